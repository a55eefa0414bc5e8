"""The flow of the compiler: what is traced once, what a schedule makes of it, and who is told."""

from __future__ import annotations

import pytest
import torch

from l2c_compile import CacheSchedule
from l2c_compile.compile import build_loop_graph, graph_of, trace_and_capture
from l2c_compile.errors import ScheduleError
from l2c_compile.passes.base import Pipeline
from l2c_compile.passes.pipeline import BITWISE, LOOP
from tests.tiny import draw, residual, run, same_bits, steps

ALL = CacheSchedule.from_table({"a": [1, 1, 1]})
SOME = CacheSchedule.from_table({"a": [1, 0, 1]})


def test_the_graph_is_what_tracing_and_the_passes_make() -> None:
    model, noise = residual(), draw(2, 4)
    graph, runs = build_loop_graph(model, steps(3), ALL, noise, {})
    assert [each.name for each in runs] == [each.name for each in BITWISE.passes]
    with torch.no_grad():
        assert same_bits(run(graph, noise), [steps(3)(model, noise)])
    assert len(graph.prices) == graph.num_evaluations == 3


def test_one_trace_serves_schedules_of_the_same_sites() -> None:
    model, noise = residual(), draw(2, 4)
    trace = trace_and_capture(model, steps(3), ALL, noise, {})
    before = [str(each.graph) for each in (trace, *trace.evaluations())]
    for schedule in (SOME, ALL):
        graph, _ = graph_of(trace, model, schedule)
        other, _ = build_loop_graph(model, steps(3), schedule, noise, {})
        assert str(graph.graph) == str(other.graph)
    assert [str(each.graph) for each in (trace, *trace.evaluations())] == before


def test_without_passes_all_is_still_there() -> None:
    graph, runs = build_loop_graph(residual(), steps(3), SOME, draw(2, 4), {}, Pipeline((), LOOP.assumes))
    assert runs == []
    assert len(graph.graph.find_nodes(op="call_function", target=torch.ops.aten.tanh.default)) == 3


def test_the_stages_are_told_in_order() -> None:
    told: list[str] = []
    build_loop_graph(residual(), steps(3), SOME, draw(2, 4), {}, progress=told.append)
    stages = ["trace the loop", "capture form 0 of an evaluation", "simplify", "unroll 3 evaluations"]
    assert told == [*stages, *(f"pass {each.name}" for each in BITWISE.passes)]


def test_a_schedule_for_another_loop_is_refused() -> None:
    with pytest.raises(ScheduleError, match="for 3 evaluations, but the loop calls the denoiser 2 times"):
        build_loop_graph(residual(), steps(2), SOME, draw(2, 4), {})
