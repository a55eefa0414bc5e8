"""Replace each cache read by the arithmetic of its rule.

    r = cache_read([f5], ..., hold); y = mul(gate, r)   ->   y = mul(gate, f5)

A held value is simply used again: the cache is the graph's own dataflow, alive exactly as long as it is needed.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import fx
from torch._ops import OpOverload
from torch.fx.node import Node, Target

from l2c_compile.graphs.facts import Fact
from l2c_compile.graphs.loop_graph import LoopGraph
from l2c_compile.graphs.marks import CACHE_READ, CacheRead
from l2c_compile.graphs.nodes import emit, evaluation_of
from l2c_compile.passes.base import LoopPass, PassReport
from l2c_compile.schedules.rules import Reading


@dataclass(frozen=True)
class LowerCacheReads(LoopPass):
    """Trace each rule on the nodes that its read names."""

    name: ClassVar[str] = "lower-cache-reads"
    needs: ClassVar[frozenset[Fact]] = frozenset({Fact.READS_CACHE})
    gives: ClassVar[frozenset[Fact]] = frozenset({Fact.READS_LOWERED})
    breaks: ClassVar[frozenset[Fact]] = frozenset({Fact.NO_DEAD_NODES})

    def rewrite(self, graph: LoopGraph, report: PassReport) -> None:  # noqa: D102
        for node in graph.graph.find_nodes(op="call_function", target=CACHE_READ):
            # The read is parsed only now, because an argument that was a read has been replaced by now.
            _lower(graph.graph, CacheRead.of(node))
            report.rewrites += 1


def _lower(graph: fx.Graph, read: CacheRead) -> None:
    tracer = _MetaTracer(graph, read.node)
    reading = Reading(
        history=tuple(fx.Proxy(node, tracer) for node in read.history),
        inputs=tuple(fx.Proxy(node, tracer) for node in read.inputs),
        current_input=None if read.current_input is None else fx.Proxy(read.current_input, tracer),
    )
    with graph.inserting_before(read.node):
        value = read.rule.combine(reading)
    read.node.replace_all_uses_with(value.node)
    graph.erase_node(read.node)


class _MetaTracer(fx.proxy.GraphAppendingTracer):
    """Gives each node that a rule makes its fake value and the evaluation of the read."""

    def __init__(self, graph: fx.Graph, read: Node) -> None:
        super().__init__(graph)
        self.evaluation = evaluation_of(read)

    def create_node(self, kind: str, target: Target, args: Any, *_: object, **__: object) -> Node:  # noqa: ANN401
        assert isinstance(target, OpOverload), "a rule is written with aten overloads"
        return emit(self.graph, target, args, self.evaluation)
