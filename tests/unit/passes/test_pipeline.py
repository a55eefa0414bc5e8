from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from torch import Tensor

from l2c_compile.errors import PassFailed, ScheduleError
from l2c_compile.graphs.facts import Fact
from l2c_compile.graphs.loop_graph import ProgramGraph
from l2c_compile.passes.base import Numerics, Pass, PassReport, Pipeline
from l2c_compile.passes.drop_dead import DropDead
from l2c_compile.passes.drop_no_ops import DropNoOps
from l2c_compile.passes.drop_site_marks import DropSiteMarks
from l2c_compile.passes.merge_common import MergeCommon
from l2c_compile.passes.pipeline import BITWISE, EVALUATION, LOOP, SKELETON
from l2c_compile.passes.read_reused_sites import ReadReusedSites
from tests.tiny import draw, program, targets


@dataclass(frozen=True)
class Breaks(Pass):
    how: str = "raises"
    name: ClassVar[str] = "breaks"

    def run(self, program: ProgramGraph) -> PassReport:
        if self.how == "raises":
            raise IndexError("of mine")
        if self.how == "refuses":
            raise ScheduleError("the caller's mistake")
        if self.how == "leaves dead nodes":
            with program.graph.inserting_after(next(iter(program.graph.nodes))):
                program.graph.call_function(torch.ops.aten.sin.default, (next(iter(program.graph.nodes)),))
        return PassReport()


def repeated(x: Tensor) -> list[Tensor]:
    return [x.sin() + x.sin()]


def test_an_order_that_cannot_work_is_refused_when_it_is_built() -> None:
    with pytest.raises(ValueError, match="pass 'read-reused-sites' needs SITES_MARKED, which no earlier pass gives"):
        Pipeline((DropDead(), ReadReusedSites()))
    with pytest.raises(ValueError, match="pass 'drop-site-marks' needs READS_LOWERED"):
        Pipeline((ReadReusedSites(), DropSiteMarks()), assumes=frozenset({Fact.SITES_MARKED}))
    with pytest.raises(ValueError, match="pass 'read-reused-sites' needs SITES_MARKED"):
        # It breaks itself what it needs.
        Pipeline((ReadReusedSites(), ReadReusedSites()), assumes=frozenset({Fact.SITES_MARKED}))


def test_passes_can_be_left_out_by_numerics_and_by_name() -> None:
    assert all(each.numerics is Numerics.BITWISE for each in BITWISE.passes)
    assert "merge-common" not in [p.name for p in LOOP.without(["merge-common"]).passes]
    with pytest.raises(ValueError, match="there is no pass 'no such'; there are read-reused-sites, "):
        LOOP.without(["no such"])
    with pytest.raises(ValueError, match="needs READS_LOWERED"):
        LOOP.without(["lower-cache-reads"])


def test_the_runner_reports_every_pass_in_order() -> None:
    graph, told = program(repeated, draw(3)), list[str]()
    runs = Pipeline((MergeCommon(), DropDead())).run(graph, told.append)
    assert [each.name for each in runs] == told == ["merge-common", "drop-dead"]
    assert [each.report.rewrites for each in runs] == [1, 1]
    assert (runs[1].nodes_before, runs[1].nodes_after) == (5, 4)
    assert targets(graph) == ["sin.default", "add.Tensor"]


@pytest.mark.parametrize("pipeline", [SKELETON, BITWISE], ids=["skeleton", "loop"])
def test_every_pass_has_a_name_of_its_own_and_a_place(pipeline: Pipeline) -> None:
    assert pipeline.passes
    assert EVALUATION.passes[0] == DropNoOps()


def test_a_failing_pass_is_named_with_those_before_it() -> None:
    with pytest.raises(PassFailed, match=r"pass 'breaks' failed \(after: merge-common, drop-dead\): of mine") as caught:
        Pipeline((MergeCommon(), DropDead(), Breaks())).run(program(repeated, draw(3)))
    assert isinstance(caught.value.__cause__, IndexError)
    with pytest.raises(PassFailed, match=r"pass 'breaks' failed \(after: nothing\)"):
        Pipeline((Breaks(),)).run(program(repeated, draw(3)))


def test_the_callers_mistake_found_by_a_pass_stays_what_it_is() -> None:
    with pytest.raises(ScheduleError, match="the caller's mistake"):
        Pipeline((Breaks("refuses"),)).run(program(repeated, draw(3)))


def test_a_fact_that_a_pass_breaks_without_saying_so_is_found() -> None:
    with pytest.raises(PassFailed, match=r"pass 'breaks' failed \(after: drop-dead\): every node has a user"):
        Pipeline((DropDead(), Breaks("leaves dead nodes"))).run(program(repeated, draw(3)))
