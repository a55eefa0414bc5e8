"""prune-projections and batch-conditioning: what is projected from timestep and condition."""

from __future__ import annotations

import operator

import pytest
import torch
from torch import Tensor, nn

from l2c_compile import CacheSchedule
from l2c_compile.graphs.loop_graph import LoopGraph
from l2c_compile.graphs.strides import addresses_memory
from l2c_compile.passes.batch_conditioning import BatchConditioning
from l2c_compile.passes.drop_dead import DropDead
from l2c_compile.passes.merge_common import MergeCommon
from l2c_compile.passes.pipeline import BITWISE
from l2c_compile.passes.prune_projections import PruneProjections
from tests.tiny import assert_strides_as_noted, at, draw, run, same_bits, seeded, tiny_dit, unrolled

aten = torch.ops.aten
DIM = 16
INPUTS = (draw(2, 4, 4, 4), torch.tensor([1, 3]))

# Each sublayer of a DiT projects its modulation from timestep and label; 6 of DIM columns a block.
ROWS = {
    "blocks.0.attn": [1, 0, 1, 0],
    "blocks.0.mlp": [1, 1, 1, 0],
    "blocks.1.attn": [1, 1, 1, 0],
    "blocks.1.mlp": [1, 0, 1, 0],
}


def loop_graph(rows: dict[str, list[int]]) -> LoopGraph:
    schedule = CacheSchedule.from_table(rows)
    noise, labels = INPUTS
    graph = unrolled(tiny_dit(), schedule, steps_of_dit(schedule.num_evaluations), noise, {"y": labels})
    BITWISE.run(graph)
    return graph


def steps_of_dit(count: int):  # type: ignore[no-untyped-def]  # noqa: ANN201
    def loop(denoiser, noise, y):  # type: ignore[no-untyped-def]  # noqa: ANN001, ANN202
        x = noise
        for i in range(count):
            x = x - 0.1 * denoiser(x, torch.full((len(x),), count - i), y)[:, :4]
        return x

    return loop


def projections(graph: LoopGraph) -> list[tuple[int, int]]:
    """Return (rows, columns) of every projection of the conditioning vector that is made, in order."""
    shapes = [n.meta["val"].shape for n in graph.graph.find_nodes(op="call_function", target=aten.linear.default)]
    return [(s[0], s[1]) for s in shapes if len(s) == 2]


def close(a: Tensor, b: Tensor) -> bool:
    # A product of other shape may sum its 16 terms in another order; four evaluations of two blocks pass it on.
    return torch.allclose(a, b, rtol=0, atol=64 * torch.finfo(a.dtype).eps * float(b.abs().max()))


def test_shift_and_scale_of_skipped_layers_are_not_projected() -> None:
    graph = loop_graph(ROWS)
    (before,) = run(graph, *INPUTS)
    report = PruneProjections().run(graph)
    DropDead().run(graph)
    (after,) = run(graph, *INPUTS)
    assert close(after, before)
    # Evaluation 1: block 0 lacks shift and scale of attn (columns 2D..6D remain), block 1 those of mlp (0..3D, 5D..6D).
    # Evaluation 3: all four are gone: each block keeps its two gates.
    assert report.rewrites == 4
    columns = sorted(width for _, width in projections(graph))
    full, final = [6 * DIM] * 4, [2 * DIM] * 4
    assert columns == sorted([*full, *final, 4 * DIM, 3 * DIM, DIM, DIM, DIM, DIM, DIM])


def test_no_column_is_projected_twice_or_lost() -> None:
    graph = loop_graph(ROWS)
    needed = sum(width for _, width in projections(graph)) - (2 + 2 + 4 + 4) * DIM
    PruneProjections().run(graph)
    DropDead().run(graph)
    assert sum(width for _, width in projections(graph)) == needed


def test_a_projection_that_is_used_whole_is_left_alone() -> None:
    graph = loop_graph({name: [1, 1] for name in ROWS})
    report = PruneProjections().run(graph)
    assert report.rewrites == 0
    assert set(report.left_alone.values()) == {"every output is used", "is used as a whole"}


def test_projections_of_all_evaluations_are_one_product() -> None:
    graph = loop_graph({name: [1, 1, 1] for name in ROWS})
    (before,) = run(graph, *INPUTS)
    report = BatchConditioning().run(graph)
    MergeCommon().run(graph)
    DropDead().run(graph)
    (after,) = run(graph, *INPUTS)
    assert close(after, before)
    assert report.rewrites == 3 * 3
    assert projections(graph) == [(3 * 2, 6 * DIM), (3 * 2, 6 * DIM), (3 * 2, 2 * DIM)]
    cats = graph.graph.find_nodes(op="call_function", target=aten.cat.default)
    assert sum(len(cat.args[0]) == 3 for cat in cats) == 1  # one stack of conditioning vectors serves all


def test_vectors_of_all_evaluations_have_equal_strides_whatever_was_pruned() -> None:
    graph = loop_graph(ROWS)
    PruneProjections().run(graph)
    DropDead().run(graph)
    (before,) = run(graph, *INPUTS)
    BatchConditioning().run(graph)
    MergeCommon().run(graph)
    DropDead().run(graph)
    assert close(run(graph, *INPUTS)[0], before)
    vectors = [n.meta["val"] for n in graph.graph.nodes if n.op == "call_function" and n.target is operator.getitem]
    vectors = [v for v in vectors if v.shape == (2, 1, DIM)]
    assert len(vectors) >= 4 * 2  # one gate a sublayer and evaluation at least
    assert {v.stride() for v in vectors} == {(DIM, DIM, 1)}


