"""What every learned finder shares: logits, their optimiser, the price of computing, checkpoints and processes.

A round gives every trained evaluation one or more updates. All that a round draws follows from the seed and its number,
so a run that was interrupted and resumed does what it would have done.

Shapes: E evaluations, S sites. Rows are evaluations in execution order.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from l2c_compile.errors import FileFormatError, ScheduleError
from l2c_compile.finders.checkpoint import Checkpoint
from l2c_compile.finders.open_evaluations import Form, SoftDenoiser
from l2c_compile.finders.penalty import Costs
from l2c_compile.finders.processes import Workers, frozen, generator_of, seeded
from l2c_compile.frontend.stand_in import Loop
from l2c_compile.graphs.forms import tensors_in
from l2c_compile.loops import BuiltInLoop
from l2c_compile.schedules.router import Router

__all__ = ["Draw", "Learner", "RoundReport", "Settings", "branches_of", "draw_share", "train"]


def branches_of(loop: Loop) -> int:
    """Return how many calls of the denoiser make one prediction of a loop of ours; 1 for any other."""
    guidance = getattr(loop, "guidance", None) if isinstance(loop, BuiltInLoop) else None
    return guidance.num_calls if guidance else 1


Draw = Callable[[int, torch.Generator], tuple[object, Mapping[str, object]]]
"""``draw(count, generator) -> (noise, conditions)``: what a loop is given, for ``count`` samples, on the CPU."""

_MOMENTS = ("step", "exp_avg", "exp_avg_sq")
"""What AdamW keeps of each row."""
_MEMORY = 0.9
"""How much of the estimated steepness a round keeps from the one before."""
_LEAST_PENALTY = 1e-6
"""lambda while nothing is known to cost more: AdamW moves a logit at its own pace, however small the gradient is."""

_LEAST_CACHED = 0.005
"""Scores nearer to 1 than this say nothing about what a cached value would do."""
_UNKNOWN = -1.0


@dataclass(frozen=True)
class Settings:
    """How to learn a router.

    Raises:
        ScheduleError: A setting makes no sense.
    """

    rounds: int = 100
    """In each of them every trained evaluation is updated."""
    batch_size: int = 8
    """Samples of one update, over all processes."""
    learning_rate: float = 0.1
    """Of AdamW on the logits, without weight decay. The authors of Learning-to-Cache take 0.01 or 0.001 for up to
    50 000 iterations; a logit has to cross up to ten units."""
    penalty: float | None = None
    """lambda: what a computed site costs, in units of the distance. Give this or a budget."""
    budget: float | None = None
    """Share of the work of the loop that may be left, in (0, 1). lambda follows from it after every round."""
    budget_in: Literal["multiply-adds", "time"] = "multiply-adds"
    """The work that the budget is a share of. Times are measured operation by operation on the model's device."""
    price_by: Literal["sites", "multiply-adds", "time"] = "sites"
    """What a site costs relative to the others: all the same (as published), or what computing it takes."""
    reduction: Literal["mean", "sum"] = "mean"
    """Squared errors of the outputs: mean over all elements (as for DiT), or sum over those of a sample (U-ViT)."""
    straight_through: bool = False
    """Mix with scores rounded to 0 or 1 at the threshold; gradients pass as if they were not rounded."""
    threshold: float = 0.1
    """A site is computed where its score is above. With a budget the router gets the threshold that meets it best."""
    limit: float = 5.0
    """Logits are clamped to [-limit, limit] after every update."""
    seed: int = 0
    checkpoint_every: int = 10
    """Rounds between checkpoints."""

    def __post_init__(self) -> None:
        for name in ("rounds", "batch_size", "checkpoint_every"):
            if type(getattr(self, name)) is not int or getattr(self, name) < 1:
                raise ScheduleError(f"{name} wants a positive whole number, got {getattr(self, name)!r}")
        if not all(0 < number < math.inf for number in (self.learning_rate, self.limit)):
            raise ScheduleError("learning_rate and limit want positive numbers")
        if (self.penalty is None) == (self.budget is None):
            raise ScheduleError("a router wants a price of computing: give a penalty, or a budget to derive it from")
        if self.penalty is not None and not 0 < self.penalty < math.inf:
            raise ScheduleError(f"penalty wants a positive number, got {self.penalty}")
        if self.budget is not None and not 0 < self.budget < 1:
            raise ScheduleError(f"budget wants a share between 0 and 1, got {self.budget}")
        if not 0 < self.threshold < 1:
            raise ScheduleError(f"threshold wants a number between 0 and 1, got {self.threshold}")


