"""Compute only those outputs of a linear layer that somebody uses.

    p = linear(c, W, b); shift, scale, gate = split(p, D)         gate = linear(c, W[2D:3D], b[2D:3D])
    y = add(x, mul(gate, cache))                             ->   y = add(x, mul(gate, cache))

Where a layer is skipped, the shift and scale in front of it are not needed, but they come out of one projection with
the gate that is. Rows of a weight are taken as views: nothing is copied.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import fx
from torch.fx.node import Node

from l2c_compile.analyses.columns import Piece, pieces_of
from l2c_compile.graphs.facts import Fact
from l2c_compile.graphs.loop_graph import LoopGraph
from l2c_compile.graphs.nodes import emit
from l2c_compile.graphs.strides import same_strides
from l2c_compile.passes.base import LoopPass, Numerics, PassReport, Reason

aten = torch.ops.aten

_Range = tuple[int, int]


@dataclass(frozen=True)
class PruneProjections(LoopPass):
    """Split a partly used projection into one projection for each run of used rows."""

    name: ClassVar[str] = "prune-projections"
    needs: ClassVar[frozenset[Fact]] = frozenset({Fact.NO_DEAD_NODES})
    breaks: ClassVar[frozenset[Fact]] = frozenset({Fact.NO_DEAD_NODES})
    numerics: ClassVar[Numerics] = Numerics.ROUNDING
    changes_strides: ClassVar[bool] = True

    def rewrite(self, graph: LoopGraph, report: PassReport) -> None:  # noqa: D102
        rows = _WeightSlices(graph.graph)
        for node in graph.graph.find_nodes(op="call_function", target=aten.linear.default):
            pieces = pieces_of(node)
            if not pieces:
                report.leave(node, Reason("is used as a whole"))
                continue
            used = _union((piece.low, piece.high) for piece in pieces)
            if used == [(0, node.meta["val"].shape[-1])]:
                report.leave(node, Reason("every output is used"))
                continue
            # Rows of a part lie closer together than those of the whole.
            report.other_strides |= _replace(rows, node, pieces, used)
            report.rewrites += 1


class _WeightSlices:
    """Slices weights by rows, each range once."""

    def __init__(self, graph: fx.Graph) -> None:
        self.graph = graph
        self.taken: dict[tuple[Node, _Range], Node] = {}

    def take(self, weight: Node, rows: _Range) -> Node:
        if (weight, rows) not in self.taken:
            with self.graph.inserting_after(weight):
                self.taken[weight, rows] = emit(self.graph, aten.slice.Tensor, (weight, 0, *rows))
        return self.taken[weight, rows]


def _replace(rows: _WeightSlices, node: Node, pieces: Sequence[Piece], used: Sequence[_Range]) -> set[Node]:
    """Replace the pieces of a projection; return the values with other strides than those they replace."""
    source, weight, *bias = node.args
    graph = node.graph
    other_strides: set[Node] = set()
    for low, high in used:
        parameters = [rows.take(p, (low, high)) for p in (weight, *bias) if isinstance(p, Node)]
        with graph.inserting_before(node):
            part = emit(graph, aten.linear.default, (source, *parameters), like=node)
        for piece in pieces:
            if low <= piece.low and piece.high <= high:
                value = part
                with graph.inserting_before(piece.node):
                    for dim in piece.unsqueezed:
                        value = emit(graph, aten.unsqueeze.default, (value, dim), like=piece.node)
                    if (piece.low, piece.high) != (low, high):
                        columns = (piece.low - low, piece.high - low)
                        value = emit(graph, aten.slice.Tensor, (value, -1, *columns), like=piece.node)
                if not same_strides(value, piece.node):
                    other_strides.add(value)
                piece.node.replace_all_uses_with(value)
    return other_strides


def _union(ranges: Iterable[_Range]) -> list[_Range]:
    """Return the ranges in order, those that overlap or touch as one."""
    merged: list[_Range] = []
    for low, high in sorted(set(ranges)):
        if merged and low <= merged[-1][1]:
            merged[-1] = merged[-1][0], max(high, merged[-1][1])
        else:
            merged.append((low, high))
    return merged
