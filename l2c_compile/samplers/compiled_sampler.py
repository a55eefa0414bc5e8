"""``CompiledSampler``, which ``l2c_compile`` returns; it keeps one ``CompiledForm`` for each form of input."""

from __future__ import annotations

import itertools
import os
import time
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Literal

import torch
from torch import fx, nn
from torch.utils._pytree import tree_unflatten

from l2c_compile.analyses.cost import NodeTimes
from l2c_compile.analyses.prediction import Prediction, predict
from l2c_compile.analyses.summary import summarize
from l2c_compile.backends.lower import lower_to_backend
from l2c_compile.backends.options import Options
from l2c_compile.checking.comparison import VerifyReport, compare_with_reference
from l2c_compile.checking.first_call import FirstCall
from l2c_compile.checking.proof import Proof, prove
from l2c_compile.compile import graph_of, trace_and_capture
from l2c_compile.errors import L2CError, ScheduleError, StaleConstantsError
from l2c_compile.frontend.autocast import check_no_autocast
from l2c_compile.frontend.capture import check_sites_exist
from l2c_compile.frontend.compiled_parts import run_eagerly
from l2c_compile.frontend.loop_effects import state_roots
from l2c_compile.frontend.loop_result import consumed
from l2c_compile.frontend.restore import left_as_it_was
from l2c_compile.frontend.stand_in import Loop
from l2c_compile.frontend.weights_lock import one_capture, weights_in_use
from l2c_compile.graphs.forms import CallSignature, overlaps_of, signature_of, tensors_in
from l2c_compile.graphs.loop_graph import LoopGraph
from l2c_compile.graphs.marks import write_into
from l2c_compile.graphs.skeleton import LoopSkeleton
from l2c_compile.loops import BuiltInLoop
from l2c_compile.passes.base import PassRun, Pipeline
from l2c_compile.passes.fold_constants import make_constants
from l2c_compile.passes.pipeline import BITWISE
from l2c_compile.progress import Progress, silent
from l2c_compile.sampler_file.write import save_sampler
from l2c_compile.samplers.compiled_form import CompiledForm, check_fresh
from l2c_compile.samplers.explanation import Explanation
from l2c_compile.samplers.guards import Guards
from l2c_compile.samplers.sampler_summary import SamplerSummary
from l2c_compile.schedules.schedule import CacheSchedule
from l2c_compile.state.random_state import RandomState

Check = Literal["first", "structure"] | None
"""What a sampler checks at run time; ``l2c_compile`` says what each word means."""

_MANY_STATES = 8
"""The number of captures for one form of input from which on each further one is warned of."""

MAX_FORMS = 64
"""How many forms of input a sampler keeps compiled by default."""


