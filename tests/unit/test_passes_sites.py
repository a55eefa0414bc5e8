"""The passes that turn sites into reads and reads into arithmetic, and the notes of binding times."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from l2c_compile import CacheSchedule
from l2c_compile.graphs.facts import Fact, check
from l2c_compile.graphs.loop_graph import Binding, LoopGraph
from l2c_compile.graphs.marks import CACHE_READ, SITE, cache_reads, site_marks
from l2c_compile.passes.base import Pass, Pipeline
from l2c_compile.passes.bind_times import BindTimes
from l2c_compile.passes.drop_dead import DropDead
from l2c_compile.passes.drop_site_marks import DropSiteMarks
from l2c_compile.passes.fold_constants import FoldConstants, make_constants
from l2c_compile.passes.lower_cache_reads import LowerCacheReads
from l2c_compile.passes.read_reused_sites import ReadReusedSites
from tests.tiny import (
    assert_strides_as_noted,
    at,
    check_equals_reference,
    draw,
    program,
    residual,
    run,
    same_bits,
    seeded,
    steps,
    targets,
    unrolled,
)

MODEL = residual()


def graph_of(table: dict[str, list[int]], loop: Any = None, **conditions: object) -> LoopGraph:  # noqa: ANN401
    schedule = CacheSchedule.from_table(table)
    return unrolled(MODEL, schedule, loop or steps(schedule.num_evaluations), draw(3, 4), conditions)


def run_all(graph: LoopGraph, *passes: Pass) -> None:
    for each in passes:
        each.run(graph)


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


def test_only_a_loop_graph_has_reads() -> None:
    with pytest.raises(TypeError, match="only a loop graph"):
        ReadReusedSites().run(program(lambda x: [x + 1], draw(3)))


def test_a_held_value_is_used_again_by_all_readers() -> None:
    graph = graph_of({"a": [1, 0, 0]})
    ReadReusedSites().run(graph)
    held = next(m.node for m in site_marks(graph.graph) if (m.site, m.evaluation) == ("a", 0))
    report = LowerCacheReads().run(graph)
    assert report.rewrites == 2
    assert CACHE_READ not in {n.target for n in graph.graph.nodes}
    assert len([u for u in held.users if u.target is not SITE]) == 3


def test_marks_become_notes_on_their_values() -> None:
    x, graph = draw(3, 4), graph_of({"a": [1, 1], "b": [1, 1]})
    marked = run(graph, x)
    assert DropSiteMarks().run(graph).rewrites == 4
    noted = [site for n in graph.graph.nodes for site in n.meta.get("sites", ())]
    assert sorted(noted) == [(0, "a", 0), (0, "b", 0), (1, "a", 0), (1, "b", 0)]
    assert SITE not in {n.target for n in graph.graph.nodes}
    assert same_bits(run(graph, x), marked)


def test_marks_of_marks_are_all_removed() -> None:
    def nested(x: Tensor) -> list[Tensor]:
        inner = SITE(x.sin(), "outer.inner", 0, 0)
        outer = SITE(inner, "outer", 0, 0)
        return [outer + 1, outer * 2]

    graph = program(nested, draw(3))
    assert DropSiteMarks().run(graph).rewrites == 2
    check(graph, DropSiteMarks.gives)
    assert targets(graph) == ["sin.default", "add.Tensor", "mul.Tensor"]
    (sine,) = graph.graph.find_nodes(op="call_function", target=torch.ops.aten.sin.default)
    assert sorted(sine.meta["sites"]) == [(0, "outer", 0), (0, "outer.inner", 0)]


def test_what_depends_on_no_input_is_folded_and_the_numbers_stay() -> None:
    x, graph = draw(3, 4), graph_of({"a": [1, 1]})
    before = run(graph, x)
    report = FoldConstants().run(graph)
    DropDead().run(graph)
    assert report.rewrites == 2
    assert not any("sin" in target for target in targets(graph))
    assert same_bits(run(graph, x), before)
    (folded,) = graph.folded
    assert {w.removeprefix("denoiser.") for w in folded.weights} == {"time.weight", "time.bias"}
    assert same_bits(make_constants(graph, folded.recipe), [graph.root.get_buffer(name) for name in folded.names])


@pytest.mark.parametrize(
    ("loop", "max_bytes", "reason"),
    [
        (steps(2), 8, "bytes, more than 8"),
        (lambda d, x: (d(x, at(x, 1)), d(x, at(x, 0)), d.a.weight * 2), 2**20, "is returned by the loop"),
    ],
)
def test_a_constant_is_left_alone_for_a_reason(loop: Any, max_bytes: int, reason: str) -> None:  # noqa: ANN401
    graph = graph_of({"a": [1, 1]}, loop)
    report = FoldConstants(max_bytes).run(graph)
    assert any(reason in why for why in report.left_alone.values()), report


def test_a_view_of_a_weight_stays_a_view() -> None:
    class Transposed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(4, 4))

        def forward(self, x: Tensor, t: Tensor) -> Tensor:
            return x @ self.weight.t() + t[:, None]

    graph = unrolled(Transposed(), CacheSchedule.all_compute(1), steps(1), draw(3, 4))
    assert "is a view of a weight" in FoldConstants().run(graph).left_alone.values()


def test_draws_are_never_folded() -> None:
    def loop(denoiser: Any, x: Tensor) -> Any:  # noqa: ANN401
        return denoiser(x, at(x, 1)) + torch.randn(3, 4) + denoiser(x, at(x, 0))

    graph = graph_of({"a": [1, 1]}, loop)
    FoldConstants().run(graph)
    assert any("randn" in target for target in targets(graph))


def test_a_folded_value_with_several_users_is_kept_once() -> None:
    def loop(denoiser: Any, x: Tensor) -> Any:  # noqa: ANN401
        t = at(x, 1)
        return denoiser(denoiser(x, t), t)

    graph = graph_of({"a": [1, 1]}, loop)
    FoldConstants().run(graph)
    (folded,) = graph.folded
    assert len(folded.names) == 1


def test_binding_times_follow_what_the_loop_feeds() -> None:
    def loop(denoiser: Any, x: Tensor, y: Tensor) -> Any:  # noqa: ANN401
        for i in range(2):
            x = x - denoiser(x, at(x, i), y)
        return x

    graph = graph_of({"a": [1, 1]}, loop, y=draw(3, 4))
    form = graph.forms[0]
    bindings = {n.name: n.meta["binding"] for n in form.graph.nodes if n.op == "placeholder"}
    assert list(bindings.values()) == [Binding.LATENT, Binding.CONSTANT, Binding.CONDITION]
    by_target = {str(n.target): n.meta["binding"] for n in form.graph.nodes if n.op == "call_function"}
    assert by_target["aten.sin.default"] is Binding.CONSTANT
    assert by_target["aten.layer_norm.default"] is Binding.LATENT
    assert BindTimes().run(form).rewrites == 0


def test_a_timestep_with_a_condition_is_a_step() -> None:
    def loop(denoiser: Any, x: Tensor, y: Tensor) -> Any:  # noqa: ANN401
        for i in range(2):
            x = x - denoiser(x, at(x, i) * y)
        return x

    graph = graph_of({"a": [1, 1]}, loop, y=draw(3))
    by_target = {str(n.target): n.meta["binding"] for n in graph.forms[0].graph.nodes if n.op == "call_function"}
    assert by_target["aten.sin.default"] in (Binding.STEP, Binding.CONDITION)


class Modulated(nn.Module):
    """Takes pieces of a projection of the time, and an expanded one: folded, each keeps its strides."""

    def __init__(self) -> None:
        super().__init__()
        self.to_two = nn.Linear(1, 8)
        self.mean = nn.Linear(1, 1)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        scale, shift = self.to_two(t[:, None]).chunk(2, dim=-1)
        mean: Tensor = self.mean(t[:, None])
        result: Tensor = x * scale + shift + mean.expand_as(x)
        return result


def test_a_folded_view_keeps_its_strides() -> None:
    model = seeded(Modulated())
    graph = unrolled(model, CacheSchedule.from_table({"to_two": [1, 1]}), steps(2), draw(3, 4))
    run_all(graph, ReadReusedSites(), DropDead(), LowerCacheReads(), DropSiteMarks())
    before = run(graph, draw(3, 4))
    FoldConstants().run(graph)
    DropDead().run(graph)
    strides = {node.meta["val"].stride() for node in graph.graph.nodes if str(node.target).startswith("_folded")}
    assert strides >= {(8, 1), (1, 0)}
    for node in graph.graph.nodes:
        if str(node.target).startswith("_folded"):
            assert graph.root.get_buffer(str(node.target)).stride() == node.meta["val"].stride()
    assert_strides_as_noted(graph, draw(3, 4))
    assert same_bits(run(graph, draw(3, 4)), before)


def test_folded_views_are_made_again_after_weights_change() -> None:
    model = seeded(Modulated())
    sampler = check_equals_reference(model, CacheSchedule.from_table({"mean": [1, 0]}), steps(2), draw(3, 4))
    with torch.no_grad():
        model.mean.weight += 1
        model.to_two.bias += 1
    sampler.refresh()
    assert sampler.verify(draw(3, 4)).bitwise


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


def test_a_mark_of_an_expanded_value_runs() -> None:
    value = draw(3, 1).expand(3, 4)
    mark = SITE(value, "a", 0, 0)
    assert mark.stride() == value.stride() == (1, 0)
    assert torch.equal(mark, value)
    assert mark.untyped_storage().data_ptr() != value.untyped_storage().data_ptr()


@pytest.mark.parametrize("earlier", [FoldConstants(), DropDead()])
def test_what_may_lose_marks_cannot_come_before_they_are_read(earlier: Pass) -> None:
    with pytest.raises(ValueError, match="needs SITES_MARKED"):
        Pipeline((earlier, ReadReusedSites()), frozenset({Fact.SITES_MARKED}))