def test_batched_projections_come_before_the_first_evaluation() -> None:
    graph = loop_graph({name: [1, 1, 1] for name in ROWS})
    BatchConditioning().run(graph)
    nodes = [node for node in graph.graph.nodes if node.op == "call_function"]
    products = [i for i, n in enumerate(nodes) if n.target is aten.linear.default and n.meta["evaluation"] is None]
    first_latent = next(
        i for i, n in enumerate(nodes) if n.target is aten.convolution.default or "conv" in str(n.target)
    )
    assert max(products) < first_latent


@pytest.mark.parametrize(("evaluations_that_fit", "products"), [(1, 0), (2, 2), (4, 1)])
def test_beyond_the_budget_evaluations_are_taken_in_chunks(evaluations_that_fit: int, products: int) -> None:
    graph = loop_graph({name: [1, 1, 1, 1] for name in ROWS})
    (before,) = run(graph, *INPUTS)
    one_evaluation = 2 * (6 + 6 + 2) * DIM * 4
    report = BatchConditioning(budget_bytes=evaluations_that_fit * one_evaluation).run(graph)
    MergeCommon().run(graph)
    DropDead().run(graph)
    (after,) = run(graph, *INPUTS)
    assert close(after, before)
    batched = [shape for shape in projections(graph) if shape == (2 * evaluations_that_fit, 6 * DIM)]
    if products:
        assert len(batched) == 2 * products
    else:
        assert report.rewrites == 0
        assert set(report.left_alone.values()) == {"no other evaluation projects with these weights"}


def test_what_depends_on_the_latent_stays_in_its_evaluation() -> None:
    graph = loop_graph({name: [1, 1] for name in ROWS})
    BatchConditioning().run(graph)
    token_products = [
        n for n in graph.graph.find_nodes(op="call_function", target=aten.linear.default) if n.meta["val"].ndim == 3
    ]
    assert {n.meta["evaluation"] for n in token_products} == {0, 1}
    assert len(token_products) == 2 * (2 * 4 + 1)


def test_pruning_then_batching_groups_by_the_columns_that_are_left() -> None:
    graph = loop_graph(ROWS)
    (before,) = run(graph, *INPUTS)
    PruneProjections().run(graph)
    DropDead().run(graph)
    BatchConditioning().run(graph)
    MergeCommon().run(graph)
    DropDead().run(graph)
    (after,) = run(graph, *INPUTS)
    assert close(after, before)
    # Both full evaluations of each block together.
    assert projections(graph).count((2 * 2, 6 * DIM)) == 2


class Columns(nn.Module):
    """Takes some columns of a projection of the latent and of one of the time, and goes on from views of them."""

    def __init__(self, back: bool = False) -> None:
        super().__init__()
        self.wide = nn.Linear(4, 12)
        self.time = nn.Linear(1, 12)
        self.back = back

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        some = self.wide(x)[..., 4:8].transpose(1, 2)
        scale = torch.sin(self.time(t[:, None]) + t[:, None])[:, None, 4:8]
        gate = self.time(t[:, None])[:, None, :4]
        if self.back:
            some = some.as_strided((x.shape[0], 4, 3), (36, 1, 12))
        result: Tensor = x + gate * scale * torch.tanh(some).transpose(1, 2)
        return result


def of_columns(model: nn.Module) -> LoopGraph:
    def loop(denoiser, noise):  # type: ignore[no-untyped-def]  # noqa: ANN001, ANN202
        x = noise
        for i in range(3):
            x = x - 0.1 * denoiser(x, at(x, i) * x[:, 0, 0])
        return x

    graph = unrolled(seeded(model), CacheSchedule.from_table({"wide": [1, 0, 1]}), loop, draw(2, 3, 4))
    BITWISE.run(graph)
    return graph


def test_pruned_columns_lie_closer_together_and_the_graph_says_so() -> None:
    graph, x = of_columns(Columns()), draw(2, 3, 4)
    before = run(graph, x)
    assert PruneProjections().run(graph).rewrites > 0
    assert_strides_as_noted(graph, x)
    assert close(run(graph, x)[0], before[0])
    assert run(graph, x)[0].stride() == before[0].stride()


def test_batched_vectors_have_other_strides_and_the_graph_says_so() -> None:
    rows = {site: [1] * 4 for site in ROWS}
    graph = loop_graph(rows)
    assert BatchConditioning().run(graph).rewrites > 0
    DropDead().run(graph)
    assert_strides_as_noted(graph, *INPUTS)


def test_columns_of_a_graph_that_addresses_memory_by_strides_stay() -> None:
    graph, x = of_columns(Columns(back=True)), draw(2, 3, 4)
    assert addresses_memory(graph.graph) is not None
    before = run(graph, x)
    for each in (PruneProjections(), BatchConditioning()):
        report = each.run(graph)
        assert report.rewrites == 0
        assert "strides" in next(iter(report.left_alone.values()))
    assert same_bits(run(graph, x), before)
