"""What sites save, against the compiled graph."""

from __future__ import annotations

import pytest
import torch

from l2c_compile import CacheSchedule
from l2c_compile.analyses.summary import summarize
from l2c_compile.compile import build_loop_graph
from l2c_compile.errors import ScheduleError
from l2c_compile.finders import Work, take_profile
from l2c_compile.loops import DDIM
from l2c_compile.schedules.sites import Site
from tests.tiny import draw, tiny_dit


def test_work_is_what_the_graph_loses_when_a_site_is_reused() -> None:
    model, noise, y = tiny_dit(), draw(2, 4, 4, 4), torch.tensor([1, 2])
    loop = DDIM(steps=2)
    sites = ["blocks.*.attn", "blocks.*.mlp", "blocks.0..blocks.1", "delta(blocks.1)"]
    work = take_profile(model, loop, sites, [(noise, {"y": y})]).work
    assert work.kept(CacheSchedule.all_compute(2, work.sites)) == 1.0

    def multiply_adds(schedule: CacheSchedule) -> int:
        graph, _ = build_loop_graph(model, loop, schedule, noise, {"y": y})
        return summarize(graph).multiply_adds

    uncached = multiply_adds(CacheSchedule.all_compute(2))
    for reused in ("blocks.0.attn", "blocks.1.mlp", "blocks.0..blocks.1", "delta(blocks.1)"):
        schedule = CacheSchedule.from_table({reused: [1, 0]})
        # What does not depend on the latent is shared among evaluations with and without reuse.
        lost = uncached - multiply_adds(schedule)
        assert work.kept(schedule) == pytest.approx(1 - lost / work.total, rel=1e-12)


def test_what_sites_save_adds_up_and_hidden_ones_save_nothing_more() -> None:
    a, b, both = Site("a.0"), Site("a.1"), Site("a")
    work = Work((100, 100), {a: (20, 20), b: (30, 30), both: (60, 60)})
    assert work.kept(CacheSchedule.from_table({a: [1, 0], b: [1, 0]})) == 1 - 50 / 200
    assert work.kept(CacheSchedule.from_table({a: [1, 0], b: [1, 0], both: [1, 0]})) == 1 - 60 / 200


def test_a_schedule_that_does_not_fit_has_no_price() -> None:
    work = Work((100, 100), {Site("a"): (20, 20)})
    with pytest.raises(ScheduleError, match="site c has no price; probe it as well"):
        work.kept(CacheSchedule.from_table({"c": [1, 0]}))
    with pytest.raises(ScheduleError, match="for 3 evaluations, the prices are for 2"):
        work.kept(CacheSchedule.from_table({"a": [1, 0, 0]}))
