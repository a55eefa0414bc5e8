"""One graph of the whole loop: what is copied, what is shared, and that it all grows linearly."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.fx.node import Target
from torch.utils._pytree import tree_leaves

from l2c_compile import CacheSchedule, Site, l2c_compile
from l2c_compile.compile import build_loop_graph
from l2c_compile.graphs.facts import Fact, check
from l2c_compile.graphs.loop_graph import LoopGraph
from l2c_compile.graphs.marks import site_marks
from l2c_compile.graphs.nodes import evaluation_of
from tests.residual_graphs import MODEL
from tests.tiny import (
    assert_strides_as_noted,
    at,
    calls_in,
    draw,
    residual,
    run,
    same_bits,
    steps,
    unrolled,
)

aten = torch.ops.aten


def count(graph: LoopGraph, target: Target) -> int:
    return len(graph.graph.find_nodes(op="call_function", target=target))


def test_every_evaluation_is_marked_in_execution_order() -> None:
    graph = unrolled(MODEL, CacheSchedule.from_table({"a": [1, 0, 0], "b": [1, 1, 1]}), steps(3), draw(3, 4))
    check(graph, {Fact.SITES_MARKED})
    assert [(m.evaluation, m.site) for m in site_marks(graph.graph)] == [(e, s) for e in range(3) for s in "ab"]
    order = [e for n in graph.graph.nodes if (e := evaluation_of(n)) is not None and n.op == "call_function"]
    assert [e for e in order if e] == sorted(e for e in order if e)


def test_the_unrolled_graph_equals_the_loop() -> None:
    graph, x = unrolled(MODEL, CacheSchedule.all_compute(3, ["a"]), steps(3), draw(3, 4)), draw(3, 4)
    with torch.no_grad():
        assert same_bits(run(graph, x), [steps(3)(MODEL, x)])


def test_strides_are_noted_as_they_are_where_the_loop_passes_views_with_gaps_or_overlaps() -> None:
    def loop(denoiser: Any, x: Tensor) -> Any:  # noqa: ANN401
        t = torch.tensor(3.0)
        for _ in range(2):
            x = denoiser(torch.cat([x, x], 1)[:, ::2], t.expand(len(x)))
        return x

    graph = unrolled(MODEL, CacheSchedule.all_compute(2, ["a"]), loop, draw(3, 4))
    assert_strides_as_noted(graph, draw(3, 4))


def test_what_does_not_depend_on_the_latent_is_shared() -> None:
    def loop(denoiser: Any, x: Tensor, y: Tensor) -> Any:  # noqa: ANN401
        t = at(x, 1)
        for _ in range(4):
            x = denoiser(x, t * 2, y)
        return x

    graph = unrolled(MODEL, CacheSchedule.all_compute(4, ["a"]), loop, draw(3, 4), {"y": draw(3, 4)})
    # t * 2 is another constant of the loop in every evaluation.
    assert count(graph, aten.sin.default) == 4
    assert count(graph, aten.tanh.default) == 4

    def same_t(denoiser: Any, x: Tensor, y: Tensor) -> Any:  # noqa: ANN401
        t = at(x, 1)
        for _ in range(4):
            x = denoiser(x, t, y)
        return x

    graph = unrolled(MODEL, CacheSchedule.all_compute(4, ["a"]), same_t, draw(3, 4), {"y": draw(3, 4)})
    assert count(graph, aten.sin.default) == 1
    assert count(graph, aten.tanh.default) == 4


def test_an_input_that_depends_on_conditions_is_shared_and_one_that_depends_on_a_draw_is_not() -> None:
    def loop(denoiser: Any, x: Tensor, y: Tensor) -> Any:  # noqa: ANN401
        drawn, given = torch.rand(3), 2 * y
        for _ in range(2):
            x = denoiser(denoiser(x, given), drawn[:2], 1.0)
        return x

    graph = unrolled(MODEL, CacheSchedule.all_compute(4, ["a"]), loop, draw(2, 4), {"y": draw(2)})
    # The second form of call multiplies by 1.0, so its graph is another; each is called twice.
    assert count(graph, aten.sin.default) == 1 + 2
    assert count(graph, aten.tanh.default) == 4


def test_an_input_that_depends_on_the_latent_in_one_evaluation_is_copied_in_all() -> None:
    def loop(denoiser: Any, x: Tensor, y: Tensor) -> Any:  # noqa: ANN401
        for t in (y, y, x[:, 0]):
            x = denoiser(x, t)
        return x

    graph = unrolled(MODEL, CacheSchedule.all_compute(3, ["a"]), loop, draw(2, 4), {"y": draw(2)})
    assert count(graph, aten.sin.default) == 3


def test_an_evaluation_whose_result_is_not_used_takes_its_place_and_is_dropped_later() -> None:
    def loop(denoiser: Any, x: Tensor) -> Any:  # noqa: ANN401
        y = denoiser(x, at(x, 1))
        denoiser(y, at(x, 0))
        return y

    graph = unrolled(MODEL, CacheSchedule.all_compute(2, ["a"]), loop, draw(3, 4))
    assert graph.num_evaluations == 2
    final, _ = build_loop_graph(MODEL, loop, CacheSchedule.all_compute(2, ["a"]), draw(3, 4), {})
    assert {evaluation_of(n) for n in final.graph.nodes if n.target is aten.tanh.default} == {0}


def schedule_of(num_evaluations: int) -> CacheSchedule:
    rows = {"a": [int(e % 2 == 0) for e in range(num_evaluations)], "b": [1] * num_evaluations}
    return CacheSchedule.from_table({Site(path): row for path, row in rows.items()})


def test_nodes_and_work_grow_linearly_with_the_evaluations() -> None:
    nodes: dict[int, int] = {}
    work: dict[int, int] = {}

    def build(num_evaluations: int) -> LoopGraph:
        schedule = schedule_of(num_evaluations)
        graph, _ = build_loop_graph(MODEL, steps(num_evaluations), schedule, draw(3, 4), {})
        return graph

    build(2)
    for num_evaluations in (8, 16, 32):

        def measure(e: int = num_evaluations) -> None:
            nodes[e] = len(build(e).graph.nodes)

        work[num_evaluations] = calls_in(measure, "l2c_compile")
    assert nodes[32] - nodes[16] == 2 * (nodes[16] - nodes[8])
    # A quadratic part of even one call for each pair of evaluations would add (32**2 - 2 * 16**2 + 8**2) = 576 calls.
    assert abs((work[32] - work[16]) - 2 * (work[16] - work[8])) < 100


CONSTANT = draw(4, seed=3)

RESULTS: dict[str, Any] = {
    "a constant, repeated": lambda d, x, y: CONSTANT.expand_as(x),
    "a weight": lambda d, x, y: (y, d.a.bias),
    "a part of a weight": lambda d, x, y: (y, d.a.weight[1:], d.a.weight.T),
    "the noise": lambda d, x, y: (y, x),
    "parts of the noise": lambda d, x, y: (y, x[0], x.t(), x.reshape(-1), *x.chunk(3)),
    "the noise, repeated": lambda d, x, y: (y, x[:1].expand(5, -1)),
    "one value twice": lambda d, x, y: (y, y[0], y),
    "a constant that is folded, and used": lambda d, x, y: (y + (d.b.bias * 2), (d.b.bias * 2)[None]),
}


@pytest.mark.parametrize("numerics", ["bitwise", "rounding"])
@pytest.mark.parametrize("result", RESULTS.values(), ids=RESULTS)
def test_a_caller_may_write_into_every_result(result: Any, numerics: Any) -> None:  # noqa: ANN401
    def loop(denoiser: Any, x: Tensor) -> Any:  # noqa: ANN401
        return result(denoiser, x, steps(2)(denoiser, x))

    model = residual()
    sampler = l2c_compile(model, CacheSchedule.from_table({"a": [1, 0]}), loop, numerics=numerics)
    noise = draw(3, 4)
    wanted = [leaf.clone() for leaf in tree_leaves(sampler(noise))]
    for _ in range(2):
        for got, first in zip(leaves := tree_leaves(sampler(noise)), wanted, strict=True):
            assert torch.equal(got, first)
        for leaf in leaves:
            torch.as_strided(leaf, (1,), (1,)).fill_(100.0)
        assert torch.equal(noise, draw(3, 4))
    assert torch.equal(model.a.weight, residual().a.weight)
    assert torch.equal(model.a.bias, residual().a.bias)
