"""What a schedule will save, from its graph and a short profile, before it is compiled."""

from __future__ import annotations

import io
from dataclasses import dataclass

from rich.console import Console, ConsoleOptions, RenderResult
from rich.table import Table

from l2c_compile.analyses.cost import NodeTimes, bytes_moved
from l2c_compile.analyses.summary import Summary, in_bytes, in_units, summarize
from l2c_compile.graphs.loop_graph import LoopGraph

NO_GAIN = 0.98
"""A time ratio above this is no gain: less than 2% is within what a machine varies from day to day."""


@dataclass(frozen=True)
class Prediction:
    """What a loop still costs when its schedule is followed; ``print`` shows it as a table."""

    multiply_adds: int
    """Multiply-adds of the cached loop."""
    multiply_adds_kept: float
    """Multiply-adds of the cached loop over those of the loop without caching."""
    bytes_moved: int
    """Bytes that the operations of the cached loop read and write, one by one."""
    bytes_moved_kept: float | None
    """Bytes moved by the cached loop over those of the loop without caching; None if that loop was not given."""
    cache_bytes: int
    """The most bytes that are kept for later evaluations at once."""
    seconds: float | None
    """Time of the cached loop: the sum over its operations, each measured alone in eager mode; None if not measured."""
    time_ratio: float | None
    """Time of the cached loop over that of the loop without caching; None if not measured."""
    warning: str | None
    """The reason why no gain is to be expected; None if one is."""

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        table = Table(title="predicted", title_justify="left", show_header=False)
        table.add_row("multiply-adds", in_units(self.multiply_adds), f"{self.multiply_adds_kept:.1%} kept")
        moved = "" if self.bytes_moved_kept is None else f"{self.bytes_moved_kept:.1%} kept"
        table.add_row("bytes moved", in_bytes(self.bytes_moved), moved)
        table.add_row("cache", in_bytes(self.cache_bytes), "at most")
        if self.seconds is not None and self.time_ratio is not None:
            ratio = f"{self.time_ratio:.1%} of the time without caching: {1 / self.time_ratio:.2f}x"
            table.add_row("time, eager", f"{self.seconds * 1e3:.3g} ms", ratio)
        yield table
        if self.warning is not None:
            yield f"warning: {self.warning}"

    def __str__(self) -> str:
        text = io.StringIO()
        Console(file=text, width=110).print(self)
        return text.getvalue()


def predict(cached: LoopGraph, uncached: LoopGraph | None = None, times: NodeTimes | None = None) -> Prediction:
    """Return what a loop graph costs after the passes.

    Args:
        cached: the graph of the loop under its schedule.
        uncached: the graph of the same loop under a schedule that reuses nothing; needed for ratios of bytes and time.
        times: what measures the operations; None where there is no device to measure on.
    """
    summary = summarize(cached)
    moved = sum(map(bytes_moved, cached.graph.nodes))
    moved_kept = seconds = ratio = None
    if uncached is not None:
        moved_kept = moved / max(1, sum(map(bytes_moved, uncached.graph.nodes)))
    if uncached is not None and times is not None:
        times.measure([*uncached.graph.nodes, *cached.graph.nodes])
        seconds = times.total(cached.graph.nodes)
        ratio = seconds / times.total(uncached.graph.nodes)
    return Prediction(
        multiply_adds=summary.multiply_adds,
        multiply_adds_kept=summary.multiply_adds_kept,
        bytes_moved=moved,
        bytes_moved_kept=moved_kept,
        cache_bytes=summary.cache.peak_bytes,
        seconds=seconds,
        time_ratio=ratio,
        warning=_warning(summary, ratio),
    )


def _warning(summary: Summary, time_ratio: float | None) -> str | None:
    kept = summary.multiply_adds_kept if time_ratio is None else time_ratio
    if kept <= NO_GAIN:
        return None
    if summary.computed_share == 1.0:
        return "no gain is to be expected: the schedule reuses nothing"
    what = "multiply-adds" if time_ratio is None else "predicted time"
    return f"no gain is to be expected: {kept:.1%} of the {what} is left; lower the threshold, or reuse larger sites"
