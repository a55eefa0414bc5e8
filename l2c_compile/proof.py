"""The structural proof: a static graph computes what its loop and schedule say, shown without running it.

The loop as traced and the evaluations as captured, before any pass, are interpreted on values (``values.py``) instead
of tensors: a reused site gets what its rule makes of the site's values at the sources, as the schedule says. So every
site of every evaluation, and the result, is one expression. The finished graph is interpreted likewise, and must come
to the same results. Nothing is shared with the passes, ``unroll`` or the pipeline.

What is proven:

form        the graph is closed, acyclic and functional; users and operands agree
values      its results are the expressions that loop, denoiser and schedule say, so every cache read descends from the
            right site of the right evaluation through the right operations
sites       so is every value that the graph notes as a site's
work        every operation is one that a result needs, and none is done more often than in the loop itself: nothing of
            a skipped site remains
draws       the random numbers of the loop are drawn, each once, in order
constants   what was folded is, bit for bit, what its recipe gives
notes       forms, evaluations and site notes on the nodes are true
memory      the plan frees no kept value before its last reader, keeps none longer, leaves none out, and gives no two
            that are alive together one slot

For which pipeline: after ``BITWISE`` passes equal means bit for bit (``exact``). After ``ROUNDING`` passes it means the
same formula, up to the rules of ``values.py``: batched and pruned projections are resolved to rows of input and weight,
sums are multisets. There, what those passes themselves add (concatenations, batched projections, partial sums) counts
as needed work if it is read completely. Regions are read through their calls.

What is taken as given: ``torch.export`` and the tracer say truly what denoiser and loop do, and torch's operators do
what their schemas say. Weights count by identity, other constants by content; on the meta device constants have none.
"""

from __future__ import annotations

import hashlib
import io
import operator
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, cast

import networkx as nx
import torch
from rich.console import Console, ConsoleOptions, RenderResult
from rich.table import Table
from rich.text import Text
from torch import Tensor, fx, nn
from torch._ops import OpOverload
from torch.fx.node import Argument, Node

from l2c_compile.errors import VerificationError
from l2c_compile.exported import root_tensor
from l2c_compile.forms import Form, Inference, Inferred, bind
from l2c_compile.graph import (
    INPUT_PORT,
    SITE,
    LoopGraph,
    SiteMark,
    draws_random_numbers,
    evaluation_of,
    module_path,
    output_list,
)
from l2c_compile.liveness import MemoryPlan, plan_memory
from l2c_compile.schedule import CacheSchedule
from l2c_compile.sites import Site
from l2c_compile.trace import LoopSkeleton
from l2c_compile.values import Value, ValueTable
from l2c_compile.verify import Fact, check

__all__ = ["FINISHED", "Finding", "Proof", "examine", "prove"]

aten = torch.ops.aten

FINISHED = frozenset({Fact.READS_LOWERED, Fact.SITES_LOWERED, Fact.NO_DEAD_NODES})
"""What holds after a whole pipeline."""

_CHECKS = ("form", "values", "sites", "work", "draws", "constants", "notes", "memory")


@dataclass(frozen=True)
class Finding:
    """Something that a graph does and should not, or the other way round."""

    check: str
    """Which part of the proof fails: form, values, sites, work, draws, constants, notes or memory."""
    message: str
    node: str | None = None
    """The name of the first node where it shows."""
    evaluation: int | None = None
    """The evaluation that the node belongs to."""
    site: str | None = None

    def __str__(self) -> str:
        return f"{self.check}: {self.message}"


