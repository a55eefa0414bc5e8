from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx, nn

from l2c_compile import CacheSchedule
from l2c_compile.graphs.facts import Fact, check
from l2c_compile.graphs.loop_graph import LoopGraph
from l2c_compile.passes.base import Pipeline
from l2c_compile.passes.outline_regions import OutlineRegions
from l2c_compile.passes.pipeline import BITWISE, LOOP
from tests.tiny import draw, run, seeded, tiny_dit, unrolled

INPUTS = (draw(2, 4, 4, 4), torch.tensor([1, 3]))
# Batched conditioning takes the projections of the gates out of the blocks, and nothing merges what remains: additions.
UNMERGED = LOOP.without(("gate-at-source", "merge-deltas"))
CALL = torch.ops.higher_order.invoke_subgraph


def loop(denoiser: Callable[..., Tensor], noise: Tensor, y: Tensor, count: int) -> Tensor:
    x = noise
    for i in range(count):
        x = x - 0.1 * denoiser(x, torch.full((len(x),), count - i), y)[:, :4]
    return x


def outlined(
    rows: dict[str, list[int]], depth: int = 2, passes: Pipeline = BITWISE
) -> tuple[LoopGraph, LoopGraph, int]:
    """Return the loop graph flat and outlined, and how many parts were outlined."""
    schedule = CacheSchedule.from_table(rows)
    conditions: dict[str, Any] = {"y": INPUTS[1], "count": schedule.num_evaluations}
    flat = unrolled(tiny_dit(depth), schedule, loop, INPUTS[0], conditions)
    passes.run(flat)
    graph = flat.copy()
    report = OutlineRegions().run(graph)
    check(graph, {Fact.OUTLINED})
    return flat, graph, report.rewrites


def full(count: int, depth: int = 2) -> dict[str, list[int]]:
    return {f"blocks.{i}.{name}": [1] * count for i in range(depth) for name in ("attn", "mlp")}


def bodies(graph: LoopGraph) -> list[fx.GraphModule]:
    return [child for child in graph.root.children() if isinstance(child, fx.GraphModule)]


def test_equal_blocks_of_all_evaluations_share_one_body() -> None:
    flat, graph, parts = outlined(full(4, depth=3), depth=3)
    # Head, three blocks and tail of each evaluation; the first also makes what evaluations share.
    assert parts >= 4 * 5
    blocks = [b for b in bodies(graph) if any("scaled_dot_product" in str(n.target) for n in b.graph.nodes)]
    calls = graph.graph.find_nodes(op="call_function", target=CALL)
    assert len(calls) == parts
    assert len(bodies(graph)) < parts / 2
    assert len(blocks) <= 3
    assert torch.equal(run(graph, *INPUTS)[0], run(flat, *INPUTS)[0])


def test_the_number_of_bodies_does_not_grow_with_the_evaluations() -> None:
    _, few, _ = outlined(full(3))
    _, many, _ = outlined(full(9))
    assert len(bodies(few)) == len(bodies(many))


def test_computed_skipped_and_kept_blocks_are_different_bodies_and_equal_the_flat_graph() -> None:
    rows = {
        "blocks.0.attn": [1, 0, 1, 0],
        "blocks.0.mlp": [1, 0, 1, 1],
        "blocks.1.attn": [1, 0, 1, 0],
        "blocks.1.mlp": [1, 0, 1, 1],
    }
    flat, graph, _ = outlined(rows)
    assert torch.equal(run(graph, *INPUTS)[0], run(flat, *INPUTS)[0])


def test_neighbouring_skipped_blocks_are_one_region() -> None:
    depth = 5
    rows = {f"blocks.{i}.{name}": [1, 0] for i in range(depth) for name in ("attn", "mlp")}
    flat, graph, _ = outlined(rows, depth, UNMERGED)
    light = [
        call
        for call in graph.graph.find_nodes(op="call_function", target=CALL)
        if call.meta["evaluation"] == 1 and not _has_product(graph, call)
    ]
    # Five in a row are cut into four and one.
    assert len(light) == 2
    assert torch.equal(run(graph, *INPUTS)[0], run(flat, *INPUTS)[0])


