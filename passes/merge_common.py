"""Compute what is the same only once (common subexpressions).

a = silu(c); b = silu(c); y = add(a, b)   ->   a = silu(c); y = add(a, a)
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch.fx.node import Node

from l2c_compile.graphs.facts import Fact
from l2c_compile.graphs.loop_graph import ProgramGraph
from l2c_compile.graphs.nodes import Expression, draws_random_numbers, expression
from l2c_compile.passes.base import Pass, PassReport, Reason


@dataclass(frozen=True)
class MergeCommon(Pass):
    """Redirect the users of a repeated computation to its first occurrence."""

    name: ClassVar[str] = "merge-common"
    breaks: ClassVar[frozenset[Fact]] = frozenset({Fact.NO_DEAD_NODES})

    def rewrite(self, graph: ProgramGraph, report: PassReport) -> None:  # noqa: D102
        first: dict[Expression, Node] = {}
        for node in list(graph.graph.nodes):
            if node.op not in ("call_function", "get_attr"):
                continue
            if draws_random_numbers(node):
                report.leave(node, Reason("draws random numbers: each draw is another"))
                continue
            # Earlier nodes have been redirected already, so equal arguments are equal nodes by now.
            original = first.setdefault(expression(node), node)
            if original is not node:
                if "sites" in node.meta:
                    original.meta["sites"] = (*original.meta.get("sites", ()), *node.meta["sites"])
                node.replace_all_uses_with(original)
                report.rewrites += 1
