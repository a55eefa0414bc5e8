"""Which columns of a projection each of its users takes."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor
from torch.fx.node import Node

aten = torch.ops.aten


@dataclass(frozen=True)
class Piece:
    """The part of a projection that one of its users takes: columns ``low`` to ``high``, ``high`` excluded."""

    node: Node
    low: int
    high: int
    unsqueezed: tuple[int, ...]
    """The dimensions that were inserted, in front of the last, before the part was taken."""


def pieces_of(node: Node) -> list[Piece] | None:
    """Return which columns of its last dimension the users of a projection take; None if any takes all of them."""
    pieces = _pieces(node, ())
    return None if pieces is None else sorted(pieces, key=lambda piece: (piece.low, piece.high, piece.unsqueezed))


def _pieces(node: Node, unsqueezed: tuple[int, ...]) -> list[Piece] | None:
    value = node.meta["val"]
    if not isinstance(value, Tensor):
        return None
    pieces: list[Piece] = []
    for user in node.users:
        if user.target is aten.unsqueeze.default and _dim(user, 1) % (value.ndim + 1) < value.ndim:
            inner = _pieces(user, (*unsqueezed, _dim(user, 1)))
            if inner is None:
                return None
            pieces += inner
            continue
        ranges = _ranges(user, value)
        if ranges is None:
            return None
        pieces += [Piece(piece, low, high, unsqueezed) for piece, low, high in ranges]
    return pieces


def _ranges(user: Node, value: Tensor) -> Iterator[tuple[Node, int, int]] | None:
    """Return the parts (node, low, high) that ``user`` takes of the last dimension; None if it does not cut it."""
    width, last = value.shape[-1], value.ndim - 1
    if user.target is aten.slice.Tensor and _dim(user, 1) % value.ndim == last:
        bounds = cast("Sequence[int | None]", user.args[2:])
        if user.kwargs or not (len(bounds) == 2 or (len(bounds) == 3 and bounds[2] == 1)):
            return None  # with a step, or in a form that no export has
        low, high, _ = slice(*bounds[:2]).indices(width)
        return iter([(user, low, high)])
    if user.target is aten.split.Tensor and _dim(user, 2) % value.ndim == last:
        size = user.args[1]
        assert isinstance(size, int)
        ends = [min(start + size, width) for start in range(0, width, size)]
    elif user.target is aten.split_with_sizes.default and _dim(user, 2) % value.ndim == last:
        ends = list(itertools.accumulate(cast("Sequence[int]", user.args[1])))
    else:
        return None
    parts = ((getitem, cast(int, getitem.args[1])) for getitem in user.users)
    return ((getitem, ([0, *ends])[index], ends[index]) for getitem, index in parts)


def _dim(node: Node, position: int) -> int:
    dim = node.args[position] if len(node.args) > position else node.kwargs.get("dim", 0)
    assert isinstance(dim, int)
    return dim