@dataclass(frozen=True)
class Proof:
    """The outcome of ``prove``. Print it."""

    findings: tuple[Finding, ...]
    exact: bool
    """Whether equal means bit for bit in eager mode; otherwise, the same formula rounded elsewhere."""
    num_evaluations: int
    num_nodes: int
    num_computed_sites: int
    """Site values (evaluation, site, port) that are computed and needed: each is one expression of the graph."""
    num_reads: int
    """Site values that are read from the cache and needed: each is what the rule makes of the right sources."""
    num_kept: int
    """Values in the memory plan."""
    not_covered: tuple[str, ...] = ()
    """Passes that run behind what is proven: nothing is said of the kernels and packed caches that they put in."""

    @property
    def holds(self) -> bool:
        """Whether the graph is proven right."""
        return not self.findings

    def to_dict(self) -> dict[str, object]:
        """Return the proof in JSON types."""
        return {"holds": self.holds, **asdict(self), "findings": [asdict(finding) for finding in self.findings]}

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        how = "bit for bit" if self.exact else "up to rounding"
        if self.not_covered:
            how += f", before {' and '.join(self.not_covered)}"
        if self.holds:
            yield Text(
                f"structure proven {how}: {self.num_nodes} operations, {self.num_computed_sites} site values computed,"
                f" {self.num_reads} read from the cache, {self.num_kept} kept in memory"
            )
            return
        table = Table(title=f"structure not proven {how}", title_justify="left")
        for heading in ("check", "evaluation", "node", "what"):
            table.add_column(heading)
        for each in self.findings:
            where = "" if each.evaluation is None else str(each.evaluation)
            table.add_row(each.check, where, Text(each.node or ""), Text(each.message))
        yield table

    def __str__(self) -> str:
        text = io.StringIO()
        Console(file=text, width=110).print(self)
        return text.getvalue().rstrip("\n")


def prove(
    graph: LoopGraph,
    skeleton: LoopSkeleton,
    denoiser: nn.Module,
    *,
    exact: bool,
    facts: Collection[Fact] = FINISHED,
    plan: MemoryPlan | None = None,
) -> Proof:
    """Show that ``graph`` computes what ``skeleton`` says under the graph's schedule, or find where it does not.

    Takes time linear in evaluations x sites. Nothing is run but the recipes of folded constants.

    Args:
        graph: after the passes.
        skeleton: the same loop as ``trace_loop`` returns it, with captured evaluations, before any pass.
        denoiser: the module that both were made from.
        exact: whether equal means bit for bit, otherwise up to rounding.
        facts: what the passes promise of the graph.
        plan: of the memory; None takes what ``plan_memory`` says.
    """
    nodes = list(graph.graph.nodes)
    findings = list(_form_findings(graph, nodes, facts))
    expected = read = None
    num_kept = 0
    if not findings:
        table = ValueTable(exact=exact)
        leaves = _Leaves(table, denoiser)
        expected = _Expected(skeleton, graph.schedule, table, leaves)
        try:
            read = _Read(graph, table, leaves)
            node_forms = _NodeForms(graph)
            plan = plan_memory(graph) if plan is None else plan
        except VerificationError as error:
            findings.append(Finding("form", str(error)))
        else:
            num_kept = len(plan.kept)
            comparison = _Comparison(graph, expected, read, table, Fact.NO_DEAD_NODES not in facts)
            findings += [*comparison.findings(), *_constant_findings(graph), *node_forms.findings()]
            findings += _memory_findings(node_forms, plan)
    needed = _needed(expected.results) if expected is not None else set()
    findings.sort(key=lambda finding: _CHECKS.index(finding.check))
    return Proof(
        findings=tuple(findings),
        exact=exact,
        num_evaluations=graph.num_evaluations,
        num_nodes=sum(node.op == "call_function" for node in nodes),
        num_computed_sites=0 if expected is None else sum(value in needed for value in expected.computed.values()),
        num_reads=0 if expected is None else sum(value in needed for value in expected.reads.values()),
        num_kept=num_kept,
    )


def examine(graph: LoopGraph, facts: Collection[Fact] = FINISHED) -> tuple[Finding, ...]:
    """Return what is wrong with a graph whatever it should compute: its form, notes, constants and memory plan."""
    findings = list(_form_findings(graph, list(graph.graph.nodes), facts))
    if not findings:
        forms = _NodeForms(graph)
        findings += [*_constant_findings(graph), *forms.findings(), *_memory_findings(forms, plan_memory(graph))]
    return tuple(findings)


# What the loop means.

_Key = tuple[int, str, int]
"""Evaluation, site, port."""


