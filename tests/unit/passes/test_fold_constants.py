"""What depends on no input is computed once, when the loop is compiled."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from l2c_compile import CacheSchedule, l2c_compile
from l2c_compile.errors import CaptureError
from l2c_compile.passes.drop_dead import DropDead
from l2c_compile.passes.drop_site_marks import DropSiteMarks
from l2c_compile.passes.fold_constants import FoldConstants, make_constants
from l2c_compile.passes.lower_cache_reads import LowerCacheReads
from l2c_compile.passes.read_reused_sites import ReadReusedSites
from tests.residual_graphs import graph_of, run_all
from tests.tiny import (
    assert_strides_as_noted,
    at,
    check_equals_reference,
    draw,
    run,
    same_bits,
    seeded,
    steps,
    targets,
    unrolled,
)


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
    assert any(reason in why for why in report.reasons()), report


def test_a_view_of_a_weight_stays_a_view() -> None:
    class Transposed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(4, 4))

        def forward(self, x: Tensor, t: Tensor) -> Tensor:
            return x @ self.weight.t() + t[:, None]

    graph = unrolled(Transposed(), CacheSchedule.all_compute(1), steps(1), draw(3, 4))
    assert "is a view of a weight" in FoldConstants().run(graph).reasons()


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


def test_an_operation_that_torch_refuses_is_the_users_and_named() -> None:
    class Mixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.time = nn.Linear(1, 4)

        def forward(self, x: Tensor, t: Tensor) -> Tensor:
            return torch.add(x, self.time(t[:, None]))

    sampler = l2c_compile(Mixed().double(), CacheSchedule.all_compute(2), steps(2))
    with pytest.raises(CaptureError, match=r"aten\.linear\.default fails in evaluation 0, module 'time' \(mat1 .*\)"):
        sampler(draw(3, 4).double())
