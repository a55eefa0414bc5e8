"""l2c_compile(): from a denoiser and a schedule to one static graph that runs; start here.

The flow is ``build_loop_graph``, one line a stage. ``CompiledSampler`` keeps one ``Program`` for each form of input.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Literal

import torch
from torch import Tensor, fx, nn
from torch.utils._pytree import tree_flatten, tree_unflatten

from l2c_compile.backend import (
    EAGER,
    Backend,
    Progress,
    check_backend,
    check_mode,
    kernels_for,
    lower_to_backend,
    num_regions,
    passes_for,
    silent,
)
from l2c_compile.capture import CallSignature, StaticValue, TensorSpec, capture, check_sites_exist, tensors_in
from l2c_compile.comparison import VerifyReport, compare_with_reference
from l2c_compile.cost import NodeTimes
from l2c_compile.errors import L2CError, ScheduleError, StaleConstantsError
from l2c_compile.graph import EvaluationGraph, LoopGraph, write_into
from l2c_compile.loops import Loop as BuiltInLoop
from l2c_compile.loops import loop_from_dict
from l2c_compile.passes.base import PassRun, Pipeline
from l2c_compile.passes.fold_constants import make_constants
from l2c_compile.passes.pipeline import BITWISE, EVALUATION, SKELETON
from l2c_compile.prediction import Prediction, predict
from l2c_compile.proof import Proof, prove
from l2c_compile.router import Router, schedule_of
from l2c_compile.saved import save_sampler
from l2c_compile.schedule import CacheSchedule
from l2c_compile.summary import Summary, summarize
from l2c_compile.trace import Loop, LoopSkeleton, trace_loop
from l2c_compile.unroll import unroll
from l2c_compile.weights_lock import one_capture, weights_in_use, weights_swapped

__all__ = ["CompiledSampler", "Program", "build_loop_graph", "l2c_compile", "trace_and_capture"]


def l2c_compile(
    model: nn.Module,
    router: Router | CacheSchedule,
    loop: Loop | None = None,
    *,
    backend: Backend = EAGER,
    threshold: float | None = None,
    numerics: Literal["bitwise", "rounding"] | None = None,
    without: Collection[str] = (),
    caches: Literal["int8", "fp8"] | None = None,
    mode: Literal["reduce-overhead"] | None = None,
    progress: Progress | None = None,
) -> CompiledSampler:
    """Compile a sampling loop and its cache schedule into one static graph.

    Nothing is captured yet: the first call does that, and every call with another form of input (shape, strides, dtype,
    device, or a Python value among the conditions) does it again for that form, like ``torch.compile``.

    Args:
        model: the denoiser. Its weights are shared, not copied.
        router: which sites are reused in which evaluations.
        loop: ``loop(denoiser, noise, **conditions) -> latent``; None takes the loop that the router was made for.
        backend: what runs the graph: "eager", "aot_eager", "inductor" or any other that ``torch.compile`` takes.
        numerics: "bitwise" runs only the passes that change no bit in eager mode; "rounding" also those that compute
            the same formula in another order, and faster kernels for linear layers on CPUs. None takes "bitwise" for
            backend "eager", "rounding" for all others: they round in their own way anyway.
        without: names of passes to leave out, as ``passes/pipeline.py`` lists them.
        threshold: scores above it are computed; None takes the router's own. Only for a ``Router``.
        caches: "int8" or "fp8" keeps values for later evaluations in one byte an element, with a scale for each token:
            less memory, and another result (``kernels/README.md`` says how far off). None keeps them as they are.
        mode: "reduce-overhead" records the whole loop as one CUDA graph in the first call of each form and replays it,
            so that nothing is launched from Python. Inputs are copied in and results copied out. CUDA only.
        progress: told each stage of a capture before it begins.

    Returns:
        An ``nn.Module`` to be called as ``sampler(noise, **conditions)``.

    Raises:
        UnknownSiteError: the schedule names a module that ``model`` does not have.
        ScheduleError: there is no loop, or a threshold for a schedule that needs none.
        BackendError: torch.compile knows no such backend, or there is no such mode.
        ValueError: ``without`` names an unknown pass, one that another pass needs, or the one that applies the
            schedule; or no such ``caches``.
    """
    schedule = schedule_of(router, threshold)
    if loop is None:
        if schedule.loop is None:
            raise ScheduleError(
                "the schedule does not say which loop it was made for; give one: l2c_compile(model, s, loop)"
            )
        loop = loop_from_dict(schedule.loop)
    check_backend(backend)
    check_mode(mode)
    schedule = schedule.resolve([path for path, _ in model.named_modules()])
    check_sites_exist(model, schedule.sites)
    passes, kernels = passes_for(backend, numerics, without, caches), kernels_for(backend, numerics, without)
    return CompiledSampler(model, schedule, loop, backend, passes, kernels, progress, mode)


def build_loop_graph(
    denoiser: nn.Module,
    loop: Loop,
    schedule: CacheSchedule,
    noise: object,
    conditions: Mapping[str, object],
    passes: Pipeline = BITWISE,
    progress: Progress | None = None,
) -> tuple[LoopGraph, list[PassRun]]:
    """Return the loop as one static graph, and what the passes did."""
    say = progress or silent
    skeleton = trace_and_capture(denoiser, loop, schedule, noise, conditions, progress)
    say("simplify")
    SKELETON.run(skeleton)
    skeleton.note_dependencies()
    for evaluation in {id(call.graph): call.graph for call in skeleton.calls}.values():
        EVALUATION.run(evaluation)
    say(f"unroll {len(skeleton.calls)} evaluations")
    graph = unroll(skeleton, denoiser, schedule)
    runs = passes.run(graph, on_pass=lambda name: say(f"pass {name}"))
    return graph, runs


def trace_and_capture(
    denoiser: nn.Module,
    loop: Loop,
    schedule: CacheSchedule,
    noise: object,
    conditions: Mapping[str, object],
    progress: Progress | None = None,
) -> LoopSkeleton:
    """Return the loop as it is traced, with its evaluations as they are captured: no pass has run."""
    say = progress or silent
    evaluations: dict[CallSignature, EvaluationGraph] = {}
    read_inputs_of = {site for (_, site), reuse in schedule.reuses.items() if reuse.rule.needs_input}

    def capture_call(signature: CallSignature) -> EvaluationGraph:
        if signature not in evaluations:
            say(f"capture form {len(evaluations)} of an evaluation")
            evaluations[signature] = capture(denoiser, signature, schedule.sites, read_inputs_of)
        return evaluations[signature]

    say("trace the loop")
    # Torch's flag that somebody traces is one for all threads: code that torch.compile made would refuse to run.
    with weights_swapped():
        skeleton = trace_loop(loop, denoiser, noise, conditions, capture_call)
    _check_num_evaluations(schedule, len(skeleton.calls))
    return skeleton


def _check_num_evaluations(schedule: CacheSchedule, performed: int) -> None:
    if schedule.num_evaluations != performed:
        raise ScheduleError(
            f"the schedule is for {schedule.num_evaluations} evaluations, but the loop calls the denoiser {performed}"
            " times; use a schedule made for this loop (guidance in separate calls counts each of them)"
        )


@dataclass
class Program:
    """The compiled loop for one form of input."""

    graph: LoopGraph
    passes: list[PassRun]
    run: Callable[..., Sequence[object]]
    """The graph, through the backend."""
    inputs: CallSignature
    """The form of ``(noise, conditions)``."""
    weights: object
    """Dtypes and devices of the denoiser's parameters, and which of them are one."""
    versions: dict[str, tuple[int, int, int]] = field(default_factory=dict)
    """Identity, memory and version of the weights that constants were folded from, when they were folded."""

    @cached_property
    def module(self) -> fx.GraphModule:
        """The graph as a module, flat; made when it is first asked for, unless the backend made it."""
        is_flat = isinstance(self.run, fx.GraphModule) and num_regions(self.run) == 0
        return self.run if is_flat else self.graph.module()  # type: ignore[return-value]

    @cached_property
    def module_to_trace(self) -> fx.GraphModule:
        """The graph as a module for torch.compile; made when it is first asked for."""
        return self.graph.module_to_trace()


