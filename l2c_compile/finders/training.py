"""What every learned finder shares: the loss, its gradients, rounds and checkpoints.

A round gives every trained evaluation one or more updates. All that a round draws follows from the seed and its number,
so a run that was interrupted and resumed does what it would have done.

Shapes: E evaluations, S sites. Rows are evaluations in execution order.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass

import torch
from torch import Tensor

from l2c_compile.errors import FileFormatError
from l2c_compile.finders.checkpoint import Checkpoint
from l2c_compile.finders.logits import Logits
from l2c_compile.finders.open_evaluations import OpenDenoiser, OpenEvaluation
from l2c_compile.finders.penalty import Penalty
from l2c_compile.finders.processes import Workers, frozen, generator_of, seeded
from l2c_compile.finders.settings import Settings
from l2c_compile.frontend.stand_in import Loop
from l2c_compile.loops import BuiltInLoop
from l2c_compile.schedules.router import Router


def branches_of(loop: Loop) -> int:
    """Return how many calls of the denoiser make one prediction of a loop of ours; 1 for any other."""
    guidance = getattr(loop, "guidance", None) if isinstance(loop, BuiltInLoop) else None
    return guidance.num_calls if guidance else 1


Draw = Callable[[int, torch.Generator], tuple[object, Mapping[str, object]]]
"""``draw(count, generator) -> (noise, conditions)``: what a loop is given, for ``count`` samples, on the CPU."""


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


class Learner:
    """Learns the logits of the trained evaluations from distances between students and teachers, round by round.

    Args:
        denoiser: the sites.
        evaluations: those of the loop, in order.
        trained: the numbers of those that have logits; in all others every site is computed.
        settings: how to learn.
        workers: the processes that learn together.
        untrained_score: what the router says of the other evaluations.

    Raises:
        ScheduleError: if the budget cannot be met.
    """

    def __init__(
        self,
        denoiser: OpenDenoiser,
        evaluations: Sequence[OpenEvaluation],
        trained: Sequence[int],
        settings: Settings,
        workers: Workers,
        untrained_score: float,
    ) -> None:
        self.denoiser = denoiser
        self.settings = settings
        self.workers = workers
        self.num_evaluations = len(evaluations)
        self._untrained_score = untrained_score
        self.logits = Logits(trained, len(denoiser.sites), settings, denoiser.device)
        self.penalty = Penalty(denoiser, evaluations, trained, settings, workers)
        self.weights_E: Tensor | None = None
        """The weight of a unit of each evaluation's distance, shape (E,), float64; None: all alike."""
        self.round = 0
        self._distances: list[float] = []

    def computes(self, e: int) -> Tensor:
        """Return which sites really run in evaluation ``e`` at the threshold, shape (S,)."""
        above_S = self.logits[e].detach().sigmoid() > self.settings.threshold
        return self.denoiser.running(above_S.to(torch.float32)).bool().cpu()

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
        self.logits.step(gradients)
        self._distances.extend(float(distance.detach()) for distance in distances.values())

    def loss(self, distances: Mapping[int, Tensor]) -> tuple[Tensor, dict[int, Tensor]]:
        """Return the loss, of this process's samples, and its gradient by evaluation, of all processes' samples."""
        rows = [self.logits[e] for e in distances]
        weights = {e: 1.0 if self.weights_E is None else float(self.weights_E[e]) for e in distances}
        total = torch.stack([weights[e] * distance for e, distance in distances.items()]).sum()
        of_distances = self.workers.mean(torch.stack(torch.autograd.grad(total, rows)))
        gradients = {}
        for e, row, gradient in zip(distances, rows, of_distances, strict=True):
            scores_S = self.logits.scores(e)
            self.penalty.note_gradient(e, gradient, row.sigmoid(), scores_S)
            price = self.penalty.price(e, scores_S)
            (of_price,) = torch.autograd.grad(price, row)
            gradients[e] = gradient + self.penalty.factor * of_price
            total = total + self.penalty.factor * price.detach()
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
        self.penalty.fit()
        self.round += 1
        return distance, self.penalty.kept(self._scores(), self.settings.threshold)

    def router(self, loop: Loop, branches: int, info: Mapping[str, object]) -> Router:
        """Return the scores as a router; with a budget, at the threshold that keeps as much as the budget allows."""
        scores_ES = self._scores()
        threshold = self.penalty.threshold(scores_ES)
        kept = self.penalty.kept(scores_ES, threshold)
        noted = {**info, f"kept_{self.settings.budget_in}": round(kept, 4), "penalty": self.penalty.factor}
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
        weights = {} if self.weights_E is None else {"weights": self.weights_E}
        return Checkpoint(self._run(), self.round, {**weights, **self.penalty.state(), **self.logits.state()})

    def restore(self, path: str | os.PathLike[str]) -> None:
        """Go on from what ``checkpoint`` returned, in a file.

        Raises:
            FileFormatError: if it is no such file, or damaged.
            ScheduleError: if it is of another model, loop, or of other settings; ``rounds`` may differ.
            OSError: if it cannot be read.
        """
        try:
            read = Checkpoint.load(path, self._run())
            weights = torch.zeros(self.num_evaluations, dtype=torch.float64)
            read.check_forms({**self.penalty.state(), **self.logits.forms(read.tensors)}, {"weights": weights})
        except FileFormatError as error:
            raise FileFormatError(f"{os.fspath(path)} is no checkpoint of learning a router: {error}") from error
        self.round = read.round
        self.weights_E = read.tensors.get("weights")
        self.penalty.load(read.tensors)
        self.logits.load(read.tensors)

    def _scores(self) -> Tensor:
        return self.logits.table(self.num_evaluations, self._untrained_score)

    def _run(self) -> dict[str, object]:
        """Return what two runs have in common if one may go on where the other stopped, in JSON values."""
        own = {"rounds", "checkpoint_every"}
        described = {
            "evaluations": self.num_evaluations,
            "trained": list(self.logits),
            "sites": list(map(str, self.denoiser.sites)),
            **{name: value for name, value in asdict(self.settings).items() if name not in own},
        }
        plain: dict[str, object] = json.loads(json.dumps(described))
        return plain


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
            on_round(RoundReport(learner.round, settings.rounds, distance, kept, learner.penalty.factor, router))
    return router()


def draw_share(
    draw: Draw, settings: Settings, number: int, workers: Workers, device: torch.device
) -> tuple[object, dict[str, object]]:
    """Return this process's rows of what round ``number`` draws: noise and conditions, on the device."""
    noise, conditions = draw(settings.batch_size, generator_of(settings.seed, number))
    own_noise, own_conditions = workers.share((noise, dict(conditions)), settings.batch_size, device)
    return own_noise, own_conditions
