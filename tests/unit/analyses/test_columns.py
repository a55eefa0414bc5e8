"""Which columns of a projection are taken, in every way of taking them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

from l2c_compile.analyses.columns import pieces_of

Ranges = list[tuple[int, int]]


@pytest.mark.parametrize(
    ("take", "ranges"),
    [
        (lambda p: p.split(3, dim=1), [(0, 3), (3, 6), (6, 8)]),
        (lambda p: p.split([2, 6], dim=-1), [(0, 2), (2, 8)]),
        (lambda p: p.chunk(2, dim=1), [(0, 4), (4, 8)]),
        (lambda p: (p[:, 5:], p[:, :-5]), [(0, 3), (5, 8)]),
        (lambda p: p[:, None].split(4, dim=2), [(0, 4), (4, 8)]),
        (lambda p: (p[:, 2:4], p[:, None, 2:4]), [(2, 4), (2, 4)]),
    ],
    ids=["split", "sizes", "chunk", "slices", "unsqueezed", "twice"],
)
def test_pieces(take: Callable[[Tensor], Any], ranges: Ranges) -> None:
    assert pieces(take) == ranges


@pytest.mark.parametrize(
    "take",
    [
        lambda p: (p[:, ::2], p[:, 1::2]),
        lambda p: (p[:, :4], p * 2),
        lambda p: p.split(1, dim=0),
        lambda p: p[:, :, None].split(4, dim=1),
        lambda p: p[1:],
    ],
    ids=["step", "also whole", "rows", "dimension behind", "slice of rows"],
)
def test_what_is_no_run_of_columns_counts_as_the_whole(take: Callable[[Tensor], Any]) -> None:
    assert pieces(take) is None


def pieces(take: Callable[[Tensor], Any]) -> Ranges | None:
    graph = make_fx(lambda x, w: take(torch.ops.aten.linear.default(x, w)), tracing_mode="fake")(
        torch.zeros(2, 4), torch.zeros(8, 4)
    ).graph
    # make_fx takes a linear layer apart; what makes the columns does not matter.
    (product,) = (n for n in graph.nodes if "mm" in str(n.target))
    found = pieces_of(product)
    return None if found is None else [(piece.low, piece.high) for piece in found]
