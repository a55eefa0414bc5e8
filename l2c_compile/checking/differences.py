"""Compare what a loop graph computes with what its loop and schedule mean."""

from __future__ import annotations

import operator
from collections import Counter
from collections.abc import Iterator
from typing import cast

import torch
from torch._ops import OpOverload
from torch.fx.node import Node

from l2c_compile.checking.expected import ExpectedValues, port_suffix
from l2c_compile.checking.finding import Finding, finding_at
from l2c_compile.checking.found import FoundValues
from l2c_compile.checking.values import Value, ValueTable, needed_for
from l2c_compile.graphs.forms import TensorForm
from l2c_compile.graphs.loop_graph import LoopGraph
from l2c_compile.graphs.nodes import draws_random_numbers

aten = torch.ops.aten

_ROUNDING_WORK = frozenset({aten.cat.default, aten.linear.default, aten.slice.Tensor, aten.unsqueeze.default, "sum"})
"""Operations that rounding passes add to those of the loop; such an operation is needed if it is read completely."""


class Comparison:
    """Compares what the graph computes with what it should compute."""

    def __init__(
        self, graph: LoopGraph, expected: ExpectedValues, read: FoundValues, table: ValueTable, dead_allowed: bool
    ) -> None:
        self.graph = graph
        self.expected = expected
        self.read = read
        self.table = table
        self.dead_allowed = dead_allowed
        self.needed = needed_for([*expected.results, *expected.draws])

    def findings(self) -> Iterator[Finding]:
        """Yield every difference, those of the results first."""
        different = list(self._results())
        yield from different
        yield from self._sites()
        yield from self._work(different_results=bool(different))
        yield from self._draws()

    def _results(self) -> Iterator[Finding]:
        wanted, got = self.expected.results, self.read.results
        if len(wanted) != len(got):
            yield Finding("values", f"the graph returns {len(got)} results, the loop {len(wanted)}")
            return
        for number, (a, b) in enumerate(zip(got, wanted, strict=True)):
            if isinstance(a, Value) and isinstance(b, Value) and a is not b:
                yield self._first_deviation(number)
                return
            if isinstance(a, Value) != isinstance(b, Value) or not (isinstance(a, Value) or a == b):
                yield Finding("values", f"result {number} is {a}, the loop returns {b}")

    def _first_deviation(self, number: int) -> Finding:
        """Return the finding at the first node whose value the loop does not have, with what is wrong with it."""
        for node, value in self.read.made:
            passing = value.target in _ROUNDING_WORK and not self.table.exact
            if value in self.expected.met or isinstance(value.form, tuple) or passing:
                continue
            if self.table.without_copies(value) not in self.expected.met:
                return finding_at(node, "values", self._deviation(value))
        return Finding(
            "values", f"result {number} is not what the loop returns, though each of its parts is the loop's"
        )

    def _deviation(self, value: Value) -> str:
        twins = [twin for twin in self.expected.met if (twin.target, twin.place) == (value.target, value.place)]
        if not twins:
            return f"computes {value}({self._names_of(value)}), which the loop does not do there"

        def num_equal(twin: Value) -> int:
            return sum(a is b for a, b in zip(twin.operands(), value.operands(), strict=False))

        twin = max(twins, key=num_equal)
        pairs = zip(value.operands(), twin.operands(), strict=False)
        wrong = [
            f"{self._name(got)} where the loop has {self._name(wanted)}" for got, wanted in pairs if got is not wanted
        ]
        if not wrong:
            return f"computes {value} with {_literals(value)} where the loop has {_literals(twin)}"
        return f"computes {value} of {' and '.join(wrong)}"

    def _names_of(self, value: Value) -> str:
        return ", ".join(map(self._name, value.operands()))

    def _name(self, value: Value) -> str:
        if value in self.expected.names:
            return self.expected.names[value]
        evaluation, module = value.place
        if isinstance(value.target, str) and value.target != "sum":
            return str(value)
        inside = f" in '{module}'" if module else ""
        return f"a {value}{inside} of {'the loop' if evaluation is None else f'evaluation {evaluation}'}"

    def _sites(self) -> Iterator[Finding]:
        for node, value in self.read.values.items():
            for key in node.meta.get("sites", ()):
                evaluation, site, port = key
                wanted = self.expected.held.get(key)
                if wanted is None:
                    yield finding_at(
                        node, "sites", f"is noted as site '{site}' of evaluation {evaluation}, which is none", site
                    )
                    return
                if value is not wanted:
                    what = f"is noted as site '{site}' of evaluation {evaluation}{port_suffix(port)}, and is not"
                    yield finding_at(node, "sites", what, site)
                    return

    def _work(self, *, different_results: bool) -> Iterator[Finding]:
        yield from self._dead()
        times: Counter[Value] = Counter()
        for node, value in self.read.made:
            if _is_free(node):
                continue
            plain = self.table.without_copies(value)
            passing = not self.table.exact and value.target in _ROUNDING_WORK
            if plain in self.needed:
                times[value] += plain is value and not passing
                if times[value] > max(1, self.expected.made[value]):
                    yield finding_at(node, "work", f"computes {self._name(value)} again")
                    return
            elif passing:
                unread = _unread(node, value) if value.target is aten.linear.default else None
                if unread is not None:
                    yield finding_at(node, "work", f"projects {unread}, which nobody reads")
                    return
            elif plain in self.expected.met:
                yield finding_at(node, "work", f"computes {self._name(value)}, which no result needs")
                return
            elif not different_results:
                yield finding_at(node, "work", f"computes {value}, which is no part of the loop")
                return

    def _dead(self) -> Iterator[Finding]:
        if self.dead_allowed:
            return
        alive: set[Node] = set()
        for node in reversed(self.graph.graph.nodes):
            if node.op in ("output", "placeholder") or draws_random_numbers(node) or node in alive:
                alive.update(node.all_input_nodes)
            elif node.op == "call_function":
                value = self.read.values[node]
                what = self._name(value) if isinstance(value, Value) else "a region"
                yield finding_at(node, "work", f"computes {what} for nobody")
                return

    def _draws(self) -> Iterator[Finding]:
        got, wanted = self.read.draws, self.expected.draws
        if [(v.target, v.arguments[:2], v.form) for v in got] != [(v.target, v.arguments[:2], v.form) for v in wanted]:
            yield Finding(
                "draws", f"the graph draws {len(got)} random tensors, the loop {len(wanted)}, or in another form"
            )


