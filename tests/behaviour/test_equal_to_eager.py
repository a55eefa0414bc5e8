"""Every built-in loop, with every kind of guidance, compiled: equal to the plain loop and the reference bit for bit."""

from __future__ import annotations

import random

import pytest
import torch
from torch import Tensor, nn

from l2c_compile import CacheSchedule
from l2c_compile.loops import DDIM, BuiltInLoop, DPMSolver, FlowEuler, Guidance
from tests.tiny import check_equals_reference, draw, tiny_dit, tiny_uvit

BATCHED = Guidance(2.5, {"y": 5})
GUIDANCES = {
    "none": None,
    "batched": BATCHED,
    "unbatched": Guidance(2.5, {"y": 5}, batched=False),
    "batched-3-channels": Guidance(2.5, {"y": 5}, channels=3),
    "unbatched-from-cond": Guidance(0.5, {"y": 5}, batched=False, channels=3, base="cond"),
}
LOOPS: dict[str, BuiltInLoop] = {
    **{f"ddim-eta-{eta:g}": DDIM(4, eta=eta) for eta in (0.0, 1.0)},
    **{
        f"{algorithm}-singlestep-{order}-{spacing}": DPMSolver(4, order=order, algorithm=algorithm, spacing=spacing)
        for algorithm in ("dpmsolver", "dpmsolver++")
        for order in (1, 2, 3)
        for spacing in ("time", "log_snr")
    },
    **{
        f"{algorithm}-multistep-{order}-{final}": DPMSolver(
            4, order=order, method="multistep", algorithm=algorithm, lower_order_final=final
        )
        for algorithm in ("dpmsolver", "dpmsolver++")
        for order in (1, 2)
        for final in (False, True)
    },
    "flow-euler": FlowEuler(4, shift=3.0),
}
QUICK = ("ddim-eta-1", "dpmsolver-singlestep-3-time", "dpmsolver++-multistep-2-True", "flow-euler")
SLOW = pytest.mark.slow(reason="every loop is taken without guidance, and every guidance with four loops")
DIT_CASES = [
    pytest.param(loop, g, id=f"{name}-{guided}", marks=() if guided == "none" or name in QUICK else SLOW)
    for name, loop in LOOPS.items()
    for guided, g in GUIDANCES.items()
]
DIT_SITES = ("blocks.0.attn", "blocks.0.mlp", "blocks.1.attn", "blocks.1.mlp")
GETITEM = "<built-in function getitem>"
UVIT_SITES = ("in_blocks.0.attn", "in_blocks.0.mlp", "mid_block.attn", "mid_block.mlp", "out_blocks.0.attn")


@pytest.fixture(scope="module")
def dit() -> nn.Module:
    return tiny_dit()


@pytest.fixture(scope="module")
def uvit() -> nn.Module:
    return tiny_uvit()


def with_guidance(loop: BuiltInLoop, guidance: Guidance | None) -> BuiltInLoop:
    return type(loop).from_dict({**loop.to_dict(), "guidance": guidance})


def inputs() -> tuple[Tensor, Tensor]:
    return draw(2, 4, 4, 4), torch.tensor([1, 3])


def random_schedule(loop: BuiltInLoop, sites: tuple[str, ...], seed: int) -> CacheSchedule:
    branches = 2 if loop.num_evaluations == 2 * len(loop.network_timesteps) else 1
    rng = random.Random(seed)
    table = {s: [int(e < branches or rng.random() < 0.5) for e in range(loop.num_evaluations)] for s in sites}
    return CacheSchedule.from_table(table, branches=branches)


@pytest.mark.parametrize(("loop", "guidance"), DIT_CASES)
def test_a_dit_that_computes_everything_equals_the_plain_loop(
    dit: nn.Module, loop: BuiltInLoop, guidance: Guidance
) -> None:
    guided = with_guidance(loop, guidance)
    noise, labels = inputs()
    check_equals_reference(dit, CacheSchedule.all_compute(guided.num_evaluations, DIT_SITES), guided, noise, y=labels)


