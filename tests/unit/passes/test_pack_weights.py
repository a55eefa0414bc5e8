"""pack-weights: which products use packed weights, and that samplers follow their weights."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from l2c_compile import CacheSchedule, l2c_compile
from l2c_compile.backends.options import Options
from l2c_compile.graphs.loop_graph import LoopGraph
from l2c_compile.kernels.packed_linear import can_pack, packed_linear_op
from l2c_compile.passes.base import PassReport
from l2c_compile.passes.pack_weights import PackWeights
from l2c_compile.passes.pipeline import KERNELS, LOOP, REGIONS
from tests.tiny import draw, run, steps, tiny_dit, unrolled

pytestmark = pytest.mark.skipif(not can_pack(torch.zeros(2, 2)), reason="this build of torch has no oneDNN")

aten = torch.ops.aten
INPUTS = (draw(2, 4, 4, 4), torch.tensor([1, 3]))
ROWS = {"blocks.0.attn": [1, 0, 1], "blocks.0.mlp": [1, 1, 0], "blocks.1.attn": [1, 1, 1]}


def loop(denoiser, noise, y):  # type: ignore[no-untyped-def]  # noqa: ANN001, ANN201
    x = noise
    for i in range(3):
        x = x - 0.1 * denoiser(x, torch.full((len(x),), 3 - i), y)[:, :4]
    return x


def packed(min_rows: int = 1) -> tuple[LoopGraph, LoopGraph, PassReport]:
    flat = unrolled(tiny_dit(), CacheSchedule.from_table(ROWS), loop, INPUTS[0], {"y": INPUTS[1]})
    LOOP.run(flat)
    graph = flat.copy()
    return flat, graph, PackWeights(min_rows).run(graph)


def count(graph: LoopGraph, target: object) -> int:
    return sum(node.target is target for node in graph.graph.nodes)


def test_products_with_weights_use_packed_ones() -> None:
    flat, graph, report = packed()
    # qkv, proj, fc1 and fc2 of what is computed, and the final layer of three evaluations.
    assert report.rewrites == count(graph, packed_linear_op) == 2 * 2 + 2 * 3 + 2 * (2 + 3) + 3
    (before,), (after,) = run(flat, *INPUTS), run(graph, *INPUTS)
    # Sums of up to 64 terms in another order, through three evaluations of two blocks.
    assert torch.allclose(after, before, rtol=0, atol=1024 * torch.finfo(before.dtype).eps * float(before.abs().max()))


def test_an_activation_joins_its_product() -> None:
    flat, graph, _ = packed()
    computed = count(flat, aten.gelu.default)
    # The MLPs of two blocks in three evaluations, one of them reused.
    assert computed == 5
    assert count(graph, aten.gelu.default) == 0
    fused = [
        node for node in graph.graph.find_nodes(op="call_function", target=packed_linear_op) if len(node.args) == 4
    ]
    assert [node.args[3] for node in fused] == ["gelu_tanh"] * computed


@pytest.mark.parametrize(("function", "act"), [("gelu", "gelu"), ("relu", "relu"), ("silu", "silu"), ("tanh", None)])
def test_which_activations_join(function: str, act: str | None) -> None:
    class Denoiser(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.alone, self.shared = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x: Tensor, t: Tensor) -> Tensor:
            activation = getattr(nn.functional, function, None) or getattr(torch, function)
            h: Tensor = self.shared(activation(self.alone(x)))
            return h + activation(h)  # type: ignore[no-any-return]

    flat = unrolled(Denoiser(), CacheSchedule.all_compute(2), steps(2), draw(3, 4))
    LOOP.run(flat)
    graph = flat.copy()
    assert PackWeights(1).run(graph).rewrites == 4
    graph.graph.lint()
    products = graph.graph.find_nodes(op="call_function", target=packed_linear_op)
    # What ``shared`` returns is read twice: before the activation, too.
    assert [node.args[3:] for node in products] == [(act,) if act else (), ()] * 2
    (before,), (after,) = run(flat, draw(3, 4)), run(graph, draw(3, 4))
    torch.testing.assert_close(after, before)


def test_projections_before_the_loop_and_products_of_few_rows_are_left_alone() -> None:
    flat, graph, report = packed()
    assert count(graph, aten.linear.default) == count(flat, aten.linear.default) - report.rewrites > 0
    assert set(report.reasons()) == {"multiplies once, or with something made in the graph"}
    _, few, report = packed(min_rows=1000)
    assert report.rewrites == 0
    assert "multiplies fewer than 1000 rows" in report.reasons()
    assert count(few, packed_linear_op) == 0


def test_weights_that_cannot_be_packed_are_left_alone() -> None:
    model = tiny_dit().double()
    inputs = INPUTS[0].double(), INPUTS[1]
    graph = unrolled(model, CacheSchedule.from_table(ROWS), loop, inputs[0], {"y": inputs[1]})
    LOOP.run(graph)
    report = PackWeights(1).run(graph)
    assert report.rewrites == 0
    assert "has a weight that cannot be packed on its device or in its dtype" in report.reasons()


def test_regions_with_packed_weights_equal_the_packed_graph() -> None:
    flat, _, _ = packed()
    graph = flat.copy()
    PackWeights(1).run(graph)
    REGIONS.run(graph)
    alone = flat.copy()
    PackWeights(1).run(alone)
    assert torch.equal(run(graph, *INPUTS)[0], run(alone, *INPUTS)[0])


def test_it_can_be_left_out() -> None:
    for backend in ("eager", "inductor"):
        assert Options(backend, "rounding").kernels == KERNELS
        assert not Options(backend, "bitwise").kernels.passes
        assert not Options(backend, "rounding", ["pack-weights"]).kernels.passes
    assert Options("inductor").kernels == KERNELS
    assert not Options("eager").kernels.passes
    assert not Options("aot_eager", "rounding").kernels.passes
    model = tiny_dit()
    for without, expected in (((), True), (("pack-weights", "plan-memory"), False)):
        sampler = l2c_compile(model, CacheSchedule.from_table(ROWS), loop, backend="inductor", without=without)
        assert bool(sampler.options.kernels.passes) == expected
        assert ("plan-memory" in [each.name for each in sampler.options.passes.passes]) == expected
