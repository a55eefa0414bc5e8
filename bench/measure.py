"""The one timer: all sides in turn in one process, medians, spread."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from l2c_compile.errors import L2CError

__all__ = ["MeasureError", "Ratio", "Timing", "compare", "quantile", "ratio", "synchronizer"]


class MeasureError(L2CError, ValueError):
    """A measurement that cannot be made as asked."""


@dataclass(frozen=True)
class Timing:
    """What one side took, one sample a round, in the order of the rounds."""

    samples_ms: tuple[float, ...]

    @property
    def median_ms(self) -> float:
        """Return the median over the rounds."""
        return statistics.median(self.samples_ms)

    @property
    def p20_ms(self) -> float:
        """Return the 20th percentile over the rounds."""
        return quantile(self.samples_ms, 0.2)

    @property
    def p80_ms(self) -> float:
        """Return the 80th percentile over the rounds."""
        return quantile(self.samples_ms, 0.8)


@dataclass(frozen=True)
class Ratio:
    """How many times longer one side takes than another."""

    value: float
    """Ratio of the medians."""
    p20: float
    """20th percentile of the ratios within one round."""
    p80: float
    """80th percentile of the ratios within one round."""


def quantile(samples: tuple[float, ...], share: float) -> float:
    """Return the value below which ``share`` of the samples lie, interpolated linearly."""
    ordered = sorted(samples)
    position = share * (len(ordered) - 1)
    below = int(position)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (position - below) * (ordered[above] - ordered[below])


def synchronizer(device: str) -> Callable[[], None]:
    """Return what waits for the device to finish: ``torch.cuda.synchronize`` on CUDA, nothing on a CPU."""
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
    """Time the sides against each other.

    Every round runs every side once, and each round starts one side later than the one before. A machine that slows
    down therefore slows all sides alike, and none profits from always running after the same other one.

    Args:
        sides: what to time, by name. What they return is thrown away.
        rounds: timed rounds.
        warmup: untimed rounds before them.
        sync: waits for the device; called before each start and before each stop. ``synchronizer(device)`` makes one.
        clock_s: a clock in seconds.
        on_round: called after every timed round, to advance a progress bar.

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
    """Return how many times longer ``numerator`` takes than ``denominator``; a speed-up is ``ratio(baseline, ours)``.

    The spread is paired: it comes from the ratios within each round, so what slows a whole round cancels.

    Raises:
        MeasureError: if the two do not come from one ``compare``.
    """
    if len(numerator.samples_ms) != len(denominator.samples_ms):
        counts = f"{len(numerator.samples_ms)} and {len(denominator.samples_ms)}"
        raise MeasureError(f"ratio wants two sides of one compare, got {counts} rounds")
    paired = tuple(a / b for a, b in zip(numerator.samples_ms, denominator.samples_ms, strict=True))
    return Ratio(numerator.median_ms / denominator.median_ms, quantile(paired, 0.2), quantile(paired, 0.8))
