"""A program: a denoiser, a loop and a schedule, drawn at random; and what must hold of it once it is compiled.

``draw_programs(rng)`` draws the programs of one denoiser: captures cost most, so several loops and schedules share
them. ``Checker.check`` compiles one through the passes that it names and judges the result by the reference;
``Checker.check_through_dynamo`` compiles it as a function of the user's own, with the backend "l2c".
"""

from __future__ import annotations

import json
import operator
import random
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any, cast

import torch
from torch import Tensor, fx, nn
from torch._dynamo.exc import BackendCompilerFailed
from torch.utils._pytree import tree_flatten, tree_leaves

from bench.trust.bits import own, same_bits
from bench.trust.programs.denoisers import Description, build_denoiser, draw_denoiser
from bench.trust.programs.loops import DrawnLoop, draw_form, draw_inputs, draw_loop
from bench.trust.programs.schedules import CalledModules, draw_schedule, draw_sites, schedule_from
from l2c_compile import CacheSchedule, Site, run_reference
from l2c_compile.analyses.cost import prices_of
from l2c_compile.analyses.summary import summarize
from l2c_compile.errors import L2CError
from l2c_compile.frontend.capture import capture
from l2c_compile.frontend.trace import trace_loop
from l2c_compile.frontend.unroll import unroll
from l2c_compile.graphs.facts import Fact
from l2c_compile.graphs.forms import CallSignature
from l2c_compile.graphs.loop_graph import EvaluationGraph, LoopGraph
from l2c_compile.graphs.nodes import infer
from l2c_compile.graphs.skeleton import LoopSkeleton
from l2c_compile.passes.base import Pass, Pipeline
from l2c_compile.passes.pipeline import BITWISE, EVALUATION, LOOP, REGIONS, SKELETON
from l2c_compile.torch_backend import l2c

_LOOPS_PER_DENOISER = 3
_SCHEDULES_PER_LOOP = 16

_PASSES: dict[str, Pass] = {each.name: each for each in LOOP.passes}
_CUT: tuple[str, ...] = ("read-reused-sites", "drop-dead", "lower-cache-reads", "drop-site-marks", "drop-dead")
"""The passes without which a schedule has no effect; every other is drawn."""


class Mismatch(AssertionError):
    """A compiled program is not what it should be."""


@dataclass(frozen=True)
class Program:
    """One program and the passes that it is compiled with, all of it JSON."""

    denoiser: Description
    loop: Description
    num_evaluations: int
    sites: list[str]
    read_inputs: list[str]
    """The sites whose inputs are marked in the captures, because a rule may read them."""
    entries: list[Description]
    """The reuses of the schedule."""
    pipelines: list[list[str]]
    """The names of the passes of each pipeline, in order. Each pipeline is judged by itself."""
    in_regions: bool
    """Whether the graph of the last pipeline is also judged in regions."""
    runs_again: bool
    """Whether each graph runs on another input, too, and on the first one again."""

    def to_json(self) -> str:
        """Return the description on one line."""
        return json.dumps(asdict(self), sort_keys=True)

    @classmethod
    def from_json(cls, text: str) -> Program:
        """Read a description."""
        return cls(**json.loads(text))

    @property
    def key(self) -> str:
        """A text that is equal for programs that differ at most in their passes."""
        return json.dumps([self.denoiser, self.loop, self.sites, self.entries], sort_keys=True)


@dataclass(frozen=True)
class Outcome:
    """The result of a check that did not fail."""

    refused: str = ""
    """The message with which the compiler refused the program; empty if it compiled."""