def _literals(value: Value) -> str:
    return ", ".join(str(a) for a in value.arguments if not isinstance(a, Value)) or "no constants"


def _is_free(node: Node) -> bool:
    return (isinstance(node.target, OpOverload) and node.target.is_view) or node.target is operator.getitem


def _unread(node: Node, value: Value) -> str | None:
    """Return which part of a batched or pruned projection nobody reads; None if all is read, or for another node."""
    x, weight, _ = value.arguments
    assert isinstance(x, Value)
    assert isinstance(weight, Value)
    assert isinstance(value.form, TensorForm)
    rank = len(value.form.shape)
    for dim, is_made, what in (
        (0, x.target is aten.cat.default, "rows"),
        (rank - 1, weight.target is aten.slice.Tensor, "columns"),
    ):
        covered = 0
        for low, high in sorted(_ranges_read(node, dim, rank)) if is_made else ():
            if low > covered:
                break
            covered = max(covered, high)
        if is_made and covered < value.form.shape[dim]:
            return f"{what} from {covered}"
    return None


def _ranges_read(node: Node, dim: int, rank: int) -> Iterator[tuple[int, int]]:
    """Yield the ranges of a dimension that the users of a projection read."""
    size = node.meta["val"].shape[dim]
    for user in node.users:
        args = list(user.args[1:])
        if user.target is aten.slice.Tensor and cast(int, args[0]) % rank == dim:
            low, high, _ = slice(args[1], args[2]).indices(size)
            yield low, high
        elif user.target is aten.unsqueeze.default:
            at = cast(int, args[0]) % (rank + 1)
            yield from _ranges_read(user, dim + (at <= dim), rank + 1)
        else:
            yield 0, size
