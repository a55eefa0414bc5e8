"""``CompiledSampler``: what ``l2c_compile`` returns; it keeps one ``CompiledForm`` for each form of input."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import fx, nn
from torch.utils._pytree import tree_unflatten

from l2c_compile.analyses.cost import NodeTimes
from l2c_compile.analyses.prediction import Prediction, predict
from l2c_compile.analyses.summary import Summary, summarize
from l2c_compile.backends.choice import EAGER, Backend
from l2c_compile.backends.lower import lower_to_backend
from l2c_compile.checking.comparison import VerifyReport, compare_with_reference
from l2c_compile.checking.proof import Proof, prove
from l2c_compile.compile import build_loop_graph, trace_and_capture
from l2c_compile.errors import L2CError, ScheduleError, StaleConstantsError
from l2c_compile.frontend.stand_in import Loop
from l2c_compile.frontend.weights_lock import one_capture, weights_in_use
from l2c_compile.graphs.forms import CallSignature, signature_of, tensors_in
from l2c_compile.graphs.loop_graph import LoopGraph
from l2c_compile.graphs.marks import write_into
from l2c_compile.loops import BuiltInLoop
from l2c_compile.passes.base import PassRun, Pipeline
from l2c_compile.passes.fold_constants import make_constants
from l2c_compile.progress import Progress, silent
from l2c_compile.sampler_file.write import save_sampler
from l2c_compile.samplers.compiled_form import CompiledForm, check_fresh, weight_versions
from l2c_compile.schedules.schedule import CacheSchedule

__all__ = ["CompiledSampler"]


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
        self._programs: dict[object, CompiledForm] = {}
        self._known: list[CompiledForm] = []
        self._latest: CompiledForm | None = None

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
            program = self._captured(signature_of(noise, dict(conditions)))
            with torch.no_grad():
                leaves = program.module_to_trace(*tensors_in((noise, conditions)))
        else:
            program = self.capture(noise, **conditions)
            with weights_in_use(), torch.no_grad():
                check_fresh(program)
                leaves = program.run(*tensors_in((noise, conditions)))
        return tree_unflatten(list(leaves), program.graph.out_spec)

    def capture(self, noise: object, **conditions: object) -> CompiledForm:
        """Return the program for this form of input, building it if there is none yet; nothing is sampled."""
        inputs = signature_of(noise, dict(conditions))
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
            program = self._programs.get(self._form(signature_of(noise, dict(conditions))))
            if program is not None:
                check_fresh(program)
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
            program.versions = weight_versions(program.graph)

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
        check_fresh(program)
        save_sampler(
            path,
            program.graph,
            program.inputs,
            loop=self.loop.to_dict() if isinstance(self.loop, BuiltInLoop) else None,
            passes=[run.name for run in program.passes],
            summary=summarize(program.graph),
            aot_inductor=aot_inductor,
        )

    def _build(self, inputs: CallSignature, noise: object, conditions: Mapping[str, object]) -> CompiledForm:
        self._check_devices(noise, conditions)
        # Constants made under inference_mode could not be refreshed outside it.
        with torch.inference_mode(False):
            graph, passes = build_loop_graph(
                self.model, self.loop, self.schedule, noise, conditions, self.passes, self._progress
            )
        run = lower_to_backend(graph, self.backend, self._progress or silent, self.kernels, self.mode)
        return CompiledForm(graph, passes, run, inputs, self._weights(), weight_versions(graph))

    def _form(self, inputs: CallSignature) -> object:
        """Return what a program is specialised on."""
        form = (inputs, self._weights(), self.model.training)
        try:
            hash(form)
        except TypeError as error:
            raise L2CError(f"conditions must be tensors or hashable Python values: {error}") from error
        return form

    def _captured(self, inputs: CallSignature) -> CompiledForm:
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
            check_fresh(program)
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

    def _current(self) -> CompiledForm:
        if self._latest is None:
            raise L2CError("nothing is compiled yet; call the sampler, or sampler.capture(noise, **conditions), first")
        return self._latest


_PER_PROCESS = frozenset({"_programs", "_known", "_latest"})