UVIT_LOOPS = [pytest.param(loop, id=name, marks=() if name in QUICK else SLOW) for name, loop in LOOPS.items()]


@pytest.mark.parametrize("loop", UVIT_LOOPS)
@pytest.mark.parametrize("guided", ["none", "batched", "unbatched"])
def test_a_uvit_that_computes_everything_equals_the_plain_loop(uvit: nn.Module, loop: BuiltInLoop, guided: str) -> None:
    loop = with_guidance(loop, GUIDANCES[guided])
    noise, labels = inputs()
    check_equals_reference(uvit, CacheSchedule.all_compute(loop.num_evaluations, UVIT_SITES), loop, noise, y=labels)


@pytest.mark.parametrize("name", ["ddim-eta-1", "dpmsolver++-singlestep-3-time", "dpmsolver-multistep-2-True"])
@pytest.mark.parametrize("guided", ["none", "batched", "unbatched"])
@pytest.mark.parametrize("seed", [0, 1])
def test_a_dit_with_a_schedule_equals_the_reference(dit: nn.Module, name: str, guided: str, seed: int) -> None:
    loop = with_guidance(LOOPS[name], GUIDANCES[guided])
    noise, labels = inputs()
    check_equals_reference(dit, random_schedule(loop, DIT_SITES, seed), loop, noise, y=labels)


@pytest.mark.parametrize("name", ["ddim-eta-1", "dpmsolver-singlestep-2-time", "flow-euler"])
@pytest.mark.parametrize("guided", ["none", "batched", "unbatched"])
def test_a_uvit_with_a_schedule_equals_the_reference(uvit: nn.Module, name: str, guided: str) -> None:
    loop = with_guidance(LOOPS[name], GUIDANCES[guided])
    noise, labels = inputs()
    check_equals_reference(uvit, random_schedule(loop, UVIT_SITES, 2), loop, noise, y=labels)


def test_a_bfloat16_dit_equals_the_reference() -> None:
    loop = DDIM(3, guidance=BATCHED)
    noise, labels = inputs()
    schedule = random_schedule(loop, DIT_SITES, 3)
    check_equals_reference(tiny_dit().bfloat16(), schedule, loop, noise.bfloat16(), y=labels)


def test_no_node_that_feeds_only_skipped_sites_survives(dit: nn.Module) -> None:
    loop = DDIM(2)
    noise, labels = inputs()
    table = {site: [1, int("blocks.1" in site)] for site in DIT_SITES}
    sampler = check_equals_reference(dit, CacheSchedule.from_table(table), loop, noise, y=labels)
    nodes = [n for n in sampler.graph_module.graph.nodes if n.meta.get("evaluation") == 1]
    norms = [n for n in nodes if "layer_norm" in str(n.target)]
    # Left: two of block 1, one of the final layer. Each block that runs has three products a sublayer.
    assert len(norms) == 3
    skipped = [n for n in nodes if any(path.endswith("blocks.0") or "blocks.0." in path for path in paths(n))]
    # Of the skipped block two gated additions and its six-fold modulation, of which shift and scale are not read.
    kinds = sorted(str(n.target).removeprefix("aten.").split(".")[0] for n in skipped)
    assert set(kinds) <= {
        "add",
        "mul",
        "linear",
        "silu",
        "unsqueeze",
        "split",
        "getitem",
        "<built-in function getitem>",
    }
    assert kinds.count("add") == 2
    assert kinds.count("mul") == 2
    gates = [n for n in skipped if str(n.target) == GETITEM]
    assert all(n.args[1] in (2, 5) for n in gates)


def paths(node: torch.fx.Node) -> list[str]:
    return [str(path) for path, _ in (node.meta.get("nn_module_stack") or {}).values()]