def draw_programs(rng: random.Random) -> Iterator[Program]:
    """Draw a denoiser, and yield some programs that use it."""
    description = draw_denoiser(rng)
    denoiser = build_denoiser(description)
    form = draw_form(rng)
    sites: list[str] = []
    read_inputs: list[str] = []
    for _ in range(_LOOPS_PER_DENOISER):
        loop = draw_loop(rng, description, form)
        noise, conditions = draw_inputs(description, loop, 0)
        called = CalledModules.of(denoiser, noise.clone(), torch.ones(loop["batch"]), **conditions)
        if not sites:
            sites = draw_sites(rng, called)
            read_inputs = [s for s in sites if called.change_is_defined(Site.parse(s)) and rng.random() < 0.3]
        forms = _forms_of_evaluations(denoiser, DrawnLoop(loop), noise, conditions)
        for _ in range(_SCHEDULES_PER_LOOP):
            entries = draw_schedule(rng, sites, forms, read_inputs)
            # Other sums than the reference's are told from wrong ones in float64 only.
            wholes = [BITWISE, LOOP] if description["dtype"] == "float64" else [BITWISE]
            pipelines = [_draw_pipeline(rng, rng.choice(wholes))]
            # Neither changes what is compiled; both cost as much as the rest.
            in_regions, runs_again = rng.random() < 0.5, rng.random() < 0.3
            yield Program(description, loop, len(forms), sites, read_inputs, entries, pipelines, in_regions, runs_again)


def evaluations_of(program: Program) -> int:
    """Return the number of times that the loop calls the denoiser."""
    inputs = draw_inputs(program.denoiser, program.loop, 0)
    return len(_forms_of_evaluations(build_denoiser(program.denoiser), DrawnLoop(program.loop), *inputs))


def _forms_of_evaluations(
    denoiser: nn.Module, loop: DrawnLoop, noise: Tensor, conditions: dict[str, Tensor]
) -> list[object]:
    """Return the shape of what each evaluation is given: only equal ones hold values of equal shape."""
    forms: list[object] = []
    hook = denoiser.register_forward_pre_hook(lambda _, args: forms.append((args[0].shape, args[0].stride())))
    with torch.no_grad():
        loop(denoiser, noise.clone(), **own(conditions))
    hook.remove()
    return forms


def _draw_pipeline(rng: random.Random, whole: Pipeline) -> list[str]:
    """Draw the whole pipeline, one pass alone, some of the passes, or another order that is allowed."""
    names = [each.name for each in whole.passes]
    match rng.choice(("whole", "whole", "alone", "some", "reordered")):
        case "alone":
            return [*_CUT, rng.choice([name for name in names if name not in _CUT])]
        case "some":
            dropped = rng.sample(range(len(names)), rng.randrange(1, len(names)))
            for index in sorted(dropped, reverse=True):
                fewer = names[:index] + names[index + 1 :]
                if "read-reused-sites" in fewer and _pipeline(fewer) is not None:
                    names = fewer
        case "reordered":
            for _ in range(40):
                index = rng.randrange(len(names) - 1)
                other = [*names[:index], names[index + 1], names[index], *names[index + 2 :]]
                if _pipeline(other) is not None:
                    names = other
    return names


def _pipeline(names: Sequence[str]) -> Pipeline | None:
    """Return the pipeline of these passes, None where one needs what no earlier one gives."""
    try:
        return Pipeline(tuple(_PASSES[name] for name in names), LOOP.assumes)
    except ValueError:
        return None


def _facts_after(names: Sequence[str]) -> set[Fact]:
    facts = set(LOOP.assumes)
    for each in (_PASSES[name] for name in names):
        facts = (facts - each.breaks) | each.gives
    return facts


def _leave_no_dead(names: Sequence[str]) -> bool:
    return Fact.NO_DEAD_NODES in _facts_after(names)


def _in_regions(names: Sequence[str], graph: LoopGraph) -> LoopGraph | None:
    """Return a copy of the graph in regions, None where the passes do not allow that."""
    if not REGIONS.assumes <= _facts_after(names):
        return None
    regions = graph.copy()
    REGIONS.run(regions)
    return regions


