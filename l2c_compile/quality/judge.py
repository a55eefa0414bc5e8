"""The judge, which compares samples with and without caching on equal noise by every measure."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from l2c_compile.api import l2c_compile
from l2c_compile.loops import BuiltInLoop
from l2c_compile.models import load_digit_classifier
from l2c_compile.models.named import NamedModel
from l2c_compile.quality.measures import (
    Estimate,
    Quality,
    bootstrap_mean,
    check_num_samples,
    measure_quality,
    sample_all,
)
from l2c_compile.schedules.schedule import CacheSchedule

_DATA_RANGE = 2.0
"""The range of the pixels of digits, which lie in [-1, 1]."""


@dataclass(frozen=True)
class Verdict:
    """What a schedule does to the samples, and how many multiply-adds it leaves."""

    quality: Quality
    as_asked: Estimate
    """The share of the samples that the classifier takes for the class that was asked for."""
    multiply_adds: int
    """Multiply-adds of one batch."""
    multiply_adds_kept: float
    """Multiply-adds of one batch over those of the reference."""


class Judge:
    """Compares samples of the digits model under a schedule with its samples without caching.

    Everything is sampled through the compiled path, on equal noise, in equal batches.

    Args:
        known: the digits model; the classifier that judges it was trained separately.
        loop: the loop that makes the samples without caching.
        num_samples: the number of samples; more than the features of the classifier (64), better ten times that.
        batch: the number of samples in a call.
        seed: the seed of the noise and the bootstrap.
        reference: the ``reference`` and ``multiply_adds`` of an earlier judge of the same settings; None samples anew.
        on_batch: a function that is called after each batch, to show progress.

    Raises:
        QualityError: if there are not more samples than features.
    """

    def __init__(
        self,
        known: NamedModel,
        loop: BuiltInLoop,
        *,
        num_samples: int,
        batch: int,
        seed: int = 0,
        reference: tuple[Tensor, int] | None = None,
        on_batch: Callable[[], None] = lambda: None,
    ) -> None:
        self.known = known
        self.seed = seed
        self.batch = min(batch, num_samples)
        self.noise, self.labels = known.inputs(num_samples, seed)
        self._on_batch = on_batch
        self._classifier = load_digit_classifier()
        # The number is checked now, not after the sampling.
        check_num_samples(num_samples, self._classifier.head.in_features)
        uncached = CacheSchedule.all_compute(loop.num_evaluations)
        self.reference, self.multiply_adds = reference or self._sample(uncached, loop)
        self.reference_features = self._features(self.reference)
        self.reference_as_asked = self._as_asked(self.reference)

    @property
    def num_batches(self) -> int:
        """The number of calls that one judgement takes."""
        return math.ceil(len(self.noise) / self.batch)

    def judge(self, schedule: CacheSchedule, loop: BuiltInLoop) -> Verdict:
        """Sample under a schedule and compare the samples; the loop may be another than the reference's."""
        samples, multiply_adds = self._sample(schedule, loop)
        quality = measure_quality(
            samples,
            self.reference,
            data_range=_DATA_RANGE,
            features=self._features(samples),
            reference_features=self.reference_features,
            seed=self.seed,
        )
        return Verdict(quality, self._as_asked(samples), multiply_adds, multiply_adds / self.multiply_adds)

    def _sample(self, schedule: CacheSchedule, loop: BuiltInLoop) -> tuple[Tensor, int]:
        # "rounding" is twice as fast on a CPU, and it changes a thousandth of what the best schedule changes.
        sampler = l2c_compile(self.known.denoiser, schedule, loop, numerics="rounding")
        samples = sample_all(sampler, self.noise, {"y": self.labels}, self.batch, self._on_batch)
        return samples, sampler.summary().multiply_adds

    @torch.no_grad()
    def _features(self, samples: Tensor) -> Tensor:
        return self._classifier.features(samples)

    @torch.no_grad()
    def _as_asked(self, samples: Tensor) -> Estimate:
        drawn = self._classifier(samples).argmax(dim=1)
        return bootstrap_mean((drawn == self.labels).double(), self.seed)
