"""Add up at the source what a run of reused residual sublayers will add one by one.

    evaluation 4:  f = attn(...); g = mlp(...)              f = ...; g = ...; s = add(f, g)
    evaluation 5:  y = add(add(x, f), g)               ->   y = add(x, s)

One tensor lives from evaluation 4 to 5 instead of two, and one is read. Only what is added as it was kept can be
merged: with a gate of its own evaluation, ``x + gate * f``, a sum does not exist before the gate is known.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch.fx.node import Node

from l2c_compile.graphs.facts import Fact
from l2c_compile.graphs.loop_graph import LoopGraph, ProgramGraph
from l2c_compile.graphs.nodes import emit, evaluation_of, form_of
from l2c_compile.graphs.strides import addresses_memory, follow, same_strides
from l2c_compile.passes.base import Numerics, Pass, PassReport

__all__ = ["MergeDeltas"]

aten = torch.ops.aten


@dataclass(frozen=True)
class _Run:
    """``add(...add(add(base, terms[0]), terms[1])...)`` with terms of earlier evaluations."""

    base: Node
    terms: tuple[Node, ...]
    adds: tuple[Node, ...]


@dataclass(frozen=True)
class MergeDeltas(Pass):
    """Replace runs of additions of kept values by the addition of one kept sum."""

    name: ClassVar[str] = "merge-deltas"
    needs: ClassVar[frozenset[Fact]] = frozenset({Fact.SITES_LOWERED})
    breaks: ClassVar[frozenset[Fact]] = frozenset({Fact.NO_DEAD_NODES})
    numerics: ClassVar[Numerics] = Numerics.ROUNDING

    def run(self, program: ProgramGraph) -> PassReport:  # noqa: D102
        if not isinstance(program, LoopGraph):
            raise TypeError("only a loop graph has evaluations to keep values for")
        report = PassReport()
        by_strides = addresses_memory(program.graph)
        if by_strides is not None:
            report.left_alone[by_strides.name] = "addresses memory by strides, so none may change"
            return report
        order = {node: index for index, node in enumerate(program.graph.nodes)}
        groups: dict[tuple[Node, ...], list[_Run]] = {}
        other_strides: set[Node] = set()
        for run in _runs(program):
            groups.setdefault(run.terms, []).append(run)
        for terms, runs in groups.items():
            reason = _why_not(terms, runs)
            if reason is not None:
                report.left_alone.update((run.adds[-1].name, reason) for run in runs)
                continue
            last = max(terms, key=order.__getitem__)
            total = terms[0]
            for term in terms[1:]:
                with program.graph.inserting_after(last if total is terms[0] else total):
                    total = emit(program.graph, aten.add.Tensor, (total, term), evaluation_of(last))
            for run in runs:
                with program.graph.inserting_before(run.adds[-1]):
                    merged = emit(program.graph, aten.add.Tensor, (run.base, total), evaluation_of(run.adds[-1]))
                if not same_strides(merged, run.adds[-1]):
                    other_strides.add(merged)
                run.adds[-1].replace_all_uses_with(merged)
                report.rewrites += 1
        follow(program.graph, other_strides)
        return report


def _runs(program: LoopGraph) -> list[_Run]:
    """Return the maximal runs of at least two terms."""
    found: list[_Run] = []
    inner: set[Node] = set()
    for node in reversed(list(program.graph.nodes)):
        if node in inner:
            continue
        terms: list[Node] = []
        adds: list[Node] = []
        current = node
        while (split := _kept_term(current)) is not None and (not adds or len(current.users) == 1):
            rest, term = split
            adds.append(current)
            terms.append(term)
            current = rest
        if len(terms) > 1:
            inner.update(adds)
            found.append(_Run(current, tuple(reversed(terms)), tuple(reversed(adds))))
    return found


def _kept_term(node: Node) -> tuple[Node, Node] | None:
    """Split ``add(x, kept)`` into x and kept; None if the node is no such addition."""
    if node.target is not aten.add.Tensor or node.kwargs or evaluation_of(node) is None:
        return None
    a, b = node.args
    for rest, term in ((a, b), (b, a)):
        if not isinstance(rest, Node) or not isinstance(term, Node) or form_of(term) != form_of(node):
            continue
        made, read = evaluation_of(term), evaluation_of(node)
        if made is not None and read is not None and made < read and form_of(rest) == form_of(node):
            return rest, term
    return None


def _why_not(terms: tuple[Node, ...], runs: list[_Run]) -> str | None:
    merged = {add for run in runs for add in run.adds}
    for term in terms:
        for user in term.users:
            if user not in merged and evaluation_of(user) != evaluation_of(term):
                return f"'{term.name}' is also read by '{user.name}', so keeping a sum would save nothing"
    if len(set(terms)) < len(terms):
        return "adds a value twice"
    return None
