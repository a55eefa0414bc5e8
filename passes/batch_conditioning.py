"""Project the conditioning of all evaluations at once, before the loop.

    evaluation 0:  s0, g0 = split(linear(c0, W), D)        C = cat([c0, c1, ...]); M = linear(C, W)
    evaluation 1:  s1, g1 = split(linear(c1, W), D)   ->   s0, s1, ... = split(contiguous(M[:, :D]), B)
                                                           g0, g1, ... = split(contiguous(M[:, D:]), B)

Timestep and condition are known before the loop starts, so what is computed from them alone need not wait for the
latent. A modulation weight (6 D^2 of the 18 D^2 of an adaLN block) is then read once instead of once an evaluation,
and E products with a handful of rows become one. Beyond a memory budget, evaluations are taken in chunks.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch.fx.node import Node

from l2c_compile.analyses.columns import Piece, pieces_of
from l2c_compile.graphs.facts import Fact
from l2c_compile.graphs.loop_graph import LoopGraph
from l2c_compile.graphs.nodes import emit, evaluation_of, num_bytes, own_evaluation
from l2c_compile.graphs.strides import same_strides
from l2c_compile.passes.base import LoopPass, Numerics, PassReport, Reason

aten = torch.ops.aten


@dataclass(frozen=True)
class BatchConditioning(LoopPass):
    """Batch equal projections of what is known before the loop."""

    budget_bytes: int = 256 * 2**20
    """The most that the batched projections of one chunk of evaluations may take."""

    name: ClassVar[str] = "batch-conditioning"
    needs: ClassVar[frozenset[Fact]] = frozenset({Fact.SITES_LOWERED, Fact.NO_DEAD_NODES})
    breaks: ClassVar[frozenset[Fact]] = frozenset({Fact.NO_DEAD_NODES})
    numerics: ClassVar[Numerics] = Numerics.ROUNDING
    changes_strides: ClassVar[bool] = True

    def rewrite(self, graph: LoopGraph, report: PassReport) -> None:  # noqa: D102
        early = graph.known_before_the_loop()
        projections = [node for node in graph.graph.nodes if _is_projection(node, early)]
        for chunk in self._chunks(projections):
            _ProjectionBatcher(graph, chunk, report).run()

    def _chunks(self, projections: Sequence[Node]) -> Iterator[list[Node]]:
        """Yield the projections of consecutive evaluations that fit into the budget together."""
        by_evaluation: dict[int, list[Node]] = {}
        for node in projections:
            by_evaluation.setdefault(own_evaluation(node), []).append(node)
        chunk: list[Node] = []
        size = 0
        for evaluation in sorted(by_evaluation):
            added = sum(map(num_bytes, by_evaluation[evaluation]))
            if chunk and size + added > self.budget_bytes:
                yield chunk
                chunk, size = [], 0
            chunk += by_evaluation[evaluation]
            size += added
        if chunk:
            yield chunk


class _ProjectionBatcher:
    """Computes one chunk of projections together, in front of the first evaluation of the chunk."""

    def __init__(self, graph: LoopGraph, projections: list[Node], report: PassReport) -> None:
        self.graph = graph.graph
        self.report = report
        self.order = {node: index for index, node in enumerate(self.graph.nodes)}
        self.projections = set(projections)
        self.levels = self._levels(_ancestors(projections))
        self.anchor = self._anchor(min(map(own_evaluation, projections)))

    def run(self) -> None:
        for level in range(max(self.levels.values(), default=0) + 1):
            members = [node for node in self.levels if self.levels[node] == level]
            groups: dict[object, list[Node]] = {}
            for node in members:
                if node in self.projections:
                    groups.setdefault(_group_key(node), []).append(node)
            for group in groups.values():
                # Noted before it is moved out of its evaluation.
                if len(group) == 1:
                    self.report.leave(group[0], Reason("no other evaluation projects with these weights"))
            for node in members:
                self._move(node)
            for group in groups.values():
                if len(group) == 1:
                    self._distribute(group[0], group)
                else:
                    self._batch(group)

    def _levels(self, needed: set[Node]) -> dict[Node, int]:
        """Return how many projections come before each node: a projection of a projection waits for it."""
        levels: dict[Node, int] = {}
        for node in self.graph.nodes:
            if node in needed:
                before = [levels[a] + (a in self.projections) for a in node.all_input_nodes if a in levels]
                levels[node] = max(before, default=0)
        return levels

    def _anchor(self, evaluation: int) -> Node:
        """Return the first node that stays where it is and is of the chunk's first evaluation or uses what is moved."""
        moved = self.projections | {node for node, level in self.levels.items() if level > 0}
        for node in self.graph.nodes:
            assert isinstance(node, Node)
            if node.op != "call_function" or node in self.levels:
                continue
            # A gate may be used earlier than in its own evaluation.
            if (evaluation_of(node) or 0) >= evaluation or not moved.isdisjoint(node.all_input_nodes):
                return node
        raise AssertionError("an evaluation without a node of its own")

    def _move(self, node: Node) -> None:
        # What waits for a projection comes after it, wherever it was.
        if self.order[node] > self.order[self.anchor] or self.levels[node] > 0:
            self.anchor.prepend(node)
        node.meta["evaluation"] = None

    def _batch(self, group: list[Node]) -> None:
        inputs = [node.args[0] for node in group]
        rest = group[0].args[1:]
        with self.graph.inserting_before(self.anchor):
            stacked = emit(self.graph, aten.cat.default, (inputs, 0))
            product = emit(self.graph, aten.linear.default, (stacked, *rest))
        self._distribute(product, group)
        self.report.rewrites += len(group)

    def _distribute(self, product: Node, group: list[Node]) -> None:
        """Give each user its columns, and each evaluation its rows of them, as tensors with memory of their own.

        All evaluations' vectors then have the same strides, whatever columns were pruned: one region fits them all.
        """
        taken = [pieces_of(node) or [] for node in group]
        batches = [node.meta["val"].shape[0] for node in group]
        with self.graph.inserting_before(self.anchor):
            if len(set(map(_columns, taken))) > 1 or not _columns(taken[0]):
                if len(group) > 1:
                    for node, own in zip(group, self._split(product, batches), strict=True):
                        self._replace(node, own)
                return
            for number, piece in enumerate(taken[0]):
                value = emit(self.graph, aten.slice.Tensor, (product, -1, piece.low, piece.high))
                value = emit(self.graph, aten.contiguous.default, (value,))
                for dim in piece.unsqueezed:
                    value = emit(self.graph, aten.unsqueeze.default, (value, dim))
                for pieces, own in zip(taken, self._split(value, batches), strict=True):
                    self._replace(pieces[number].node, own)

    def _replace(self, node: Node, own: Node) -> None:
        if not same_strides(node, own):
            self.report.other_strides.add(own)
        node.replace_all_uses_with(own)

    def _split(self, value: Node, batches: list[int]) -> list[Node]:
        """Return the rows of each evaluation."""
        parts = emit(self.graph, aten.split_with_sizes.default, (value, batches))
        return [self._get(parts, index) for index in range(len(batches))]

    def _get(self, parts: Node, index: int) -> Node:
        part = self.graph.call_function(operator.getitem, (parts, index))
        part.meta.update(val=parts.meta["val"][index], evaluation=None)
        return part


def _columns(pieces: list[Piece]) -> object:
    """Return which columns are taken in which shape; None where a dimension is put before the batch."""
    if any(0 in piece.unsqueezed for piece in pieces):
        return None
    return tuple((piece.low, piece.high, piece.unsqueezed) for piece in pieces)


def _is_projection(node: Node, early: set[Node]) -> bool:
    return node in early and node.target is aten.linear.default and evaluation_of(node) is not None


def _group_key(node: Node) -> object:
    source = node.args[0]
    assert isinstance(source, Node)
    value = source.meta["val"]
    return node.args[1:], tuple(value.shape[1:]), value.dtype


def _ancestors(nodes: Sequence[Node]) -> set[Node]:
    found: set[Node] = set()
    stack = list(nodes)
    while stack:
        node = stack.pop()
        if node not in found and node.op != "placeholder":
            found.add(node)
            stack.extend(node.all_input_nodes)
    return found