def _has_product(graph: LoopGraph, call: fx.Node) -> bool:
    body = getattr(graph.root, str(call.args[1]))
    return any("linear" in str(n.target) or "conv" in str(n.target) for n in body.graph.nodes)


def test_weights_are_operands_and_no_body_owns_any() -> None:
    _, graph, _ = outlined(full(2))
    assert all(not list(body.parameters()) and not list(body.buffers()) for body in bodies(graph))
    assert not any(n.op == "get_attr" for body in bodies(graph) for n in body.graph.nodes)


def test_structure_decides_not_the_class() -> None:
    class Other(torch.nn.Module):
        """Two blocks of different classes that do the same."""

        def __init__(self) -> None:
            super().__init__()
            self.blocks = torch.nn.ModuleList([_First(), _Second(), _First()])

        def forward(self, x: Tensor, t: Tensor) -> Tensor:
            for block in self.blocks:
                x = block(x)
            return x

    noise = draw(2, 4)
    schedule = CacheSchedule.from_table({"blocks.0.linear": [1, 1]})

    def two(denoiser: Callable[..., Tensor], x: Tensor) -> Tensor:
        return denoiser(denoiser(x, x[:, 0]), x[:, 0])

    flat = unrolled(seeded(Other()), schedule, two, noise)
    BITWISE.run(flat)
    graph = flat.copy()
    OutlineRegions().run(graph)
    assert len(bodies(graph)) == 1
    assert len(graph.graph.find_nodes(op="call_function", target=CALL)) == 6
    assert torch.equal(run(graph, noise)[0], run(flat, noise)[0])


