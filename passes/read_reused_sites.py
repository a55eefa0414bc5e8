"""Replace each reused site: its users get a cache read instead of its own value.

    f = site(linear(m, w), "blocks.3.attn", 0, 7)      r = cache_read([f5], "blocks.3.attn", 0, 7, [5], hold)
    y = add(x, mul(gate, f))                      ->   y = add(x, mul(gate, r))

What only fed the site is removed by ``DropDead``. For a site of kind "delta" the cached value is out - in at the
source, and the users get in + cached.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, fx
from torch.fx.node import Node

from l2c_compile.errors import ScheduleError
from l2c_compile.graphs.facts import Fact
from l2c_compile.graphs.loop_graph import LoopGraph
from l2c_compile.graphs.marks import CACHE_READ, INPUT_PORT, CacheRead, site_marks
from l2c_compile.graphs.nodes import emit, infer
from l2c_compile.graphs.strides import same_strides
from l2c_compile.passes.base import LoopPass, PassReport
from l2c_compile.schedules.rules import HOLD
from l2c_compile.schedules.schedule import Reuse
from l2c_compile.schedules.sites import Site

aten = torch.ops.aten


@dataclass(frozen=True)
class ReadReusedSites(LoopPass):
    """Redirect the users of every site that the schedule reuses to a ``l2c::cache_read``."""

    name: ClassVar[str] = "read-reused-sites"
    needs: ClassVar[frozenset[Fact]] = frozenset({Fact.SITES_MARKED})
    gives: ClassVar[frozenset[Fact]] = frozenset({Fact.READS_CACHE})
    breaks: ClassVar[frozenset[Fact]] = frozenset({Fact.SITES_MARKED, Fact.NO_DEAD_NODES})

    def rewrite(self, graph: LoopGraph, report: PassReport) -> None:  # noqa: D102
        _SiteReplacer(graph, report).run()


class _SiteReplacer:
    """Replaces each site that is reused by a read of the cache, in execution order."""

    def __init__(self, graph: LoopGraph, report: PassReport) -> None:
        self.graph: fx.Graph = graph.graph
        self.reads = graph.reads()
        self.report = report
        # What the site holds after each evaluation: its own value, or the value that was read in its place.
        self.held: dict[tuple[int, str, int], Node] = {}
        self.ports: dict[tuple[int, str], list[int]] = {}
        self.deltas: dict[Node, Node] = {}
        for mark in site_marks(self.graph):
            self.held[mark.evaluation, mark.site, mark.port] = mark.node
            if mark.port != INPUT_PORT:
                self.ports.setdefault((mark.evaluation, mark.site), []).append(mark.port)

    def run(self) -> None:
        # In execution order, so that a rule which reads an earlier read finds it in place.
        for evaluation, site, reuse in self.reads:
            for port in self.ports[evaluation, str(site)]:
                self._replace(evaluation, site, port, reuse)
                self.report.rewrites += 1

    def _replace(self, evaluation: int, site: Site, port: int, reuse: Reuse) -> None:
        own = self.held[evaluation, str(site), port]
        if site.kind == "delta" and len(self.ports[evaluation, str(site)]) > 1:
            raise ScheduleError(
                f"site '{site}', evaluation {evaluation}: its module returns several tensors, so its change (out - in)"
                " is not defined; reuse its output instead"
            )
        if site.kind == "delta":
            self._check_change(evaluation, site, own)
        history = [self._held_at(source, evaluation, site, port, own) for source in reuse.sources]
        needs_input = site.kind == "delta" or reuse.rule.needs_input
        current = self.held[evaluation, str(site), INPUT_PORT] if needs_input else None
        inputs = [self.held[e, str(site), INPUT_PORT] for e in reuse.sources] if reuse.rule.needs_input else []
        rule = json.dumps(reuse.rule.to_dict())
        where = (str(site), port, evaluation, list(reuse.sources))
        with self.graph.inserting_before(own):
            looked_at = current if reuse.rule.needs_input else None
            value = self.graph.call_function(CACHE_READ, (history, inputs, looked_at, *where, rule))
            value.meta.update(val=self._read(value, reuse), evaluation=evaluation)
            if site.kind == "delta":
                value = emit(self.graph, aten.add.Tensor, (current, value), evaluation)
        if not same_strides(value, own):
            # The reference does so too: a module that is reused may return other strides than when it ran.
            self.report.other_strides.add(value)
        own.replace_all_uses_with(value)
        self.held[evaluation, str(site), port] = value

    def _held_at(self, source: int, evaluation: int, site: Site, port: int, own: Node) -> Node:
        """Return what the rule reads from ``source``: the site's output there, or its change."""
        value = self.held.get((source, str(site), port))
        wanted, got = own.meta["val"], None if value is None else value.meta["val"]
        if value is None or not isinstance(got, Tensor) or _form(got) != _form(wanted):
            holds = _describe(got) if isinstance(got, Tensor) else "nothing"
            raise ScheduleError(
                f"site '{site}', evaluation {evaluation}: reuses evaluation {source}, where it holds {holds}, but needs"
                f" {_describe(wanted)}; choose a source with equal batch, shape and memory layout"
            )
        return value if site.kind == "out" else self._delta(value, source, site)

    def _check_change(self, evaluation: int, site: Site, own: Node) -> None:
        before, after = self.held[evaluation, str(site), INPUT_PORT].meta["val"], own.meta["val"]
        if before.shape != after.shape or torch.bool in (before.dtype, after.dtype):
            raise ScheduleError(
                f"site '{site}', evaluation {evaluation}: takes {_kind(before)} and returns {_kind(after)}, so its"
                " change (out - in) is not defined; reuse its output instead"
            )

    def _delta(self, out: Node, source: int, site: Site) -> Node:
        if out not in self.deltas:
            before = self.held[source, str(site), INPUT_PORT]
            with self.graph.inserting_after(out):
                self.deltas[out] = emit(self.graph, aten.sub.Tensor, (out, before), source)
        return self.deltas[out]

    def _read(self, read: Node, reuse: Reuse) -> Tensor:
        """Return a value without data that has the form of what a read returns."""
        value = CacheRead.of(read).history[0].meta["val"] if reuse.rule == HOLD else infer(CACHE_READ, read.args, {})
        assert isinstance(value, Tensor)
        return value


def _form(value: Tensor) -> tuple[object, ...]:
    # Views were captured for the strides of the reader; the stride of a dimension of size 1 says nothing.
    strides = tuple(stride for size, stride in zip(value.shape, value.stride(), strict=True) if size > 1)
    return value.shape, strides, value.dtype, value.device


def _kind(value: Tensor) -> str:
    return f"{tuple(value.shape)}" if value.dtype != torch.bool else f"{tuple(value.shape)} of bool"


def _describe(value: Tensor) -> str:
    return f"{tuple(value.shape)} with strides {value.stride()}, {value.dtype} on {value.device}"
