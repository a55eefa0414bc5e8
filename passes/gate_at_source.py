"""Apply the gates of reused sublayers where their outputs are made, so that a sum of them can be kept.

    evaluation 4:  f = attn(...); g = mlp(...)                evaluation 4:  f = ...; p = mul(a5, f)
    evaluation 5:  y = add(add(x, mul(a5, f)), mul(b5, g))  ->               g = ...; q = mul(b5, g)
                                                              evaluation 5:  y = add(add(x, p), q)

A gate of an adaLN block is made from timestep and condition: it is another in each evaluation, but known before the
loop. ``MergeDeltas`` then adds p and q up at the source. A whole run of skipped sublayers, over many blocks, becomes
one kept tensor instead of one each, and one read instead of one each.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch.fx.node import Node

from l2c_compile.graphs.facts import Fact
from l2c_compile.graphs.loop_graph import LoopGraph, ProgramGraph
from l2c_compile.graphs.nodes import evaluation_of, form_of
from l2c_compile.passes.base import Numerics, Pass, PassReport

__all__ = ["GateAtSource"]

aten = torch.ops.aten


@dataclass(frozen=True)
class _Term:
    """What a run adds: a kept value, or a product of one with gates that are known before the loop."""

    kept: Node
    products: tuple[Node, ...]
    """From the kept value to the addition."""


@dataclass(frozen=True)
class _Run:
    """Additions of terms one after another to one tensor of the reader."""

    terms: tuple[_Term, ...]
    last: Node
    """The last addition."""

    @property
    def kept(self) -> frozenset[Node]:
        return frozenset(term.kept for term in self.terms)


@dataclass(frozen=True)
class GateAtSource(Pass):
    """Move products of kept values and gates to the evaluation that makes the value, where a sum can then be kept."""

    name: ClassVar[str] = "gate-at-source"
    needs: ClassVar[frozenset[Fact]] = frozenset({Fact.SITES_LOWERED, Fact.NO_DEAD_NODES})
    # Products are the same bits wherever they are made, but alone they save nothing: this belongs to MergeDeltas.
    numerics: ClassVar[Numerics] = Numerics.ROUNDING

    def run(self, program: ProgramGraph) -> PassReport:  # noqa: D102
        if not isinstance(program, LoopGraph):
            raise TypeError("only a loop graph has evaluations to keep values for")
        report = PassReport()
        early = program.known_before_the_loop()
        first = _first_nodes(program, early)
        groups: dict[frozenset[Node], list[_Run]] = {}
        for run in _runs(program, early):
            groups.setdefault(run.kept, []).append(run)
        for runs in groups.values():
            reason = _why_not(runs)
            if reason is not None:
                report.left_alone.update((run.last.name, reason) for run in runs)
                continue
            for run in runs:
                for term in run.terms:
                    _move(term, early, first)
                report.rewrites += 1
        return report


def _runs(program: LoopGraph, early: set[Node]) -> Iterator[_Run]:
    """Yield the maximal runs of at least two terms, one of them with a gate."""
    inner: set[Node] = set()
    for node in reversed(list(program.graph.nodes)):
        if node in inner:
            continue
        terms: list[_Term] = []
        current, last = node, node
        while (split := _split(current, early)) is not None and (current is last or len(current.users) == 1):
            inner.add(current)
            rest, term = split
            terms.append(term)
            current = rest
        if len(terms) > 1 and any(term.products for term in terms):
            yield _Run(tuple(reversed(terms)), last)


def _split(node: Node, early: set[Node]) -> tuple[Node, _Term] | None:
    """Split ``add(x, term)`` into x and the term; None if the node is no such addition."""
    if node.target is not aten.add.Tensor or node.kwargs or evaluation_of(node) is None:
        return None
    a, b = node.args
    for rest, added in ((a, b), (b, a)):
        if not isinstance(rest, Node) or not isinstance(added, Node) or form_of(rest) != form_of(node):
            continue
        term = _term(added, node, early)
        if term is not None:
            return rest, term
    return None


def _term(added: Node, addition: Node, early: set[Node]) -> _Term | None:
    reader = evaluation_of(addition)
    products: list[Node] = []
    current = added
    while True:
        made = evaluation_of(current)
        if made is None or reader is None or current in early or form_of(current) != form_of(addition):
            return None
        if made < reader:
            return _Term(current, tuple(reversed(products)))
        if current.target is not aten.mul.Tensor or current.kwargs or len(current.users) != 1:
            return None
        factors = [factor for factor in current.all_input_nodes if factor not in early]
        if len(factors) != 1:
            return None
        products.append(current)
        current = factors[0]


def _why_not(runs: Sequence[_Run]) -> str | None:
    kept = runs[0].kept
    if any(len(run.terms) > len(kept) for run in runs):
        return "adds a value twice"
    if len(runs) >= len(kept):
        return f"{len(runs)} evaluations add {len(kept)} values with gates of their own: as many sums as values"
    readers = {term.products[0] if term.products else None for run in runs for term in run.terms}
    lasts = {run.last for run in runs}
    for value in kept:
        for user in value.users:
            if evaluation_of(user) != evaluation_of(value) and user not in readers and not _adds_to(user, lasts):
                return f"'{value.name}' is also read by '{user.name}', so keeping a sum would save nothing"
    return None


def _adds_to(node: Node, lasts: set[Node]) -> bool:
    """Tell whether a node is an addition of one of the runs."""
    while node not in lasts:
        if node.target is not aten.add.Tensor or len(node.users) != 1:
            return False
        node = next(iter(node.users))
    return True


def _first_nodes(program: LoopGraph, early: set[Node]) -> dict[int, Node]:
    """Return the first node of each evaluation that waits for the latent."""
    first: dict[int, Node] = {}
    for node in program.graph.nodes:
        evaluation = evaluation_of(node)
        if evaluation is not None and node.op == "call_function" and node not in early:
            first.setdefault(evaluation, node)
    return first


def _move(term: _Term, early: set[Node], first: dict[int, Node]) -> None:
    """Move the products of a term right behind its kept value, and what they are made of before its evaluation."""
    made = evaluation_of(term.kept)
    assert made is not None
    after = term.kept
    for product in term.products:
        for factor in product.all_input_nodes:
            if factor in early:
                _move_before(factor, first[made])
        after.append(product)
        product.meta["evaluation"] = made
        product.meta["nn_module_stack"] = term.kept.meta.get("nn_module_stack", {})
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
