"""Calls that return the memory they were given in eager torch do so while they are captured."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from l2c_compile.frontend.aliases import AliasesAsInEagerTorch

SHARING: dict[str, Callable[[Tensor], Tensor]] = {
    "functional dropout": lambda x: F.dropout(x, 0.5, training=False),
    "module dropout": lambda x: nn.Dropout(0.5).eval()(x),
    "torch.dropout": lambda x: torch.dropout(x, 0.5, False),
    "aten dropout": lambda x: torch.ops.aten.dropout(x, 0.5, False),
    "expand": lambda x: x.expand(2, 3),
    "expand_as": lambda x: x.expand_as(torch.empty(2, 3)),
    "broadcast_to": lambda x: torch.broadcast_to(x, (2, 3)),
    "data": lambda x: x.data,
}


@pytest.mark.parametrize("call", SHARING.values(), ids=SHARING)
def test_a_write_into_the_result_reaches_the_argument(call: Callable[[Tensor], Tensor]) -> None:
    x = torch.ones(2, 3)
    with AliasesAsInEagerTorch():
        result = call(x)
    result.mul_(2)
    assert torch.equal(x, torch.full((2, 3), 2.0))


@pytest.mark.parametrize("name", ["functional dropout", "expand", "data"])
def test_what_is_captured_is_what_runs(name: str) -> None:
    class Writes(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            before = x + 1
            SHARING[name](before).add_(1)
            return before * 2

    x = torch.ones(2, 3)
    with AliasesAsInEagerTorch():
        exported = torch.export.export(Writes(), (x,), strict=False).run_decompositions({})
    assert torch.equal(exported.module()(x), Writes()(x))


def test_dropout_that_drops_and_expansions_of_another_shape_stay_what_they_are() -> None:
    x = torch.ones(1, 3)
    with AliasesAsInEagerTorch():
        assert torch.equal(F.dropout(x, 1.0, training=True), torch.zeros(1, 3))
        assert x.expand(2, 3).shape == (2, 3)
