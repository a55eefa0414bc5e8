"""Remove the site marks: from here on sites are ordinary values.

f = site(linear(m, w), "blocks.3.attn", 0, 5); y = mul(gate, f)   ->   y = mul(gate, linear(m, w))
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from l2c_compile.graphs.facts import Fact
from l2c_compile.graphs.loop_graph import ProgramGraph
from l2c_compile.graphs.marks import SITE, SiteMark
from l2c_compile.passes.base import Pass, PassReport


@dataclass(frozen=True)
class DropSiteMarks(Pass):
    """Redirect the users of each mark to the value; note the site on the value for readers and ``verify``."""

    name: ClassVar[str] = "drop-site-marks"
    needs: ClassVar[frozenset[Fact]] = frozenset({Fact.READS_LOWERED})
    gives: ClassVar[frozenset[Fact]] = frozenset({Fact.SITES_LOWERED})
    breaks: ClassVar[frozenset[Fact]] = frozenset({Fact.NO_DEAD_NODES})

    def rewrite(self, graph: ProgramGraph, report: PassReport) -> None:  # noqa: D102
        for node in graph.graph.find_nodes(op="call_function", target=SITE):
            # The mark is parsed only now: its value may have been another mark (of a module that ends with another).
            mark = SiteMark.of(node)
            held = mark.value.meta.get("sites", ())
            mark.value.meta["sites"] = (*held, (mark.evaluation, mark.site, mark.port))
            mark.node.replace_all_uses_with(mark.value)
            graph.graph.erase_node(mark.node)
            report.rewrites += 1
