"""Return what each site computes, behind what the denoiser returns.

    f = site(linear(m, w), "blocks.3.attn", 0, -1); ...; return [y]   ->   ...; return [y, linear(m, w)]

For a site of kind "delta" it is the change, out - in: what a cache keeps. The order is that of the program's sites,
then of their ports.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from l2c_compile.errors import ScheduleError
from l2c_compile.graphs.facts import Fact
from l2c_compile.graphs.loop_graph import EvaluationGraph
from l2c_compile.graphs.marks import INPUT_PORT, SiteMark, site_marks
from l2c_compile.graphs.nodes import emit, output_list
from l2c_compile.passes.base import EvaluationPass, PassReport
from l2c_compile.schedules.sites import Site

aten = torch.ops.aten


@dataclass(frozen=True)
class ReturnSites(EvaluationPass):
    """Append the value of every site and port to the outputs of an evaluation graph."""

    name: ClassVar[str] = "return-sites"
    needs: ClassVar[frozenset[Fact]] = frozenset({Fact.SITES_MARKED})

    def rewrite(self, graph: EvaluationGraph, report: PassReport) -> None:  # noqa: D102
        marks = site_marks(graph.graph)
        inputs = {mark.site: mark for mark in marks if mark.port == INPUT_PORT}
        results = output_list(graph.graph)
        for site in graph.sites:
            outputs = sorted((m for m in marks if m.site == str(site) and m.port != INPUT_PORT), key=lambda m: m.port)
            _check_form(site, outputs)
            for mark in outputs:
                value = mark.value
                if site.kind == "delta":
                    with graph.graph.inserting_after(mark.node):
                        value = emit(graph.graph, aten.sub.Tensor, (mark.value, inputs[mark.site].node))
                results.append(value)
                report.rewrites += 1
        graph.graph.output_node().args = (results,)


def _check_form(site: Site, outputs: list[SiteMark]) -> None:
    if site.kind == "delta" and len(outputs) > 1:
        raise ScheduleError(
            f"site '{site}': its module returns several tensors, so its change (out - in) is not defined; use its"
            " output instead"
        )
