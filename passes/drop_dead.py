"""Remove every node whose value nobody uses. The only place where work disappears.

n = layer_norm(x); m = mul(n, s); f = linear(m, w); y = add(x, cache)   ->   y = add(x, cache)
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from l2c_compile.graphs.facts import Fact
from l2c_compile.graphs.loop_graph import EvaluationGraph, ProgramGraph
from l2c_compile.graphs.marks import SITE
from l2c_compile.graphs.nodes import draws_random_numbers
from l2c_compile.passes.base import Pass, PassReport, Reason


@dataclass(frozen=True)
class DropDead(Pass):
    """Remove nodes without users, last to first. Inputs stay; so do random draws: later draws depend on them.

    The marks of an evaluation graph stay as well: in a loop, a change (out - in) reads an input that nobody else reads.
    """

    name: ClassVar[str] = "drop-dead"
    gives: ClassVar[frozenset[Fact]] = frozenset({Fact.NO_DEAD_NODES})
    breaks: ClassVar[frozenset[Fact]] = frozenset({Fact.SITES_MARKED})

    def rewrite(self, graph: ProgramGraph, report: PassReport) -> None:  # noqa: D102
        for node in reversed(list(graph.graph.nodes)):
            if node.users or node.op in ("placeholder", "output"):
                continue
            if node.target is SITE and isinstance(graph, EvaluationGraph):
                report.leave(node, Reason("marks a site that the loop may read"))
                continue
            if draws_random_numbers(node):
                report.leave(node, Reason("draws random numbers: later draws depend on it"))
                continue
            graph.graph.erase_node(node)
            report.rewrites += 1
