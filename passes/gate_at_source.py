"""Apply the gates of reused sublayers where their outputs are made, so that a sum of them can be kept.

    evaluation 4:  f = attn(...); g = mlp(...)                evaluation 4:  f = ...; p = mul(a5, f)
    evaluation 5:  y = add(add(x, mul(a5, f)), mul(b5, g))  ->               g = ...; q = mul(b5, g)
                                                              evaluation 5:  y = add(add(x, p), q)

A gate of an adaLN block is made from timestep and condition: it is another in each evaluation, but known before the
loop. ``MergeDeltas`` then adds p and q up at the source. A whole run of skipped sublayers, over many blocks, becomes
one kept tensor instead of one each, and one read instead of one each.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import torch
from torch.fx.node import Node

from l2c_compile.analyses.kept import KeptRun, is_kept, kept_runs
from l2c_compile.graphs.facts import Fact
from l2c_compile.graphs.loop_graph import LoopGraph
from l2c_compile.graphs.nodes import evaluation_of, fits, own_evaluation, put_with
from l2c_compile.passes.base import LoopPass, Numerics, PassReport, Reason

aten = torch.ops.aten


@dataclass(frozen=True)
class _Term:
    """What a run adds: a kept value, or a product of one with gates that are known before the loop."""

    kept: Node
    products: tuple[Node, ...]
    """The products, from the kept value to the addition."""


@dataclass(frozen=True)
class GateAtSource(LoopPass):
    """Move products of kept values and gates to the evaluation that makes the value, where a sum can then be kept."""

    name: ClassVar[str] = "gate-at-source"
    needs: ClassVar[frozenset[Fact]] = frozenset({Fact.SITES_LOWERED, Fact.NO_DEAD_NODES})
    # Products are the same bits wherever they are made, but alone they save nothing: this belongs to MergeDeltas.
    numerics: ClassVar[Numerics] = Numerics.ROUNDING

    def rewrite(self, graph: LoopGraph, report: PassReport) -> None:  # noqa: D102
        early = graph.known_before_the_loop()
        first = _first_nodes(graph, early)
        groups: dict[frozenset[Node], list[KeptRun[_Term]]] = {}
        for run in kept_runs(graph.graph.nodes, partial(_term, early)):
            if any(term.products for term in run.terms):
                groups.setdefault(frozenset(term.kept for term in run.terms), []).append(run)
        for kept, runs in groups.items():
            reason = _why_not(kept, runs)
            for run in runs:
                report.note(run.last, reason)
                for term in run.terms if reason is None else ():
                    _move(term, early, first)


def _term(early: set[Node], added: Node, addition: Node) -> _Term | None:
    products: list[Node] = []
    current = added
    while evaluation_of(current) is not None and current not in early and fits(current, addition):
        if is_kept(current, addition):
            return _Term(current, tuple(reversed(products)))
        if current.target is not aten.mul.Tensor or current.kwargs or len(current.users) != 1:
            return None
        factors = [factor for factor in current.all_input_nodes if factor not in early]
        if len(factors) != 1:
            return None
        products.append(current)
        current = factors[0]
    return None


def _why_not(kept: frozenset[Node], runs: Sequence[KeptRun[_Term]]) -> Reason | None:
    if any(len(run.terms) > len(kept) for run in runs):
        return Reason("adds a value twice")
    if len(runs) >= len(kept):
        return Reason(
            "{} evaluations add {} values with gates of their own: as many sums as values", len(runs), len(kept)
        )
    readers = {term.products[0] for run in runs for term in run.terms if term.products}
    readers.update(add for run in runs for add in run.adds)
    for value in kept:
        for user in value.users:
            if evaluation_of(user) != evaluation_of(value) and user not in readers:
                return Reason("'{}' is also read by '{}', so keeping a sum would save nothing", value.name, user.name)
    return None


def _first_nodes(graph: LoopGraph, early: set[Node]) -> dict[int, Node]:
    """Return the first node of each evaluation that waits for the latent."""
    first: dict[int, Node] = {}
    for node in graph.graph.nodes:
        evaluation = evaluation_of(node)
        if evaluation is not None and node.op == "call_function" and node not in early:
            first.setdefault(evaluation, node)
    return first


def _move(term: _Term, early: set[Node], first: dict[int, Node]) -> None:
    """Move the products of a term right behind its kept value, and what they are made of before its evaluation."""
    after = term.kept
    for product in term.products:
        for factor in product.all_input_nodes:
            if factor in early:
                _move_before(factor, first[own_evaluation(term.kept)])
        after.append(product)
        put_with(product, term.kept)
        after = product


def _move_before(node: Node, anchor: Node) -> None:
    """Move a node and all it is made of in front of ``anchor``, where they stand behind it."""
    if node < anchor:
        return
    stack = [node]
    needed: list[Node] = []
    seen: set[Node] = set()
    while stack:
        current = stack.pop()
        if current in seen or current < anchor:
            continue
        seen.add(current)
        needed.append(current)
        stack.extend(current.all_input_nodes)
    for each in sorted(needed):
        anchor.prepend(each)
        if isinstance(each.target, torch._ops.OpOverload) and not each.target.is_view:
            continue
        # Views in front of an evaluation belong to no part of it.
        each.meta["evaluation"] = None
