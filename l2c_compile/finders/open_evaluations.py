"""Evaluations that a finder can look into and mix: the captured graphs of a denoiser, form by form.

A loop is run as it is, eagerly, on a stand-in for the denoiser; what an evaluation does is the finder's to say.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, fx, nn
from torch.utils._pytree import tree_flatten, tree_unflatten

from l2c_compile.analyses.cost import MultiplyAdds, NodeTimes
from l2c_compile.errors import LoopError, ScheduleError
from l2c_compile.frontend.capture import capture, check_sites_exist
from l2c_compile.frontend.stand_in import Loop, StandIn
from l2c_compile.graphs.forms import CallSignature, StaticValue, TensorForm
from l2c_compile.graphs.loop_graph import EvaluationGraph
from l2c_compile.graphs.marks import INPUT_PORT, SITE, site_marks
from l2c_compile.passes.pipeline import MIXED, OBSERVED
from l2c_compile.schedules.coverage import covering_sites
from l2c_compile.schedules.schedule import CacheSchedule
from l2c_compile.schedules.sites import Site, as_site

__all__ = ["Form", "OnEvaluation", "SoftDenoiser", "price_in"]


@dataclass(frozen=True)
class Form:
    """One form of call of the denoiser, as graphs that run."""

    captured: EvaluationGraph
    """With its sites marked."""
    observed: fx.GraphModule
    mixed: fx.GraphModule
    num_outputs: int
    columns: tuple[int, ...]
    """For each value that a site holds, the site's index; a module that returns several tensors holds several."""

    def full(self, tensors: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """Return the denoiser's outputs and what each site computed, without gradients."""
        with torch.no_grad():
            results = list(self.observed(*tensors))
        return results[: self.num_outputs], results[self.num_outputs :]

    def soft(
        self, tensors: Sequence[Tensor], scores_S: Tensor, cached: Sequence[Tensor]
    ) -> tuple[list[Tensor], list[Tensor]]:
        """Return the outputs when each site is ``score * computed + (1 - score) * cached``, and what was computed.

        Args:
            tensors: the arguments of the call.
            scores_S: one number a site, float32.
            cached: what ``full`` or ``soft`` returned as computed in an earlier evaluation.
        """
        results = list(self.mixed(*tensors, scores_S, *cached))
        return results[: self.num_outputs], results[self.num_outputs :]

    def outputs_in_form(self, outputs: Sequence[Tensor]) -> list[Tensor]:
        """Return the outputs in the dtypes that the denoiser has outside autocast."""
        wanted = [leaf for leaf in self.captured.out_leaves if isinstance(leaf, Tensor)]
        return [output.to(leaf.dtype) for output, leaf in zip(outputs, wanted, strict=True)]


OnEvaluation = Callable[[int, Form, list[Tensor]], list[Tensor]]
"""Given evaluation, form and tensor arguments of a call; returns the tensors that the denoiser would."""


class SoftDenoiser:
    """Captures a denoiser with its sites and runs loops on it.

    Args:
        model: the denoiser; its weights are shared.
        sites: what may be reused; patterns are resolved.

    Raises:
        UnknownSiteError: a site names a module that the model does not have.
        ScheduleError: there are no sites, or two of them overlap and neither covers the other.
    """

    def __init__(self, model: nn.Module, sites: Sequence[Site | str]) -> None:
        if not sites:
            raise ScheduleError("there is nothing to learn without sites; name some, such as 'blocks.*.attn'")
        self.model = model
        wanted = CacheSchedule.all_compute(1, tuple(map(as_site, sites)))
        self.sites = wanted.resolve([path for path, _ in model.named_modules()]).sites
        check_sites_exist(model, self.sites)
        column = {site: index for index, site in enumerate(self.sites)}
        self.covers = [[column[whole] for whole in wholes] for wholes in covering_sites(self.sites).values()]
        """For each site the columns of the sites that cover it."""
        self._forms: dict[CallSignature, Form] = {}

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return next((weight.device for weight in self.model.parameters()), torch.device("cpu"))

    def run(self, loop: Loop, noise: object, conditions: Mapping[str, object], on_evaluation: OnEvaluation) -> object:
        """Return what the loop makes of the evaluations that ``on_evaluation`` gives it."""
        evaluation = -1

        def evaluate(args: tuple[object, ...], kwargs: dict[str, object]) -> object:
            nonlocal evaluation
            evaluation += 1
            form, tensors = self.call(args, kwargs)
            outputs = iter(on_evaluation(evaluation, form, tensors))
            leaves = [next(outputs) if isinstance(leaf, Tensor) else leaf for leaf in form.captured.out_leaves]
            assert form.captured.out_spec is not None
            return tree_unflatten(leaves, form.captured.out_spec)

        result = loop(StandIn(self.model, evaluate), noise, **conditions)
        if evaluation < 0:
            raise LoopError("the loop never calls the denoiser it is given; call the first argument of the loop")
        return result

    def call(self, args: tuple[object, ...], kwargs: dict[str, object]) -> tuple[Form, list[Tensor]]:
        """Return the form of a call and its tensors, capturing the form if it is new."""
        leaves, spec = tree_flatten((args, kwargs))
        specs = (TensorForm.of(leaf) if isinstance(leaf, Tensor) else StaticValue.of(leaf) for leaf in leaves)
        form = self.form(CallSignature(spec, tuple(specs)))
        return form, [leaf for leaf in leaves if isinstance(leaf, Tensor)]

    def form(self, signature: CallSignature) -> Form:
        """Return the form of all calls of this signature, capturing it if it is new."""
        if signature not in self._forms:
            self._forms[signature] = self._capture(signature)
        return self._forms[signature]

    def forms_of(self, loop: Loop, noise: object, conditions: Mapping[str, object]) -> list[Form]:
        """Return the form of each evaluation of a loop; the denoiser is not run."""
        forms: list[Form] = []

        def note(evaluation: int, form: Form, tensors: list[Tensor]) -> list[Tensor]:
            forms.append(form)
            wanted = (leaf for leaf in form.captured.out_leaves if isinstance(leaf, Tensor))
            return [torch.zeros(leaf.shape, dtype=leaf.dtype, device=leaf.device) for leaf in wanted]

        with torch.random.fork_rng(), torch.no_grad():
            self.run(loop, noise, conditions, note)
        return forms

    def _capture(self, signature: CallSignature) -> Form:
        captured = capture(self.model, signature, self.sites)
        observed, mixed = captured.copy(), captured.copy()
        OBSERVED.run(observed)
        MIXED.run(mixed)
        num_outputs = sum(isinstance(leaf, Tensor) for leaf in captured.out_leaves)
        marks = [mark for mark in site_marks(captured.graph) if mark.port != INPUT_PORT]
        column = {str(site): index for index, site in enumerate(self.sites)}
        columns = tuple(sorted(column[mark.site] for mark in marks))
        return Form(captured, observed.module(), mixed.module(), num_outputs, columns)


def price_in(unit: str, device: torch.device, forms: Sequence[Form]) -> Callable[[fx.Node], float]:
    """Return what prices a node: "multiply-adds", counted, or "time", measured once for each form of operation."""
    if unit == "multiply-adds":
        return MultiplyAdds().of
    times = NodeTimes(device)
    times.measure(node for form in forms for node in form.captured.graph.nodes if node.target is not SITE)
    return times.of