class _Leaves:
    """Values of tensors that a program refers to: weights by identity, other constants by content."""

    def __init__(self, table: ValueTable, denoiser: nn.Module) -> None:
        self._table = table
        self._weights: dict[int, str] = {}
        self._constants: dict[int, tuple[Tensor, Value]] = {}
        for named in (denoiser.named_parameters, denoiser.named_buffers):
            for path, tensor in named(remove_duplicate=False):
                self._weights.setdefault(id(tensor), path)

    def of(self, tensor: Tensor) -> Value:
        if id(tensor) in self._weights:
            return self._table.leaf("weight", self._weights[id(tensor)], Form.of(tensor))
        if id(tensor) not in self._constants:
            value = self._table.leaf("constant", _content(tensor), Form.of(tensor))
            # The tensor is kept so that no other can get its id.
            self._constants[id(tensor)] = tensor, value
        return self._constants[id(tensor)][1]


def _content(tensor: Tensor) -> str:
    if tensor.device.type == "meta":
        return "without content"
    plain = tensor.detach().cpu().contiguous().reshape(-1)
    return hashlib.sha256(plain.view(torch.uint8).numpy().tobytes()).hexdigest()[:16]


class _Expected:
    """The expressions of a loop under a schedule, from the definition: evaluation by evaluation, site by site."""

    def __init__(self, skeleton: LoopSkeleton, schedule: CacheSchedule, table: ValueTable, leaves: _Leaves) -> None:
        self.table = table
        self.leaves = leaves
        self.schedule = schedule
        self.sites: dict[str, Site] = {str(site): site for site in schedule.sites}
        self.held: dict[_Key, Value] = {}
        """What a site holds after an evaluation: computed or read."""
        self.computed: dict[_Key, Value] = {}
        self.reads: dict[_Key, Value] = {}
        self.names: dict[Value, str] = {}
        self.draws: list[Value] = []
        self.results: list[object] = self._run(skeleton)
        self.made = Counter(table.times_made)
        """How often the loop, in which nothing is shared, computes an expression."""
        self.met = dict.fromkeys((*self.made, *self.names, *_needed(self.results)))
        """Every expression of the loop, those of skipped sites included."""

    def _run(self, skeleton: LoopSkeleton) -> list[object]:
        table = self.table
        values: dict[Node, Value] = {}
        for number, node in enumerate(skeleton.input_nodes()):
            values[node] = table.leaf("input", number, Form.of(node.meta["val"]))
        for node, tensor in zip(skeleton.constant_nodes(), skeleton.constants.values(), strict=True):
            values[node] = self.leaves.of(tensor)
        made_by = {node: e for e, nodes in enumerate(skeleton.output_nodes()) for node in nodes}
        arguments, outputs = skeleton.argument_nodes(), skeleton.output_nodes()
        num_done = 0
        for node in skeleton.graph.nodes:
            awaited = [made_by[argument] for argument in node.all_input_nodes if argument in made_by]
            if node.op == "output":
                awaited.append(len(outputs) - 1)
            while num_done <= max(awaited, default=-1):
                given = [values[argument] for argument in arguments[num_done]]
                values.update(zip(outputs[num_done], self._evaluate(skeleton, num_done, given), strict=True))
                num_done += 1
            table.place = (None, "")
            if node.op == "get_attr":
                values[node] = self.leaves.of(root_tensor(skeleton.root, node))
            elif node.op == "call_function":
                values[node] = self._operation(node, values)
        return [values[result] if isinstance(result, Node) else result for result in skeleton.result_nodes()]

    def _evaluate(self, skeleton: LoopSkeleton, evaluation: int, given: Sequence[Value]) -> list[Value]:
        form = skeleton.calls[evaluation].graph
        values: dict[Node, Value] = {}
        inputs = iter(given)
        for node in form.graph.nodes:
            self.table.place = (evaluation, module_path(node))
            if node.op == "placeholder":
                values[node] = next(inputs)
            elif node.op == "get_attr":
                values[node] = self.leaves.of(root_tensor(form.root, node))
            elif node.target is SITE:
                mark = SiteMark.of(node)
                values[node] = self._site(evaluation, mark, values[mark.value])
            elif node.op == "call_function":
                values[node] = self._operation(node, values)
        return [values[node] for node in output_list(form.graph) if isinstance(node, Node)]

    def _operation(self, node: Node, values: Mapping[Node, Value]) -> Value:
        args, kwargs = _on_values(node, values)
        if draws_random_numbers(node):
            self.draws.append(self.table.draw(len(self.draws), cast(OpOverload, node.target), args, kwargs))
            return self.draws[-1]
        return self.table.call(node.target, args, kwargs)

    def _site(self, evaluation: int, mark: SiteMark, own: Value) -> Value:
        """Return what the denoiser goes on with at a site."""
        site, key = self.sites[mark.site], (evaluation, mark.site, mark.port)
        reuse = None if mark.port == INPUT_PORT else self.schedule.active(evaluation, site)
        if reuse is None:
            self.held[key] = own
            if mark.port != INPUT_PORT and self.schedule.computes(evaluation, site):
                self.computed[key] = own
                self.names.setdefault(own, f"site '{site}' of evaluation {evaluation}{_port(mark.port)}")
            return own
        history = [self._cached(source, site, mark.port) for source in reuse.sources]
        inputs = [self.held[source, mark.site, INPUT_PORT] for source in reuse.sources if reuse.rule.needs_input]
        current = self.held.get((evaluation, mark.site, INPUT_PORT))
        value = self.table.apply_rule(reuse.rule, history, inputs, current if reuse.rule.needs_input else None)
        if site.kind == "delta":
            assert current is not None
            value = self.table.call(aten.add.Tensor, (current, value), {})
        self.held[key] = self.reads[key] = value
        sources = " and ".join(map(str, reuse.sources))
        self.names.setdefault(value, f"site '{site}' at {evaluation} as made from {sources}{_port(mark.port)}")
        return value

    def _cached(self, source: int, site: Site, port: int) -> Value:
        held = self.held[source, str(site), port]
        if site.kind == "out":
            return held
        return self.table.call(aten.sub.Tensor, (held, self.held[source, str(site), INPUT_PORT]), {})


