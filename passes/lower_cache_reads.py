"""Replace each cache read by the arithmetic of its rule.

    r = cache_read([f5], ..., hold); y = mul(gate, r)   ->   y = mul(gate, f5)

A held value is simply used again: the cache is the graph's own dataflow, alive exactly as long as it is needed.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import ClassVar

from torch import fx
from torch.fx.node import Node

from l2c_compile.graph import CACHE_READ, ProgramGraph
from l2c_compile.passes.base import Pass, PassReport
from l2c_compile.rules import Reading, rule_from_dict
from l2c_compile.verify import Fact

__all__ = ["LowerCacheReads"]


@dataclass(frozen=True)
class LowerCacheReads(Pass):
    """Trace each rule on the nodes that its read names."""

    name: ClassVar[str] = "lower-cache-reads"
    needs: ClassVar[frozenset[Fact]] = frozenset({Fact.READS_CACHE})
    gives: ClassVar[frozenset[Fact]] = frozenset({Fact.READS_LOWERED})
    breaks: ClassVar[frozenset[Fact]] = frozenset({Fact.NO_DEAD_NODES})

    def run(self, program: ProgramGraph) -> PassReport:  # noqa: D102
        graph, report = program.graph, PassReport()
        for read in list(graph.find_nodes(op="call_function", target=CACHE_READ)):
            _lower(graph, read)
            report.rewrites += 1
        return report


def _lower(graph: fx.Graph, read: Node) -> None:
    history, inputs, current_input, *_, rule = read.args
    tracer = fx.proxy.GraphAppendingTracer(graph)
    reading = Reading(
        history=tuple(fx.Proxy(node, tracer) for node in history),
        inputs=tuple(fx.Proxy(node, tracer) for node in inputs),
        current_input=None if current_input is None else fx.Proxy(current_input, tracer),
    )
    with graph.inserting_before(read):
        value = rule_from_dict(json.loads(rule)).combine(reading).node
    made, node = [], read.prev
    while node is not read and "val" not in node.meta and node.op == "call_function":
        made.append(node)
        node = node.prev
    for node in made:
        # A rule works element by element, so every step of it has the form of the value it makes.
        node.meta.update(val=read.meta["val"], evaluation=read.meta["evaluation"])
    read.replace_all_uses_with(value)
    graph.erase_node(read)
