"""prune-projections: columns that nobody reads are not projected."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from l2c_compile import CacheSchedule
from l2c_compile.graphs.loop_graph import LoopGraph
from l2c_compile.graphs.strides import addresses_memory
from l2c_compile.passes.batch_conditioning import BatchConditioning
from l2c_compile.passes.drop_dead import DropDead
from l2c_compile.passes.pipeline import BITWISE
from l2c_compile.passes.prune_projections import PruneProjections
from tests.dit_loops import DIM, INPUTS, ROWS, close, loop_graph, projections
from tests.tiny import assert_strides_as_noted, at, draw, run, same_bits, seeded, unrolled

aten = torch.ops.aten


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
    assert set(report.reasons()) == {"every output is used", "is used as a whole"}


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


def test_columns_of_a_graph_that_addresses_memory_by_strides_stay() -> None:
    graph, x = of_columns(Columns(back=True)), draw(2, 3, 4)
    assert addresses_memory(graph.graph) is not None
    before = run(graph, x)
    for each in (PruneProjections(), BatchConditioning()):
        report = each.run(graph)
        assert report.rewrites == 0
        assert "strides" in next(iter(report.reasons()))
    assert same_bits(run(graph, x), before)
