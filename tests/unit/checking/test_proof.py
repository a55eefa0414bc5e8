"""The proof holds for graphs that are right, and says where others are wrong."""

from __future__ import annotations

import json

import pytest
import torch
from torch import Tensor, fx

from bench.trust.programs.rules import Combination, FollowInput
from l2c_compile import CacheSchedule
from l2c_compile.checking.proof import Proof, prove
from l2c_compile.compile import graph_of, trace_and_capture
from l2c_compile.frontend.stand_in import Loop
from l2c_compile.graphs.facts import Fact
from l2c_compile.graphs.loop_graph import LoopGraph
from l2c_compile.graphs.skeleton import LoopSkeleton
from l2c_compile.loops import DDIM, Guidance
from l2c_compile.passes.base import Pipeline
from l2c_compile.passes.outline_regions import OutlineRegions
from l2c_compile.passes.pipeline import BITWISE, LOOP
from tests.tiny import calls_in, draw, residual, steps, tiny_dit

aten = torch.ops.aten


MODEL = tiny_dit()


def built(pipeline: Pipeline, count: int = 4, loop: Loop | None = None) -> tuple[LoopGraph, LoopSkeleton, Proof]:
    row = [1, 0] * (count // 2)
    table = {"blocks.*.attn": row, "blocks.*.mlp": row}
    schedule = CacheSchedule.from_table(table).resolve([path for path, _ in MODEL.named_modules()])
    loop = loop or DDIM(count, guidance=Guidance(2.0, null={"y": 5}))
    noise, conditions = draw(1, 4, 4, 4), {"y": torch.tensor([1])}
    skeleton = trace_and_capture(MODEL, loop, schedule, noise, conditions)
    graph, _ = graph_of(skeleton, MODEL, schedule, pipeline)
    return graph, skeleton, prove(graph, skeleton, MODEL, exact=pipeline.is_bitwise, facts=pipeline.facts)


@pytest.mark.parametrize("pipeline", [BITWISE, LOOP], ids=["bitwise", "rounding"])
def test_the_proof_counts_what_it_proved(pipeline: Pipeline) -> None:
    _, _, proof = built(pipeline)
    assert proof.holds, str(proof)
    assert proof.exact is pipeline.is_bitwise
    assert (proof.num_evaluations, proof.num_computed_sites, proof.num_reads) == (4, 8, 8)
    assert proof.num_kept > 0
    assert "8 site values computed, 8 read from the cache" in str(proof)
    assert json.loads(json.dumps(proof.to_dict()))["holds"]


@pytest.mark.parametrize("pipeline", [BITWISE, LOOP], ids=["bitwise", "rounding"])
def test_after_every_single_pass_the_graph_is_proven(pipeline: Pipeline) -> None:
    """Not only after all of them: what one breaks, a later one could hide."""
    graph, skeleton, _ = built(Pipeline((), LOOP.assumes))
    for count, each in enumerate(pipeline.passes, start=1):
        each.run(graph)
        facts = Pipeline(pipeline.passes[:count], pipeline.assumes).facts
        proof = prove(graph, skeleton, MODEL, exact=pipeline.is_bitwise, facts=facts)
        # Until drop-dead has run, what it will remove is still there.
        wrong = [f for f in proof.findings if f.check != "work" or Fact.NO_DEAD_NODES in facts]
        assert wrong == [], (each.name, str(proof))


def test_a_pass_that_rounds_is_not_proven_bit_for_bit() -> None:
    graph, skeleton, _ = built(LOOP)
    proof = prove(graph, skeleton, graph.root.get_submodule("denoiser"), exact=True)
    assert {finding.check for finding in proof.findings} >= {"values"}
    assert "structure not proven bit for bit" in str(proof)


@pytest.mark.parametrize("pipeline", [BITWISE, LOOP], ids=["bitwise", "rounding"])
def test_regions_are_read_through_their_calls(pipeline: Pipeline) -> None:
    graph, skeleton, _ = built(pipeline)
    OutlineRegions().run(graph)
    calls = graph.graph.find_nodes(op="call_function", target=torch.ops.higher_order.invoke_subgraph)
    assert calls
    denoiser = graph.root.get_submodule("denoiser")
    assert prove(graph, skeleton, denoiser, exact=pipeline.is_bitwise).holds
    bodies = [child for child in graph.root.children() if isinstance(child, fx.GraphModule)]
    product = next(n for body in bodies for n in body.graph.nodes if n.target is aten.linear.default)
    product.args = (product.args[0], product.args[1])
    assert "values" in {f.check for f in prove(graph, skeleton, denoiser, exact=pipeline.is_bitwise).findings}


@pytest.mark.parametrize("site", ["a", "delta(a)"])
@pytest.mark.parametrize("rule", [Combination((2.0, -1.0)), FollowInput()])
def test_rules_and_changes_are_followed(site: str, rule: Combination | FollowInput) -> None:
    schedule = CacheSchedule.from_table({site: [1, 1, 0, 1, 0]}, rule=rule)
    model = residual()
    skeleton = trace_and_capture(model, steps(5), schedule, draw(3, 4), {})
    graph, _ = graph_of(skeleton, model, schedule)
    proof = prove(graph, skeleton, model, exact=True)
    assert proof.holds, str(proof)
    assert proof.num_reads == 2
    other = CacheSchedule.from_table({site: [1, 1, 0, 1, 1]}, rule=rule)
    graph.schedule = other
    assert {f.check for f in prove(graph, skeleton, model, exact=True).findings} >= {"values"}


def test_250_evaluations_take_work_linear_in_them() -> None:
    model = residual()

    def function_calls(count: int) -> int:
        schedule = CacheSchedule.from_table({"a": [1, 0] * (count // 2), "b": [1, 1] + [1, 0] * (count // 2 - 1)})
        skeleton = trace_and_capture(model, steps(count), schedule, draw(3, 4), {})
        graph, _ = graph_of(skeleton, model, schedule)
        proofs: list[Proof] = []
        calls = calls_in(lambda: proofs.append(prove(graph, skeleton, model, exact=True)))
        assert proofs[0].holds, str(proofs[0])
        return calls

    # Calls, not seconds: those depend on what else the machine does. Five times the evaluations.
    assert function_calls(250) < 6 * function_calls(50)


def test_a_chain_of_additions_over_all_evaluations_is_followed() -> None:
    def loop(denoiser: Loop, noise: Tensor, y: Tensor) -> Tensor:
        x = noise
        for i in range(4):
            x = x + denoiser(x, torch.full((1,), 4.0 - i), y)[:, :4]  # type: ignore[index]
        return x

    _, _, proof = built(LOOP, loop=loop)
    assert proof.holds, str(proof)
