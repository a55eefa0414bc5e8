"""The results of the kernels in float64 and without their code, and how far a float32 sum may be from them.

u is half the eps of float32, the largest relative error of one operation. The error of m operations in a row is at most
gamma(m) = m u / (1 - m u) times the same sum over absolute values.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from l2c_compile.kernels._launch import Terms

U = torch.finfo(torch.float32).eps / 2


def gamma(num_operations: int) -> float:
    return num_operations * U / (1 - num_operations * U)


def spread(operand: Tensor, x: Tensor) -> Tensor:
    """Return an operand in float64 with the shape of ``x``."""
    if x.dim() == 3 and operand.dim() == 2:
        return torch.stack([operand.double()] * x.shape[1], dim=1).expand(x.shape)
    return operand.double().expand(x.shape)


def exact_sum(x: Tensor, terms: Terms) -> tuple[Tensor, Tensor]:
    """Return the sum of the terms, and the sum of their absolute values."""
    total, magnitude = x.double(), x.double().abs()
    for index, cache in enumerate(terms.caches):
        value = cache.to(torch.float32).double()
        if terms.token_scales and (token_scale := terms.token_scales[index]) is not None:
            value = value * token_scale.double()[..., None]
        size = value.abs()
        if terms.scales and (scale := terms.scales[index]) is not None:
            value, size = value * spread(scale, x), size * spread(scale, x).abs()
        if terms.shifts and (shift := terms.shifts[index]) is not None:
            value, size = value + spread(shift, x), size + spread(shift, x).abs()
        if terms.gates and (gate := terms.gates[index]) is not None:
            value, size = value * spread(gate, x), size * spread(gate, x).abs()
        if terms.weights:
            value, size = value * terms.weights[index], size * abs(terms.weights[index])
        total, magnitude = total + value, magnitude + size
    return total, magnitude


def rounding(value: Tensor, dtype: torch.dtype) -> Tensor:
    """Return how far the one rounding to ``dtype`` may move a value: one eps of it, or the smallest subnormal.

    Rounding to the nearest would move it by half an eps, but Triton's interpreter truncates to bfloat16.
    """
    return torch.finfo(dtype).eps * value.abs() + torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps


def sum_bound(total: Tensor, magnitude: Tensor, num_terms: int, dtype: torch.dtype) -> Tensor:
    """Return how far a float32 sum rounded to ``dtype`` may be from ``exact_sum``.

    A term takes at most six operations before it is added (token scale, scale, shift, gate, the weight and its own
    rounding to float32) and is in at most ``num_terms`` additions.
    """
    off = gamma(num_terms + 6) * magnitude
    return off + rounding(total.abs() + off, dtype)


def exact_norm(stream: Tensor, norm: str, eps: float, affine: tuple[Tensor | None, ...]) -> tuple[Tensor, Tensor]:
    """Return the exact modulated norm of a stream, and how far a float32 one, rounded, may be from it.

    A row is summed by a tree: numpy adds blocks of 128 in 8 lanes and then pairs, torch and Triton split at least as
    finely. A value is in at most 32 + log2(D) additions.
    """
    weight, bias, mod_scale, mod_shift = (
        torch.full_like(stream, default, dtype=torch.float64) if operand is None else spread(operand, stream)
        for operand, default in zip(affine, (1.0, 0.0, 0.0, 0.0), strict=True)
    )
    h = stream.double()
    depth = 32 + math.ceil(math.log2(max(h.shape[-1], 1)))
    centered, mean_off = h, torch.zeros_like(h[..., :1])
    if norm == "layer":
        centered = h - h.mean(-1, keepdim=True)
        mean_off = gamma(depth + 1) * h.abs().mean(-1, keepdim=True)
    square = (centered**2).mean(-1, keepdim=True)
    # The error of the square: each centered value is off by mean_off + u |centered|, and the mean of |centered| is at
    # most its root; then comes the error of the sum itself.
    square_off = 2 * mean_off * square.sqrt() + mean_off**2 + gamma(depth + 5) * square
    root = 1 / (square + eps).sqrt()
    # The error of 1 / sqrt: half of that, and those of adding eps, of the root (two units in torch) and the division.
    root_off = 0.5 * square_off / (square + eps) + gamma(4)
    normed = centered * root
    normed_off = root * mean_off + normed.abs() * (root_off + 2 * U)
    y = (normed * weight + bias) * (1 + mod_scale) + mod_shift
    size = (normed.abs() * weight.abs() + bias.abs()) * (1 + mod_scale.abs()) + mod_shift.abs()
    # The error of the last five operations, and a hundredth for products of errors.
    off = 1.01 * (normed_off * weight.abs() * (1 + mod_scale).abs() + gamma(5) * size)
    return y, off + rounding(y.abs() + off, stream.dtype)


def assert_within(got: Tensor, wanted: Tensor, bound: Tensor) -> None:
    """Fail, with the worst element, unless each element is as near as its bound says."""
    share = (got.double() - wanted).abs() / bound
    assert got.shape == wanted.shape
    assert bool((share <= 1).all()), f"off by up to {share.nan_to_num(nan=math.inf).max():.3g} times the bound"
