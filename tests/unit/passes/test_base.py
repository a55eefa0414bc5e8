"""What a pass is, how an order of passes is checked, and what its runner reports."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from torch import Tensor

from l2c_compile.errors import PassFailed, ScheduleError
from l2c_compile.graphs.facts import Fact
from l2c_compile.graphs.loop_graph import ProgramGraph
from l2c_compile.graphs.nodes import emit
from l2c_compile.passes.base import Numerics, Pass, PassReport, Pipeline, Reason
from l2c_compile.passes.drop_dead import DropDead
from l2c_compile.passes.drop_site_marks import DropSiteMarks
from l2c_compile.passes.merge_common import MergeCommon
from l2c_compile.passes.merge_deltas import MergeDeltas
from l2c_compile.passes.mix_sites import MixSites
from l2c_compile.passes.pipeline import BITWISE, LOOP
from l2c_compile.passes.read_reused_sites import ReadReusedSites
from tests.tiny import draw, program, run, same_bits, targets

aten = torch.ops.aten


@dataclass(frozen=True)
class Breaks(Pass):
    how: str = "raises"
    name: ClassVar[str] = "breaks"

    def rewrite(self, graph: ProgramGraph, report: PassReport) -> None:
        if self.how == "raises":
            raise IndexError("of mine")
        if self.how == "refuses":
            raise ScheduleError("the caller's mistake")
        if self.how == "leaves dead nodes":
            first = next(iter(graph.graph.nodes))
            with graph.graph.inserting_after(first):
                graph.graph.call_function(torch.ops.aten.sin.default, (first,))


def repeated(x: Tensor) -> list[Tensor]:
    return [x.sin() + x.sin()]


@pytest.mark.parametrize(("each", "kind"), [(MixSites(), "EvaluationGraph"), (MergeDeltas(), "LoopGraph")])
def test_a_pass_is_given_no_other_kind_of_graph_than_it_wants(each: Pass, kind: str) -> None:
    with pytest.raises(TypeError, match=f"pass '{each.name}' wants a graph of kind {kind}, got ProgramGraph"):
        each.run(program(repeated, draw(3)))


def test_reasons_count_candidates_remember_the_first_and_are_worded_when_somebody_asks() -> None:
    class Asked:
        def __str__(self) -> str:
            asked.append(self)
            return "two"

    asked: list[object] = []
    first, second = (node for node in program(repeated, draw(3)).graph.nodes if node.target is aten.sin.default)
    first.meta.update(evaluation=3, nn_module_stack={"": ("blocks.0.attn", "")})
    report = PassReport()
    report.leave(first, Reason("reads {} values", Asked()))
    report.note(second, Reason("reads {} values", 5))
    report.note(second, Reason("is used as a whole"))
    report.note(second, None)
    assert asked == []
    left, _ = report.left_alone.values()
    assert (left.count, left.name, left.module, left.evaluation) == (2, first.name, "blocks.0.attn", 3)
    assert (report.rewrites, report.reasons()) == (1, {"reads two values": 2, "is used as a whole": 1})


@dataclass(frozen=True)
class Transposes(Pass):
    """Puts a tensor with other strides in the place of what the first node makes."""

    name: ClassVar[str] = "transposes"
    changes_strides: ClassVar[bool] = True

    def rewrite(self, graph: ProgramGraph, report: PassReport) -> None:
        first = next(node for node in graph.graph.nodes if node.op == "call_function")
        with graph.graph.inserting_before(first.next):
            turned = emit(graph.graph, aten.t.default, (first,))
            copy = emit(graph.graph, aten.contiguous.default, (turned,))
            other = emit(graph.graph, aten.t.default, (copy,))
        first.replace_all_uses_with(other, delete_user_cb=lambda user: user is not turned)
        report.other_strides.add(other)
        report.rewrites += 1


def test_a_pass_that_changes_strides_is_followed_and_results_keep_theirs() -> None:
    x = draw(3, 4)
    graph = program(lambda x: [x.sin().exp().view(12) + 1], x)
    wanted = run(graph, x)
    assert Transposes().run(graph).rewrites == 1
    # The second no longer is a view.
    assert [name for name in targets(graph) if name in ("view.default", "reshape.default")] == ["reshape.default"]
    assert same_bits(run(graph, x), wanted)
    graph = program(lambda x: [x.sin().exp()], x)
    Transposes().run(graph)
    assert same_bits(run(graph, x), [x.sin().exp()])


def test_a_pass_that_changes_strides_does_not_see_a_graph_that_addresses_memory_by_them() -> None:
    graph = program(lambda x: [x.sin().as_strided((2,), (3,))], draw(3, 4))
    before = targets(graph)
    report = Transposes().run(graph)
    assert report.reasons() == {"addresses memory by strides, so none may change": 1}
    assert (report.rewrites, targets(graph)) == (0, before)


def test_an_order_that_cannot_work_is_refused_when_it_is_built() -> None:
    with pytest.raises(ValueError, match="pass 'read-reused-sites' needs SITES_MARKED, which no earlier pass gives"):
        Pipeline((DropDead(), ReadReusedSites()))
    with pytest.raises(ValueError, match="pass 'drop-site-marks' needs READS_LOWERED"):
        Pipeline((ReadReusedSites(), DropSiteMarks()), assumes=frozenset({Fact.SITES_MARKED}))
    with pytest.raises(ValueError, match="pass 'read-reused-sites' needs SITES_MARKED"):
        # It breaks itself what it needs.
        Pipeline((ReadReusedSites(), ReadReusedSites()), assumes=frozenset({Fact.SITES_MARKED}))


def test_passes_for_graphs_of_different_kinds_are_refused_when_the_order_is_built() -> None:
    with pytest.raises(ValueError, match="'mix-sites' a graph of kind EvaluationGraph and pass 'merge-deltas' a graph"):
        Pipeline((MixSites(), MergeDeltas()), assumes=frozenset({Fact.SITES_MARKED, Fact.SITES_LOWERED}))


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