def _port(port: int) -> str:
    return f" (result {port})" if port else ""


def _on_values(node: Node, values: Mapping[Node, Any]) -> tuple[tuple[object, ...], dict[str, object]]:
    # Not fx's map_arg: it makes immutable lists, and wants nodes back.
    args = tuple(_mapped(argument, values) for argument in node.args)
    return args, {name: _mapped(argument, values) for name, argument in node.kwargs.items()}


def _mapped(argument: Argument, values: Mapping[Node, Any]) -> object:
    if isinstance(argument, Node):
        return values[argument]
    if isinstance(argument, (tuple, list)):
        return tuple(_mapped(element, values) for element in argument)
    return argument


# What the graph computes.


class _Read:
    """The expressions of a loop graph, node by node."""

    def __init__(self, graph: LoopGraph, table: ValueTable, leaves: _Leaves) -> None:
        self.table = table
        self.leaves = leaves
        self.root = graph.root
        self.values: dict[Node, Any] = {}
        """A value; a tuple of them for the call of a region."""
        self.made: list[tuple[Node, Value]] = []
        """Every operation in order, those inside regions included and those that only pass on an argument left out."""
        self.draws: list[Value] = []
        self.folded: dict[str, Value] = {}
        for each in graph.folded:
            (outputs,) = each.recipe.output_node().args
            made = self._interpret(each.recipe, ())
            assert isinstance(outputs, tuple)
            self.folded.update(zip(each.names, (made[output] for output in outputs), strict=True))  # type: ignore[index]
        self.made.clear()
        inputs = [
            table.leaf("input", number, Form.of(node.meta["val"]))
            for number, node in enumerate(graph.graph.find_nodes(op="placeholder"))
        ]
        self.values = self._interpret(graph.graph, inputs)
        self.results = [self.values[r] if isinstance(r, Node) else r for r in output_list(graph.graph)]

    def _interpret(self, graph: fx.Graph, inputs: Sequence[Value]) -> dict[Node, Any]:
        values: dict[Node, Any] = {}
        given = iter(inputs)
        for node in graph.nodes:
            self.table.place = (evaluation_of(node), module_path(node))
            if node.op == "placeholder":
                values[node] = next(given)
            elif node.op == "get_attr":
                values[node] = self._attribute(node)
            elif node.op == "call_function":
                values[node] = self._operation(node, values)
        return values

    def _attribute(self, node: Node) -> object:
        name = str(node.target)
        if name in self.folded:
            return self.folded[name]
        region = self.root._modules.get(name)
        return region if region is not None else self.leaves.of(root_tensor(self.root, node))

    def _operation(self, node: Node, values: Mapping[Node, Any]) -> object:
        args, kwargs = _on_values(node, values)
        if node.target is torch.ops.higher_order.invoke_subgraph:
            region, _, *operands = args
            assert isinstance(region, fx.GraphModule)
            inner = self._interpret(region.graph, cast("list[Value]", operands))
            (outputs,) = region.graph.output_node().args
            return tuple(inner[output] for output in cast("tuple[Node, ...]", outputs))
        if node.target is operator.getitem and isinstance(args[0], tuple):
            return args[0][cast(int, args[1])]
        if draws_random_numbers(node):
            self.draws.append(self.table.draw(len(self.draws), cast(OpOverload, node.target), args, kwargs))
            return self.draws[-1]
        value = self.table.call(node.target, args, kwargs)
        # A mark, a held value, a copy: what only passes its argument on computes nothing.
        if not any(operand is value for operand in _values_in(args)):
            self.made.append((node, value))
        return value


