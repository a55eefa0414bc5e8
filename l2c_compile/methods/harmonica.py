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
from l2c_compile.finders.effects import effect_of_caching
from l2c_compile.finders.open_evaluations import OpenDenoiser, OpenEvaluation
from l2c_compile.finders.processes import Workers
from l2c_compile.finders.settings import Settings
from l2c_compile.finders.training import Draw, Learner, RoundReport, branches_of, draw_share, train
from l2c_compile.frontend.stand_in import Loop
from l2c_compile.schedules.router import Router
from l2c_compile.schedules.sites import Site

if TYPE_CHECKING:
    from accelerate import Accelerator

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
    """Whether activations are computed again for the gradient in place of being kept; worth it above horizon 1."""

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
        ScheduleError: if the sites or the budget do not fit the loop.
        UnknownSiteError: if a site names a module that the model does not have.
        CaptureError: if the denoiser cannot be captured.
    """
    branches = branches or branches_of(loop)
    workers, denoiser = Workers(accelerator), OpenDenoiser(model, sites)
    evaluations = denoiser.evaluations_of(loop, *draw_share(draw, settings, 0, workers, denoiser.device))
    trained = range(branches, len(evaluations))
    if not trained:
        raise ScheduleError(f"a loop of {len(evaluations)} evaluations has none that could reuse; use a longer loop")
    learner = Learner(denoiser, evaluations, trained, settings, workers, _FROZEN_SCORE)
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

    def _on_evaluation(self, e: int, evaluation: OpenEvaluation, tensors: list[Tensor]) -> list[Tensor]:
        tensors = [self._cut(e, tensor) for tensor in tensors]
        branch = e % self.branches
        with self.learner.workers.autocast():
            teacher, full = evaluation.observe(tensors)
            if e not in self.learner.logits:
                self._cache[branch] = full
                return evaluation.in_form(teacher)
            cached = [self._cut(e, value) for value in self._cache[branch]]
            outputs, computed = self._student(evaluation, tensors, self.learner.logits.scores(e), cached)
            self._distances[e] = self.learner.distance(outputs, teacher)
        self._cache[branch] = evaluation.refreshed(self.learner.computes(e), computed, cached)
        outputs = evaluation.in_form(outputs)
        if self._ends_window(e):
            self._step()
            self._cache[branch] = [value.detach() for value in self._cache[branch]]
            outputs = [output.detach() for output in outputs]
        return outputs

    def _student(
        self, evaluation: OpenEvaluation, tensors: list[Tensor], scores_S: Tensor, cached: list[Tensor]
    ) -> tuple[list[Tensor], list[Tensor]]:
        if not self.settings.recompute_activations:
            return evaluation.mix(tensors, scores_S, cached)

        def student(*flat: Tensor) -> list[Tensor]:
            outputs, computed = evaluation.mix(flat[: len(tensors)], scores_S, flat[len(tensors) :])
            return outputs + computed

        flat = recompute(student, *tensors, *cached, use_reentrant=False)
        num_outputs = len(flat) - len(cached)
        return list(flat[:num_outputs]), list(flat[num_outputs:])

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

    def _measured_weights(self, noise: object, conditions: dict[str, object]) -> Tensor:
        """Return the weight of each evaluation, shape (E,), float64.

        Evaluation e weighs what its caching does to the result of the loop: the mean squared difference between the
        loop that caches up to e and the one that caches up to e - 1, both in full from there on. The authors add up
        in this way, too; their lambda is tuned to weights that are not scaled.
        """
        learner = self.learner
        cache: dict[int, list[Tensor]] = {}

        def evaluate(
            e: int, evaluation: OpenEvaluation, tensors: list[Tensor]
        ) -> tuple[list[Tensor], list[Tensor] | None]:
            branch, is_cached = e % self.branches, e in learner.logits
            with learner.workers.autocast():
                if is_cached:
                    is_computed = learner.computes(e)
                    scores_S = is_computed.to(tensors[0].device).float()
                    outputs, computed = evaluation.mix(tensors, scores_S, cache[branch])
                    cache[branch] = evaluation.refreshed(is_computed, computed, cache[branch])
                else:
                    outputs, cache[branch] = evaluation.observe(tensors)
            outputs = evaluation.in_form(outputs)
            return outputs, outputs if is_cached else None

        effects = effect_of_caching(self.denoiser, self.loop, noise, conditions, evaluate, learner.workers)
        weights = torch.ones(learner.num_evaluations, dtype=torch.float64)
        for e, effect in effects.items():
            weights[e] = effect
        return weights
