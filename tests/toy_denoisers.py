"""Denoisers whose exact sample is known."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def toy(x: Tensor, t_B: Tensor, y: Tensor) -> Tensor:
    """Return a prediction that depends on all inputs, with a learned variance in the channels behind it."""
    shift = (t_B.to(x.dtype) / 1000.0 + 0.1 * y.to(x.dtype))[:, None, None, None]
    return torch.cat([torch.tanh(0.7 * x + shift), x * shift], dim=1)


def toy_inputs(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    torch.manual_seed(0)
    return torch.randn(3, 4, 2, 2, dtype=dtype), torch.tensor([1, 5, 7])


def relative_error(got: Tensor, wanted: Tensor) -> float:
    return ((got - wanted).abs().max() / wanted.abs().max()).item()


# These are closed forms for Gaussian data, whose exact noise prediction and exact trajectory are known.


MEAN, STD = torch.tensor([-1.5, 0.3, 0.8])[None, :, None].double(), 0.4


def gaussian_noise(x: Tensor, alpha: float, sigma: float) -> Tensor:
    """Return E[noise | x] for data drawn from N(MEAN, STD**2)."""
    return sigma * (x - alpha * MEAN) / (alpha**2 * STD**2 + sigma**2)


def gaussian_flow(x: Tensor, start: tuple[float, float], end: tuple[float, float]) -> Tensor:
    """Return x after the probability flow from one (alpha, sigma) to another, on which it keeps its standard score."""
    deviations = (x - start[0] * MEAN) / math.hypot(start[0] * STD, start[1])
    return end[0] * MEAN + math.hypot(end[0] * STD, end[1]) * deviations
