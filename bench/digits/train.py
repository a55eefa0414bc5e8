"""Train the digits model: a class-conditional DiT on scikit-learn's 8 x 8 digits, small enough to ship.

    python -m bench.digits.train --out runs/digits --minutes 30

It writes ``digits_dit.safetensors`` (float32, averaged weights) and ``checkpoint.pt``; a second call with the same
folder continues where the first was interrupted. The budget is time, so two runs agree in quality, not in bits.

Shapes: B batch, H height, W width.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import os
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from safetensors.torch import save_file
from sklearn.datasets import load_digits  # type: ignore[import-untyped,unused-ignore]
from torch import Tensor, nn

from l2c_compile.models.dit import DiT

MODEL_CONFIG: dict[str, Any] = {
    "input_size": 8,
    "patch_size": 1,
    "in_channels": 1,
    "hidden_size": 96,
    "depth": 8,
    "num_heads": 4,
    "mlp_ratio": 4.0,
    "num_classes": 10,
    "learn_sigma": False,
}
"""The constructor arguments of the model, which has 1.4 million parameters and 16 sites."""

_TRAINING_STEPS = 1000
_CHECKPOINT_EVERY_S = 60.0


@dataclass(frozen=True)
class Settings:
    """The settings of the training."""

    minutes: float = 30.0
    """The budget of training time in minutes, summed over interrupted runs."""
    batch_size: int = 64
    learning_rate: float = 1e-3
    """The peak rate, after a linear warm-up over the first 3% of the budget and before a cosine to zero."""
    label_dropout: float = 0.1
    """The share of samples that are trained with the null class, for guidance."""
    wide_noise: float = 0.25
    """The share of samples in which one pixel in twenty has noise from a wide uniform distribution. Without it the
    model is wrong on the rare pixel beyond four standard deviations, and a sampler without clipping lets that pixel
    diverge."""
    ema_decay: float = 0.998
    seed: int = 0


def load_digit_images() -> tuple[Tensor, Tensor]:
    """Return the 1797 images, shape (N, 1, 8, 8), float32 in [-1, 1], and their labels, shape (N,), int64."""
    data = load_digits()
    images = torch.tensor(data.images, dtype=torch.float32)[:, None] / 8.0 - 1.0
    return images, torch.tensor(data.target, dtype=torch.int64)


def train(out: Path, settings: Settings) -> Path:
    """Train until the budget is spent.

    Args:
        out: the folder for the weights and the checkpoint, which is made if absent.
        settings: the settings of the training.

    Returns:
        The path of the averaged weights.
    """
    out.mkdir(parents=True, exist_ok=True)
    checkpoint_path = out / "checkpoint.pt"
    weights_path = out / "digits_dit.safetensors"
    torch.manual_seed(settings.seed)
    model = DiT(**MODEL_CONFIG)
    average = copy.deepcopy(model).requires_grad_(False)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], weight_decay=0.01)
    step, elapsed_s, smooth_loss = 0, 0.0, 1.0
    if checkpoint_path.exists():
        state = torch.load(checkpoint_path, weights_only=True)
        model.load_state_dict(state["model"])
        average.load_state_dict(state["average"])
        optimizer.load_state_dict(state["optimizer"])
        torch.set_rng_state(state["rng"])
        step, elapsed_s, smooth_loss = state["step"], state["elapsed_s"], state["loss"]

    def save() -> None:
        state: dict[str, Any] = {
            "model": model.state_dict(),
            "average": average.state_dict(),
            "optimizer": optimizer.state_dict(),
        }
        state |= {"rng": torch.get_rng_state(), "step": step, "elapsed_s": elapsed_s, "loss": smooth_loss}
        torch.save(state, checkpoint_path.with_suffix(".tmp"))
        os.replace(checkpoint_path.with_suffix(".tmp"), checkpoint_path)
        metadata = {
            "config": json.dumps(MODEL_CONFIG),
            "training": json.dumps(asdict(settings) | {"steps": step, "data": "sklearn.datasets.load_digits"}),
            "noise_schedule": json.dumps({"kind": "linear", "num_steps": _TRAINING_STEPS}),
            "seed": str(settings.seed),
            "final_loss": f"{smooth_loss:.5f}",
        }
        save_file(average.state_dict(), weights_path.with_suffix(".tmp"), metadata=metadata)
        os.replace(weights_path.with_suffix(".tmp"), weights_path)

    budget_s = settings.minutes * 60.0
    batches = _batches(*load_digit_images(), settings)
    saved_s = elapsed_s
    columns = (TextColumn("{task.description}"), BarColumn(), TimeRemainingColumn())
    with Progress(*columns, refresh_per_second=0.2) as progress:
        bar = progress.add_task("training", total=budget_s)
        while elapsed_s < budget_s:
            began = time.perf_counter()
            loss = _update(model, optimizer, next(batches), _learning_rate(elapsed_s / budget_s, settings))
            step += 1
            _follow(average, model, min(settings.ema_decay, step / (step + 10)))
            smooth_loss += (loss - smooth_loss) * max(0.01, 1.0 / step)
            elapsed_s += time.perf_counter() - began
            progress.update(bar, completed=elapsed_s, description=f"update {step}, loss {smooth_loss:.4f}")
            if elapsed_s - saved_s >= _CHECKPOINT_EVERY_S:
                saved_s = elapsed_s
                save()
    save()
    return weights_path


def main() -> None:
    """Read the command line and train the model."""
    defaults = Settings()
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder for the weights and the checkpoint")
    parser.add_argument("--minutes", type=float, default=defaults.minutes)
    parser.add_argument("--seed", type=int, default=defaults.seed)
    parser.add_argument("--threads", type=int, default=1, help="CPU threads")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    settings = Settings(minutes=arguments.minutes, seed=arguments.seed)
    path = train(arguments.out, settings)
    print(f"wrote {path} ({path.stat().st_size} bytes)")


def _batches(images: Tensor, labels: Tensor, settings: Settings) -> Iterator[tuple[Tensor, Tensor, Tensor, Tensor]]:
    """Yield noisy images, their noise, timesteps and labels without end, epoch after epoch."""
    betas = torch.linspace(1e-4, 0.02, _TRAINING_STEPS, dtype=torch.float64)
    alphas_bar = torch.cumprod(1.0 - betas, 0)
    B = settings.batch_size
    while True:
        for index in torch.split(torch.randperm(len(images)), B):
            if len(index) < B:
                continue
            x0 = images[index]
            # One timestep is drawn from each of B equal intervals, so that every batch has all noise levels.
            t = ((torch.arange(B) + torch.rand(B)) * (_TRAINING_STEPS / B)).long().clamp(max=_TRAINING_STEPS - 1)
            signal = alphas_bar[t].sqrt().float()[:, None, None, None]
            sigma = (1.0 - alphas_bar[t]).sqrt().float()[:, None, None, None]
            is_wide = (torch.rand(B, 1, 1, 1) < settings.wide_noise) & (torch.rand_like(x0) < 0.05)
            noise = torch.where(is_wide, 12.0 * torch.rand_like(x0) - 6.0, torch.randn_like(x0))
            dropped = torch.rand(B) < settings.label_dropout
            y = torch.where(dropped, MODEL_CONFIG["num_classes"], labels[index])
            yield signal * x0 + sigma * noise, noise, t, y


def _update(
    model: nn.Module, optimizer: torch.optim.Optimizer, batch: tuple[Tensor, Tensor, Tensor, Tensor], rate: float
) -> float:
    """Make one update of the optimiser and return its loss."""
    noisy, noise, t, y = batch
    for group in optimizer.param_groups:
        group["lr"] = rate
    loss = nn.functional.mse_loss(model(noisy, t, y), noise)
    optimizer.zero_grad(set_to_none=True)
    loss.backward()  # type: ignore[no-untyped-call]
    nn.utils.clip_grad_norm_([p for group in optimizer.param_groups for p in group["params"]], 1.0)
    optimizer.step()
    return loss.item()


def _learning_rate(done: float, settings: Settings) -> float:
    warm_up = min(1.0, (done + 1e-3) / 0.03)
    return settings.learning_rate * warm_up * 0.5 * (1.0 + math.cos(math.pi * min(done, 1.0)))


@torch.no_grad()
def _follow(average: nn.Module, model: nn.Module, decay: float) -> None:
    """Move ``average`` towards ``model``."""
    for a, p in zip(average.parameters(), model.parameters(), strict=True):
        a.lerp_(p, 1.0 - decay)


if __name__ == "__main__":
    main()
