"""Learning-to-Cache: learn which sites a cached evaluation may take from the full evaluation before it.

Ma et al. (arXiv 2406.01733), section 3.3, as in the authors' code. For a pair of evaluations (s, m) the model runs at s
in full and fills the cache, the loop itself goes from there to m, and there teacher and student get the same latent:

    student = model with r * computed + (1 - r) * cached at each site,    r = sigmoid(logits of m)
    loss = MSE(student, teacher) + lambda * sum(r)

Only the logits are trained. The loop is run as it is: guidance in one call is trained on both halves of its batch,
guidance in two calls on each with a cache of its own. The authors train without guidance and drop one label in ten; to
do so, give a loop without guidance and drop labels in the data.

Shapes: N samples of a data set, S sites.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from l2c_compile.errors import ScheduleError
from l2c_compile.finders.effects import effect_of_caching
from l2c_compile.finders.latent_data import LatentData, noised_by
from l2c_compile.finders.open_evaluations import OpenDenoiser, OpenEvaluation
from l2c_compile.finders.processes import Workers, generator_of
from l2c_compile.finders.segments import Segment, segments
from l2c_compile.finders.settings import Settings
from l2c_compile.finders.training import Draw, Learner, RoundReport, branches_of, draw_share, train
from l2c_compile.frontend.stand_in import Loop
from l2c_compile.loops import BuiltInLoop, DPMSolver
from l2c_compile.schedules.router import Router
from l2c_compile.schedules.sites import Site

if TYPE_CHECKING:
    from accelerate import Accelerator

_NUM_WEIGHING_DRAWS = 4
"""Batches that the sensitivities are a mean of."""

_COMPUTED = 1.0
"""The score of evaluations that are not trained. The authors' files hold rows for them that nobody reads."""


@dataclass(frozen=True)
class L2CSettings(Settings):
    """How to learn; see ``Settings``. A round updates every pair once, each on fresh samples."""

    weigh_by_result: bool = False
    """Whether the distance of each evaluation is weighed with what it does to the result of the loop
    (``_sensitivities``). The authors count all alike, though what is off early may be forgotten, or grow, on
    the way to the end."""


