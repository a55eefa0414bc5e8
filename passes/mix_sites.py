"""Mix what each site computes with a cached value: soft routing (Learning-to-Cache, arXiv 2406.01733, equation 7).

    f = site(linear(m, w), "blocks.3.attn", 0, -1); y = f(gate, f)
    ->  s = lerp(cached_0, linear(m, w), select(scores, 0, 0)); y = f(gate, s)

``scores`` (one number a site) and the cached values become inputs behind the denoiser's own. A score of 1 gives the
computed value and one of 0 the cached value, exactly; in between, gradients flow to the score, to what the site
computes and to what was cached. For a site of kind "delta" the cached value is a change, which is added to the site's
current input. Where a site lies within another, the outer one mixes what the inner one's mixture leads to.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, fx
from torch.fx.node import Node

from l2c_compile.errors import ScheduleError
from l2c_compile.graphs.facts import Fact
from l2c_compile.graphs.loop_graph import EvaluationGraph
from l2c_compile.graphs.marks import INPUT_PORT, SiteMark, site_marks
from l2c_compile.graphs.nodes import emit
from l2c_compile.passes.base import EvaluationPass, Numerics, PassReport

aten = torch.ops.aten


@dataclass(frozen=True)
class MixSites(EvaluationPass):
    """Give the users of every site ``score * computed + (1 - score) * cached``."""

    name: ClassVar[str] = "mix-sites"
    needs: ClassVar[frozenset[Fact]] = frozenset({Fact.SITES_MARKED})
    breaks: ClassVar[frozenset[Fact]] = frozenset({Fact.SITES_MARKED, Fact.NO_DEAD_NODES})
    numerics: ClassVar[Numerics] = Numerics.APPROXIMATE

    def rewrite(self, graph: EvaluationGraph, report: PassReport) -> None:  # noqa: D102
        _SiteMixer(graph).run(report)


class _SiteMixer:
    """Adds the inputs of the mixture to an evaluation graph and mixes each site's value with its cached one."""

    def __init__(self, graph: EvaluationGraph) -> None:
        self.graph: fx.Graph = graph.graph
        marks = site_marks(self.graph)
        self.inputs = {mark.site: mark.node for mark in marks if mark.port == INPUT_PORT}
        column = {str(site): index for index, site in enumerate(graph.sites)}
        outputs = (mark for mark in marks if mark.port != INPUT_PORT)
        self.outputs = sorted(outputs, key=lambda mark: (column[mark.site], mark.port))
        self.column = column
        self.is_delta = {str(site) for site in graph.sites if site.kind == "delta"}

    def run(self, report: PassReport) -> None:
        if not self.outputs:
            return
        like = self.outputs[0].node.meta["val"]
        scores = self._input("scores", torch.empty(len(self.column), dtype=torch.float32, device="meta"), like)
        cached = [
            self._input(f"cached_{index}", mark.node.meta["val"], like) for index, mark in enumerate(self.outputs)
        ]
        for mark, value in zip(self.outputs, cached, strict=True):
            self._mix(mark, scores, value)
            report.rewrites += 1

    def _input(self, name: str, form: Tensor, like: Tensor) -> Node:
        last = list(self.graph.find_nodes(op="placeholder"))[-1]
        with self.graph.inserting_after(last):
            node = self.graph.placeholder(name)
        device = like.device if form.is_meta else form.device
        with like.fake_mode:  # type: ignore[attr-defined]
            node.meta["val"] = torch.empty_strided(form.shape, form.stride(), dtype=form.dtype, device=device)
        return node

    def _mix(self, mark: SiteMark, scores: Node, cached: Node) -> None:
        form = mark.node.meta["val"]
        if not form.is_floating_point():
            raise ScheduleError(
                f"site '{mark.site}' holds {form.dtype}, of which there is no mixture; choose sites that hold"
                " floating-point values"
            )
        users = list(mark.node.users)
        with self.graph.inserting_after(mark.node):
            mixed = self.graph.call_function(aten.lerp.Tensor)
        with self.graph.inserting_before(mixed):
            if mark.site in self.is_delta:
                cached = emit(self.graph, aten.add.Tensor, (self.inputs[mark.site], cached))
            # Under autocast the two may differ in dtype; the computed value decides.
            cached = emit(self.graph, aten.type_as.default, (cached, mark.value))
            score = emit(self.graph, aten.select.int, (scores, 0, self.column[mark.site]))
            score = emit(self.graph, aten.type_as.default, (score, mark.value))
        mixed.args = (cached, mark.value, score)
        mixed.meta["val"] = form
        for user in users:
            user.replace_input_with(mark.node, mixed)