def _values_in(arguments: Iterable[object]) -> Iterator[Value]:
    for argument in arguments:
        if isinstance(argument, Value):
            yield argument
        elif isinstance(argument, tuple):
            yield from _values_in(argument)


def _needed(results: Iterable[object]) -> set[Value]:
    """Return everything that the results are made from, themselves included."""
    found: set[Value] = set()
    stack = [value for value in results if isinstance(value, Value)]
    while stack:
        value = stack.pop()
        if value not in found:
            found.add(value)
            stack += value.operands()
    return found


# Where they part.


def _form_findings(graph: LoopGraph, nodes: Sequence[Node], facts: Collection[Fact]) -> Iterator[Finding]:
    """Yield what keeps the graph from being a program at all."""
    inside = set(nodes)
    operands = nx.DiGraph()
    operands.add_nodes_from(nodes)
    for node in nodes:
        for argument in node.all_input_nodes:
            operands.add_edge(argument, node)
            if argument not in inside:
                yield _at(node, "form", f"uses '{argument.name}', which is no node of the graph")
                return
            if node not in argument.users:
                yield _at(node, "form", f"uses '{argument.name}', which does not know of it")
        for user in node.users:
            if user not in inside or node not in user.all_input_nodes:
                yield _at(node, "form", f"is said to be used by '{user.name}', but is not")
    if not nx.is_directed_acyclic_graph(operands):
        cycle = [node.name for node, _ in nx.find_cycle(operands)]
        yield Finding("form", f"the nodes {', '.join(cycle)} wait for each other", node=cycle[0])
        return
    try:
        check(graph, set(facts) - {Fact.NO_DEAD_NODES})
    except VerificationError as error:
        yield Finding("form", str(error))


def _at(node: Node, check_name: str, what: str, site: str | None = None) -> Finding:
    evaluation = evaluation_of(node)
    module = module_path(node)
    place = "" if evaluation is None else f" of evaluation {evaluation}"
    inside = f" in '{module}'" if module else ""
    return Finding(check_name, f"node '{node.name}'{place}{inside} {what}", node.name, evaluation, site)


_ROUNDING_WORK = frozenset({aten.cat.default, aten.linear.default, aten.slice.Tensor, aten.unsqueeze.default, "sum"})
"""What passes that round make besides what the loop does: it is needed if it is read completely."""