class _First(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = torch.nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return x + torch.tanh(self.linear(x))


class _Second(_First):
    pass


def test_random_draws_stay_outside() -> None:
    schedule = CacheSchedule.from_table(full(2))

    def noisy(denoiser: Callable[..., Tensor], noise: Tensor, y: Tensor) -> Tensor:
        x = noise
        for i in range(2):
            x = x - 0.1 * denoiser(x, torch.full((len(x),), 2 - i), y)[:, :4] + 0.1 * torch.randn_like(x)
        return x

    flat = unrolled(tiny_dit(), schedule, noisy, INPUTS[0], {"y": INPUTS[1]})
    BITWISE.run(flat)
    graph = flat.copy()
    OutlineRegions().run(graph)
    assert not any("randn" in str(n.target) for body in bodies(graph) for n in body.graph.nodes)
    torch.manual_seed(5)
    wanted = run(flat, *INPUTS)[0]
    torch.manual_seed(5)
    assert torch.equal(run(graph, *INPUTS)[0], wanted)


def test_a_smaller_limit_cuts_runs_of_skipped_blocks_shorter() -> None:
    rows = {f"blocks.{i}.{name}": [1, 0] for i in range(5) for name in ("attn", "mlp")}
    schedule = CacheSchedule.from_table(rows)
    flat = unrolled(tiny_dit(5), schedule, loop, INPUTS[0], {"y": INPUTS[1], "count": 2})
    UNMERGED.run(flat)
    wide, narrow = flat.copy(), flat.copy()
    assert OutlineRegions(1).run(narrow).rewrites == OutlineRegions(8).run(wide).rewrites + 3


def test_a_block_is_cut_where_one_tensor_goes_on() -> None:
    _, graph, _ = outlined(full(2))
    attentions = [b for b in bodies(graph) if any("scaled_dot_product" in str(n.target) for n in b.graph.nodes)]
    activations = [b for b in bodies(graph) if any("gelu" in str(n.target) for n in b.graph.nodes)]
    assert attentions
    assert activations
    assert not set(attentions) & set(activations)


def test_blocks_that_all_differ_share_their_halves() -> None:
    # Attention computed or kept, times MLP computed or kept: four blocks that all differ.
    rows = {
        "blocks.0.attn": [1, 1],
        "blocks.0.mlp": [1, 1],
        "blocks.1.attn": [1, 0],
        "blocks.1.mlp": [1, 1],
        "blocks.2.attn": [1, 1],
        "blocks.2.mlp": [1, 0],
        "blocks.3.attn": [1, 0],
        "blocks.3.mlp": [1, 0],
    }
    flat, graph, _ = outlined(rows, 4, UNMERGED)
    assert torch.equal(run(graph, *INPUTS)[0], run(flat, *INPUTS)[0])
    attentions = [b for b in bodies(graph) if any("scaled_dot_product" in str(n.target) for n in b.graph.nodes)]
    # Whether the result is kept makes no other body: it is in memory anyway, so every call returns it.
    assert len(attentions) == 1


def test_sums_of_cached_values_are_regions_of_their_own() -> None:
    rows = {f"blocks.{i}.{name}": [1, 1, 0] for i in range(4) for name in ("attn", "mlp")}
    rows["blocks.1.mlp"] = rows["blocks.2.attn"] = [1, 0, 1]
    flat, graph, _ = outlined(rows, 4, LOOP.without(("contiguous-layout",)))
    heavy = [b for b in bodies(graph) if any("linear" in str(n.target) for n in b.graph.nodes)]
    computed = CacheSchedule.from_table(full(3, 4))
    uncached, _, _ = outlined({str(site): [1, 1, 1] for site in computed.sites}, 4)
    assert torch.equal(run(graph, *INPUTS)[0], run(flat, *INPUTS)[0])
    assert not torch.equal(run(flat, *INPUTS)[0], run(uncached, *INPUTS)[0])
    # Attention, MLP and the final layer: no variant for what is added to their input or kept of their output.
    assert len([b for b in heavy if any("gelu" in str(n.target) for n in b.graph.nodes)]) == 1
    assert len([b for b in heavy if any("scaled_dot_product" in str(n.target) for n in b.graph.nodes)]) == 1


def test_the_latent_of_the_previous_evaluation_is_no_cached_value() -> None:
    # The input of evaluation 1 is evaluation 0's result itself: adding to it is the block's own work.
    class Residual(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = torch.nn.ModuleList([_First()])

        def forward(self, x: Tensor, t: Tensor) -> Tensor:
            result: Tensor = self.blocks[0](x)
            return result

    def two(denoiser: Callable[..., Tensor], x: Tensor) -> Tensor:
        return denoiser(denoiser(x, x[:, 0]), x[:, 0])

    flat = unrolled(seeded(Residual()), CacheSchedule.from_table({"blocks.0.linear": [1, 1]}), two, draw(2, 4))
    BITWISE.run(flat)
    graph = flat.copy()
    OutlineRegions().run(graph)
    assert len(bodies(graph)) == 1
    assert torch.equal(run(graph, draw(2, 4))[0], run(flat, draw(2, 4))[0])


class Streams(nn.Module):
    """Two streams out of one product, one of them used later; vectors by unbind, used in several blocks."""

    def __init__(self) -> None:
        super().__init__()
        self.time = nn.Linear(1, 8)
        self.blocks = nn.ModuleList(nn.Linear(4, 4) for _ in range(2))
        self.joint = Parts()

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        first, second = self.time(t[:, None]).view(-1, 2, 4).unbind(1)
        mine, others = self.joint(x * first[:, None])
        x = x + self.blocks[0](torch.tanh(mine) * second[:, None])
        result: Tensor = x + self.blocks[1](others).mean(1, keepdim=True) * first[:, None]
        return result


class Parts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Any:  # noqa: ANN401
        return self.linear(x).split([1, 2], dim=1)


def test_regions_are_passed_tensors_only() -> None:
    def loop(denoiser: Callable[..., Tensor], x: Tensor, t: Tensor) -> Tensor:
        for i in range(3):
            x = x - 0.1 * denoiser(x, t + i)
        return x

    # Evaluation 1 makes both streams, and the second of them for evaluation 2 only.
    schedule = CacheSchedule.from_table({"joint": [1, 1, 0], "blocks.1": [1, 0, 1]})
    inputs = (draw(2, 3, 4), draw(2, seed=3))
    for passes in (BITWISE, LOOP, BITWISE.without(("plan-memory", "fold-constants"))):
        flat = unrolled(seeded(Streams()), schedule, loop, inputs[0], {"t": inputs[1]})
        passes.run(flat)
        graph = flat.copy()
        OutlineRegions().run(graph)
        for call in graph.graph.find_nodes(op="call_function", target=CALL):
            assert all(isinstance(operand.meta["val"], Tensor) for operand in call.args[2:])
        assert torch.equal(run(graph, *inputs)[0], run(flat, *inputs)[0])
