"""The body of ``l2c eval``, and the judge that it shares with ``python -m bench quality``.

Shapes: N samples, D features.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text
from torch import Tensor

from l2c_compile.api import l2c_compile
from l2c_compile.files import write_atomically
from l2c_compile.importers import load_schedule_file
from l2c_compile.loops import Loop
from l2c_compile.models import load_digit_classifier
from l2c_compile.named_models import DIGITS, NamedModel, named_model
from l2c_compile.quality import (
    Estimate,
    Quality,
    bootstrap_mean,
    check_num_samples,
    measure_quality,
    sample_all,
)
from l2c_compile.router import schedule_of
from l2c_compile.schedule import CacheSchedule

__all__ = ["Judge", "Verdict", "evaluate_file"]

_DATA_RANGE = 2.0
"""Of digits, which lie in [-1, 1]."""

_HEADINGS = {
    "psnr_db": "PSNR, dB",
    "ssim": "SSIM",
    "relative_l1": "relative L1",
    "relative_l2": "relative L2",
    "frechet": "Frechet distance",
    "precision": "precision",
    "recall": "recall",
}


@dataclass(frozen=True)
class Verdict:
    """What a schedule does to the samples, and what it leaves to do."""

    quality: Quality
    as_asked: Estimate
    """Share of the samples that the classifier takes for the class that was asked for."""
    multiply_adds: int
    """Of one batch."""
    multiply_adds_kept: float
    """Over those of the reference."""


class Judge:
    """Samples of the uncached digits model, and what others are like beside them.

    Everything is sampled through the compiled path, on equal noise, in equal batches.

    Raises:
        QualityError: there are not more samples than features.

    Args:
        known: the digits model; its judge is a classifier that was trained by itself.
        loop: the loop of the reference.
        num_samples: more than the features of the classifier (64), better ten times that.
        batch: samples a call.
        seed: of the noise and the bootstrap.
        reference: what an earlier judge of the same settings has as ``reference`` and ``multiply_adds``; None samples.
        on_batch: called after each batch, for progress.
    """

    def __init__(
        self,
        known: NamedModel,
        loop: Loop,
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
        # Now, not after the sampling.
        check_num_samples(num_samples, self._classifier.head.in_features)
        uncached = CacheSchedule.all_compute(loop.num_evaluations)
        self.reference, self.multiply_adds = reference or self._sample(uncached, loop)
        self.reference_features = self._features(self.reference)
        self.reference_as_asked = self._as_asked(self.reference)

    @property
    def num_batches(self) -> int:
        """How many calls one judgement takes."""
        return math.ceil(len(self.noise) / self.batch)

    def judge(self, schedule: CacheSchedule, loop: Loop) -> Verdict:
        """Sample under a schedule and compare; the loop may be another than the reference's."""
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

    def _sample(self, schedule: CacheSchedule, loop: Loop) -> tuple[Tensor, int]:
        # Twice as fast on a CPU, and what it rounds is a thousandth of what the best schedule changes.
        sampler = l2c_compile(self.known.denoiser, replace(schedule, loop=None), loop, numerics="rounding")
        samples = sample_all(sampler, self.noise, {"y": self.labels}, self.batch, self._on_batch)
        return samples, sampler.summary().multiply_adds

    @torch.no_grad()
    def _features(self, samples: Tensor) -> Tensor:
        return self._classifier.features(samples)

    @torch.no_grad()
    def _as_asked(self, samples: Tensor) -> Estimate:
        drawn = self._classifier(samples).argmax(dim=1)
        return bootstrap_mean((drawn == self.labels).double(), self.seed)


def evaluate_file(
    path: str | os.PathLike[str],
    console: Console,
    *,
    model: str = DIGITS,
    steps: int | None = None,
    threshold: float | None = None,
    num_samples: int = 2000,
    batch: int = 20,
    seed: int = 0,
    json_path: str | os.PathLike[str] | None = None,
) -> None:
    """Print what a schedule or router does to the samples of a model.

    Args:
        path: A file that ``load_schedule_file`` reads.
        console: Where to print; progress goes to stderr.
        model: "digits".
        steps: Sampler steps; None takes the loop in the file, or as many as the file is for.
        threshold: For routers, in place of the usual one.
        num_samples: Samples with and without caching.
        batch: Samples a call.
        seed: Of the noise.
        json_path: If given, also write the numbers there.

    Raises:
        L2CError: The file cannot be read, there is no such model, they do not fit together, or there are too few
            samples.
        OSError: A file cannot be read or written.
    """
    schedule = schedule_of(load_schedule_file(path, threshold=threshold))
    known = named_model(model, with_weights=True)
    loop = known.loop_of(schedule, steps)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("sample without caching", total=2 * math.ceil(num_samples / min(batch, num_samples)))
        judge = Judge(
            known,
            loop,
            num_samples=num_samples,
            batch=batch,
            seed=seed,
            on_batch=lambda: progress.advance(task),
        )
        progress.update(task, description="sample with caching")
        verdict = judge.judge(schedule, loop)
    where = f"{known.name}, {loop.name}, {loop.num_evaluations} evaluations, {num_samples} samples, seed {seed}"
    console.print(Text(where), soft_wrap=True)
    console.print(_table(verdict, judge.reference_as_asked))
    if json_path is not None:
        document = {
            "model": known.name,
            "loop": loop.to_dict(),
            "schedule": schedule.digest,
            "seed": seed,
            "multiply_adds_kept": verdict.multiply_adds_kept,
            "quality": verdict.quality.to_dict(),
            "as_asked": vars(verdict.as_asked),
            "as_asked_uncached": vars(judge.reference_as_asked),
        }
        write_atomically(json_path, (json.dumps(document, indent=2, allow_nan=False) + "\n").encode())
        console.print(Text(f"numbers written to {os.fspath(json_path)}"), soft_wrap=True)


def _table(verdict: Verdict, uncached_as_asked: Estimate) -> Table:
    table = Table(title="against the uncached model on equal noise", title_justify="left")
    for heading in ("measure", "value", "95% interval"):
        table.add_column(heading, justify="left" if heading == "measure" else "right", no_wrap=True)
    table.add_row("multiply-adds kept", f"{verdict.multiply_adds_kept:.1%}", "")
    for name, estimate in verdict.quality.estimates():
        if estimate is not None:
            table.add_row(_HEADINGS[name], *_numbers(estimate))
    table.add_row("drawn as asked", *_numbers(verdict.as_asked))
    table.add_row("  without caching", *_numbers(uncached_as_asked))
    return table


def _numbers(estimate: Estimate) -> tuple[str, str]:
    return f"{estimate.value:.4g}", f"{estimate.low:.4g} .. {estimate.high:.4g}"
