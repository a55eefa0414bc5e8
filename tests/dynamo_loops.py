"""A small denoiser and loop for ``torch.compile(sample, backend="l2c")``, and what is checked of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from l2c_compile import CacheSchedule, run_reference
from l2c_compile.torch_backend import l2c


class Toy(nn.Module):
    """A denoiser with one module worth caching."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(4, 4)
        self.outer = nn.Linear(4, 4)
        self.dropout = nn.Dropout(0.5)
        self.same = nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.outer(self.same(x + self.dropout(self.inner(x))))
        return result


def toy_loop(denoiser: nn.Module, noise: Tensor) -> Tensor:
    x = noise
    for _ in range(2):
        x = x - 0.1 * denoiser(x)
    return x


TWO = CacheSchedule.from_table({"inner": [1, 0]})


def fails(sample: Callable[..., Tensor], message: str, **options: object) -> None:
    """Check that compiling says ``message``, under no_grad."""
    given: dict[str, Any] = {"backend": "eager", **options}
    with torch.no_grad(), pytest.raises(Exception, match=message):
        torch.compile(sample, backend=l2c, options=given)(torch.randn(2, 4))


def check_toy_equals_reference(model: nn.Module, schedule: CacheSchedule) -> None:
    def loop(denoiser: nn.Module, noise: Tensor) -> Tensor:
        for _ in range(schedule.num_evaluations):
            noise = noise - 0.1 * denoiser(noise)
        return noise

    x = torch.randn(2, 4)
    wanted = run_reference(model, loop, schedule, x, {})
    given: dict[str, Any] = {"router": schedule, "backend": "eager"}
    with torch.no_grad():
        got = torch.compile(lambda x: loop(model, x), backend=l2c, options=given)(x)
    assert torch.equal(got, wanted)  # type: ignore[arg-type]