class _Comparison:
    """Compares what the graph computes with what it should."""

    def __init__(
        self, graph: LoopGraph, expected: _Expected, read: _Read, table: ValueTable, dead_allowed: bool
    ) -> None:
        self.graph = graph
        self.expected = expected
        self.read = read
        self.table = table
        self.dead_allowed = dead_allowed
        self.needed = _needed([*expected.results, *expected.draws])

    def findings(self) -> Iterator[Finding]:
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
        """Say which node is the first whose value the loop does not have, and what is wrong with it."""
        for node, value in self.read.made:
            passing = value.target in _ROUNDING_WORK and not self.table.exact
            if value in self.expected.met or isinstance(value.form, tuple) or passing:
                continue
            if self.table.without_copies(value) not in self.expected.met:
                return _at(node, "values", self._deviation(value))
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
                    yield _at(
                        node, "sites", f"is noted as site '{site}' of evaluation {evaluation}, which is none", site
                    )
                    return
                if value is not wanted:
                    what = f"is noted as site '{site}' of evaluation {evaluation}{_port(port)}, and is not"
                    yield _at(node, "sites", what, site)
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
                    yield _at(node, "work", f"computes {self._name(value)} again")
                    return
            elif passing:
                unread = _unread(node, value) if value.target is aten.linear.default else None
                if unread is not None:
                    yield _at(node, "work", f"projects {unread}, which nobody reads")
                    return
            elif plain in self.expected.met:
                yield _at(node, "work", f"computes {self._name(value)}, which no result needs")
                return
            elif not different_results:
                yield _at(node, "work", f"computes {value}, which is no part of the loop")
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
                yield _at(node, "work", f"computes {what} for nobody")
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
    """Return which part of a batched or pruned projection nobody reads, None if all is read or it is neither."""
    x, weight, _ = value.arguments
    assert isinstance(x, Value)
    assert isinstance(weight, Value)
    assert isinstance(value.form, Form)
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


def _constant_findings(graph: LoopGraph) -> Iterator[Finding]:
    """Yield the folded constants that are not what their recipe gives."""
    for folded in graph.folded:
        with torch.no_grad():
            values = fx.Interpreter(graph.root, graph=folded.recipe).run()
        for name, value in zip(folded.names, values, strict=True):
            kept = graph.root.get_buffer(name)
            if kept.dtype != value.dtype or kept.shape != value.shape or _content(kept) != _content(value):
                yield Finding("constants", f"'{name}' is not what its recipe gives; if weights changed, call refresh()")
                return


class _NodeForms:
    """Forms, memory and evaluations of the nodes of a flat loop graph, derived from its inputs."""

    def __init__(self, graph: LoopGraph) -> None:
        self.graph = graph
        self.nodes = list(graph.graph.nodes)
        self.is_flat = not any(node.target is torch.ops.higher_order.invoke_subgraph for node in self.nodes)
        self.forms: dict[Node, Any] = {}
        self.base: dict[Node, Node] = {}
        """The node that allocated the memory."""
        self.early: set[Node] = set()
        """What depends on no noise and no random draw."""
        self._inference = Inference()
        num_inputs = 0
        for node in self.nodes if self.is_flat else ():
            operands = node.all_input_nodes
            if node.op == "placeholder":
                self.forms[node], self.base[node] = Form.of(node.meta["val"]), node
                if num_inputs >= graph.num_noise:
                    self.early.add(node)
                num_inputs += 1
            elif node.op == "get_attr":
                self.forms[node], self.base[node] = Form.of(root_tensor(graph.root, node)), node
                self.early.add(node)
            elif node.op == "call_function":
                inferred = self._infer(node)
                self.forms[node] = inferred.forms
                self.base[node] = node if inferred.shares is None else self.base[operands[inferred.shares]]
                if not draws_random_numbers(node) and self.early.issuperset(operands):
                    self.early.add(node)

    def _infer(self, node: Node) -> Inferred:
        args, kwargs = _on_values(node, self.forms)
        if node.target is operator.getitem:
            source = node.all_input_nodes[0]
            return Inferred(self.forms[source][cast(int, args[1])], None if self.base[source] is source else 0)
        target = cast(OpOverload, node.target)
        inferred = self._inference.of(target, bind(target, args, kwargs))
        if inferred.shares is None:
            return inferred
        # By position among the tensors of the call; all_input_nodes has each node once.
        operands = list(_flat(bind(target, *_on_values(node, {n: n for n in node.all_input_nodes}))))
        return Inferred(inferred.forms, node.all_input_nodes.index(operands[inferred.shares]))

    def findings(self) -> Iterator[Finding]:
        """Yield the first node whose notes are not true."""
        for node, form in self.forms.items():
            noted = node.meta.get("val")
            noted_forms = tuple(map(_noted, noted)) if isinstance(noted, (tuple, list)) else _noted(noted)
            if not _agree(noted_forms, form):
                yield _at(node, "notes", f"returns {form}, its note says {noted_forms}")
                return
            if node.op != "call_function" or node in self.early:
                continue
            own = evaluation_of(node)
            made = [e for a in node.all_input_nodes if a not in self.early and (e := evaluation_of(a)) is not None]
            if own is not None and made and max(made) > own:
                yield _at(node, "notes", f"reads a value of evaluation {max(made)}, which comes later")
                return