class CompiledSampler(nn.Module):
    """A sampling loop that runs as one static graph: ``sampler(noise, **conditions) -> latent``.

    It holds no state between calls, so threads may sample at once. While one thread captures a new form,
    ``torch.export`` swaps the weights of the model, and samplers in other threads wait; they run on during the rest of
    the compilation. Only samplers wait: code that uses the model itself, and code that ``torch.compile`` made of a
    sampler, must not run while a form is captured. Processes may be forked; the child calls
    ``torch.set_num_threads(1)`` first, as in torch's data loaders.

    It runs under ``torch.no_grad``. ``model`` is a submodule, so ``state_dict``, ``to`` and ``load_state_dict`` reach
    its weights; after changing weights in place, call ``refresh``.

    ``torch.compile(sampler, fullgraph=True)`` takes the static graph into its own, for every form that was captured
    before; weights are then checked for changes when it traces, not in every call.
    """

    def __init__(
        self,
        model: nn.Module,
        schedule: CacheSchedule,
        loop: Loop,
        options: Options | None = None,
        progress: Progress | None = None,
        max_forms: int = MAX_FORMS,
        check: Check = "first",
    ) -> None:
        super().__init__()
        self.model = model
        self._schedule = schedule
        self.loop = loop
        self.options = options or Options()
        self.max_forms = max_forms
        """How many forms of input are kept compiled; beyond that the one that was used least recently is forgotten."""
        self.check: Check = check
        """What is checked at run time; ``l2c_compile`` says what."""
        self.training = model.training
        self._progress = progress or silent
        self._begin_empty()

    @property
    def schedule(self) -> CacheSchedule:
        """The schedule, its patterns resolved; after another one is assigned, the next call captures anew."""
        return self._schedule

    @schedule.setter
    def schedule(self, schedule: CacheSchedule) -> None:
        schedule = schedule.resolve([path for path, _ in self.model.named_modules()])
        check_sites_exist(self.model, schedule.sites)
        self._schedule = schedule

    def __setattr__(self, name: str, value: object) -> None:
        """Set an attribute; a loop that is a module does not become a child, whose weights are none of the model's."""
        if name == "loop":
            object.__setattr__(self, name, value)
        else:
            super().__setattr__(name, value)  # type: ignore[arg-type]

    @property
    def loop(self) -> Loop:
        """The sampling loop; after another one is assigned, the next call captures anew."""
        return self._loop[0]

    @loop.setter
    def loop(self, loop: Loop) -> None:
        self._loop = (loop,)

    def _begin_empty(self) -> None:
        self._forms: list[CompiledForm] = []
        self._known: list[CompiledForm] = []
        self._latest: CompiledForm | None = None

    def __getstate__(self) -> dict[str, object]:
        """Leave out what belongs to this process, so that a copy captures anew."""
        return {name: value for name, value in self.__dict__.items() if name not in _PER_PROCESS}

    def __setstate__(self, state: dict[str, object]) -> None:
        """Restore the sampler with nothing captured."""
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self._begin_empty()

    def forward(self, noise: object, **conditions: object) -> object:
        """Sample a batch of latents.

        Args:
            noise: the first argument of the loop: a tensor, or nested containers of tensors.
            **conditions: the keyword arguments of the loop. Tensors are inputs of the graph; anything else is static.

        Raises:
            StaleConstantsError: if weights changed since constants were folded from them.
            CaptureError: if the denoiser cannot be captured.
            LoopTraceError: if the loop cannot be traced.
            ScheduleError: if the schedule is for another number of evaluations.
        """
        if torch.compiler.is_dynamo_compiling():
            check_no_autocast()
            # The static graph itself goes into Dynamo's, whatever the sampler's own backend is.
            form = self._captured(signature_of(noise, dict(conditions)))
            with torch.no_grad():
                leaves = form.module_to_trace(*tensors_in((noise, conditions)))
        else:
            form = self.capture(noise, **conditions)
            leaves = self._run(form, noise, conditions) if form.is_checked else self._first_run(form, noise, conditions)
        return tree_unflatten(list(leaves), form.graph.out_spec)

    def capture(self, noise: object, **conditions: object) -> CompiledForm:
        """Return the compiled form for these inputs, which is compiled if there is none yet; nothing is sampled."""
        check_no_autocast()
        inputs = _form_of(noise, conditions)
        with weights_in_use():
            form = self._form_for(inputs)
        if form is None:
            with one_capture():
                # Another thread may have built it meanwhile.
                form = self._form_for(inputs)
                if form is None:
                    form = self._build(inputs, noise, conditions)
                    self._remember(form)
        form.last_use = next(_USES)
        self._latest = form
        return form

    def _form_for(self, inputs: CallSignature) -> CompiledForm | None:
        """Return the compiled form for these inputs, None if there is none, or none of what is there now."""
        _check_hashable(inputs)
        reasons = []
        for form in self._forms:
            if form.inputs == inputs:
                reason = self._why_not(form)
                if reason is None:
                    return form
                reasons.append(reason)
        if reasons:
            self._progress(f"capture anew: {reasons[0]}")
        if len(reasons) >= _MANY_STATES:
            warnings.warn(
                f"the sampler is captured for the {len(reasons) + 1}th time for one form of input, because what it is"
                f" made from changes between calls ({reasons[0]}); each capture takes seconds, so keep what changes"
                " out of the model and the loop, or pass it as a condition",
                stacklevel=4,
            )
        return None

    def _why_not(self, form: CompiledForm) -> str | None:
        """Return what changed since a form was compiled, None if it may run."""
        for name, made_from, now in (
            ("model", form.guards.roots["denoiser"], self.model),
            ("loop", form.guards.roots["loop"], self.loop),
            ("schedule", form.schedule, self.schedule),
        ):
            if made_from is not now:
                return f"the sampler has another {name}"
        return form.guards.why_not()

    def _remember(self, form: CompiledForm) -> None:
        """Keep a new form, and forget those that were used least recently where that is too many."""
        by_use = sorted(self._forms, key=lambda each: each.last_use)
        forgotten = by_use[: max(0, len(by_use) + 1 - self.max_forms)]
        # The latest is asked first.
        self._forms = [form, *(each for each in self._forms if each not in forgotten)]
        if forgotten:
            warnings.warn(
                f"the sampler was compiled for more than {self.max_forms} forms of input, so the one used least"
                " recently is forgotten and would be compiled again; pad the inputs to fewer forms, or give"
                f" l2c_compile(..., max_forms={2 * self.max_forms})",
                stacklevel=5,
            )

    def _run(self, form: CompiledForm, noise: object, conditions: Mapping[str, object]) -> Sequence[object]:
        with weights_in_use(), torch.no_grad():
            check_fresh(form)
            return form.run(*tensors_in((noise, conditions)))

    def _first_run(self, form: CompiledForm, noise: object, conditions: Mapping[str, object]) -> Sequence[object]:
        """Run a form for the first time, and compare it with the eager loop if that is asked for."""
        # The reference wraps modules of the denoiser, which must not happen while another thread captures it.
        with one_capture(), weights_in_use():
            drawn_from = RandomState()
            results = self._run(form, noise, conditions)
            start_s = time.perf_counter()
            call = FirstCall(
                denoiser=self.model,
                loop=self.loop,
                schedule=self.schedule,
                roots=form.guards.roots,
                inputs=(noise, dict(conditions)),
                results=results,
                drawn_from=drawn_from,
                graph=lambda: self._bitwise_module(form),
                is_bitwise=self.options.is_bitwise,
            )
            if self.check == "first" and call.has_values():
                self._progress("compare the first call with the eager loop")
                with run_eagerly():
                    call.check()
                form.checked_in_s = time.perf_counter() - start_s
            form.is_checked = True
        return results

    def _bitwise_module(self, form: CompiledForm) -> fx.GraphModule:
        """Return the static graph of a form with the passes that change no bit."""
        if self.options.is_bitwise:
            return form.module
        with torch.inference_mode(False):
            graph, _ = graph_of(form.trace, self.model, self.schedule, BITWISE)
        return graph.module()

    @property
    def graph_module(self) -> fx.GraphModule:
        """The static graph of the latest form of input, which takes flat tensors and returns a flat list of results."""
        return self._current().module

    def print_readable(self) -> str:
        """Print the code of the latest static graph and return it."""
        return self.graph_module.print_readable()

    def summary(self) -> SamplerSummary:
        """Return what each evaluation of the latest static graph computes, reads and keeps; ``print`` shows it."""
        return SamplerSummary.of(self._current())

    def explain(self) -> Explanation:
        """Return what each pass did to the latest static graph, and why it left the rest alone; printable."""
        return Explanation(tuple(self._current().passes))

    def predict(self, noise: object, **conditions: object) -> Prediction:
        """Predict what the schedule saves for this form of input, before anything is compiled; ``print`` shows it.

        Nothing is sampled. The prediction has work, memory and time. Times are measured on the device of the weights,
        form by form, in eager mode; with weights on the meta device there are none.
        """
        self._check_devices(noise, conditions)
        trace = self._trace(noise, conditions)
        cached, _ = self._graph(trace)
        devices = {weight.device for weight in self.model.parameters()}
        if any(device.type == "meta" for device in devices):
            return predict(cached)
        nothing_reused = CacheSchedule.all_compute(self.schedule.num_evaluations, self.schedule.sites)
        uncached, _ = self._graph(trace, nothing_reused)
        with torch.inference_mode(False):
            return predict(cached, uncached, NodeTimes(min(devices, key=str, default=torch.device("cpu"))))

    def _trace(self, noise: object, conditions: Mapping[str, object]) -> LoopSkeleton:
        with one_capture(), torch.inference_mode(False):
            return trace_and_capture(self.model, self.loop, self.schedule, noise, conditions, self._progress)

    def _graph(
        self, trace: LoopSkeleton, schedule: CacheSchedule | None = None, passes: Pipeline | None = None
    ) -> tuple[LoopGraph, list[PassRun]]:
        """Return the static graph of a trace, by default under the sampler's schedule and with its passes."""
        # Constants made under inference_mode could not be refreshed outside it.
        with one_capture(), torch.inference_mode(False):
            return graph_of(trace, self.model, schedule or self.schedule, passes or self.options.passes, self._progress)

    def prove(self, noise: object, **conditions: object) -> Proof:
        """Prove the structure of the static graph for this form of input; nothing is sampled, and no backend compiles.

        The proof (``checking/proof.py``) shows that the static graph computes what the traced loop, the captured
        evaluations and the schedule say, bit for bit or up to rounding as ``numerics`` allows. It has no rules for
        kernels of ours and for packed caches: what is proven then is the graph without the passes that insert them,
        and the report names these passes. Packed weights are never part of the proof: they go into a copy, which the
        backend runs. The trace is the one that the graph was made from; ``copy.copy(sampler).prove(...)`` takes a new
        one, because a copy has captured nothing yet.

        Weights may be on the meta device; constants then have no values and are not compared.

        Returns:
            The proof, which ``print`` shows; ``proof.holds`` says whether the graph is right.

        Raises:
            StaleConstantsError: if weights changed since constants were folded from them.
        """
        self._check_devices(noise, conditions)
        with weights_in_use():
            form = self._form_for(_form_of(noise, conditions))
            if form is not None:
                check_fresh(form)
        trace = form.trace if form is not None else self._trace(noise, conditions)
        graph, runs = (form.graph, form.passes) if form is not None else self._graph(trace)
        passes, not_covered = self.options.passes, self._not_covered(runs)
        if not_covered:
            passes = passes.without(not_covered)
            graph, _ = self._graph(trace, passes=passes)
        with weights_in_use():
            proof = prove(graph, trace, self.model, exact=passes.is_bitwise, facts=passes.facts)
        return replace(proof, not_covered=not_covered)

    def _not_covered(self, runs: Sequence[PassRun]) -> tuple[str, ...]:
        """Return the passes that insert something that the proof cannot follow."""
        opaque = {each.name for each in self.options.passes.passes if not each.is_followed_by_proof}
        return tuple(run.name for run in runs if run.name in opaque and run.report.rewrites)

    def verify(self, noise: object, **conditions: object) -> VerifyReport:
        """Prove the structure of the static graph, and compare a run of it with a run of the reference.

        After the proof (see ``prove``), both run once on equal inputs and equal random numbers. If the results differ,
        every site of every evaluation is compared.

        Returns:
            The report, which ``print`` shows; ``report.holds`` says whether proof and numbers are right.

        Raises:
            StaleConstantsError: if weights changed since constants were folded from them.
        """
        form = self.capture(noise, **conditions)
        proof = self.prove(noise, **conditions)

        def loop(denoiser: nn.Module, noise: object, **conditions: object) -> object:
            with left_as_it_was(form.guards.roots):
                return consumed(self.loop(denoiser, noise, **conditions))

        with weights_in_use(), run_eagerly():
            return compare_with_reference(
                self.model,
                loop,
                self.schedule,
                form.module,
                form.run,
                noise,
                conditions,
                proof,
                wants_bitwise=self.options.is_bitwise,
            )

    def refresh(self) -> None:
        """Fold constants and pack weights again after the weights changed.

        What was compiled for other dtypes, devices or ties of the weights is forgotten.
        """
        # A write through ``weight.data`` leaves the version of the weight, by which others know that it changed.
        torch.autograd.graph.increment_version(list(self.model.parameters()))
        weights = self._weights()
        fitting = (form for form in self._forms if form.guards.weights == weights)
        self._forms = [form for form in fitting if form.guards.why_not_but_for_weights() is None]
        for form in self._forms:
            for folded in form.graph.folded:
                for name, value in zip(folded.names, make_constants(form.graph, folded.recipe), strict=True):
                    write_into(form.graph.root.get_buffer(name), value)
            form.note_weights()

    def save(
        self,
        path: str | os.PathLike[str],
        noise: object = None,
        *,
        aot_inductor: bool = False,
        **conditions: object,
    ) -> None:
        """Write the compiled form of one input, weights included, as one ``.pt2`` file, which ``load`` reads.

        The file needs neither the model's class nor this sampler's backend: it holds the static graph, and ``load``
        takes a backend. It is replaced at once, or not at all.

        Args:
            path: the file to write; its name ends in ``.pt2``.
            noise: with ``conditions``, an input of the form to save, which is captured if it is not yet; None takes the
                latest form.
            aot_inductor: whether the flat graph is also compiled ahead of time into ``<stem>.aoti.pt2``, which
                ``torch._inductor.aoti_load_package`` runs: native code for this machine, which takes and returns flat
                tensors. This takes a minute for a handful of blocks, and hours for 50 evaluations of 28; loading the
                ``.pt2`` with ``backend="inductor"`` compiles each region once.
            **conditions: the keyword arguments of the loop that belong to ``noise``.

        Raises:
            SaveError: if the graph holds what a file cannot, for example an operator of another library.
            StaleConstantsError: if weights changed since constants were folded from them.
            L2CError: if nothing is compiled yet and no input is given.
            OSError: if the folder cannot be written to.
        """
        if noise is None and conditions:
            raise L2CError("save wants the noise with the conditions: save(path, noise, **conditions)")
        form = self._current() if noise is None else self.capture(noise, **conditions)
        reason = form.guards.why_not()
        if reason is not None:
            raise StaleConstantsError(
                f"since the latest form was compiled, what it is made from changed ({reason}); give save the inputs:"
                " save(path, noise, **conditions)"
            )
        check_fresh(form)
        save_sampler(
            path,
            form.graph,
            form.inputs,
            loop=self.loop.to_dict() if isinstance(self.loop, BuiltInLoop) else None,
            passes=[run.name for run in form.passes],
            summary=summarize(form.graph),
            aot_inductor=aot_inductor,
        )

    def _build(self, inputs: CallSignature, noise: object, conditions: Mapping[str, object]) -> CompiledForm:
        self._check_devices(noise, conditions)
        check_sites_exist(self.model, self.schedule.sites)
        trace = self._trace(noise, conditions)
        graph, passes = self._graph(trace)
        run = lower_to_backend(graph, self.options, self._progress)
        roots = state_roots(self.model, self.loop, noise, conditions)
        guards = Guards(roots, trace.read, self._weights, is_deep=self.check is not None)
        form = CompiledForm(trace, graph, passes, run, inputs, self.schedule, guards, bool(self.options.kernels.passes))
        form.note_weights()
        return form

    def _captured(self, inputs: CallSignature) -> CompiledForm:
        """Return the latest compiled form for these inputs; Dynamo can trace this, because nothing is hashed."""
        self._check_all_fresh()
        for form in self._known:
            if form.inputs.spec == inputs.spec and form.inputs.leaves == inputs.leaves:
                return form
        raise L2CError(
            "torch.compile cannot capture a sampler while it traces; call sampler.capture(noise, **conditions) with"
            " inputs of this form first"
        )

    # This runs when Dynamo traces, not in every call of the code that it traced.
    @torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
    def _check_all_fresh(self) -> None:
        self._known = [form for form in self._forms if self._why_not(form) is None]
        for form in self._known:
            check_fresh(form)
            _ = form.module_to_trace  # made here, because Dynamo cannot trace how it is made

    def _weights(self) -> object:
        names: dict[nn.Parameter, list[str]] = {}
        for name, weight in self.model.named_parameters(remove_duplicate=False):
            names.setdefault(weight, []).append(name)
        # The graph refers to a tied weight by one of its names, so once it is untied another graph is needed.
        tied = frozenset(tuple(each) for each in names.values() if len(each) > 1)
        return frozenset((w.dtype, w.device) for w in names), tied

    def _check_devices(self, noise: object, conditions: Mapping[str, object]) -> None:
        weights = {w.device for w in self.model.parameters()}
        given = {x.device for x in tensors_in((noise, dict(conditions)))}
        if len(weights) == 1 and not given <= weights:
            (device,) = weights
            if device.type == "meta":
                raise ScheduleError(
                    "the denoiser's weights are on the meta device, so they have no values: load them; where accelerate"
                    " offloads them, call accelerate.hooks.remove_hook_from_submodules(model) first"
                )
            stray = ", ".join(sorted(str(d) for d in given - weights))
            raise ScheduleError(
                f"the denoiser is on {device}, an input on {stray}; move the inputs there with .to('{device}')"
            )

    def _current(self) -> CompiledForm:
        if self._latest is None:
            raise L2CError("nothing is compiled yet; call the sampler, or sampler.capture(noise, **conditions), first")
        return self._latest


def _form_of(noise: object, conditions: Mapping[str, object]) -> CallSignature:
    inputs = signature_of(noise, dict(conditions))
    return replace(inputs, overlaps=overlaps_of(tensors_in((noise, dict(conditions)))))


def _check_hashable(inputs: CallSignature) -> None:
    try:
        hash(inputs)
    except TypeError as error:
        raise L2CError(f"conditions must be tensors or hashable Python values: {error}") from error


_USES = itertools.count(1)

_PER_PROCESS = frozenset({"_forms", "_known", "_latest"})
