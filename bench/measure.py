"""The one timer, which runs all sides in turn in one process and reports medians and their spread."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from l2c_compile.errors import L2CError


class MeasureError(L2CError, ValueError):
    """A measurement that cannot be made as asked."""


@dataclass(frozen=True)
class Timing:
    """The times of one side, a sample for each round, in the order of the rounds."""

    samples_ms: tuple[float, ...]

    @property
    def median_ms(self) -> float:
        """The median over the rounds."""
        return statistics.median(self.samples_ms)

    @property
    def p20_ms(self) -> float:
        """The 20th percentile over the rounds."""
        return quantile(self.samples_ms, 0.2)

    @property
    def p80_ms(self) -> float:
        """The 80th percentile over the rounds."""
        return quantile(self.samples_ms, 0.8)


@dataclass(frozen=True)
class Ratio:
    """The time of one side over that of another, with its spread."""

    value: float
    """The ratio of the medians."""
    p20: float
    """The 20th percentile of the ratios within one round."""
    p80: float
    """The 80th percentile of the ratios within one round."""


def quantile(samples: tuple[float, ...], share: float) -> float:
    """Return the value below which ``share`` of the samples lie, interpolated linearly."""
    ordered = sorted(samples)
    position = share * (len(ordered) - 1)
    below = int(position)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (position - below) * (ordered[above] - ordered[below])


def synchronizer(device: str) -> Callable[[], None]:
    """Return a function that waits for the device: ``torch.cuda.synchronize`` on CUDA; on a CPU it does nothing."""
    if not device.startswith("cuda"):
        return lambda: None
    import torch

    return lambda: torch.cuda.synchronize(device)


def compare(
    sides: Mapping[str, Callable[[], object]],
    *,
    rounds: int = 20,
    warmup: int = 3,
    sync: Callable[[], None] | None = None,
    clock_s: Callable[[], float] = time.perf_counter,
    on_round: Callable[[], None] | None = None,
) -> dict[str, Timing]:
    """Measure how long each side takes, all in turn.

    Every round runs every side once, and each round starts one side later than the round before. A machine that slows
    down therefore slows all sides alike, and no side profits from always running after the same other one.

    Args:
        sides: the functions to time, by name. Their results are thrown away.
        rounds: the number of timed rounds.
        warmup: the number of untimed rounds before them.
        sync: a function that waits for the device, as ``synchronizer(device)`` returns it. It is called before each
            start and before each stop.
        clock_s: a function that returns the time in seconds.
        on_round: a function that is called after every timed round, to advance a progress bar.

    Returns:
        The timing of each side, in the order of ``sides``.

    Raises:
        MeasureError: if there is no side or no round.
    """
    if not sides or rounds < 1 or warmup < 0:
        got = f"{len(sides)} sides, rounds={rounds}, warmup={warmup}"
        raise MeasureError(f"compare wants at least one side, one round and no negative warmup, got {got}")
    wait = sync or (lambda: None)
    names = list(sides)
    samples_ms: dict[str, list[float]] = {name: [] for name in names}

    for _ in range(warmup):
        for name in names:
            sides[name]()
    wait()

    gc.collect()
    gc_was_enabled = gc.isenabled()
    gc.disable()
    try:
        for round_index in range(rounds):
            first = round_index % len(names)
            for name in names[first:] + names[:first]:
                wait()
                start_s = clock_s()
                sides[name]()
                wait()
                samples_ms[name].append((clock_s() - start_s) * 1e3)
            if on_round is not None:
                on_round()
    finally:
        if gc_was_enabled:
            gc.enable()
    return {name: Timing(tuple(samples_ms[name])) for name in names}


def ratio(numerator: Timing, denominator: Timing) -> Ratio:
    """Return the time of ``numerator`` over that of ``denominator``; a speed-up is ``ratio(baseline, ours)``.

    The spread is paired: it comes from the ratios within each round, so that what slows a whole round cancels out.

    Raises:
        MeasureError: if the two do not come from one ``compare``.
    """
    if len(numerator.samples_ms) != len(denominator.samples_ms):
        counts = f"{len(numerator.samples_ms)} and {len(denominator.samples_ms)}"
        raise MeasureError(f"ratio wants two sides of one compare, got {counts} rounds")
    paired = tuple(a / b for a, b in zip(numerator.samples_ms, denominator.samples_ms, strict=True))
    return Ratio(numerator.median_ms / denominator.median_ms, quantile(paired, 0.2), quantile(paired, 0.8))
