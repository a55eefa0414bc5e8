"""How long each cached value is needed, and how many bytes that is, from the schedule alone."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from l2c_compile.schedule import CacheSchedule
from l2c_compile.sites import Site

__all__ = ["CacheLiveness", "cache_liveness"]


@dataclass(frozen=True)
class CacheLiveness:
    """Bytes of cached site values during each evaluation: made before or in it, read in or after it."""

    bytes_per_evaluation: tuple[int, ...]

    @property
    def peak_bytes(self) -> int:
        """The most that is alive at once."""
        return max(self.bytes_per_evaluation, default=0)

    @property
    def mean_bytes(self) -> float:
        """The mean over evaluations."""
        return sum(self.bytes_per_evaluation) / max(1, len(self.bytes_per_evaluation))


def cache_liveness(schedule: CacheSchedule, site_bytes: Mapping[tuple[int, Site], int]) -> CacheLiveness:
    """Return the cache bytes alive during each evaluation: a value lives from its source to its last reader.

    Args:
        schedule: resolved.
        site_bytes: size in bytes of each site's value, by (evaluation, site).
    """
    last_reader: dict[tuple[int, Site], int] = {}
    for evaluation, site in schedule.reuses:
        reuse = schedule.active(evaluation, site)
        for source in reuse.sources if reuse is not None else ():
            last_reader[source, site] = max(evaluation, last_reader.get((source, site), 0))
    # Differences instead of intervals keep this linear in evaluations x sites.
    changes = [0] * (schedule.num_evaluations + 1)
    for (source, site), last in last_reader.items():
        changes[source] += site_bytes[source, site]
        changes[last + 1] -= site_bytes[source, site]
    alive, total = [], 0
    for change in changes[:-1]:
        total += change
        alive.append(total)
    return CacheLiveness(tuple(alive))
