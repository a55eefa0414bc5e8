"""The settings that every learned finder has."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from l2c_compile.errors import ScheduleError


@dataclass(frozen=True)
class Settings:
    """How to learn a router.

    Raises:
        ScheduleError: if a setting makes no sense.
    """

    rounds: int = 100
    """How often every trained evaluation is updated."""
    batch_size: int = 8
    """Samples of one update, over all processes."""
    learning_rate: float = 0.1
    """The rate of AdamW on the logits, without weight decay. The authors of Learning-to-Cache take 0.01 or 0.001 for
    up to 50 000 iterations; a logit has to cross up to ten units."""
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
    """Whether scores are rounded to 0 or 1 at the threshold where they mix; gradients pass as if they were not."""
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
