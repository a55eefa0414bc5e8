"""How long a value is kept, and in which buffer."""

from __future__ import annotations

import networkx as nx

from tests.residual_loops import (
    VALUE_BYTES,
    Residuals,
    compiled,
    every_layer,
    kept_per_evaluation,
    plan_of,
)


def test_a_value_lives_from_its_source_to_its_last_reader_and_no_longer() -> None:
    rows = {"layers.0": [1, 1, 0, 0, 1], "layers.1": [1, 1, 1, 1, 0], "layers.2": [1] * 5}
    sampler = compiled(Residuals(3, gated=False), rows, "bitwise")
    kept = {(value.made_in, value.last_read_in) for value in plan_of(sampler).kept}
    assert kept == {(1, 3), (3, 4)}
    # In evaluation 3 the first is read, and free, before the second is made.
    assert kept_per_evaluation(sampler) == [0, 1, 1, 1, 1]


def test_a_loop_that_reuses_nothing_keeps_nothing() -> None:
    plan = plan_of(compiled(Residuals(2, gated=True), every_layer(2, [1, 1, 1])))
    assert (plan.kept, plan.cache.peak_bytes, plan.slot_bytes) == ((), 0, ())


def test_buffers_are_an_optimal_coloring_of_the_interval_graph() -> None:
    rows = {f"layers.{i}": [1, *(int((i + e) % (i + 2) == 0) for e in range(9))] for i in range(5)}
    plan = plan_of(compiled(Residuals(5, gated=False), rows, "bitwise"))
    intervals = {(value.begin, value.end): value.slot for value in plan.kept}
    overlaps = nx.interval_graph(intervals)
    assert all(intervals[one] != intervals[other] for one, other in overlaps.edges)
    assert len(plan.slot_bytes) == nx.chordal_graph_treewidth(overlaps) + 1
    assert sum(plan.slot_bytes) == plan.cache.peak_bytes


def test_the_summary_counts_what_the_graph_keeps_and_what_others_would() -> None:
    summary = compiled(Residuals(5, gated=True), every_layer(5, [1, 0, 1, 0])).summary()
    assert summary.cache.peak_bytes == 3 * VALUE_BYTES
    assert summary.cache_of_schedule.peak_bytes == summary.keep_everything_bytes == 5 * VALUE_BYTES
    assert [row.cache_bytes // VALUE_BYTES for row in summary.rows] == [3, 1, 3, 1]
    assert "60% of keeping every site" in " ".join(str(summary).split())
