"""What a static graph computes, reads and keeps, evaluation by evaluation."""

from __future__ import annotations

import io
from dataclasses import dataclass

import torch
from rich.console import Console, ConsoleOptions, RenderResult
from rich.table import Table

from l2c_compile.analyses.cost import MultiplyAdds
from l2c_compile.analyses.memory_plan import (
    CacheLiveness,
    MemoryPlan,
    cache_liveness,
    keep_everything_bytes,
    plan_memory,
    site_bytes,
)
from l2c_compile.graphs.loop_graph import LoopGraph
from l2c_compile.graphs.nodes import evaluation_of


@dataclass(frozen=True)
class EvaluationSummary:
    """One row of a summary: what one evaluation computes, reads and keeps."""

    evaluation: int
    num_computed: int
    """Number of sites that are computed."""
    num_read: int
    """Number of sites that are read from the cache."""
    sources: tuple[int, ...]
    """The evaluations that these sites are read from, newest first."""
    multiply_adds: int
    """Multiply-adds that are left in this evaluation."""
    multiply_adds_uncached: int
    """Multiply-adds of one full evaluation of this form."""
    cache_bytes: int
    """The most bytes that the graph keeps for later evaluations during this one."""


@dataclass(frozen=True)
class Summary:
    """What a static graph computes, reads and keeps; ``print`` shows it as a table."""

    rows: tuple[EvaluationSummary, ...]
    num_sites: int
    shared_multiply_adds: int
    """Multiply-adds outside the evaluations: the loop's own, and what several evaluations share."""
    cache: CacheLiveness
    """The bytes that the graph keeps."""
    cache_of_schedule: CacheLiveness
    """The bytes that it would take to keep every site that is read, from its source to its last reader."""
    keep_everything_bytes: int
    """The bytes that it would take to keep every site of the last evaluation all the time, as caches in hooks do."""
    num_packed: int
    """Number of kept values that are packed."""
    num_unpacked: int
    """Number of kept values that are kept as they are."""

    @property
    def multiply_adds(self) -> int:
        """Multiply-adds of the static graph."""
        return sum(row.multiply_adds for row in self.rows) + self.shared_multiply_adds

    @property
    def multiply_adds_kept(self) -> float:
        """Multiply-adds of the static graph over those of the loop without caching."""
        full = sum(row.multiply_adds_uncached for row in self.rows)
        return self.multiply_adds / full if full else 1.0

    @property
    def computed_share(self) -> float:
        """The share of all (evaluation, site) that is computed."""
        cells = len(self.rows) * self.num_sites
        return sum(row.num_computed for row in self.rows) / cells if cells else 1.0

    def in_short(self) -> str:
        """Return the totals as one line."""
        text = (
            f"{self.computed_share:.1%} of the sites computed, {self.multiply_adds_kept:.1%} of the multiply-adds kept;"
            f" cache {in_bytes(self.cache.peak_bytes)} at most, {in_bytes(self.cache.mean_bytes)} on average"
        )
        if self.keep_everything_bytes:
            share = self.cache.peak_bytes / self.keep_everything_bytes
            text += f" ({share:.0%} of keeping every site, {in_bytes(self.keep_everything_bytes)})"
        if self.num_packed:
            text += f"; {self.num_packed} of {self.num_packed + self.num_unpacked} kept values are packed"
        return text

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        table = Table(title="evaluations in execution order", title_justify="left")
        for heading in ("evaluation", "computed", "read", "from", "multiply-adds", "kept", "cache"):
            table.add_column(heading, justify="right")
        for row in self.rows:
            table.add_row(
                str(row.evaluation),
                f"{row.num_computed}/{self.num_sites}",
                str(row.num_read),
                _sources(row.sources),
                in_units(row.multiply_adds),
                f"{row.multiply_adds / max(1, row.multiply_adds_uncached):.0%}",
                in_bytes(row.cache_bytes),
            )
        yield table
        yield self.in_short()

    def __str__(self) -> str:
        text = io.StringIO()
        Console(file=text, width=110).print(self)
        return text.getvalue()


def summarize(graph: LoopGraph) -> Summary:
    """Return what a loop graph computes, reads and keeps after the passes."""
    count = MultiplyAdds()
    left = [0] * graph.num_evaluations
    shared = 0
    for node in graph.graph.nodes:
        evaluation = evaluation_of(node)
        if evaluation is None:
            shared += count.of(node)
        else:
            left[evaluation] += count.of(node)
    full = [price.multiply_adds for price in graph.prices]
    plan = plan_memory(graph)
    cache = plan.cache
    rows = []
    computed = graph.schedule.computed_per_evaluation()
    reads: list[list[tuple[int, ...]]] = [[] for _ in computed]
    for evaluation, _, reuse in graph.reads():
        reads[evaluation].append(reuse.sources)
    for e, num_computed in enumerate(computed):
        sources = sorted({source for entry in reads[e] for source in entry}, reverse=True)
        rows.append(
            EvaluationSummary(
                e, num_computed, len(reads[e]), tuple(sources), left[e], full[e], cache.bytes_per_evaluation[e]
            )
        )
    of_schedule = cache_liveness(graph.schedule, site_bytes(graph))
    everything = keep_everything_bytes(graph)
    num_packed, num_unpacked = _count_packed(graph, plan)
    num_sites = len(graph.schedule.sites)
    return Summary(tuple(rows), num_sites, shared, cache, of_schedule, everything, num_packed, num_unpacked)


def _count_packed(graph: LoopGraph, plan: MemoryPlan) -> tuple[int, int]:
    packs = graph.graph.find_nodes(op="call_function", target=torch.ops.l2c.pack_cache.default)
    parts = {part.name for pack in packs for part in pack.users}
    plain = [value for value in plan.kept if value.name not in parts and value.last_read_in > value.made_in]
    return len(packs), len(plain)


def _sources(sources: tuple[int, ...]) -> str:
    shown = ", ".join(map(str, sources[:4]))
    return shown + (", ..." if len(sources) > 4 else "")


def in_units(number: float) -> str:
    """Return a count with a decimal unit."""
    for unit in ("", "k", "M", "G", "T"):
        if number < 1000:
            return f"{number:.3g} {unit}".strip()
        number /= 1000
    return f"{number:.3g} P"


def in_bytes(number: float) -> str:
    """Return a size with a binary unit."""
    for unit in ("B", "KiB", "MiB"):
        if number < 1024:
            return f"{number:.3g} {unit}"
        number /= 1024
    return f"{number:.3g} GiB"