def _flat(arguments: Iterable[object]) -> Iterator[Node]:
    for argument in arguments:
        if isinstance(argument, Node):
            yield argument
        elif isinstance(argument, tuple):
            yield from _flat(argument)


def _noted(value: object) -> Form | None:
    return Form.of(value) if isinstance(value, Tensor) else None


def _agree(noted: object, derived: object) -> bool:
    if isinstance(noted, tuple) and isinstance(derived, tuple):
        return len(noted) == len(derived) and all(map(_agree, noted, derived))
    if not isinstance(noted, Form) or not isinstance(derived, Form):
        return noted is None and derived is None
    strides = zip(noted.shape, noted.stride, derived.stride, strict=True) if noted.shape == derived.shape else ()
    equal = (noted.shape, noted.dtype, noted.device) == (derived.shape, derived.dtype, derived.device)
    return equal and all(a == b for size, a, b in strides if size > 1)


def _memory_findings(nodes: _NodeForms, plan: MemoryPlan) -> Iterator[Finding]:
    """Yield where a memory plan is not what the graph needs."""
    if not nodes.is_flat:
        return
    position = {node: index for index, node in enumerate(nodes.nodes)}
    by_name = {node.name: node for node in nodes.nodes}
    readers: dict[Node, list[Node]] = {}
    for node in nodes.nodes:
        for operand in node.all_input_nodes:
            base = nodes.base[operand]
            if nodes.base.get(node) is not base:
                readers.setdefault(base, []).append(node)
    planned = {by_name[value.name]: value for value in plan.kept if value.name in by_name}
    if len(planned) < len(plan.kept):
        yield Finding("memory", "the plan keeps a value that the graph does not have, or one twice")
    for base, reading in readers.items():
        made = evaluation_of(base)
        read_later = any((evaluation_of(reader) or 0) > made for reader in reading) if made is not None else False
        if read_later and base not in planned and base not in nodes.early and base.op == "call_function":
            yield _at(base, "memory", "is read by a later evaluation, and the plan does not keep it")
            return
    for base, value in planned.items():
        last = max((position[reader] for reader in readers.get(base, ())), default=-1)
        if value.end < last:
            yield _at(base, "memory", f"is freed at {value.end} and read by '{nodes.nodes[last].name}' at {last}")
        elif value.end > last:
            yield _at(base, "memory", f"is kept until {value.end}, and read for the last time at {last}")
        elif value.begin < position[base] or (value.last_read_in > value.made_in and value.begin != position[base]):
            yield _at(base, "memory", f"is made at {position[base]}, and the plan begins at {value.begin}")
        elif value.num_bytes < _bytes(nodes.forms[base]) or plan.slot_bytes[value.slot] < value.num_bytes:
            yield _at(base, "memory", f"does not fit into its slot of {plan.slot_bytes[value.slot]} bytes")
    busy: dict[int, tuple[int, str]] = {}
    for value in sorted(plan.kept, key=lambda each: each.begin):
        until, name = busy.get(value.slot, (-1, ""))
        if value.begin <= until:
            yield Finding("memory", f"'{value.name}' and '{name}' are alive together in slot {value.slot}", value.name)
        busy[value.slot] = value.end, value.name


def _bytes(form: object) -> int:
    """Return the size in bytes of the memory that forms span, 0 for none."""
    if isinstance(form, tuple):
        return sum(map(_bytes, form))
    if not isinstance(form, Form) or 0 in form.shape:
        return 0
    extent = 1 + sum((size - 1) * stride for size, stride in zip(form.shape, form.stride, strict=True))
    return extent * form.dtype.itemsize
