"""HarmoniCa: learn a router along whole trajectories of the student, reusing values of any age.

Huang et al. (arXiv 2410.01723), as in the authors' code. The loop runs on the student from noise to the end. At each
evaluation e after the first of its branch

    student = model with r * computed + (1 - r) * cached at each site,   teacher = model on the student's latent
    loss = weight_e * MSE(student, teacher) + lambda * sum(r)

one step of the optimiser follows, and the loop goes on with what the student gave. A cache entry is refreshed only
where the site would be computed (score above the threshold, and so those of all sites that cover it). The weights are
what each evaluation's caching does to the result of the loop, measured every few rounds (``_measured_weights``).

Shapes: E evaluations, S sites.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint as recompute

from l2c_compile.errors import ScheduleError
from l2c_compile.finders.open_evaluations import Form, SoftDenoiser
from l2c_compile.finders.processes import Workers
from l2c_compile.finders.training import (
    Draw,
    Learner,
    RoundReport,
    Settings,
    branches_of,
    draw_share,
    squared_difference,
    train,
)
from l2c_compile.frontend.stand_in import Loop
from l2c_compile.schedules.router import Router
from l2c_compile.schedules.sites import Site

if TYPE_CHECKING:
    from accelerate import Accelerator

__all__ = ["RolloutSettings", "learn_rollout"]

_FROZEN_SCORE = 0.9933071
"""The sigmoid of 5: what the authors freeze the first evaluation at."""


@dataclass(frozen=True)
class RolloutSettings(Settings):
    """How to learn along trajectories; see also ``Settings``. A round is one trajectory."""

    weigh_every: int = 25
    """Rounds after which the weights of the evaluations are measured anew; 0 leaves all at 1."""
    horizon: int = 1
    """Evaluations that are differentiated together, caches and latents between them included; 1 as published."""
    recompute_activations: bool = False
    """Keep no activations of an evaluation until its gradient, but compute them again; worth it above horizon 1."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.weigh_every < 0 or self.horizon < 1:
            raise ScheduleError("weigh_every wants a number from 0, horizon one from 1")


def learn_rollout(
    model: nn.Module,
    loop: Loop,
    draw: Draw,
    sites: Sequence[Site | str],
    settings: RolloutSettings,
    *,
    branches: int | None = None,
    checkpoint: str | os.PathLike[str] | None = None,
    accelerator: Accelerator | None = None,
    on_round: Callable[[RoundReport], None] | None = None,
) -> Router:
    """Learn a router in which every evaluation but the first may reuse values of any age.

    Args:
        model: the denoiser; its weights are used, not changed.
        loop: runs eagerly, as it is.
        draw: returns noise and conditions.
        sites: what may be reused, with patterns.
        settings: how to learn.
        branches: evaluations with equal ``e % branches`` share caches; None: as the guidance of a loop of ours says.
        checkpoint: a file to go on from if it exists, and to write every ``settings.checkpoint_every`` rounds.
        accelerator: processes that share the batch, and mixed precision.
        on_round: told after every round.

    Raises:
        ScheduleError: the sites or the budget do not fit the loop.
        UnknownSiteError: a site names a module that the model does not have.
        CaptureError: the denoiser cannot be captured.
    """
    branches = branches or branches_of(loop)
    workers, denoiser = Workers(accelerator), SoftDenoiser(model, sites)
    forms = denoiser.forms_of(loop, *draw_share(draw, settings, 0, workers, denoiser.device))
    trained = range(branches, len(forms))
    if not trained:
        raise ScheduleError(f"a loop of {len(forms)} evaluations has none that could reuse; use a longer loop")
    learner = Learner(denoiser, forms, trained, settings, workers, _FROZEN_SCORE)
    rollout = _Rollout(learner, loop, settings, branches)

    def one_round(number: int) -> None:
        rollout.one_round(number, *draw_share(draw, settings, number, workers, denoiser.device))

    info = {"method": "HarmoniCa", "learned_on": "own samples"}
    return train(learner, one_round, lambda: learner.router(loop, branches, info), checkpoint, on_round)


