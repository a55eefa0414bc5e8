"""Train the digit classifier that judges samples of the digits model.

    python -m bench.digits.train_classifier --out runs/digits

It writes ``digit_classifier.safetensors``, trained on 80% of scikit-learn's digits; the metadata holds the accuracy on
the other 20%.
"""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path

import torch
from safetensors.torch import save_file
from sklearn.model_selection import train_test_split  # type: ignore[import-untyped,unused-ignore]
from torch import Tensor, nn

from bench.digits.train import load_digit_images
from l2c_compile.models.digits import DigitClassifier

_CONFIG = {"width": 32, "feature_dim": 64}
_BATCH_SIZE = 64


def train_classifier(out: Path, *, epochs: int = 60, seed: int = 0) -> float:
    """Train on 80% of the digits and write the weights.

    Args:
        out: the folder for the weights, which is made if absent.
        epochs: the number of passes over the training images.
        seed: the seed of the split, the initial weights and the order.

    Returns:
        The accuracy on the held-out 20%, in [0, 1].
    """
    torch.manual_seed(seed)
    images, labels = load_digit_images()
    train, held_out = train_test_split(range(len(labels)), test_size=0.2, random_state=seed, stratify=labels)
    model = DigitClassifier(**_CONFIG)
    num_updates = epochs * -(-len(train) // _BATCH_SIZE)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.01)
    rates = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, num_updates)
    train_images, train_labels = images[train], labels[train]
    for _ in range(epochs):
        for index in torch.split(torch.randperm(len(train)), _BATCH_SIZE):
            loss = nn.functional.cross_entropy(model(_jitter(train_images[index])), train_labels[index])
            optimizer.zero_grad(set_to_none=True)
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            rates.step()
    accuracy = _accuracy(model, images[held_out], labels[held_out])
    metadata = {
        "config": json.dumps(_CONFIG),
        "training": json.dumps({"epochs": epochs, "seed": seed, "data": "sklearn.datasets.load_digits", "share": 0.8}),
        "held_out_accuracy": f"{accuracy:.4f}",
        "held_out_images": str(len(held_out)),
    }
    out.mkdir(parents=True, exist_ok=True)
    path = out / "digit_classifier.safetensors"
    save_file(model.state_dict(), path.with_suffix(".tmp"), metadata=metadata)
    os.replace(path.with_suffix(".tmp"), path)
    return accuracy


def main() -> None:
    """Read the command line, train and print the held-out accuracy."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder for the weights")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1, help="CPU threads")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    print(f"held-out accuracy {train_classifier(arguments.out, seed=arguments.seed):.4f}")


def _jitter(images: Tensor) -> Tensor:
    """Return the images with noise, so that slightly noisy samples are judged by their shape."""
    return images + 0.1 * torch.randn_like(images)


@torch.no_grad()
def _accuracy(model: DigitClassifier, images: Tensor, labels: Tensor) -> float:
    right: Tensor = model.eval()(images).argmax(-1) == labels
    return right.float().mean().item()


if __name__ == "__main__":
    main()