def alternating_pairs(num_evaluations: int, branches: int = 1) -> list[tuple[int, int]]:
    """Return the pairs of a loop whose predictions alternate: the first full, the second cached, and so on.

    Args:
        num_evaluations: calls of the denoiser.
        branches: calls for one prediction: 2 for guidance in two calls.
    """
    full = range(0, num_evaluations // branches - 1, 2)
    return [(branches * n + b, branches * (n + 1) + b) for n in full for b in range(branches)]


def published_pairs(loop: BuiltInLoop) -> list[tuple[int, int]]:
    """Return the pairs that the authors train.

    A singlestep solver of order 2 is full in its first evaluation and in every midpoint; the evaluations that begin a
    later step take from the midpoint before. All other loops alternate.
    """
    branches = branches_of(loop)
    if isinstance(loop, DPMSolver) and loop.method == "singlestep" and loop.order == 2:
        starts = range(2, loop.num_evaluations // branches, 2)
        return [(branches * (n - 1) + b, branches * n + b) for n in starts for b in range(branches)]
    return alternating_pairs(loop.num_evaluations, branches)


def learn_l2c(
    model: nn.Module,
    loop: Loop,
    inputs: Draw | LatentData,
    sites: Sequence[Site | str],
    settings: L2CSettings,
    *,
    pairs: Iterable[tuple[int, int]] | None = None,
    branches: int | None = None,
    checkpoint: str | os.PathLike[str] | None = None,
    accelerator: Accelerator | None = None,
    on_round: Callable[[RoundReport], None] | None = None,
) -> Router:
    """Learn a router for a denoiser and the loop that samples it.

    Args:
        model: the denoiser; its weights are used, not changed.
        loop: runs eagerly; with ``LatentData`` it is also traced, as ``l2c_compile`` does.
        inputs: a function that draws noise and conditions, and the model samples the trajectories itself; or a data
            set. With data a loop with history (multistep) is run from its start for every pair.
        sites: what may be reused, with patterns.
        settings: how to learn.
        pairs: (full, cached) evaluations, each full one the latest of its branch before; None takes
            ``published_pairs`` of a loop of ours.
        branches: evaluations with equal ``e % branches`` share caches; None: as the guidance of a loop of ours says.
        checkpoint: a file to go on from if it exists, and to write every ``settings.checkpoint_every`` rounds.
        accelerator: processes that share the batch, and mixed precision.
        on_round: told after every round.

    Returns:
        A router whose trained evaluations are the cached ones; all others are computed.

    Raises:
        ScheduleError: if the pairs, the sites, the budget or the data do not fit the loop.
        UnknownSiteError: if a site names a module that the model does not have.
        CaptureError: if the denoiser cannot be captured.
        LoopTraceError: if the loop cannot be traced.
    """
    branches = branches or branches_of(loop)
    workers, denoiser = Workers(accelerator), OpenDenoiser(model, sites)
    draw = inputs.draw if isinstance(inputs, LatentData) else inputs

    def drawn(number: int) -> tuple[object, dict[str, object]]:
        return draw_share(draw, settings, number, workers, denoiser.device)

    evaluations = denoiser.evaluations_of(loop, *drawn(0))
    chosen = _checked_pairs(loop, pairs, len(evaluations), branches)
    learner = Learner(denoiser, evaluations, [m for _, m in chosen], settings, workers, _COMPUTED)
    updates = _PairUpdates(learner, branches)

    def own_samples(number: int) -> None:
        noise, conditions = drawn(number)
        with torch.no_grad():
            denoiser.run(loop, noise, conditions, updates.on_evaluation)

    one_round: Callable[[int], None] = own_samples
    source = "own samples"
    if isinstance(inputs, LatentData):
        noised = inputs.noised or noised_by(loop)
        parts = segments(denoiser, loop, *drawn(0), chosen)
        one_round, source = _data_round(inputs, noised, parts, updates), "latents"

    def weighed_round(number: int) -> None:
        if settings.weigh_by_result and learner.weights_E is None:
            learner.weigh(_sensitivities(learner, loop, branches, map(drawn, range(_NUM_WEIGHING_DRAWS))))
        one_round(number)

    info = {"method": "Learning-to-Cache", "learned_on": source}
    if settings.weigh_by_result:
        info["weighed"] = "by result"
    return train(learner, weighed_round, lambda: learner.router(loop, branches, info), checkpoint, on_round)


def _sensitivities(
    learner: Learner, loop: Loop, branches: int, draws: Iterable[tuple[object, dict[str, object]]]
) -> Tensor:
    """Return how much the result of the loop changes for a unit of each evaluation's distance, shape (E,), float64.

    Measured where one evaluation alone takes every site from the full one before it: the mean squared change of the
    result over the distance there. Errors of several evaluations add up where they are independent.
    """
    denoiser = learner.denoiser
    nothing_S = torch.zeros(len(denoiser.sites), device=denoiser.device)
    changes_E = torch.zeros(learner.num_evaluations, dtype=torch.float64)
    distances_E = torch.zeros_like(changes_E)
    caches: dict[int, list[Tensor]] = {}

    def evaluate(e: int, evaluation: OpenEvaluation, tensors: list[Tensor]) -> tuple[list[Tensor], list[Tensor] | None]:
        student = None
        with learner.workers.autocast():
            outputs, values = evaluation.observe(tensors)
            if e in learner.logits:
                student, _ = evaluation.mix(tensors, nothing_S, caches[e % branches])
                distances_E[e] += float(learner.distance(student, outputs))
                student = evaluation.in_form(student)
        caches[e % branches] = values
        return evaluation.in_form(outputs), student

    for noise, conditions in draws:
        effects = effect_of_caching(denoiser, loop, noise, conditions, evaluate, learner.workers)
        for e, change in effects.items():
            changes_E[e] += change
    return changes_E / distances_E.clamp(min=torch.finfo(torch.float64).tiny)


class _PairUpdates:
    """Fills the cache in full evaluations and updates the logits of cached ones, while the full model goes on."""

    def __init__(self, learner: Learner, branches: int) -> None:
        self.learner = learner
        self.branches = branches
        self._cache: dict[int, list[Tensor]] = {}

    def on_evaluation(self, e: int, evaluation: OpenEvaluation, tensors: list[Tensor]) -> list[Tensor]:
        return self.evaluate(e, evaluation, tensors, is_trained=e in self.learner.logits)

    def evaluate(self, e: int, evaluation: OpenEvaluation, tensors: list[Tensor], *, is_trained: bool) -> list[Tensor]:
        with self.learner.workers.autocast():
            outputs, values = evaluation.observe(tensors)
            if is_trained:
                with torch.enable_grad():
                    cached = self._cache.pop(e - self.branches)
                    student, _ = evaluation.mix(tensors, self.learner.logits.scores(e), cached)
                    distance = self.learner.distance(student, outputs)
        if is_trained:
            with torch.enable_grad():
                self.learner.update({e: distance})
        else:
            self._cache = {source: kept for source, kept in self._cache.items() if source > e - self.branches}
            self._cache[e] = values
        return evaluation.in_form(outputs)


def _data_round(
    data: LatentData,
    noised: Callable[[Tensor, Tensor, int], Tensor],
    parts: Sequence[Segment],
    updates: _PairUpdates,
) -> Callable[[int], None]:
    learner = updates.learner
    settings = learner.settings

    def one_pair(part: Segment, generator: torch.Generator) -> None:
        clean, conditions = data.draw_clean(settings.batch_size, generator)
        noise = torch.randn(clean.shape, generator=generator, dtype=clean.dtype)
        drawn = noised(clean, noise, part.start), conditions
        state, own = learner.workers.share(drawn, settings.batch_size, learner.denoiser.device)

        def on_evaluation(e: int, evaluation: OpenEvaluation, tensors: list[Tensor]) -> list[Tensor]:
            return updates.evaluate(e, evaluation, tensors, is_trained=e == part.end)

        with torch.no_grad():
            part.run(state, own, on_evaluation)

    def one_round(number: int) -> None:
        generator = generator_of(settings.seed, number)
        for part in parts:
            one_pair(part, generator)

    return one_round


def _checked_pairs(
    loop: Loop, pairs: Iterable[tuple[int, int]] | None, num_evaluations: int, branches: int
) -> list[tuple[int, int]]:
    if pairs is None:
        if not isinstance(loop, BuiltInLoop):
            raise ScheduleError(
                "a loop of your own wants its pairs, for example"
                f" pairs=alternating_pairs({num_evaluations}, branches={branches})"
            )
        pairs = published_pairs(loop)
    chosen = sorted(pairs, key=lambda pair: pair[1])
    if not chosen:
        raise ScheduleError(f"there are no pairs to learn from in {num_evaluations} evaluations; use a longer loop")
    cached = {m for _, m in chosen}
    if len(cached) != len(chosen):
        raise ScheduleError("an evaluation is cached in two pairs; give each one full evaluation")
    for s, m in chosen:
        if not 0 <= s < m < num_evaluations:
            raise ScheduleError(
                f"pair ({s}, {m}): the loop has evaluations 0..{num_evaluations - 1}, the full one before the cached"
            )
        if s in cached or s != m - branches:
            raise ScheduleError(
                f"pair ({s}, {m}): a cached evaluation takes from the one right before it, here {m - branches}, which"
                " must be full; learn_rollout learns to reuse older values"
            )
    return chosen
