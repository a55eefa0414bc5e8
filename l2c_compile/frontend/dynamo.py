"""Find the evaluations and sites in the graph that Dynamo captured of a sampling function, and make a loop graph of it.

Dynamo notes on every node which modules it was made in (``nn_module_stack``) and numbers the calls of each: the second
call of a module has ``@1`` behind its key. So the calls of the denoiser are the evaluations, and a value that a site's
module makes and other modules use is the site's value. It is passed through ``l2c::site``; then the whole graph is
lowered to functional ATen, as ``capture`` does with one evaluation.

Weights are inputs of Dynamo's graph and stay inputs: Dynamo passes the current ones in each call.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, fx, nn
from torch._dynamo.source import NNModuleSource
from torch._functorch._aot_autograd.schemas import GraphSignature
from torch._functorch.aot_autograd import aot_export_module
from torch._guards import ChainedSource
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.fx.node import Argument, Node
from torch.utils._pytree import tree_structure

from l2c_compile.errors import CaptureError, ScheduleError, UnknownSiteError, nearest
from l2c_compile.frontend.aliases import AliasesAsInEagerTorch
from l2c_compile.graphs.forms import TensorForm
from l2c_compile.graphs.loop_graph import LoopGraph
from l2c_compile.graphs.marks import INPUT_PORT, SITE
from l2c_compile.graphs.nodes import draws_random_numbers, module_path, output_list
from l2c_compile.schedules.schedule import CacheSchedule
from l2c_compile.schedules.sites import Site

_GRAD_MODES = (
    torch._C._set_grad_enabled,
    torch.autograd.grad_mode._enter_inference_mode,
    torch.autograd.grad_mode._exit_inference_mode,
)

_WEIGHT = "l2c_weight"
"""The key under which a node notes whether a module holds this input."""


@dataclass
class DynamoLoop:
    """A loop graph, and which of Dynamo's inputs it takes."""

    graph: LoopGraph
    positions: tuple[int, ...]
    """For each input of the loop graph, its position among Dynamo's inputs."""


def loop_graph_of(
    module: fx.GraphModule,
    example_inputs: Sequence[object],
    schedule: CacheSchedule,
    denoiser: nn.Module | str | None = None,
) -> DynamoLoop:
    """Return the loop graph of a sampling function, with sites marked where the schedule reads them.

    Args:
        module: the graph that Dynamo made; it is left as it was.
        example_inputs: the inputs of the graph, real or fake. Symbolic sizes become static, which Dynamo guards on.
        schedule: the schedule, whose sites are marked; patterns are resolved with the modules that the graph calls.
        denoiser: the module whose calls are the evaluations, or its name; None finds the one that has the sites.

    Raises:
        UnknownSiteError: if no module of the graph has the sites, or an evaluation does not call one.
        ScheduleError: if the graph calls the denoiser more or less often than the schedule has evaluations.
        CaptureError: if the graph does not show what a site's value or input is, needs gradients or autocast, or
            writes in place where that changes the result.
    """
    _check_modes(module, example_inputs)
    inputs: list[object] = [_StaticTensor.of(value) for value in example_inputs]
    own, weights = _copy(module, inputs)
    calls = _ModuleCalls(own.graph)
    name, schedule = _find_denoiser(calls, schedule, denoiser)
    evaluations = calls.of_module(name)
    _check_count(name, evaluations, schedule)
    marker = _MarkInserter(own.graph, calls, evaluations, schedule)
    marker.mark()
    num_results = _return_marks(own.graph)
    own.recompile()
    positions = [index for index, value in enumerate(inputs) if isinstance(value, _StaticTensor)]
    specs = [value.spec for value in inputs if isinstance(value, _StaticTensor)]
    # Dynamo's tracing context is left, because it is about Dynamo's own fake tensors.
    with torch._guards.tracing(None), torch.no_grad(), AliasesAsInEagerTorch():
        _check_in_place(own, _fake(specs), marker.marks)
        lowered, signature = aot_export_module(
            own, _fake(specs), decompositions={}, trace_joint=False, pre_dispatch=True
        )
    mutated = {**signature.buffers_to_mutate, **signature.user_inputs_to_mutate}
    if mutated:
        index = [str(name) for name in signature.user_inputs].index(next(iter(mutated.values())))
        name = own.graph.find_nodes(op="placeholder")[index].name
        raise CaptureError(
            f"the function or the denoiser changes '{name}' in place; clone it first, or, if it is a buffer, call"
            " .eval() on the denoiser"
        )
    assert isinstance(lowered, fx.GraphModule)
    lowered.graph.output_node().args = (tuple(output_list(lowered.graph)[:num_results]),)
    _note_evaluations(lowered.graph, evaluations)
    return _to_loop_graph(lowered, signature, schedule, positions, weights)