class Checker:
    """Compiles and judges programs of one denoiser; captures and traces are shared."""

    def __init__(self, description: Description) -> None:
        self.description = description
        self.denoiser = build_denoiser(description)
        self._captures: dict[object, EvaluationGraph | L2CError] = {}
        self._skeletons: dict[object, LoopSkeleton] = {}
        self._versions = self._weight_versions()

    def check(self, program: Program) -> Outcome:
        """Compile ``program`` and compare it with the reference.

        Raises:
            Mismatch: if it is not equal, changes its inputs or weights, keeps state, or is not as its metadata says.
            Exception: if the compiler raises anything that is no refusal in words of its own.
        """
        loop = DrawnLoop(program.loop)
        schedule = schedule_from(program.sites, program.entries, program.num_evaluations)
        try:
            graphs = [(names, self._compiled(program, schedule, names)) for names in program.pipelines]
            regions = _in_regions(*graphs[-1]) if program.in_regions else None
        except L2CError as error:
            if not isinstance(error, ValueError):
                raise
            return Outcome(refused=f"{type(error).__name__}: {error}")
        seeds = (1, 2) if program.runs_again else (1,)
        runs = [
            _ReferenceRun(self.denoiser, loop, schedule, *draw_inputs(self.description, program.loop, s)) for s in seeds
        ]
        if not program.entries and not same_bits(runs[0].wanted, runs[0].plain()):
            raise Mismatch("the reference without reuses is not the loop itself")
        _check_summary(graphs[0][1], schedule, no_dead=_leave_no_dead(graphs[0][0]))
        for names, graph in graphs:
            _judge(graph, runs, _is_bitwise(names), f"passes {', '.join(names)}")
        if regions is not None:
            _judge(regions, runs[:1], _is_bitwise(names), f"passes {', '.join(names)}, outline-regions")
        self._check_weights()
        return Outcome()

    def check_through_dynamo(self, program: Program) -> Outcome:
        """Compile the loop of ``program`` with ``torch.compile(..., backend="l2c")``; it must equal the reference.

        Raises:
            Mismatch: if it does not, bit for bit, or it changes its inputs or weights.
            Exception: if the backend raises anything that is no refusal in words of its own.
        """
        loop = DrawnLoop(program.loop)
        schedule = schedule_from(program.sites, program.entries, program.num_evaluations)
        try:
            run = _ReferenceRun(self.denoiser, loop, schedule, *draw_inputs(self.description, program.loop, 1))
        except RuntimeError as error:
            # A schedule that reuses a value of another shape has no right answer; ``check`` holds that it is refused.
            return Outcome(refused=f"NoReference: {error}")
        called = CalledModules.of(self.denoiser, own(run.noise), torch.ones(len(run.noise)), **own(run.conditions))
        for _, site in schedule.reuses:
            if (site.last or site.path) in called.pass_on:
                # A documented limit: the graph does not show it, so it is not reused.
                return Outcome(refused=f"NoTrace: {site} returns what it was given")
        inputs = own(run.inputs)
        torch._dynamo.reset()
        options: dict[str, Any] = {"router": schedule, "backend": "eager", "numerics": "bitwise"}

        def sample(noise: Tensor, conditions: Sequence[Tensor]) -> object:
            return loop(self.denoiser, noise, **dict(zip(run.conditions, conditions, strict=True)))

        try:
            with run.seeded():
                got = torch.compile(sample, backend=l2c, options=options, fullgraph=True)(inputs[0], inputs[1:])
        except BackendCompilerFailed as error:
            reason = error.inner_exception
            if not isinstance(reason, L2CError) or not isinstance(reason, ValueError):
                raise
            return Outcome(refused=f"{type(reason).__name__}: {reason}")
        if not same_bits(tree_leaves(got), tree_leaves(run.wanted)):
            raise Mismatch(f"through Dynamo: got {got}, wanted {run.wanted}")
        if not same_bits(inputs, run.inputs):
            raise Mismatch("through Dynamo: writes into its inputs")
        self._check_weights()
        return Outcome()

    def _compiled(self, program: Program, schedule: CacheSchedule, names: Sequence[str]) -> LoopGraph:
        """Return the graph after the passes."""
        pipeline = _pipeline(names)
        assert pipeline is not None
        skeleton = self._skeleton(program, schedule.sites)
        graph = unroll(skeleton, self.denoiser, schedule)
        graph.prices = prices_of(skeleton)
        pipeline.run(graph)
        return graph

    def _skeleton(self, program: Program, sites: tuple[Site, ...]) -> LoopSkeleton:
        """Trace the loop, as ``api.build_loop_graph`` does."""
        loop = DrawnLoop(program.loop)
        marking = (sites, frozenset(map(Site.parse, program.read_inputs)))
        key = (json.dumps(loop.how, sort_keys=True), marking)

        def capture_call(signature: CallSignature) -> EvaluationGraph:
            form = (signature, marking)
            if form not in self._captures:
                try:
                    evaluation = capture(self.denoiser, signature, *marking)
                except L2CError as error:
                    self._captures[form] = error
                else:
                    EVALUATION.run(evaluation)
                    self._captures[form] = evaluation
            captured = self._captures[form]
            if isinstance(captured, L2CError):
                raise captured
            return captured

        if key not in self._skeletons:
            noise, conditions = draw_inputs(self.description, loop.how, 0)
            skeleton = trace_loop(loop, self.denoiser, noise, conditions, capture_call)
            SKELETON.run(skeleton)
            self._skeletons[key] = skeleton
        return self._skeletons[key]

    def _check_weights(self) -> None:
        if self._weight_versions() != self._versions:
            raise Mismatch("a weight or buffer of the denoiser was written into")

    def _weight_versions(self) -> list[int]:
        return [tensor._version for tensor in (*self.denoiser.parameters(), *self.denoiser.buffers())]


