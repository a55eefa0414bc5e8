"""Cache reads become what their rules make of the history; marks of sites go."""

from __future__ import annotations

from typing import Any

import pytest
from torch import Tensor, nn

from l2c_compile import CacheSchedule
from l2c_compile.graphs.facts import Fact
from l2c_compile.graphs.marks import CACHE_READ, SITE, site_marks
from l2c_compile.passes.base import Pass, Pipeline
from l2c_compile.passes.drop_dead import DropDead
from l2c_compile.passes.drop_site_marks import DropSiteMarks
from l2c_compile.passes.fold_constants import FoldConstants
from l2c_compile.passes.lower_cache_reads import LowerCacheReads
from l2c_compile.passes.read_reused_sites import ReadReusedSites
from tests.residual_graphs import graph_of
from tests.tiny import (
    assert_strides_as_noted,
    at,
    check_equals_reference,
    draw,
    seeded,
    unrolled,
)


def test_a_held_value_is_used_again_by_all_readers() -> None:
    graph = graph_of({"a": [1, 0, 0]})
    ReadReusedSites().run(graph)
    held = next(m.node for m in site_marks(graph.graph) if (m.site, m.evaluation) == ("a", 0))
    report = LowerCacheReads().run(graph)
    assert report.rewrites == 2
    assert CACHE_READ not in {n.target for n in graph.graph.nodes}
    assert len([u for u in held.users if u.target is not SITE]) == 3


class Turned(nn.Module):
    """Returns its input's shape in another memory order."""

    def __init__(self) -> None:
        super().__init__()
        self.turn = nn.Conv1d(3, 3, 1)
        self.outer = nn.Sequential(nn.Identity())

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        turned = self.outer(self.turn(x.transpose(1, 2)).transpose(1, 2))
        return turned + t[:, None, None]  # type: ignore[no-any-return]


@pytest.mark.parametrize("site", ["delta(outer)", "delta(turn)", "outer"])
def test_a_read_notes_the_strides_that_it_has(site: str) -> None:
    def loop(denoiser: Any, x: Tensor) -> Tensor:  # noqa: ANN401
        for i in range(3):
            x = x + denoiser(x if i else x.transpose(1, 2).contiguous().transpose(1, 2), at(x, i))
        return x

    model = seeded(Turned())
    graph = unrolled(model, CacheSchedule.from_table({site: [1, 1, 0]}), loop, draw(2, 4, 3))
    for each in (ReadReusedSites(), DropDead(), LowerCacheReads(), DropSiteMarks()):
        each.run(graph)
        assert_strides_as_noted(graph, draw(2, 4, 3))
    check_equals_reference(model, CacheSchedule.from_table({site: [1, 1, 0]}), loop, draw(2, 4, 3))


@pytest.mark.parametrize("earlier", [FoldConstants(), DropDead()])
def test_what_may_lose_marks_cannot_come_before_they_are_read(earlier: Pass) -> None:
    with pytest.raises(ValueError, match="needs SITES_MARKED"):
        Pipeline((earlier, ReadReusedSites()), frozenset({Fact.SITES_MARKED}))
