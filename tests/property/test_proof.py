"""Over drawn models, loops, schedules, rules and pipelines: the structural proof takes no right graph for wrong."""

from __future__ import annotations

from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from l2c_compile import CacheSchedule
from l2c_compile.checking.proof import prove
from l2c_compile.compile import build_loop_graph, graph_of, trace_and_capture
from l2c_compile.passes.base import Pipeline
from l2c_compile.passes.pipeline import BITWISE, LOOP
from tests.property.test_compiled_equals_reference import Network, cases
from tests.tiny import draw

# What may be left out without another pass missing what it needs.
OPTIONAL = ("drop-no-ops", "merge-common", "fold-constants", "gate-at-source", "merge-deltas", "prune-projections")


@st.composite
def pipelines(draw: st.DrawFn) -> Pipeline:
    pipeline = draw(st.sampled_from([BITWISE, LOOP]))
    names = sorted({each.name for each in pipeline.passes} & {*OPTIONAL, "batch-conditioning", "plan-memory"})
    return pipeline.without(draw(st.lists(st.sampled_from(names), unique=True, max_size=3)))


@given(cases(), pipelines())
@settings(max_examples=max(40, settings().max_examples))
def test_a_right_graph_is_proven(case: tuple[Network, Any, CacheSchedule], pipeline: Pipeline) -> None:
    model, loop, schedule = case
    noise = draw(2, 4)
    skeleton = trace_and_capture(model, loop, schedule, noise, {})
    graph, _ = graph_of(skeleton, model, schedule, pipeline)
    proof = prove(graph, skeleton, model, exact=pipeline.is_bitwise, facts=pipeline.facts)
    assert proof.holds, str(proof)
    computed = {(e, site) for site in schedule.sites for e in range(schedule.num_evaluations)}
    assert proof.num_computed_sites <= sum(schedule.computes(*each) for each in computed)
    assert proof.num_reads <= sum(1 for _ in graph.reads())


@given(cases())
def test_under_another_schedule_the_same_graph_is_not(case: tuple[Network, Any, CacheSchedule]) -> None:
    """A graph in which a site is computed whose value the result needs, held against a schedule that reuses it."""
    model, loop, schedule = case
    noise = draw(2, 4)
    everything = CacheSchedule.all_compute(schedule.num_evaluations, schedule.sites)
    graph, _ = build_loop_graph(model, loop, everything, noise, {})
    graph.schedule = schedule
    skeleton = trace_and_capture(model, loop, schedule, noise, {})
    proof = prove(graph, skeleton, model, exact=True)
    assert proof.holds == (proof.num_reads == 0)