class _ReferenceRun:
    """One input of a program, and the result of the reference for it."""

    def __init__(
        self,
        denoiser: nn.Module,
        loop: DrawnLoop,
        schedule: CacheSchedule,
        noise: Tensor,
        conditions: dict[str, Tensor],
    ) -> None:
        self.denoiser, self.loop, self.noise, self.conditions = denoiser, loop, noise, conditions
        self.inputs = [noise, *conditions.values()]
        self.seed = 7
        with self.seeded():
            self.wanted = run_reference(denoiser, loop, schedule, own(noise), own(conditions))
        if not all(bool(leaf.isfinite().all()) for leaf in tree_leaves(self.wanted) if isinstance(leaf, Tensor)):
            raise AssertionError("the drawn program is not finite")

    def seeded(self) -> Any:  # noqa: ANN401 - a context manager of torch
        torch.manual_seed(self.seed)
        return torch.no_grad()

    def plain(self) -> object:
        with self.seeded():
            return self.loop(self.denoiser, own(self.noise), **own(self.conditions))


def _is_bitwise(names: Sequence[str]) -> bool:
    return all(_PASSES[name] in BITWISE.passes for name in names)


def _judge(graph: LoopGraph, runs: Sequence[_ReferenceRun], exact: bool, what: str) -> None:
    """Run a graph on each input, and after several on the first again; write into every result as a caller may."""
    for number, run in enumerate((*runs, runs[0]) if len(runs) > 1 else runs):
        inputs = own(run.inputs)
        with run.seeded():
            leaves = list(_NoteChecker(graph.root, graph=graph.graph).run(*inputs))
        wanted, spec = tree_flatten(run.wanted)
        if spec != graph.out_spec:
            raise Mismatch(f"{what}: returns {graph.out_spec}, wanted {spec}")
        if not (same_bits(leaves, wanted) if exact else are_close(leaves, wanted)):
            raise Mismatch(f"{what}, run {number}: got {leaves}, wanted {wanted}")
        if not same_bits(inputs, run.inputs):
            raise Mismatch(f"{what}: writes into its inputs")
        for leaf in leaves:
            if isinstance(leaf, Tensor) and leaf.is_floating_point() and torch._debug_has_internal_overlap(leaf) == 0:
                leaf.fill_(torch.nan)
        if not same_bits(inputs, run.inputs):
            raise Mismatch(f"{what}: its results share memory with its inputs")