class CompiledSampler(nn.Module):
    """A sampling loop that runs as one static graph: ``sampler(noise, **conditions) -> latent``.

    Holds no state between calls, so threads may sample at once. While one thread captures a new form, torch.export
    swaps the weights of the model, and samplers in other threads wait; they run on during the rest of the compilation.
    Only samplers wait: what uses the model itself, and what ``torch.compile`` made of a sampler, must not run while a
    form is captured. Processes may be forked; the child calls ``torch.set_num_threads(1)`` first, as in torch's data
    loaders.

    Runs under ``torch.no_grad``. ``model`` is a submodule, so ``state_dict``, ``to`` and
    ``load_state_dict`` reach its weights; after changing weights in place call ``refresh``.

    ``torch.compile(sampler, fullgraph=True)`` takes the static graph into its own, for every form that was captured
    before; weights are then checked for changes when it traces, not in every call.
    """

    def __init__(
        self,
        model: nn.Module,
        schedule: CacheSchedule,
        loop: Loop,
        backend: Backend,
        passes: Pipeline,
        kernels: Pipeline,
        progress: Progress | None = None,
        mode: str | None = None,
    ) -> None:
        super().__init__()
        self.model = model
        self.schedule = schedule
        self.loop = loop
        self.backend = backend
        self.passes = passes
        self.mode = mode
        self.kernels = kernels
        self.training = model.training
        self._progress = progress
        self._begin_empty()

    def _begin_empty(self) -> None:
        self._programs: dict[object, Program] = {}
        self._known: list[Program] = []
        self._latest: Program | None = None

    def __getstate__(self) -> dict[str, object]:
        """Leave out what belongs to this process: a copy captures anew."""
        return {name: value for name, value in self.__dict__.items() if name not in _PER_PROCESS}

    def __setstate__(self, state: dict[str, object]) -> None:
        """Restore, with nothing captured."""
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self._begin_empty()

    def forward(self, noise: object, **conditions: object) -> object:
        """Sample.

        Args:
            noise: what the loop takes as its first argument: a tensor, or nested containers of tensors.
            **conditions: the loop's keyword arguments. Tensors are inputs of the graph; anything else is static.

        Raises:
            StaleConstantsError: weights changed since constants were folded from them.
            CaptureError, LoopTraceError, ScheduleError: see ``capture``.
        """
        if torch.compiler.is_dynamo_compiling():
            # The static graph itself goes into Dynamo's, whatever the sampler's own backend is.
            program = self._captured(_form_of(noise, conditions))
            with torch.no_grad():
                leaves = program.module_to_trace(*tensors_in((noise, conditions)))
        else:
            program = self.capture(noise, **conditions)
            with weights_in_use(), torch.no_grad():
                _check_fresh(program)
                leaves = program.run(*tensors_in((noise, conditions)))
        return tree_unflatten(list(leaves), program.graph.out_spec)

    def capture(self, noise: object, **conditions: object) -> Program:
        """Return the program for this form of input, building it if there is none yet; nothing is sampled."""
        inputs = _form_of(noise, conditions)
        with weights_in_use():
            form = self._form(inputs)
        program = self._programs.get(form)
        if program is None:
            with one_capture():
                # Another thread may have built it meanwhile.
                program = self._programs.get(form) or self._build(inputs, noise, conditions)
                self._programs[form] = program
                self._known = list(reversed(self._programs.values()))
        self._latest = program
        return program

    @property
    def graph_module(self) -> fx.GraphModule:
        """The static graph of the latest form of input: flat tensors in, flat list of results out."""
        return self._current().module

    def print_readable(self) -> str:
        """Print the code of the latest static graph and return it."""
        return self.graph_module.print_readable()

    def summary(self) -> Summary:
        """Return what is computed, read and kept in each evaluation of the latest static graph; printable."""
        return summarize(self._current().graph)

    def predict(self, noise: object, **conditions: object) -> Prediction:
        """Price the schedule for this form of input before anything is compiled: work, memory and time; printable.

        Nothing is sampled. Times are measured on the device of the weights, form by form, in eager mode; with weights
        on the meta device there are none.
        """
        self._check_devices(noise, conditions)
        with torch.inference_mode(False):
            cached, _ = self._graph(self.schedule, self.passes, noise, conditions)
            devices = {weight.device for weight in self.model.parameters()}
            if any(device.type == "meta" for device in devices):
                return predict(cached)
            nothing_reused = CacheSchedule.all_compute(self.schedule.num_evaluations, self.schedule.sites)
            uncached, _ = self._graph(nothing_reused, self.passes, noise, conditions)
            device = min(devices, key=str, default=torch.device("cpu"))
            return predict(cached, uncached, NodeTimes(device))

    def _graph(
        self, schedule: CacheSchedule, passes: Pipeline, noise: object, conditions: Mapping[str, object]
    ) -> tuple[LoopGraph, list[PassRun]]:
        with one_capture(), torch.inference_mode(False):
            return build_loop_graph(self.model, self.loop, schedule, noise, conditions, passes, self._progress)

    def prove(self, noise: object, **conditions: object) -> Proof:
        """Prove the structure of the static graph for this form of input; nothing is sampled, and no backend compiles.

        The loop is traced and its evaluations are captured anew, and the static graph is shown to be what they and the
        schedule say (``proof.py``), bit for bit or up to rounding as ``numerics`` allows. The proof has no rules for
        kernels of ours and for packed caches: what is proven then is the graph without the passes that put them in, and
        the report names those. Packed weights are never part of it: they go into a copy, which the backend runs.

        Weights may be on the meta device: constants then have no values, and are not compared.

        Returns:
            The proof; printable. ``proof.holds`` says whether the graph is right.

        Raises:
            StaleConstantsError: weights changed since constants were folded from them.
        """
        self._check_devices(noise, conditions)
        with weights_in_use():
            program = self._programs.get(self._form(_form_of(noise, conditions)))
            if program is not None:
                _check_fresh(program)
        if program is None:
            graph, runs = self._graph(self.schedule, self.passes, noise, conditions)
        else:
            graph, runs = program.graph, program.passes
        passes, not_covered = self.passes, self._not_covered(runs)
        if not_covered:
            passes = passes.without(not_covered)
            graph, _ = self._graph(self.schedule, passes, noise, conditions)
        with one_capture(), torch.inference_mode(False):
            skeleton = trace_and_capture(self.model, self.loop, self.schedule, noise, conditions, self._progress)
        with weights_in_use():
            proof = prove(graph, skeleton, self.model, exact=passes.is_bitwise, facts=passes.facts)
        return replace(proof, not_covered=not_covered)

    def _not_covered(self, runs: Sequence[PassRun]) -> tuple[str, ...]:
        """Return the passes that put something into a graph which the proof cannot follow."""
        opaque = {each.name for each in self.passes.passes if not each.is_followed_by_proof}
        return tuple(run.name for run in runs if run.name in opaque and run.report.rewrites)

    def verify(self, noise: object, **conditions: object) -> VerifyReport:
        """Prove the structure of the static graph, and compare a run of it with a run of the reference.

        After the proof (see ``prove``) both run once, on equal inputs and equal random numbers; where the results
        differ, every site of every evaluation is compared.

        Returns:
            The report; printable. ``report.holds`` says whether all is as it should be.

        Raises:
            StaleConstantsError: weights changed since constants were folded from them.
        """
        program = self.capture(noise, **conditions)
        proof = self.prove(noise, **conditions)
        with weights_in_use():
            return compare_with_reference(
                self.model,
                self.loop,
                self.schedule,
                program.module,
                program.run,
                noise,
                conditions,
                proof,
                wants_bitwise=self.passes.is_bitwise and self.backend == EAGER,
            )

    def refresh(self) -> None:
        """Follow the weights after they changed: constants are folded, and weights packed, again.

        Forms that the weights no longer have are forgotten.
        """
        # Writing through ``weight.data`` is not counted; whoever keeps something made of a weight goes by the count.
        torch.autograd.graph.increment_version(list(self.model.parameters()))
        weights = self._weights()
        self._programs = {form: program for form, program in self._programs.items() if program.weights == weights}
        self._known = list(reversed(self._programs.values()))
        for program in self._programs.values():
            for folded in program.graph.folded:
                for name, value in zip(folded.names, make_constants(program.graph, folded.recipe), strict=True):
                    write_into(program.graph.root.get_buffer(name), value)
            program.versions = _weight_versions(program.graph)

    def save(
        self,
        path: str | os.PathLike[str],
        noise: object = None,
        *,
        aot_inductor: bool = False,
        **conditions: object,
    ) -> None:
        """Write the program for one form of input, weights included, as one ``.pt2`` file; ``load`` reads it.

        The file needs neither the model's class nor this sampler's backend: it holds the static graph, and ``load``
        takes a backend. It is replaced at once, or not at all.

        Args:
            path: where to; ends in ``.pt2``.
            noise: with ``conditions``, the form of input, captured if it is not yet; None takes the latest.
            aot_inductor: also compile the flat graph ahead of time into ``<stem>.aoti.pt2``, which
                ``torch._inductor.aoti_load_package`` runs: native code for this machine, flat tensors in and out. Takes
                a minute for a handful of blocks and hours for 50 evaluations of 28; loading the ``.pt2`` with
                ``backend="inductor"`` compiles each region once.
            **conditions: see ``noise``.

        Raises:
            SaveError: the program holds what a file cannot, for example an operator of another library.
            StaleConstantsError: weights changed since constants were folded from them.
            L2CError: nothing is compiled yet and no input is given.
            OSError: the folder cannot be written to.
        """
        if noise is None and conditions:
            raise L2CError("save wants the noise with the conditions: save(path, noise, **conditions)")
        program = self._current() if noise is None else self.capture(noise, **conditions)
        if program.weights != self._weights():
            raise StaleConstantsError(
                "since the latest program was compiled, weights moved, changed their dtype or were untied; give save"
                " the inputs: save(path, noise, **conditions)"
            )
        _check_fresh(program)
        save_sampler(
            path,
            program.graph,
            program.inputs,
            loop=self.loop.to_dict() if isinstance(self.loop, BuiltInLoop) else None,
            passes=[run.name for run in program.passes],
            summary=summarize(program.graph),
            aot_inductor=aot_inductor,
        )

    def _build(self, inputs: CallSignature, noise: object, conditions: Mapping[str, object]) -> Program:
        self._check_devices(noise, conditions)
        # Constants made under inference_mode could not be refreshed outside it.
        with torch.inference_mode(False):
            graph, passes = build_loop_graph(
                self.model, self.loop, self.schedule, noise, conditions, self.passes, self._progress
            )
        run = lower_to_backend(graph, self.backend, self._progress or silent, self.kernels, self.mode)
        return Program(graph, passes, run, inputs, self._weights(), _weight_versions(graph))

    def _form(self, inputs: CallSignature) -> object:
        """Return what a program is specialised on."""
        form = (inputs, self._weights(), self.model.training)
        try:
            hash(form)
        except TypeError as error:
            raise L2CError(f"conditions must be tensors or hashable Python values: {error}") from error
        return form

    def _captured(self, inputs: CallSignature) -> Program:
        """Return the latest program of a form in code that Dynamo can trace: it hashes nothing."""
        self._check_all_fresh()
        for program in self._known:
            if program.inputs.spec == inputs.spec and program.inputs.leaves == inputs.leaves:
                return program
        raise L2CError(
            "torch.compile cannot capture a sampler while it traces; call sampler.capture(noise, **conditions) with"
            " inputs of this form first"
        )

    # Runs when Dynamo traces, not in every call of what it traced.
    @torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
    def _check_all_fresh(self) -> None:
        weights = self._weights()
        self._known = [program for program in self._known if program.weights == weights]
        for program in self._known:
            _check_fresh(program)
            _ = program.module_to_trace  # made here: Dynamo could not trace how

    def _weights(self) -> object:
        names: dict[nn.Parameter, list[str]] = {}
        for name, weight in self.model.named_parameters(remove_duplicate=False):
            names.setdefault(weight, []).append(name)
        # The graph knows a tied weight by one of its names, so untying it makes another program.
        tied = frozenset(tuple(each) for each in names.values() if len(each) > 1)
        return frozenset((w.dtype, w.device) for w in names), tied

    def _check_devices(self, noise: object, conditions: Mapping[str, object]) -> None:
        weights = {w.device for w in self.model.parameters()}
        given = {x.device for x in tensors_in((noise, dict(conditions)))}
        if len(weights) == 1 and not given <= weights:
            (device,) = weights
            stray = ", ".join(sorted(str(d) for d in given - weights))
            raise ScheduleError(
                f"the denoiser is on {device}, an input on {stray}; move the inputs there with .to('{device}')"
            )

    def _current(self) -> Program:
        if self._latest is None:
            raise L2CError("nothing is compiled yet; call the sampler, or sampler.capture(noise, **conditions), first")
        return self._latest


_PER_PROCESS = frozenset({"_programs", "_known", "_latest"})


def _form_of(noise: object, conditions: Mapping[str, object]) -> CallSignature:
    leaves, spec = tree_flatten((noise, dict(conditions)))
    return CallSignature(spec, tuple(TensorSpec.of(x) if isinstance(x, Tensor) else StaticValue.of(x) for x in leaves))


def _weight_versions(graph: LoopGraph) -> dict[str, tuple[int, int, int]]:
    return {path: _version(graph.root, path) for folded in graph.folded for path in folded.weights}


def _version(root: nn.Module, path: str) -> tuple[int, int, int]:
    owner, _, name = path.rpartition(".")
    weight = getattr(root.get_submodule(owner), name)
    # Assigning to .data, as Module.to does, changes the memory only.
    return id(weight), int(weight.untyped_storage()._cdata), 0 if weight.is_inference() else weight._version


def _check_fresh(program: Program) -> None:
    for path, version in program.versions.items():
        if _version(program.graph.root, path) != version:
            raise StaleConstantsError(
                f"weight '{path.removeprefix('denoiser.')}' changed since constants were folded from it; call refresh()"
            )
