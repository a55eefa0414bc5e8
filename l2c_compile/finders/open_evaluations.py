"""Evaluations that a finder can look into: the captured graphs of a denoiser, whose sites are observed or mixed.

A loop is run as it is, eagerly, on a stand-in for the denoiser; the finder decides what an evaluation does.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cached_property

import torch
from torch import Tensor, fx, nn
from torch.utils._pytree import tree_unflatten

from l2c_compile.analyses.cost import MultiplyAdds, NodeTimes
from l2c_compile.errors import LoopError, ScheduleError
from l2c_compile.frontend.capture import capture, check_sites_called, check_sites_exist
from l2c_compile.frontend.stand_in import Loop, StandIn
from l2c_compile.graphs.forms import CallSignature, signature_of, tensors_in
from l2c_compile.graphs.loop_graph import EvaluationGraph
from l2c_compile.graphs.marks import INPUT_PORT, SITE, site_marks
from l2c_compile.passes.base import Pipeline
from l2c_compile.passes.pipeline import EVALUATION, MIXED, OBSERVED
from l2c_compile.schedules.coverage import covering_sites
from l2c_compile.schedules.schedule import CacheSchedule
from l2c_compile.schedules.sites import Site, as_site


class OpenEvaluation:
    """All evaluations of a denoiser whose calls have one form; what its sites hold can be seen, and mixed.

    Args:
        captured: the graph of the evaluation, simplified, its sites marked.
    """

    def __init__(self, captured: EvaluationGraph) -> None:
        self.captured = captured
        column = {str(site): index for index, site in enumerate(captured.sites)}
        marks = (mark for mark in site_marks(captured.graph) if mark.port != INPUT_PORT)
        self.columns = tuple(sorted(column[mark.site] for mark in marks))
        """The index of the site for each value that sites hold; a module that returns several tensors holds several."""
        self._num_outputs = len(tensors_in(captured.out_leaves))

    @cached_property
    def observed(self) -> fx.GraphModule:
        """The graph that also returns what its sites hold."""
        return self._module(OBSERVED)

    @cached_property
    def mixed(self) -> fx.GraphModule:
        """The graph that also takes scores and cached values.

        Raises:
            ScheduleError: if a site holds what has no mixture.
        """
        return self._module(MIXED)

    def observe(self, tensors: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """Return the denoiser's outputs and what each site computed, without gradients."""
        with torch.no_grad():
            return self._divided(self.observed(*tensors), tensors)

    def mix(
        self, tensors: Sequence[Tensor], scores_S: Tensor, cached: Sequence[Tensor]
    ) -> tuple[list[Tensor], list[Tensor]]:
        """Return the outputs when each site is ``score * computed + (1 - score) * cached``, and what was computed.

        Args:
            tensors: the arguments of the call.
            scores_S: one number a site, float32.
            cached: what ``observe`` or ``mix`` returned as computed in an earlier evaluation.
        """
        return self._divided(self.mixed(*tensors, scores_S, *cached), tensors)

    def refreshed(self, is_fresh_S: Tensor, computed: Sequence[Tensor], cached: Sequence[Tensor]) -> list[Tensor]:
        """Return the computed values of the sites where ``is_fresh_S`` is True, and the cached ones of the others."""
        is_fresh = is_fresh_S.tolist()
        return [new if is_fresh[c] else old for c, new, old in zip(self.columns, computed, cached, strict=True)]

    def in_form(self, outputs: Sequence[Tensor]) -> list[Tensor]:
        """Return the outputs in the dtypes that the denoiser has outside autocast."""
        wanted = tensors_in(self.captured.out_leaves)
        return [output.to(leaf.dtype) for output, leaf in zip(outputs, wanted, strict=True)]

    def result(self, outputs: Sequence[Tensor]) -> object:
        """Return the outputs in the structure that the denoiser returns."""
        remaining = iter(outputs)
        leaves = [next(remaining) if isinstance(leaf, Tensor) else leaf for leaf in self.captured.out_leaves]
        assert self.captured.out_spec is not None
        return tree_unflatten(leaves, self.captured.out_spec)

    def _module(self, pipeline: Pipeline) -> fx.GraphModule:
        graph = self.captured.copy()
        pipeline.run(graph)
        return graph.module()

    def _divided(self, results: Sequence[Tensor], tensors: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        outputs, values = list(results[: self._num_outputs]), results[self._num_outputs :]
        # The loop may write into what it gives and gets, and a site may hold the same memory.
        writable = {_memory(tensor) for tensor in (*tensors, *outputs)}
        return outputs, [value.clone() if _memory(value) in writable else value for value in values]


OnEvaluation = Callable[[int, OpenEvaluation, list[Tensor]], list[Tensor]]
"""A function that is given number, evaluation and tensor arguments of a call, and returns what the denoiser would."""


class OpenDenoiser:
    """A denoiser whose evaluations are captured with its sites, and on which loops run.

    Args:
        model: the denoiser; its weights are shared.
        sites: the sites to look into, with patterns.

    Raises:
        UnknownSiteError: if a site names a module that the model does not have.
        ScheduleError: if there are no sites.
    """

    def __init__(self, model: nn.Module, sites: Sequence[Site | str]) -> None:
        if not sites:
            raise ScheduleError("there is nothing to learn without sites; name some, such as 'blocks.*.attn'")
        self.model = model
        wanted = CacheSchedule.all_compute(1, tuple(map(as_site, sites)))
        self.sites = wanted.resolve([path for path, _ in model.named_modules()]).sites
        check_sites_exist(model, self.sites)
        self._evaluations: dict[CallSignature, OpenEvaluation] = {}

    @cached_property
    def covers(self) -> list[list[int]]:
        """The columns of the sites that cover a site, for each site.

        Raises:
            ScheduleError: if two sites overlap and neither covers the other.
        """
        column = {site: index for index, site in enumerate(self.sites)}
        return [[column[whole] for whole in wholes] for wholes in covering_sites(self.sites).values()]

    @property
    def device(self) -> torch.device:
        """The device of the weights."""
        return next((weight.device for weight in self.model.parameters()), torch.device("cpu"))

    def running(self, scores_S: Tensor) -> Tensor:
        """Return the scores times those of all sites that cover them: a site runs only where these do."""
        if not any(self.covers):
            return scores_S
        return torch.stack([scores_S[[index, *wholes]].prod() for index, wholes in enumerate(self.covers)])

    def run(self, loop: Loop, noise: object, conditions: Mapping[str, object], on_evaluation: OnEvaluation) -> object:
        """Return what the loop makes of the evaluations that ``on_evaluation`` gives it.

        Raises:
            LoopError: if the loop does not call the denoiser.
        """
        count = 0

        def evaluate(args: tuple[object, ...], kwargs: dict[str, object]) -> object:
            nonlocal count
            with stand_in.put_away():
                evaluation, tensors = self.call(args, kwargs)
            count += 1
            return evaluation.result(on_evaluation(count - 1, evaluation, tensors))

        stand_in = StandIn(self.model, evaluate)
        with stand_in:
            result = loop(self.model, noise, **conditions)
        if not count:
            raise LoopError("the loop never calls the denoiser it is given; call the first argument of the loop")
        return result

    def call(self, args: tuple[object, ...], kwargs: dict[str, object]) -> tuple[OpenEvaluation, list[Tensor]]:
        """Return the evaluation that a call is, and the tensors of the call."""
        return self.evaluation(signature_of(args, kwargs)), tensors_in((args, kwargs))

    def evaluation(self, signature: CallSignature) -> OpenEvaluation:
        """Return the evaluation of all calls of this form, capturing it if it is new.

        Raises:
            CaptureError: if the denoiser cannot be captured.
            UnknownSiteError: if it does not call a site.
        """
        if signature not in self._evaluations:
            captured = capture(self.model, signature, self.sites)
            check_sites_called(self.model, self.sites, [captured])
            EVALUATION.run(captured)
            self._evaluations[signature] = OpenEvaluation(captured)
        return self._evaluations[signature]

    def evaluations_of(self, loop: Loop, noise: object, conditions: Mapping[str, object]) -> list[OpenEvaluation]:
        """Return the evaluations of a loop, in order; the denoiser is not run."""
        found: list[OpenEvaluation] = []

        def note(e: int, evaluation: OpenEvaluation, tensors: list[Tensor]) -> list[Tensor]:
            found.append(evaluation)
            wanted = tensors_in(evaluation.captured.out_leaves)
            return [torch.zeros(leaf.shape, dtype=leaf.dtype, device=leaf.device) for leaf in wanted]

        with torch.random.fork_rng(), torch.no_grad():
            self.run(loop, noise, conditions, note)
        return found


def price_in(unit: str, device: torch.device, evaluations: Sequence[OpenEvaluation]) -> Callable[[fx.Node], float]:
    """Return what prices a node: "multiply-adds", counted, or "time", measured once for each form of operation."""
    if unit == "multiply-adds":
        return MultiplyAdds().of
    times = NodeTimes(device)
    times.measure(node for each in evaluations for node in each.captured.graph.nodes if node.target is not SITE)
    return times.of


def _memory(tensor: Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)
