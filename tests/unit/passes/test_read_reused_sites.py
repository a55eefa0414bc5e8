"""Reused sites become reads of a cache."""

from __future__ import annotations

from l2c_compile.graphs.facts import check
from l2c_compile.graphs.marks import cache_reads, site_marks
from l2c_compile.passes.drop_dead import DropDead
from l2c_compile.passes.drop_site_marks import DropSiteMarks
from l2c_compile.passes.lower_cache_reads import LowerCacheReads
from l2c_compile.passes.read_reused_sites import ReadReusedSites
from tests.residual_graphs import graph_of, run_all
from tests.tiny import (
    draw,
    run,
    same_bits,
)


def test_each_reused_value_is_read_and_its_own_has_no_user() -> None:
    graph = graph_of({"a": [1, 0, 0], "b": [1, 1, 0]})
    report = ReadReusedSites().run(graph)
    check(graph, ReadReusedSites.gives)
    assert report.rewrites == len(cache_reads(graph.graph)) == 3
    assert [(r.site, r.evaluation, list(r.sources)) for r in cache_reads(graph.graph)] == [
        *(("a", 1, [0]), ("a", 2, [0]), ("b", 2, [1])),
    ]
    used = {(m.site, m.evaluation) for m in site_marks(graph.graph) if m.node.users}
    assert used == {("a", 0), ("b", 0), ("b", 1)}


def test_without_a_reuse_nothing_is_read() -> None:
    graph = graph_of({"a": [1, 1]})
    assert ReadReusedSites().run(graph).rewrites == 0


def test_reading_keeps_the_numbers_of_the_final_graph() -> None:
    x = draw(3, 4)
    graph = graph_of({"a": [1, 0, 0], "delta(b)": [1, 1, 0]})
    ReadReusedSites().run(graph)
    read = run(graph, x)
    run_all(graph, DropDead(), LowerCacheReads(), DropSiteMarks(), DropDead())
    assert same_bits(run(graph, x), read)
