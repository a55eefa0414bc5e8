"""Add up at the source what a run of reused residual sublayers would add one by one.

    evaluation 4:  f = attn(...); g = mlp(...)              f = ...; g = ...; s = add(f, g)
    evaluation 5:  y = add(add(x, f), g)               ->   y = add(x, s)

One tensor lives from evaluation 4 to 5 instead of two, and one is read. Only what is added as it was kept can be
merged: with a gate of its own evaluation, ``x + gate * f``, a sum does not exist before the gate is known.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import fx
from torch.fx.node import Node

from l2c_compile.analyses.kept import KeptRun, is_kept, kept_runs
from l2c_compile.graphs.facts import Fact
from l2c_compile.graphs.loop_graph import LoopGraph
from l2c_compile.graphs.nodes import emit, evaluation_of, fits
from l2c_compile.graphs.strides import same_strides
from l2c_compile.passes.base import LoopPass, Numerics, PassReport, Reason

aten = torch.ops.aten


@dataclass(frozen=True)
class MergeDeltas(LoopPass):
    """Replace runs of additions of kept values by the addition of one kept sum."""

    name: ClassVar[str] = "merge-deltas"
    needs: ClassVar[frozenset[Fact]] = frozenset({Fact.SITES_LOWERED})
    breaks: ClassVar[frozenset[Fact]] = frozenset({Fact.NO_DEAD_NODES})
    numerics: ClassVar[Numerics] = Numerics.ROUNDING
    changes_strides: ClassVar[bool] = True

    def rewrite(self, graph: LoopGraph, report: PassReport) -> None:  # noqa: D102
        groups: dict[tuple[Node, ...], list[KeptRun[Node]]] = {}
        for run in kept_runs(graph.graph.nodes, _kept_term):
            groups.setdefault(run.terms, []).append(run)
        for terms, runs in groups.items():
            reason = _why_not(terms, runs)
            for run in runs:
                report.note(run.last, reason)
            if reason is None:
                _merge(graph.graph, terms, runs, report)


def _kept_term(added: Node, addition: Node) -> Node | None:
    return added if is_kept(added, addition) and fits(added, addition) else None


def _merge(graph: fx.Graph, terms: tuple[Node, ...], runs: list[KeptRun[Node]], report: PassReport) -> None:
    last = max(terms)
    total = terms[0]
    for term in terms[1:]:
        with graph.inserting_after(last if total is terms[0] else total):
            total = emit(graph, aten.add.Tensor, (total, term), evaluation_of(last))
    for run in runs:
        with graph.inserting_before(run.last):
            merged = emit(graph, aten.add.Tensor, (run.base, total), evaluation_of(run.last))
        if not same_strides(merged, run.last):
            report.other_strides.add(merged)
        run.last.replace_all_uses_with(merged)


def _why_not(terms: tuple[Node, ...], runs: list[KeptRun[Node]]) -> Reason | None:
    merged = {add for run in runs for add in run.adds}
    for term in terms:
        for user in term.users:
            if user not in merged and evaluation_of(user) != evaluation_of(term):
                return Reason("'{}' is also read by '{}', so keeping a sum would save nothing", term.name, user.name)
    if len(set(terms)) < len(terms):
        return Reason("adds a value twice")
    return None
