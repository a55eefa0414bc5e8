"""Samplers of a denoiser whose sites differ much in work."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from l2c_compile import CacheSchedule, CompiledSampler, l2c_compile

WIDE, DIM = 256, 4


class Uneven(nn.Module):
    """Nearly all of the work is in one of two sublayers."""

    def __init__(self) -> None:
        super().__init__()
        self.heavy = nn.Sequential(nn.Linear(DIM, WIDE), nn.Linear(WIDE, WIDE), nn.Linear(WIDE, DIM))
        self.light = nn.Linear(DIM, DIM)

    def forward(self, x_BD: Tensor, t_B: Tensor) -> Tensor:
        x_BD = x_BD + self.heavy(x_BD) * t_B[:, None]
        result: Tensor = x_BD + self.light(x_BD)
        return result


def loop(denoiser: Callable[..., Tensor], noise: Tensor) -> Tensor:
    x = noise
    for i in range(4):
        x = x - 0.1 * denoiser(x, torch.full((x.shape[0],), float(4 - i), device=x.device))
    return x


def sampler(rows: dict[str, list[int]], device: str = "cpu") -> CompiledSampler:
    torch.manual_seed(0)
    return l2c_compile(Uneven().eval().to(device), CacheSchedule.from_table(rows), loop)
