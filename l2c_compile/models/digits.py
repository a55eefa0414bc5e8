"""The trained digits model and its judge, shipped with the package for examples and tests.

Both are made by ``bench/digits/train.py`` and ``bench/digits/train_classifier.py`` from scikit-learn's 8 x 8 digits.

Shapes: B batch, C channels, H height, W width, D width.
"""

from __future__ import annotations

from importlib import resources
from typing import Any

import torch
from torch import Tensor, nn

from l2c_compile.errors import FileFormatError
from l2c_compile.files.tensors import read_tensors
from l2c_compile.models.dit import DiT

GUIDANCE_SCALE = 2.0
"""The guidance scale of the digits model. From 1.5 to 5 it draws the digits that are asked for; without guidance some
are other digits, and above 2 pixels overshoot their range."""


class DigitClassifier(nn.Module):
    """A small convolutional classifier of 8 x 8 digits.

    Args:
        width: the number of channels of the two convolutions.
        feature_dim: the width of the layer before the logits.
    """

    def __init__(self, *, width: int = 32, feature_dim: int = 64) -> None:
        super().__init__()
        self.convolutions = nn.Sequential(
            nn.Conv2d(1, width, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(width, width, 3, padding=1),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Flatten(),
            nn.Dropout(0.3),
        )
        self.hidden = nn.Linear(16 * width, feature_dim)
        self.head = nn.Linear(feature_dim, 10)

    def features(self, x_BCHW: Tensor) -> Tensor:
        """Return the activations before the logits, shape (B, D), for distances between sets of images.

        Args:
            x_BCHW: images, shape (B, 1, 8, 8), in [-1, 1].
        """
        return torch.relu(self.hidden(self.convolutions(x_BCHW)))

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """Return logits, shape (B, 10).

        Args:
            x_BCHW: images, shape (B, 1, 8, 8), in [-1, 1].
        """
        result: Tensor = self.head(self.features(x_BCHW))
        return result


def load_digits_dit() -> DiT:
    """Return the trained digits model: float32, on the CPU, in evaluation mode.

    It takes (B, 1, 8, 8) latents, timesteps 0..999 of the linear beta schedule and labels 0..9; 10 is the null class.

    Raises:
        FileFormatError: if the installed file is damaged.
    """
    weights, config = _read("digits_dit.safetensors")
    model = DiT(**config)
    model.load_state_dict(weights)
    return model.eval()


def load_digit_classifier() -> DigitClassifier:
    """Return the trained digit classifier: float32, on the CPU, in evaluation mode.

    Raises:
        FileFormatError: if the installed file is damaged.
    """
    weights, config = _read("digit_classifier.safetensors")
    model = DigitClassifier(**config)
    model.load_state_dict(weights)
    return model.eval()


def _read(name: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return the tensors of a packaged file and the constructor arguments from its metadata."""
    with resources.as_file(resources.files("l2c_compile") / "data" / name) as path:
        try:
            config, weights = read_tensors(path, "model", key="config")
        except FileFormatError as error:
            raise FileFormatError(f"l2c_compile/data/{name} is damaged ({error}); install the package again") from error
    return weights, config