@dataclass(frozen=True)
class _StaticTensor:
    """A tensor among Dynamo's inputs, with its sizes as numbers."""

    spec: TensorForm

    @classmethod
    def of(cls, value: object) -> object:
        """Return the description of a tensor, the number for a symbolic number, and anything else as it is."""
        if isinstance(value, Tensor):
            # int() of a symbolic size makes Dynamo guard on its value.
            shape, stride = tuple(map(int, value.shape)), tuple(map(int, value.stride()))
            return cls(TensorForm(shape, stride, value.dtype, value.device))
        return int(value) if isinstance(value, torch.SymInt) else value


def _fake(specs: Iterable[TensorForm]) -> tuple[Tensor, ...]:
    # Later calls find the fake mode in the tensors.
    with FakeTensorMode():
        return tuple(spec.empty() for spec in specs)


def _check_modes(module: fx.GraphModule, example_inputs: Sequence[object]) -> None:
    results = (node.meta.get("example_value") for node in module.graph.output_node().all_input_nodes)
    if any(isinstance(value, Tensor) and value.requires_grad for value in results):
        raise CaptureError("a schedule is for sampling, not for training; call the function under torch.no_grad()")
    devices = {value.device.type for value in example_inputs if isinstance(value, Tensor)}
    enters = torch.amp.autocast_mode._enter_autocast
    if any(map(torch.is_autocast_enabled, devices)) or any(node.target is enters for node in module.graph.nodes):
        raise CaptureError(
            "backend 'l2c' does not take autocast; convert the denoiser with .to(torch.bfloat16), or use l2c_compile()"
        )


def _copy(module: fx.GraphModule, inputs: Sequence[object]) -> tuple[fx.GraphModule, set[int]]:
    """Return a copy of Dynamo's graph without grad modes and symbolic inputs, and the positions of its weights."""
    graph = fx.Graph()
    copies: dict[Node, Argument] = {}
    weights: set[int] = set()
    position = 0
    for node in module.graph.nodes:
        if node.op == "placeholder":
            value = inputs[position]
            if isinstance(value, _StaticTensor):
                if isinstance(node.meta.get("example_value"), nn.Parameter) or _is_held_by_a_module(node):
                    weights.add(position)
                copy = copies[node] = graph.placeholder(node.name)
                # The stack of an input is that of the module where Dynamo met it first: it is no call.
                copy.meta = {"example_value": node.meta.get("example_value"), _WEIGHT: position in weights}
            else:
                assert value is None or isinstance(value, (bool, int, float))
                copies[node] = value
            position += 1
        elif node.target not in _GRAD_MODES:
            copies[node] = graph.node_copy(node, copies.__getitem__)
    return fx.GraphModule(module, graph), weights


def _is_held_by_a_module(placeholder: Node) -> bool:
    """Return whether Dynamo found an input in a module: a buffer, or any other tensor among its attributes."""
    source = getattr(placeholder, "_dynamo_source", None)
    while isinstance(source, ChainedSource):
        if isinstance(source, NNModuleSource):
            return True
        source = source.base
    return False


@dataclass(frozen=True)
class _ModuleCall:
    """One call of a module, with its key and its name in Dynamo's stacks."""

    key: str
    name: str

    @property
    def module_id(self) -> str:
        """``str(id(module))``, as Dynamo notes it."""
        return self.key.partition("@")[0]


def _stack(node: Node) -> list[_ModuleCall]:
    """Return the calls that a node was made in, the outermost first."""
    return [_ModuleCall(str(key), str(entry[0])) for key, entry in (node.meta.get("nn_module_stack") or {}).items()]