class _Rollout:
    def __init__(self, learner: Learner, loop: Loop, settings: RolloutSettings, branches: int) -> None:
        self.learner = learner
        self.denoiser = learner.denoiser
        self.loop = loop
        self.settings = settings
        self.branches = branches
        self._cache: dict[int, list[Tensor]] = {}
        self._distances: dict[int, Tensor] = {}

    def one_round(self, number: int, noise: object, conditions: dict[str, object]) -> None:
        """Update the logits along one trajectory."""
        every = self.settings.weigh_every
        # The first weights are those of a router that knows nothing yet; so they are measured only once it does.
        if every and number and number % every == 0:
            self.learner.weigh(self._measured_weights(noise, conditions))
        with torch.enable_grad():
            self.denoiser.run(self.loop, noise, conditions, self._on_evaluation)
            self._step()
        self._cache.clear()

    def _on_evaluation(self, e: int, form: Form, tensors: list[Tensor]) -> list[Tensor]:
        tensors = [self._cut(e, tensor) for tensor in tensors]
        branch = e % self.branches
        with self.learner.workers.autocast():
            teacher, full = form.full(tensors)
            if e not in self.learner.logits:
                self._cache[branch] = full
                return form.outputs_in_form(teacher)
            cached = [self._cut(e, value) for value in self._cache[branch]]
            outputs, computed = self._student(form, tensors, self.learner.scores(e), cached)
            self._distances[e] = self.learner.distance(outputs, teacher)
        is_fresh = self.learner.computes(e).tolist()
        columns = form.columns
        self._cache[branch] = [
            new if is_fresh[column] else old for column, new, old in zip(columns, computed, cached, strict=True)
        ]
        outputs = form.outputs_in_form(outputs)
        if self._ends_window(e):
            self._step()
            self._cache[branch] = [value.detach() for value in self._cache[branch]]
            outputs = [output.detach() for output in outputs]
        return outputs

    def _student(
        self, form: Form, tensors: list[Tensor], scores_S: Tensor, cached: list[Tensor]
    ) -> tuple[list[Tensor], list[Tensor]]:
        if not self.settings.recompute_activations:
            return form.soft(tensors, scores_S, cached)

        def student(*flat: Tensor) -> list[Tensor]:
            outputs, computed = form.soft(flat[: len(tensors)], scores_S, flat[len(tensors) :])
            return outputs + computed

        flat = recompute(student, *tensors, *cached, use_reentrant=False)
        return list(flat[: form.num_outputs]), list(flat[form.num_outputs :])

    def _ends_window(self, e: int) -> bool:
        return (e - self.branches + 1) % self.settings.horizon == 0

    def _cut(self, e: int, value: Tensor) -> Tensor:
        """Let no gradient pass into an earlier window."""
        begins = e < self.branches or (e - self.branches) % self.settings.horizon == 0
        return value.detach() if begins else value

    def _step(self) -> None:
        if self._distances:
            self.learner.update(self._distances)
            self._distances = {}

    @torch.no_grad()
    def _measured_weights(self, noise: object, conditions: dict[str, object]) -> Tensor:
        """Return the weight of each evaluation, shape (E,), float64.

        Evaluation e weighs what its caching does to the result of the loop: the mean squared difference between the
        loop that caches up to e and the one that caches up to e - 1, both in full from there on. The authors add up
        in this way, too; their lambda is tuned to weights that are not scaled.
        """
        E = self.learner.num_evaluations
        recorded: list[list[Tensor]] = []
        cache: dict[int, list[Tensor]] = {}

        def record(e: int, form: Form, tensors: list[Tensor]) -> list[Tensor]:
            with self.learner.workers.autocast():
                if e in self.learner.logits:
                    is_computed = self.learner.computes(e)
                    held = cache[e % self.branches]
                    outputs, computed = form.soft(tensors, is_computed.to(tensors[0].device).float(), held)
                    fresh = is_computed.tolist()
                    values = [n if fresh[c] else o for c, n, o in zip(form.columns, computed, held, strict=True)]
                else:
                    outputs, values = form.full(tensors)
            cache[e % self.branches] = values
            recorded.append(form.outputs_in_form(outputs))
            return recorded[-1]

        results = {E - 1: self.denoiser.run(self.loop, noise, conditions, record)}
        for last in range(self.branches - 1, E - 1):

            def resume(e: int, form: Form, tensors: list[Tensor]) -> list[Tensor]:
                if e <= last:  # noqa: B023 - called before the next turn
                    return recorded[e]
                with self.learner.workers.autocast():
                    return form.outputs_in_form(form.full(tensors)[0])

            results[last] = self.denoiser.run(self.loop, noise, conditions, resume)
        weights = torch.ones(E, dtype=torch.float64)
        for e in self.learner.logits:
            weights[e] = squared_difference(results[e], results[e - 1])
        return weights
