"""How long each cached value is needed, and how many bytes it takes: as a schedule says, and as a graph does it.

``cache_liveness`` counts the bytes of a schedule: every site that is read later lives from its source to its last
reader. ``plan_memory`` counts those of a loop graph, where sites may have been merged, moved or copied since. It looks
at storage, not at nodes: a view keeps the whole tensor alive that it is a view of.
"""

from __future__ import annotations

import heapq
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.fx.node import Node

from l2c_compile.analyses.kept import cache_work
from l2c_compile.graphs.loop_graph import LoopGraph
from l2c_compile.graphs.nodes import evaluation_of
from l2c_compile.graphs.storages import Storages
from l2c_compile.schedules.schedule import CacheSchedule
from l2c_compile.schedules.sites import Site

aten = torch.ops.aten


@dataclass(frozen=True)
class CacheLiveness:
    """The bytes of cached values during each evaluation: values made before or in it, and read in or after it."""

    bytes_per_evaluation: tuple[int, ...]

    @property
    def peak_bytes(self) -> int:
        """The most bytes that are alive at once."""
        return max(self.bytes_per_evaluation, default=0)

    @property
    def mean_bytes(self) -> float:
        """The mean number of bytes over the evaluations."""
        return sum(self.bytes_per_evaluation) / max(1, len(self.bytes_per_evaluation))


def cache_liveness(schedule: CacheSchedule, site_bytes: Mapping[tuple[int, Site], int]) -> CacheLiveness:
    """Return the cache bytes that are alive during each evaluation: a value lives from its source to its last reader.

    Args:
        schedule: the schedule, its patterns resolved.
        site_bytes: the size in bytes of each site's value, by (evaluation, site).
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


def site_bytes(graph: LoopGraph) -> dict[tuple[int, Site], int]:
    """Return the size in bytes of every site's value, by (evaluation, site), whether it is computed there or not."""
    by_name = {str(site): site for site in graph.schedule.sites}
    return {(e, by_name[name]): size for e, price in enumerate(graph.prices) for name, size in price.site_bytes.items()}


def keep_everything_bytes(graph: LoopGraph) -> int:
    """Return the bytes of a cache that holds every site of the last evaluation of each branch, read later or not."""
    sizes = site_bytes(graph)
    first_of_branch = range(min(graph.schedule.branches, graph.num_evaluations))
    return sum(sizes.get((e, site), 0) for e in first_of_branch for site in graph.schedule.sites)


@dataclass(frozen=True)
class KeptValue:
    """A tensor that stays in memory because a later evaluation reads it."""

    name: str
    """The name of the node that makes it."""
    made_in: int
    """The evaluation that makes it."""
    last_read_in: int
    """The last evaluation that reads it; the one that makes it if it is only kept there until it is summed up."""
    num_bytes: int
    begin: int
    """Position in the graph of the node that makes it; for a value kept only until it is summed up, of its last other
    use."""
    end: int
    """Position in the graph of the last node that reads it."""
    slot: int
    """The number of the buffer that it can live in; values that are alive together have different ones."""


@dataclass(frozen=True)
class MemoryPlan:
    """Every value that a loop graph keeps from one evaluation for a later one, and the buffers they fit into."""

    kept: tuple[KeptValue, ...]
    """The kept values, in the order of ``begin``."""
    cache: CacheLiveness
    """The most bytes that are alive during each evaluation."""
    slot_bytes: tuple[int, ...]
    """The size in bytes of each buffer. A buffer holds values of one size only, so that none is ever moved."""


def plan_memory(graph: LoopGraph) -> MemoryPlan:
    """Find what a loop graph keeps from one evaluation for a later one, when it is freed, and a buffer for each value.

    The loop's own history, the conditions, and all that is made of weights, timesteps and conditions alone are not
    counted.
    """
    nodes = list(graph.graph.nodes)
    position = {node: index for index, node in enumerate(nodes)}
    storages = Storages(nodes)
    early = graph.known_before_the_loop()
    ahead = cache_work(nodes)
    own_use: dict[Node, int] = {}
    kept_use: dict[Node, int] = {}
    last_evaluation: dict[Node, int] = {}
    for node in nodes:
        base, evaluation = storages.base(node), evaluation_of(node)
        made = evaluation_of(base)
        if made is None or base in early or base.op != "call_function" or evaluation is None:
            continue
        if not isinstance(base.meta.get("val"), Tensor):
            continue  # several tensors: each of them counts by itself
        own_use.setdefault(base, position[base])
        for user in node.users:
            read = evaluation_of(user)
            if storages.base(user) is base:
                continue
            if read is not None and (read > made or user in ahead):
                kept_use[base] = max(position[user], kept_use.get(base, 0))
                last_evaluation[base] = max(read, last_evaluation.get(base, 0))
            else:
                own_use[base] = max(position[user], own_use[base])
    intervals = []
    for base, end in kept_use.items():
        made, last = evaluation_of(base), last_evaluation[base]
        assert made is not None
        begin = position[base] if last > made else own_use[base]
        if begin < end:
            intervals.append((begin, end, storages.num_bytes(base), made, last, base.name))
    intervals.sort()
    slots, slot_bytes = _color([(begin, end, size) for begin, end, size, *_ in intervals])
    kept = tuple(
        KeptValue(name, made, last, size, begin, end, slot)
        for (begin, end, size, made, last, name), slot in zip(intervals, slots, strict=True)
    )
    return MemoryPlan(kept, _per_evaluation(kept, nodes, graph.num_evaluations), slot_bytes)


def _color(intervals: list[tuple[int, int, int]]) -> tuple[list[int], tuple[int, ...]]:
    """Give each interval (begin, end, size in bytes) a slot of its size that no overlapping interval has.

    If the intervals are taken in the order of their beginnings, the first free slot is optimal: it colors an interval
    graph, whose edges are never built.
    """
    free: dict[int, list[int]] = defaultdict(list)
    busy: list[tuple[int, int]] = []
    slots: list[int] = []
    sizes: list[int] = []
    for begin, end, size in intervals:
        while busy and busy[0][0] < begin:
            _, slot = heapq.heappop(busy)
            heapq.heappush(free[sizes[slot]], slot)
        if free[size]:
            slot = heapq.heappop(free[size])
        else:
            slot = len(sizes)
            sizes.append(size)
        heapq.heappush(busy, (end, slot))
        slots.append(slot)
    return slots, tuple(sizes)


def _per_evaluation(kept: Iterable[KeptValue], nodes: list[Node], num_evaluations: int) -> CacheLiveness:
    changes = [0] * (len(nodes) + 1)
    for value in kept:
        changes[value.begin] += value.num_bytes
        changes[value.end + 1] -= value.num_bytes
    most, total = [0] * num_evaluations, 0
    for node, change in zip(nodes, changes, strict=False):
        total += change
        evaluation = evaluation_of(node)
        if evaluation is not None:
            most[evaluation] = max(most[evaluation], total)
    return CacheLiveness(tuple(most))
