"""Compute only those outputs of a linear layer that somebody uses.

    p = linear(c, W, b); shift, scale, gate = split(p, D)         gate = linear(c, W[2D:3D], b[2D:3D])
    y = add(x, mul(gate, cache))                             ->   y = add(x, mul(gate, cache))

Where a layer is skipped, the shift and scale in front of it are not needed, but they come out of one projection with
the gate that is. Rows of a weight are taken as views: nothing is copied.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.fx.node import Node

from l2c_compile.graph import LoopGraph, ProgramGraph, emit, evaluation_of
from l2c_compile.passes.base import Numerics, Pass, PassReport
from l2c_compile.verify import Fact

__all__ = ["PruneProjections"]

aten = torch.ops.aten

_Range = tuple[int, int]


@dataclass(frozen=True)
class PruneProjections(Pass):
    """Split a partly used projection into one projection for each run of used rows."""

    name: ClassVar[str] = "prune-projections"
    needs: ClassVar[frozenset[Fact]] = frozenset({Fact.NO_DEAD_NODES})
    breaks: ClassVar[frozenset[Fact]] = frozenset({Fact.NO_DEAD_NODES})
    numerics: ClassVar[Numerics] = Numerics.ROUNDING

    def run(self, program: ProgramGraph) -> PassReport:  # noqa: D102
        assert isinstance(program, LoopGraph)
        report = PassReport()
        rows = _Rows(program)
        for node in program.graph.find_nodes(op="call_function", target=aten.linear.default):
            pieces = _pieces(node)
            if pieces is None:
                report.left_alone[node.name] = "is used as a whole"
                continue
            used = _union(pieces.values())
            if used == [(0, node.meta["val"].shape[-1])]:
                report.left_alone[node.name] = "every output is used"
                continue
            _rewrite(program, rows, node, pieces, used)
            report.rewrites += 1
        return report


class _Rows:
    """Row ranges of weights, each taken once."""

    def __init__(self, program: LoopGraph) -> None:
        self.graph = program.graph
        self.taken: dict[tuple[Node, _Range], Node] = {}

    def take(self, weight: Node, rows: _Range) -> Node:
        if (weight, rows) not in self.taken:
            with self.graph.inserting_after(weight):
                self.taken[weight, rows] = emit(self.graph, aten.slice.Tensor, (weight, 0, *rows), None)
        return self.taken[weight, rows]


def _rewrite(program: LoopGraph, rows: _Rows, node: Node, pieces: dict[Node, _Range], used: list[_Range]) -> None:
    graph, evaluation = program.graph, evaluation_of(node)
    source, weight, *bias = node.args
    assert isinstance(weight, Node)
    for low, high in used:
        parameters = [rows.take(p, (low, high)) for p in (weight, *bias) if isinstance(p, Node)]
        with graph.inserting_before(node):
            part = emit(graph, aten.linear.default, (source, *parameters), evaluation)
            part.meta["nn_module_stack"] = node.meta.get("nn_module_stack", {})
        for piece, (start, end) in pieces.items():
            if low <= start and end <= high:
                replacement = part
                if (start, end) != (low, high):
                    with graph.inserting_before(piece):
                        replacement = emit(graph, aten.slice.Tensor, (part, -1, start - low, end - low), evaluation)
                    replacement.meta["nn_module_stack"] = piece.meta.get("nn_module_stack", {})
                piece.replace_all_uses_with(replacement)


def _pieces(node: Node) -> dict[Node, _Range] | None:
    """Return the nodes that take a range of the last dimension, with their ranges; None if anybody takes it all."""
    value = node.meta["val"]
    weight = node.args[1]
    if not isinstance(value, Tensor) or not isinstance(weight, Node):
        return None
    width, last = value.shape[-1], value.ndim - 1
    pieces: dict[Node, _Range] = {}
    for user in node.users:
        if user.target is aten.split.Tensor and _dim(user, 2) % value.ndim == last:
            size = user.args[1]
            assert isinstance(size, int)
            bounds = [(start, min(start + size, width)) for start in range(0, width, size)]
        elif user.target is aten.split_with_sizes.default and _dim(user, 2) % value.ndim == last:
            sizes = user.args[1]
            assert isinstance(sizes, (list, tuple))
            ends = list(itertools.accumulate(sizes))
            bounds = list(zip([0, *ends], ends, strict=False))
        else:
            return None
        for getitem in user.users:
            index = getitem.args[1]
            assert isinstance(index, int)
            pieces[getitem] = bounds[index]
    return pieces or None


def _dim(node: Node, position: int) -> int:
    dim = node.args[position] if len(node.args) > position else node.kwargs.get("dim", 0)
    assert isinstance(dim, int)
    return dim


def _union(ranges: Iterable[_Range]) -> list[_Range]:
    """Merge ranges that touch."""
    merged: list[_Range] = []
    for low, high in sorted(set(ranges)):
        if merged and low <= merged[-1][1]:
            merged[-1] = merged[-1][0], max(high, merged[-1][1])
        else:
            merged.append((low, high))
    return merged