@dataclass(frozen=True)
class RoundReport:
    """Where training stands after a round."""

    round: int
    """How many rounds are done."""
    rounds: int
    distance: float
    """Mean over the updates of the round of what the student is away from the teacher, without the penalty."""
    kept: float
    """Share of the work that is left at the threshold of the settings."""
    penalty: float
    """lambda."""
    router: Callable[[], Router]
    """Gives the router as it is."""


def squared_difference(one: object, other: object) -> float:
    """Return the mean squared difference of two results of a loop, summed over their tensors."""
    pairs = zip(tensors_in(one), tensors_in(other), strict=True)
    return float(sum((a.double() - b.double()).square().mean() for a, b in pairs))


class Learner:
    """The logits of the trained evaluations, their optimiser and lambda.

    Args:
        denoiser: the sites.
        forms: of each evaluation of the loop.
        trained: the evaluations that have logits; in all others every site is computed.
        settings: how to learn.
        workers: the processes that learn together.
        untrained_score: what the router says of the other evaluations.
    """

    def __init__(
        self,
        denoiser: SoftDenoiser,
        forms: Sequence[Form],
        trained: Sequence[int],
        settings: Settings,
        workers: Workers,
        untrained_score: float,
    ) -> None:
        self.denoiser = denoiser
        self.settings = settings
        self.workers = workers
        self.num_evaluations = len(forms)
        self._untrained_score = untrained_score
        generator = torch.Generator().manual_seed(settings.seed)
        draws = {e: torch.randn(len(denoiser.sites), generator=generator) for e in trained}
        self.logits = {e: nn.Parameter(drawn.to(denoiser.device)) for e, drawn in draws.items()}
        self._optimizer = torch.optim.AdamW(self.logits.values(), lr=settings.learning_rate, weight_decay=0.0)
        self._work = Costs(denoiser, forms, settings.budget_in, workers)
        is_same = settings.price_by == settings.budget_in
        self._prices = self._work if is_same else Costs(denoiser, forms, settings.price_by, workers)
        self._set_prices()
        self.penalty = settings.penalty or _LEAST_PENALTY
        self.steepness_ES = torch.full((len(forms), len(denoiser.sites)), _UNKNOWN)
        self.weights_E: Tensor | None = None
        """What a unit of each evaluation's distance weighs, shape (E,), float64; None: all alike."""
        self.round = 0
        self._distances: list[float] = []
        self._check_budget()

    def scores(self, e: int) -> Tensor:
        """Return the scores that evaluation ``e`` is mixed with, shape (S,), differentiable in its logits."""
        scores_S = self.logits[e].sigmoid()
        if self.settings.straight_through:
            rounded_S = (scores_S > self.settings.threshold).to(scores_S.dtype)
            scores_S = scores_S + (rounded_S - scores_S).detach()
        return scores_S

    def computes(self, e: int) -> Tensor:
        """Return which sites really run in evaluation ``e`` at the threshold, shape (S,)."""
        if e not in self.logits:
            return torch.ones(len(self.denoiser.sites), dtype=torch.bool)
        above_S = self.logits[e].detach().sigmoid() > self.settings.threshold
        return self._work.open(above_S.to(torch.float32)).bool().cpu()

    def distance(self, students: Sequence[Tensor], teachers: Sequence[Tensor]) -> Tensor:
        """Return the squared error of the floating-point outputs, in float32 at least; a mean over the samples."""
        total = torch.zeros((), device=self.denoiser.device)
        for student, teacher in zip(students, teachers, strict=True):
            if student.is_floating_point():
                dtype = torch.promote_types(student.dtype, torch.float32)
                square = (student.to(dtype) - teacher.detach().to(dtype)).square()
                total = total + (
                    square.mean() if self.settings.reduction == "mean" else square.flatten(1).sum(1).mean()
                )
        return total

    def update(self, distances: Mapping[int, Tensor]) -> None:
        """Take one step of the optimiser on the rows of the given evaluations.

        Args:
            distances: by evaluation, what its student is away from its teacher; differentiable.
        """
        _, gradients = self.loss(distances)
        for e, gradient in gradients.items():
            self.logits[e].grad = gradient
        # Rows without a gradient are left alone, their moments too: the authors train one parameter an evaluation.
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        with torch.no_grad():
            for e in gradients:
                self.logits[e].clamp_(-self.settings.limit, self.settings.limit)
        self._distances.extend(float(distance.detach()) for distance in distances.values())

    def loss(self, distances: Mapping[int, Tensor]) -> tuple[Tensor, dict[int, Tensor]]:
        """Return the loss, of this process's samples, and its gradient by evaluation, of all processes' samples."""
        rows = [self.logits[e] for e in distances]
        weights = {e: 1.0 if self.weights_E is None else float(self.weights_E[e]) for e in distances}
        total = torch.stack([weights[e] * distance for e, distance in distances.items()]).sum()
        of_distances = self.workers.mean(torch.stack(torch.autograd.grad(total, rows)))
        gradients = {}
        for e, row, gradient in zip(distances, rows, of_distances, strict=True):
            self._note_steepness(e, gradient)
            price = (self._price_ES[e] * self._prices.open(self.scores(e))).sum()
            (of_price,) = torch.autograd.grad(price, row)
            gradients[e] = gradient + self.penalty * of_price
            total = total + self.penalty * price.detach()
        return total.detach(), gradients

    def weigh(self, weights_E: Tensor) -> None:
        """Take the weights of the trained evaluations over from here, scaled to a mean of 1; float64, shape (E,)."""
        weights_E = self.workers.mean(weights_E)
        rows = list(self.logits)
        mean = weights_E[rows].mean()
        weights_E[rows] = weights_E[rows] / mean if mean > 0 else 1.0
        self.weights_E = weights_E

    def finish_round(self) -> tuple[float, float]:
        """Count the round and fit lambda to the budget; return the mean distance and the kept share."""
        own = torch.tensor(self._distances, dtype=torch.float64)
        distance = float(self.workers.mean(own.mean()))
        self._distances.clear()
        if self.settings.budget is not None:
            self.penalty = max(self._penalty_for(self.settings.budget), _LEAST_PENALTY)
        self.round += 1
        return distance, self._work.kept(self._computed(self._all_scores(), self.settings.threshold))

    def _set_prices(self) -> None:
        mean_price = float(self._prices.own_ES[list(self.logits)].mean())
        self._price_ES = (self._prices.own_ES / mean_price).to(torch.float32).to(self.denoiser.device)

    def _note_steepness(self, e: int, gradient: Tensor) -> None:
        """Estimate how steeply the distance grows where a site is no longer computed, from its gradient.

        To first order the distance is a sum of ``(1 - r)**2 * D`` over the sites, whose slope is ``-2 * (1 - r) * D``.
        """
        with torch.no_grad():
            r_S = self.logits[e].sigmoid()
            cached_S = 1.0 - self.scores(e)
            seen_S = (-gradient / (r_S * (1.0 - r_S)) / cached_S.clamp(min=_LEAST_CACHED)).clamp(min=0.0).cpu()
            known_S = self.steepness_ES[e]
            is_known = (cached_S >= _LEAST_CACHED).cpu()
            blended_S = torch.where(known_S < 0, seen_S, _MEMORY * known_S + (1.0 - _MEMORY) * seen_S)
            self.steepness_ES[e] = torch.where(is_known, blended_S, known_S)

    def _penalty_for(self, budget: float) -> float:
        """Return the lambda at which as many scores settle above the threshold as the budget allows.

        A score settles where ``steepness * (1 - r) = lambda * price``.
        """
        worth_ES = self.steepness_ES.clamp(min=0.0) / self._price_ES.cpu()
        return (1.0 - self.settings.threshold) * self._threshold_within(budget, worth_ES)

    def router(self, loop: Loop, branches: int, info: Mapping[str, object]) -> Router:
        """Return the scores as a router; with a budget, at the threshold that keeps as much as the budget allows."""
        scores_ES = self._all_scores()
        threshold = self.settings.threshold
        if self.settings.budget is not None:
            threshold = self._threshold_within(self.settings.budget, scores_ES)
        kept = self._work.kept(self._computed(scores_ES, threshold))
        noted = {**info, f"kept_{self.settings.budget_in}": round(kept, 4), "penalty": self.penalty}
        noted |= {"rounds": self.round, "batch_size": self.settings.batch_size, "seed": self.settings.seed}
        return Router(
            scores_ES,
            self.denoiser.sites,
            tuple(self.logits),
            threshold,
            branches,
            loop.to_dict() if isinstance(loop, BuiltInLoop) else None,
            noted,
        )

    def checkpoint(self) -> Checkpoint:
        """Return all that the next round depends on."""
        tensors = {} if self.weights_E is None else {"weights": self.weights_E}
        tensors["penalty"] = torch.tensor(self.penalty, dtype=torch.float64)
        tensors["steepness"] = self.steepness_ES
        # Times that are measured again would be others.
        tensors["work.total"] = torch.tensor(self._work.total, dtype=torch.float64)
        tensors["work.own"] = self._work.own_ES
        tensors["prices.own"] = self._prices.own_ES.clone()
        for e, row in self.logits.items():
            tensors[f"logits.{e}"] = row.detach().cpu().clone()
            for name, value in self._optimizer.state[row].items():
                tensors[f"{name}.{e}"] = value.cpu().clone()
        return Checkpoint(self._described(), self.round, tensors)

    def restore(self, path: str | os.PathLike[str]) -> None:
        """Go on from what ``checkpoint`` returned, in a file.

        Raises:
            FileFormatError: if it is no such file, or damaged.
            ScheduleError: if it is of another model, loop, or of other settings; ``rounds`` may differ.
        """
        try:
            read = Checkpoint.load(path, self._described())
            read.check_forms(*self._forms(read.tensors))
        except FileFormatError as error:
            raise FileFormatError(f"{os.fspath(path)} is no checkpoint of learning a router: {error}") from error
        tensors = read.tensors
        self.round, self.penalty, self.steepness_ES = read.round, float(tensors["penalty"]), tensors["steepness"]
        self._work.total, self._work.own_ES = float(tensors["work.total"]), tensors["work.own"]
        self._prices.own_ES = tensors["prices.own"]
        self._set_prices()
        self.weights_E = tensors.get("weights")
        for e, row in self.logits.items():
            with torch.no_grad():
                row.copy_(tensors[f"logits.{e}"])
            names = [name for name in _MOMENTS if f"{name}.{e}" in tensors]
            device = {"step": torch.device("cpu")}
            self._optimizer.state[row] = {
                name: tensors[f"{name}.{e}"].to(device.get(name, row.device)) for name in names
            }

    def _forms(self, names: Collection[str]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Return tensors of the forms that a checkpoint with these names must have, and of those that it may have."""
        one, table_ES = torch.zeros((), dtype=torch.float64), self._work.own_ES
        needed = {"penalty": one, "work.total": one, "work.own": table_ES, "prices.own": table_ES}
        needed["steepness"] = self.steepness_ES
        # AdamW counts in float32, also where other numbers are smaller.
        step = one if torch.get_default_dtype() == torch.float64 else one.float()
        for e, row in self.logits.items():
            needed[f"logits.{e}"] = row
            moments = dict(zip((f"{name}.{e}" for name in _MOMENTS), (step, row, row), strict=True))
            needed |= moments if any(name in names for name in moments) else {}
        return needed, {"weights": table_ES[:, 0]}

    def _described(self) -> dict[str, object]:
        own = {"rounds", "checkpoint_every"}
        settings = {name: value for name, value in asdict(self.settings).items() if name not in own}
        described = {
            "evaluations": self.num_evaluations,
            "trained": list(self.logits),
            "sites": list(map(str, self.denoiser.sites)),
            **settings,
        }
        plain: dict[str, object] = json.loads(json.dumps(described))
        return plain

    def _all_scores(self) -> Tensor:
        scores_ES = torch.full((self.num_evaluations, len(self.denoiser.sites)), self._untrained_score)
        for e, row in self.logits.items():
            scores_ES[e] = row.detach().sigmoid().float().cpu()
        return scores_ES

    def _threshold_within(self, budget: float, scores_ES: Tensor) -> float:
        """Return the lowest of the scores above which no more than the budget is left; 0 if that is all of them."""
        rows = list(self.logits)
        candidates = [0.0, *torch.unique(scores_ES[rows]).tolist()]
        low, high = 0, len(candidates) - 1
        while low < high:
            middle = (low + high) // 2
            if self._work.kept(self._computed(scores_ES, candidates[middle])) <= budget:
                high = middle
            else:
                low = middle + 1
        return float(candidates[high])

    def _computed(self, scores_ES: Tensor, threshold: float) -> Tensor:
        computed_ES = torch.ones_like(scores_ES, dtype=torch.bool)
        rows = list(self.logits)
        computed_ES[rows] = scores_ES[rows] > threshold
        return computed_ES

    def _check_budget(self) -> None:
        budget = self.settings.budget
        if budget is None:
            return
        nothing_ES = self._computed(torch.zeros(self.num_evaluations, len(self.denoiser.sites)), 0.5)
        least = self._work.kept(nothing_ES)
        if budget < least:
            raise ScheduleError(
                f"a budget of {budget:.1%} of the {self.settings.budget_in} cannot be met: {least:.1%} is left when"
                " every site is reused in every evaluation that may reuse; let more evaluations reuse, name more sites,"
                " or raise the budget"
            )


def train(
    learner: Learner,
    one_round: Callable[[int], None],
    router: Callable[[], Router],
    checkpoint: str | os.PathLike[str] | None,
    on_round: Callable[[RoundReport], None] | None,
) -> Router:
    """Run the rounds that are left, with the weights frozen, and return the router.

    Args:
        learner: what learns.
        one_round: updates the learner; given the number of the round.
        router: makes the router.
        checkpoint: where to go on from, if it exists, and to write to.
        on_round: told after every round, in every process.
    """
    settings, workers = learner.settings, learner.workers
    if checkpoint is not None and os.path.exists(checkpoint):
        learner.restore(checkpoint)
    while learner.round < settings.rounds:
        with frozen(learner.denoiser.model), seeded(settings.seed, learner.round, workers.rank):
            one_round(learner.round)
        distance, kept = learner.finish_round()
        is_due = learner.round % settings.checkpoint_every == 0 or learner.round == settings.rounds
        if checkpoint is not None and is_due and workers.is_main:
            learner.checkpoint().save(checkpoint)
        if on_round is not None:
            on_round(RoundReport(learner.round, settings.rounds, distance, kept, learner.penalty, router))
    return router()


def draw_share(
    draw: Draw, settings: Settings, number: int, workers: Workers, device: torch.device
) -> tuple[object, dict[str, object]]:
    """Return this process's rows of what round ``number`` draws: noise and conditions, on the device."""
    noise, conditions = draw(settings.batch_size, generator_of(settings.seed, number))
    own_noise, own_conditions = workers.share((noise, dict(conditions)), settings.batch_size, device)
    return own_noise, own_conditions
