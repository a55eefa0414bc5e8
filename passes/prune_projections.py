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
from torch._ops import OpOverload
from torch.fx.node import Argument, Node

from l2c_compile.analyses.columns import Piece, pieces_of
from l2c_compile.graphs.facts import Fact
from l2c_compile.graphs.loop_graph import LoopGraph, ProgramGraph
from l2c_compile.graphs.nodes import emit, evaluation_of
from l2c_compile.graphs.strides import addresses_memory, follow, same_strides
from l2c_compile.passes.base import Numerics, Pass, PassReport

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
        by_strides = addresses_memory(program.graph)
        if by_strides is not None:
            report.left_alone[by_strides.name] = "addresses memory by strides, so none may change"
            return report
        rows = _Rows(program)
        closer: set[Node] = set()
        for node in program.graph.find_nodes(op="call_function", target=aten.linear.default):
            pieces = pieces_of(node)
            if not pieces:
                report.left_alone[node.name] = "is used as a whole"
                continue
            used = _union((piece.low, piece.high) for piece in pieces)
            if used == [(0, node.meta["val"].shape[-1])]:
                report.left_alone[node.name] = "every output is used"
                continue
            closer |= _rewrite(program, rows, node, pieces, used)
            report.rewrites += 1
        follow(program.graph, closer)
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


def _rewrite(program: LoopGraph, rows: _Rows, node: Node, pieces: Sequence[Piece], used: Sequence[_Range]) -> set[Node]:
    """Replace the pieces of a projection; return the values whose rows lie closer together than those they replace."""
    source, weight, *bias = node.args
    closer: set[Node] = set()

    def insert(target: OpOverload, args: tuple[Argument, ...], like: Node) -> Node:
        new = emit(program.graph, target, args, evaluation_of(like))
        new.meta["nn_module_stack"] = like.meta.get("nn_module_stack", {})
        return new

    for low, high in used:
        parameters = [rows.take(p, (low, high)) for p in (weight, *bias) if isinstance(p, Node)]
        with program.graph.inserting_before(node):
            part = insert(aten.linear.default, (source, *parameters), node)
        for piece in pieces:
            if low <= piece.low and piece.high <= high:
                value = part
                with program.graph.inserting_before(piece.node):
                    for dim in piece.unsqueezed:
                        value = insert(aten.unsqueeze.default, (value, dim), piece.node)
                    if (piece.low, piece.high) != (low, high):
                        value = insert(aten.slice.Tensor, (value, -1, piece.low - low, piece.high - low), piece.node)
                if not same_strides(value, piece.node):
                    closer.add(value)
                piece.node.replace_all_uses_with(value)
    return closer


def _union(ranges: Iterable[_Range]) -> list[_Range]:
    """Merge ranges that touch."""
    merged: list[_Range] = []
    for low, high in sorted(set(ranges)):
        if merged and low <= merged[-1][1]:
            merged[-1] = merged[-1][0], max(high, merged[-1][1])
        else:
            merged.append((low, high))
    return merged