@dataclass
class _ModuleCalls:
    """The calls of modules in a graph, in execution order, and what each of them made."""

    graph: fx.Graph
    nodes: dict[_ModuleCall, list[Node]] = field(default_factory=dict)
    parents: dict[_ModuleCall, list[_ModuleCall]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for node in self.graph.nodes:
            stack = _stack(node)
            for depth, call in enumerate(stack):
                self.nodes.setdefault(call, []).append(node)
                self.parents.setdefault(call, stack[:depth])

    def names(self) -> list[str]:
        """Return the names of all modules that are called."""
        return list(dict.fromkeys(call.name for call in self.nodes))

    def of_module(self, name: str) -> list[_ModuleCall]:
        """Return the calls of one module."""
        return [call for call in self.nodes if call.name == name]

    def paths_below(self, name: str) -> list[str]:
        """Return the paths, relative to module ``name``, of the modules that are called within it."""
        inner = (c.name for c, parents in self.parents.items() if any(parent.name == name for parent in parents))
        return list(dict.fromkeys(n.removeprefix(f"{name}.") for n in inner if n.startswith(f"{name}.")))


def _plain(name: str) -> str:
    """Return a name of Dynamo's as the user writes it: ``self.model`` for ``L['self'].model``."""
    return re.sub(r"^[LG]\['([^']+)'\]", r"\1", name)


def _find_denoiser(
    calls: _ModuleCalls, schedule: CacheSchedule, denoiser: nn.Module | str | None
) -> tuple[str, CacheSchedule]:
    """Return the name of the denoiser and the schedule, resolved with its modules."""
    names = calls.names()
    if not names:
        raise CaptureError(f"the graph calls no module at all; {_BROKEN}")
    if denoiser is not None:
        chosen = _names_of(calls, denoiser)
        if not chosen:
            what = f"'{denoiser}'" if isinstance(denoiser, str) else f"the given {type(denoiser).__name__}"
            hint = nearest(what, map(_plain, names)) or f"it calls {_listed(names)}"
            raise UnknownSiteError(f"option 'denoiser': the graph calls no module {what}; {hint}")
        name = chosen[0]
        paths = calls.paths_below(name)
        if isinstance(denoiser, nn.Module):
            paths = [path for path, _ in denoiser.named_modules()]
        return name, schedule.resolve(paths)
    if not schedule.sites:
        found = {name: schedule for name in names if any(not calls.parents[c] for c in calls.of_module(name))}
    else:
        found = {}
        reason: UnknownSiteError | None = None
        for name in names:
            try:
                found[name] = schedule.resolve(calls.paths_below(name))
            except UnknownSiteError as error:
                # The outermost module is the most likely denoiser, so its paths make the best hint.
                reason = reason or error
        if not found:
            raise UnknownSiteError(
                f"no module that the graph calls has all sites of the schedule. With '{_plain(names[0])}' as the"
                f" denoiser: {reason} A module that is never called, or only returns its input, cannot be a site."
            )
    if len(found) > 1:
        raise ScheduleError(
            f"the denoiser may be {_listed(found)}; choose with option 'denoiser': the module itself or its name"
        )
    return next(iter(found.items()))


_BROKEN = (
    "if the function was broken into several graphs, torch.compile(..., fullgraph=True) says where: a schedule is for"
    " the whole loop"
)


def _names_of(calls: _ModuleCalls, denoiser: nn.Module | str) -> list[str]:
    if isinstance(denoiser, str):
        return [name for name in calls.names() if denoiser in (name, _plain(name))]
    return [call.name for call in calls.nodes if call.module_id == str(id(denoiser))]


def _listed(names: Iterable[str]) -> str:
    plain = [f"'{_plain(name)}'" for name in names]
    return ", ".join(plain[:6]) + (", ..." if len(plain) > 6 else "")


def _check_count(name: str, evaluations: Sequence[_ModuleCall], schedule: CacheSchedule) -> None:
    if len(evaluations) != schedule.num_evaluations:
        raise ScheduleError(
            f"the schedule is for {schedule.num_evaluations} evaluations, but the graph calls '{_plain(name)}'"
            f" {len(evaluations)} times; use a schedule made for this loop (guidance in separate calls counts each of"
            f" them); {_BROKEN}"
        )


@dataclass(frozen=True)
class _ValueMark:
    """The mark of a site's value, and the nodes that show whether a write in place reaches the value."""

    site: Site
    evaluation: int
    node: Node
    value: Node
    inputs: tuple[Node, ...]
    """The values that the site's module uses and that other modules made."""
    first: Node
    """The first node that the module made."""
    last: Node
    """The last node that the module made."""


class _MarkInserter:
    """Inserts ``l2c::site`` behind the values, and where needed the inputs, of the sites that the schedule reads."""

    def __init__(
        self, graph: fx.Graph, calls: _ModuleCalls, evaluations: Sequence[_ModuleCall], schedule: CacheSchedule
    ) -> None:
        self.graph = graph
        self.calls = calls
        self.evaluations = evaluations
        self.schedule = schedule
        self.marks: list[_ValueMark] = []
        self.within: dict[tuple[_ModuleCall, str], list[_ModuleCall]] = {}
        outer = set(evaluations)
        for call, parents in calls.parents.items():
            for parent in outer.intersection(parents):
                self.within.setdefault((parent, call.name), []).append(call)

    def mark(self) -> None:
        cells: dict[tuple[int, Site], bool] = {}
        for (evaluation, site), reuse in self.schedule.reuses.items():
            if self.schedule.active(evaluation, site) is not None:
                for e in (evaluation, *reuse.sources):
                    reads_input = site.kind == "delta" or reuse.rule.needs_input
                    cells[e, site] = cells.get((e, site), False) or reads_input
        # Where a module ends with another, the inner one's mark is the value that the outer one returns. Of marks
        # behind one module the first is the outermost: a run holds what is read where its last module is reused.
        rank = {site: index for index, site in enumerate(self.schedule.sites)}
        order = sorted(cells, key=lambda cell: (-_last(cell[1]).count("."), -cell[1].num_modules, -rank[cell[1]]))
        for evaluation, site in order:
            self._mark_output(evaluation, site)
        for evaluation, site in order:
            if cells[evaluation, site]:
                self._mark_input(evaluation, site)

    def _call(self, evaluation: int, site: Site, path: str) -> _ModuleCall:
        outer = self.evaluations[evaluation]
        found = self.within.get((outer, f"{outer.name}.{path}"), [])
        if site.call >= len(found):
            raise UnknownSiteError(
                f"site '{site}': evaluation {evaluation} calls module '{path}' {len(found)} times, but the schedule"
                f" reads call number {site.call}; a call that only returns its input leaves no trace in the graph"
            )
        return found[site.call]

    def _mark_output(self, evaluation: int, site: Site) -> None:
        call = self._call(evaluation, site, _last(site))
        nodes = self.calls.nodes[call]
        inside = set(nodes)
        values = [node for node in nodes if not inside.issuperset(node.users)]
        if not values:
            raise UnknownSiteError(
                f"site '{site}': in evaluation {evaluation} nothing that it makes is used outside it"
            )
        inputs = tuple(self._given(call))
        after = nodes[-1]
        for port, value in enumerate(values):
            if not isinstance(value.meta.get("example_value"), Tensor):
                raise CaptureError(
                    f"site '{site}', evaluation {evaluation}: the module returns what is no tensor ({value.name}), and"
                    " the graph does not show which tensors of it are used; choose a module that returns tensors"
                )
            outside = set(value.users) - inside
            with self.graph.inserting_after(after):
                mark = self._insert(value, str(site), port, evaluation)
            self._note(mark, self.calls.parents[call], after, 1)
            value.replace_all_uses_with(mark, delete_user_cb=outside.__contains__)
            self.marks.append(_ValueMark(site, evaluation, mark, value, inputs, nodes[0], nodes[-1]))
            after = mark

    def _mark_input(self, evaluation: int, site: Site) -> None:
        call = self._call(evaluation, site, site.path)
        given = list(self._given(call))
        if len(given) != 1:
            output = next(mark.value for mark in self.marks if mark.site == site and mark.evaluation == evaluation)
            given = [node for node in given if _form(node).fits(_form(output))]
        if len(given) != 1:
            raise CaptureError(
                f"site '{site}', evaluation {evaluation}: the input of module '{site.path}' is read, but"
                f" {len(given) or 'none'} of the tensors that it uses could be that; reuse its output (kind 'out', rule"
                " hold), or compile with l2c_compile()"
            )
        inside = set(self.calls.nodes[call])
        first = self.calls.nodes[call][0]
        with self.graph.inserting_before(first):
            mark = self._insert(given[0], str(site), INPUT_PORT, evaluation)
        self._note(mark, self.calls.parents[call], first, 0)
        given[0].replace_all_uses_with(mark, delete_user_cb=lambda user: user in inside)

    def _given(self, call: _ModuleCall) -> Iterator[Node]:
        """Yield the tensors that a call uses but did not make, weights excluded."""
        inside = set(self.calls.nodes[call])
        seen: set[Node] = set()
        for node in self.calls.nodes[call]:
            for argument in node.all_input_nodes:
                value = argument.meta.get("example_value")
                if argument in inside or argument in seen or not isinstance(value, Tensor):
                    continue
                seen.add(argument)
                if argument.op != "get_attr" and not argument.meta.get(_WEIGHT):
                    yield argument

    def _insert(self, value: Node, site: str, port: int, evaluation: int) -> Node:
        mark = self.graph.call_function(SITE, (value, site, port, evaluation))
        mark.meta = {"example_value": value.meta["example_value"]}
        return mark

    def _note(self, mark: Node, parents: Sequence[_ModuleCall], neighbour: Node, distance: int) -> None:
        """Add ``mark`` to the nodes of the calls around the site's, before (0) or behind (1) ``neighbour``."""
        mark.meta["nn_module_stack"] = {call.key: (call.name, nn.Module) for call in parents}
        for call in parents:
            nodes = self.calls.nodes[call]
            if distance == 1 and nodes[-1] is neighbour:
                nodes.append(mark)
            else:
                # Only the first and the last node matter, not the order between them.
                nodes.insert(0 if distance == 0 and nodes[0] is neighbour else 1, mark)


def _last(site: Site) -> str:
    return site.last or site.path


def _form(node: Node) -> TensorForm:
    return TensorForm.of(node.meta["example_value"])


class _InPlaceWriteChecker(fx.Interpreter):
    """Runs Dynamo's graph, which may write in place, on fake tensors and checks which marks the writes reach."""

    def __init__(self, module: fx.GraphModule, marks: Sequence[_ValueMark]) -> None:
        super().__init__(module, garbage_collect_values=False)
        self.marks = marks
        self.firsts, self.lasts = _by(marks, "first"), _by(marks, "last")
        self.before: dict[_ValueMark, list[int]] = {}
        self.marked: dict[Node, int] = {}

    def run_node(self, n: Node) -> object:
        for mark in self.firsts.get(n, ()):
            self.before[mark] = self._versions(mark)
        result: object = super().run_node(n)
        for mark in self.lasts.get(n, ()):
            if self.before[mark] != self._versions(mark):
                raise CaptureError(
                    f"site '{mark.site}': module '{_last(mark.site)}' writes into its input in place, so more than its"
                    " output would change where it is reused; let it clone that input first"
                )
        if n.target is SITE:
            (value,) = n.all_input_nodes
            self.marked[n] = self.env[value]._version
        return result

    def check_marks(self) -> None:
        for mark in self.marks:
            value, copy = self.env[mark.node.all_input_nodes[0]], self.env[mark.node]
            shares = any(_storage(value) == _storage(self.env[node]) for node in mark.inputs)
            if value._version != self.marked[mark.node] or (shares and copy._version != 0):
                raise CaptureError(
                    f"site '{mark.site}', evaluation {mark.evaluation}: a write in place reaches a tensor that shares"
                    " memory with the site's value; clone one of them first"
                )

    def _versions(self, mark: _ValueMark) -> list[int]:
        return [self.env[node]._version for node in mark.inputs]


def _by(marks: Iterable[_ValueMark], name: str) -> dict[Node, list[_ValueMark]]:
    found: dict[Node, list[_ValueMark]] = {}
    for mark in marks:
        found.setdefault(getattr(mark, name), []).append(mark)
    return found


def _storage(tensor: Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)


def _return_marks(graph: fx.Graph) -> int:
    """Add the marks to the results of the graph, so that lowering keeps values that only a later read uses.

    Returns:
        The number of results without the marks.
    """
    results = output_list(graph)
    graph.output_node().args = ((*results, *graph.find_nodes(op="call_function", target=SITE)),)
    return len(results)


def _check_in_place(module: fx.GraphModule, inputs: Sequence[Tensor], marks: Sequence[_ValueMark]) -> None:
    checker = _InPlaceWriteChecker(module, marks)
    fake_mode = next((value.fake_mode for value in inputs if isinstance(value, FakeTensor)), FakeTensorMode())
    with fake_mode:
        checker.run(*inputs)
    checker.check_marks()


def _note_evaluations(graph: fx.Graph, evaluations: Sequence[_ModuleCall]) -> None:
    """Note on each node its evaluation and its path within the denoiser."""
    numbers = {call: number for number, call in enumerate(evaluations)}
    for node in graph.nodes:
        stack = _stack(node)
        node.meta.pop("nn_module_stack", None)
        depth = next((depth for depth, call in enumerate(stack) if call in numbers), None)
        if depth is None:
            continue
        outer = stack[depth]
        node.meta["evaluation"] = numbers[outer]
        node.meta["nn_module_stack"] = {
            call.key: (call.name.removeprefix(outer.name).removeprefix("."), "") for call in stack[depth:]
        }
        if draws_random_numbers(node):
            raise CaptureError(
                f"the denoiser draws random numbers ({node.target}) in module '{module_path(node)}', evaluation"
                f" {numbers[outer]}; call .eval() if it is dropout, or draw them in the loop and pass them in"
            )


def _to_loop_graph(
    lowered: fx.GraphModule,
    signature: GraphSignature,
    schedule: CacheSchedule,
    positions: Sequence[int],
    weights: Collection[int],
) -> DynamoLoop:
    """Copy the lowered graph, with the noise as its first inputs and tensors of the graph's own code as buffers."""
    inputs = dict(zip(signature.user_inputs, positions, strict=True))
    placeholders = {
        node: inputs[node.name] for node in lowered.graph.find_nodes(op="placeholder") if node.name in inputs
    }
    noise = _noise(lowered.graph, {node for node, position in placeholders.items() if position not in weights})
    order = sorted(placeholders, key=lambda node: (node not in noise, placeholders[node]))
    loop = LoopGraph(
        graph=fx.Graph(),
        root=nn.Module(),
        schedule=schedule,
        num_noise=len(noise),
        out_spec=tree_structure(output_list(lowered.graph)),
    )
    copies: dict[Node, Node] = {}
    for node in order:
        copies[node] = loop.graph.placeholder(node.name)
    for node in lowered.graph.nodes:
        if node.op == "output":
            copies[node] = loop.graph.output(
                [copies[n] if isinstance(n, Node) else n for n in output_list(lowered.graph)]
            )
        elif node.op == "get_attr":
            copies[node] = loop.graph.get_attr(loop.new_constant(getattr(lowered, str(node.target))))
        elif node not in copies:
            copies[node] = loop.graph.node_copy(node, copies.__getitem__)
        copies[node].meta = dict(node.meta)
    return DynamoLoop(loop, tuple(placeholders[node] for node in order))


def _noise(graph: fx.Graph, inputs: Collection[Node]) -> set[Node]:
    """Return the noise: the inputs that the loop itself combines with what the denoiser returned.

    The other inputs are conditions. This decides only what the passes may expect to know before the loop. If no input
    is combined so, all floating inputs count as noise.
    """
    sources: dict[Node, frozenset[Node]] = {}
    predicted: set[Node] = set()
    noise: set[Node] = set()
    for node in graph.nodes:
        if node.op == "output":
            continue
        sources[node] = frozenset({node}) if node in inputs else frozenset()
        if "evaluation" in node.meta:
            predicted.add(node)
            continue
        sources[node] = sources[node].union(*(sources[argument] for argument in node.all_input_nodes))
        if not predicted.isdisjoint(node.all_input_nodes):
            predicted.add(node)
            noise |= sources[node]
    return noise or {node for node in inputs if node.meta["val"].is_floating_point()}
