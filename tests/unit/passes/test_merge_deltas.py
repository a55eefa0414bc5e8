from __future__ import annotations

import torch
from torch import Tensor, nn

from l2c_compile import CacheSchedule
from l2c_compile.graphs.loop_graph import LoopGraph
from l2c_compile.passes.base import PassReport
from l2c_compile.passes.drop_dead import DropDead
from l2c_compile.passes.merge_deltas import MergeDeltas
from l2c_compile.passes.pipeline import BITWISE
from tests.tiny import draw, run, seeded, steps, unrolled

NOISE = draw(2, 4)


class Stream(nn.Module):
    """Residual sublayers without gates; ``gated`` puts one that changes with time on the second."""

    def __init__(self, *, gated: bool = False, skip: bool = False) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(4, 4) for _ in range(3))
        self.gated, self.skip = gated, skip

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        kept = x
        for index, layer in enumerate(self.layers):
            branch = layer(torch.tanh(kept if self.skip and index == 2 else x))
            x = x + (branch * torch.cos(t)[:, None] if self.gated and index == 1 else branch)
            if index == 0:
                kept = x
        return x


def merged(model: nn.Module, rows: dict[str, list[int]]) -> tuple[LoopGraph, PassReport, Tensor, Tensor]:
    """Return the graph after the pass, its report, and the results before and after."""
    schedule = CacheSchedule.from_table(rows)
    graph = unrolled(seeded(model), schedule, steps(schedule.num_evaluations), NOISE)
    BITWISE.run(graph)
    (before,) = run(graph, NOISE)
    report = MergeDeltas().run(graph)
    DropDead().run(graph)
    (after,) = run(graph, NOISE)
    return graph, report, before, after


def additions(graph: LoopGraph, evaluation: int) -> int:
    nodes = graph.graph.find_nodes(op="call_function", target=torch.ops.aten.add.Tensor)
    return sum(node.meta.get("evaluation") == evaluation for node in nodes)


def close(a: Tensor, b: Tensor) -> bool:
    # Three terms in another order: each addition rounds once, to half an ulp of a partial sum.
    return torch.allclose(a, b, rtol=0, atol=8 * torch.finfo(a.dtype).eps * float(b.abs().max()))


def test_a_run_of_reused_layers_becomes_one_sum_at_its_source() -> None:
    graph, report, before, after = merged(Stream(), {f"layers.{i}": [1, 0] for i in range(3)})
    assert report.rewrites == 1
    assert additions(graph, 1) == 1
    assert additions(graph, 0) == 3 + 2
    assert close(after, before)


def test_evaluations_that_read_the_same_run_share_its_sum() -> None:
    graph, report, before, after = merged(Stream(), {f"layers.{i}": [1, 0, 0] for i in range(3)})
    assert report.rewrites == 2
    assert additions(graph, 0) == 3 + 2
    assert close(after, before)


def test_a_gate_of_its_own_evaluation_ends_the_run() -> None:
    graph, report, before, after = merged(Stream(gated=True), {f"layers.{i}": [1, 0] for i in range(3)})
    assert report.rewrites == 0
    assert additions(graph, 1) == 3
    assert torch.equal(after, before)


def test_a_value_inside_the_run_that_is_read_ends_it() -> None:
    # The first layer's sum is read by the third layer, which is computed.
    rows = {"layers.0": [1, 0], "layers.1": [1, 0], "layers.2": [1, 1]}
    _, report, before, after = merged(Stream(skip=True), rows)
    assert report.rewrites == 0
    assert torch.equal(after, before)


def test_a_term_that_another_evaluation_reads_alone_is_left() -> None:
    rows = {"layers.0": [1, 0, 0], "layers.1": [1, 0, 1], "layers.2": [1, 1, 1]}
    _, report, before, after = merged(Stream(), rows)
    assert report.rewrites == 0
    assert any("is also read by" in reason for reason in report.reasons())
    assert torch.equal(after, before)


def test_a_second_run_finds_nothing() -> None:
    graph, _, _, _ = merged(Stream(), {f"layers.{i}": [1, 0] for i in range(3)})
    assert MergeDeltas().run(graph).rewrites == 0
