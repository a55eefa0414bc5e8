from __future__ import annotations

import torch
from torch import Tensor

from l2c_compile.passes.drop_dead import DropDead
from l2c_compile.passes.merge_common import MergeCommon
from tests.tiny import draw, program, run, same_bits, targets

aten = torch.ops.aten


def repeated(x: Tensor) -> list[Tensor]:
    first, second = aten.silu(x), aten.silu(x)
    return [first + second, aten.mul(first, 2.0), aten.mul(second, 2.0)]


def test_chains_of_equal_work_are_done_once_for_all_users_and_the_numbers_stay() -> None:
    graph, x = program(repeated, draw(3)), draw(3)
    before = run(graph, x)
    assert MergeCommon().run(graph).rewrites == 2
    DropDead().run(graph)
    assert targets(graph) == ["silu.default", "add.Tensor", "mul.Tensor"]
    assert same_bits(run(graph, x), before)
    assert MergeCommon().run(graph).rewrites == 0


def test_numbers_that_python_calls_equal_are_kept_apart() -> None:
    def function(n: Tensor, x: Tensor) -> list[Tensor]:
        return [n * 1, n * 1.0, n * True, x + 0.0, x + -0.0, x + 0, aten.sum(x, [0], False), aten.sum(x, [0], True)]

    n, x = torch.tensor([1, -2]), torch.tensor([-0.0, 0.0])
    graph = program(function, n, x)
    before = run(graph, n, x)
    assert MergeCommon().run(graph).rewrites == 0
    assert same_bits(run(graph, n, x), before)


def test_equal_keywords_in_another_order_are_equal() -> None:
    graph = program(lambda x: [aten.div(x, 2.0), aten.div(x, 2.0)], draw(3))
    first, second = graph.graph.find_nodes(op="call_function", target=aten.div.Tensor)
    first.kwargs, second.kwargs = {"a": 1, "b": 2}, {"b": 2, "a": 1}
    assert MergeCommon().run(graph).rewrites == 1


def test_draws_are_never_merged() -> None:
    graph = program(lambda x: [torch.rand_like(x), torch.rand_like(x)], draw(3))
    report = MergeCommon().run(graph)
    assert report.rewrites == 0
    assert set(report.reasons()) == {"draws random numbers: each draw is another"}


def test_the_sites_of_merged_values_are_all_noted() -> None:
    graph = program(repeated, draw(3))
    first, second = graph.graph.find_nodes(op="call_function", target=aten.silu.default)
    first.meta["sites"], second.meta["sites"] = ((0, "a", 0),), ((1, "a", 0),)
    MergeCommon().run(graph)
    assert first.meta["sites"] == ((0, "a", 0), (1, "a", 0))