_RELATIVE = 1e-9
"""The largest relative error allowed: far above that of another order of sums in float64 (2e-16 an operation, and norms
that magnify it by a thousand), far below that of another formula."""


def are_close(got: Sequence[object], wanted: Sequence[object], relative: float = _RELATIVE) -> bool:
    """Return whether two lists of results are equal up to another order of sums."""
    return len(got) == len(wanted) and all(_is_close(*pair, relative) for pair in zip(got, wanted, strict=True))


def _is_close(got: object, wanted: object, relative: float) -> bool:
    if not isinstance(got, Tensor) or not isinstance(wanted, Tensor):
        return same_bits(got, wanted)
    if got.dtype != wanted.dtype or got.shape != wanted.shape or got.stride() != wanted.stride():
        return False
    return bool((got - wanted).abs().max() <= relative * wanted.abs().max())


class _NoteChecker(fx.Interpreter):
    """Runs a graph, regions included, and compares every value with what its node notes."""

    is_region = False

    def run_node(self, n: fx.Node) -> Any:  # noqa: ANN401 - whatever a node returns
        value = super().run_node(n)
        if n.op != "output" and "val" in n.meta:
            try:
                _compare_forms(value, n.meta["val"], n)
            except Mismatch:
                if not self._is_torchs(n):
                    raise
        return value

    def _is_torchs(self, node: fx.Node) -> bool:
        """Return whether torch itself computes what the node notes, from what its arguments note.

        For expanded arguments torch's operators without values give other strides than those with (torch 2.13).
        """
        if node.target is operator.getitem:
            source, index = cast("tuple[fx.Node, int]", node.args)
            expected: object = source.meta["val"][index]
        elif node.target is torch.ops.higher_order.invoke_subgraph:
            body = self.fetch_attr(str(cast("fx.Node", node.args[0]).target))
            expected = body.graph.output_node().meta["val"]
        elif isinstance(node.target, torch._ops.OpOverload):
            expected = infer(node.target, node.args, node.kwargs)
        else:
            # What a region is passed was compared where it was made.
            return node.op == "placeholder" and self.is_region
        try:
            _compare_forms(expected, node.meta["val"], node)
        except Mismatch:
            return False
        return True

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:  # noqa: ANN401
        if target is torch.ops.higher_order.invoke_subgraph:
            body, _, *operands = args
            region = _NoteChecker(body)
            region.is_region = True
            return region.run(*operands)
        return super().call_function(target, args, kwargs)


def _compare_forms(value: object, noted: object, node: fx.Node) -> None:
    if isinstance(value, (tuple, list)) and isinstance(noted, (tuple, list)):
        for each, note in zip(value, noted, strict=True):
            _compare_forms(each, note, node)
    elif isinstance(value, Tensor) and isinstance(noted, Tensor):
        form, said = _form(value), _form(noted)
        if form != said:
            raise Mismatch(f"{node.format_node()} gives {form}, its metadata says {said}")


def _form(value: Tensor) -> tuple[object, ...]:
    # The stride of a dimension of size 1 says nothing; torch's fake and real operators differ in it.
    strides = [stride for size, stride in zip(value.shape, value.stride(), strict=True) if size > 1]
    return tuple(value.shape), strides, value.dtype


def _check_summary(graph: LoopGraph, schedule: CacheSchedule, no_dead: bool) -> None:
    summary = summarize(graph)
    computed = [row.num_computed for row in summary.rows]
    read = [row.num_read for row in summary.rows]
    active = [sum(schedule.active(e, s) is not None for s in schedule.sites) for e in range(schedule.num_evaluations)]
    if computed != schedule.computed_per_evaluation() or read != active:
        raise Mismatch(f"the summary counts {computed} computed and {read} read, the schedule says otherwise")
    full = sum(row.multiply_adds_uncached for row in summary.rows)
    if no_dead and not 0 <= summary.multiply_adds <= full:
        raise Mismatch(f"the summary counts {summary.multiply_adds} multiply-adds of {full}")
