"""Return what the sites hold beside the outputs of an evaluation graph.

    f = site(linear(m, w), "blocks.3.attn", 0, -1); y = add(x, f); return [y]   ->   ...; return [y, f]

For a site of kind "delta" that is out - in.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch.fx.node import Node

from l2c_compile.graph import INPUT_PORT, ProgramGraph, SiteMark, emit, output_list, site_marks
from l2c_compile.passes.base import Pass, PassReport
from l2c_compile.sites import Site
from l2c_compile.verify import Fact

__all__ = ["ProbeSites", "probed_marks"]


def probed_marks(program: ProgramGraph) -> list[SiteMark]:
    """Return the marks whose values ``ProbeSites`` returns, in that order."""
    return [mark for mark in site_marks(program.graph) if mark.port != INPUT_PORT]


@dataclass(frozen=True)
class ProbeSites(Pass):
    """Append the values that a schedule could keep to the outputs of an evaluation graph."""

    name: ClassVar[str] = "probe-sites"
    needs: ClassVar[frozenset[Fact]] = frozenset({Fact.SITES_MARKED})

    def run(self, program: ProgramGraph) -> PassReport:  # noqa: D102
        before = {mark.site: mark.node for mark in site_marks(program.graph) if mark.port == INPUT_PORT}
        marks = probed_marks(program)
        output = program.graph.output_node()
        with program.graph.inserting_before(output):
            held = [_held(program, mark, before) for mark in marks]
        output.args = ([*output_list(program.graph), *held],)
        return PassReport(rewrites=len(held))


def _held(program: ProgramGraph, mark: SiteMark, before: dict[str, Node]) -> Node:
    if Site.parse(mark.site).kind == "out":
        return mark.node
    return emit(program.graph, torch.ops.aten.sub.Tensor, (mark.node, before[mark.site]), mark.evaluation)
