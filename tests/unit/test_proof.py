"""The structural proof and its normal forms: what counts as equal, what does not, and what the report says."""

from __future__ import annotations

import json
import operator
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, fx

from bench.trust.programs.rules import Combination, FollowInput
from l2c_compile import CacheSchedule
from l2c_compile.checking.proof import Proof, prove
from l2c_compile.checking.values import Value, ValueTable
from l2c_compile.compile import build_loop_graph, trace_and_capture
from l2c_compile.errors import VerificationError
from l2c_compile.frontend.stand_in import Loop
from l2c_compile.graphs.facts import Fact
from l2c_compile.graphs.forms import Form
from l2c_compile.graphs.loop_graph import LoopGraph
from l2c_compile.graphs.skeleton import LoopSkeleton
from l2c_compile.loops import DDIM, Guidance
from l2c_compile.passes.base import Pipeline
from l2c_compile.passes.outline_regions import OutlineRegions
from l2c_compile.passes.pipeline import BITWISE, LOOP
from tests.tiny import calls_in, captured_once, draw, residual, steps, tiny_dit

aten = torch.ops.aten


def table_with(*shapes: tuple[int, ...], exact: bool) -> tuple[ValueTable, list[Value]]:
    table = ValueTable(exact=exact)
    return table, [table.leaf("input", i, Form.of(torch.empty(shape))) for i, shape in enumerate(shapes)]


@pytest.mark.parametrize("exact", [True, False])
def test_equal_expressions_are_one_object(exact: bool) -> None:
    table, (x, y) = table_with((2, 4), (2, 4), exact=exact)
    assert table.call(aten.mul.Tensor, (x, y), {}) is table.call(aten.mul.Tensor, (x,), {"other": y})
    assert table.call(aten.mul.Tensor, (x, y), {}) is not table.call(aten.mul.Tensor, (y, x), {})
    assert table.call(aten.mul.Tensor, (x, 1), {}) is not table.call(aten.mul.Tensor, (x, 1.0), {})
    assert table.call(aten.mul.Tensor, (x, 0.0), {}) is not table.call(aten.mul.Tensor, (x, -0.0), {})


@pytest.mark.parametrize("exact", [True, False])
def test_what_changes_nothing_is_its_argument(exact: bool) -> None:
    table, (x,) = table_with((2, 4), exact=exact)
    assert table.call(aten.clone.default, (x,), {}) is x
    assert table.call(aten.view.default, (x, [2, 4]), {}) is x
    assert table.call(aten.dropout.default, (x, 0.5, False), {}) is x
    assert table.call(aten.dropout.default, (x, 0.5, True), {}) is not x
    assert table.call(aten.slice.Tensor, (x, 1, 0, 99), {}) is x
    assert table.call(aten._to_copy.default, (x,), {"dtype": torch.float64}) is not x


@pytest.mark.parametrize("exact", [True, False])
def test_a_square_transposed_is_another_value(exact: bool) -> None:
    table, (x,) = table_with((4, 4), exact=exact)
    assert table.call(aten.t.default, (x,), {}) is not x


@pytest.mark.parametrize("exact", [True, False])
def test_parts_of_a_split_are_slices_and_slices_of_slices_are_slices(exact: bool) -> None:
    table, (x,) = table_with((2, 12), exact=exact)
    parts = table.call(aten.split.Tensor, (x, 4, -1), {})
    second = table.call(torch.ops.aten.slice.Tensor, (x, 1, 4, 8), {})
    assert table.call(operator.getitem, (parts, 1), {}) is second
    assert table.call(operator.getitem, (parts, 2), {}) is not second
    wider = table.call(aten.slice.Tensor, (x, 1, 2, 10), {})
    assert table.call(aten.slice.Tensor, (wider, 1, 2, 6), {}) is second


def test_layout_counts_bit_for_bit_but_not_for_correctly_rounded_arithmetic() -> None:
    table, (x, y) = table_with((2, 8), (2, 4), exact=True)
    half = table.call(aten.slice.Tensor, (x, 1, 0, 4), {})
    copy = table.call(aten.clone.default, (half,), {})
    assert copy is not half
    assert table.call(aten.gelu.default, (copy,), {}) is not table.call(aten.gelu.default, (half,), {})
    assert table.call(aten.mul.Tensor, (copy, y), {}) is table.call(aten.mul.Tensor, (half, y), {})
    table, (x, y) = table_with((2, 8), (2, 4), exact=False)
    half = table.call(aten.slice.Tensor, (x, 1, 0, 4), {})
    assert table.call(aten.clone.default, (half,), {}) is half


def test_additions_are_multisets_up_to_rounding_only() -> None:
    def orders(exact: bool) -> tuple[Value, Value, Value]:
        table, (x, y, z) = table_with((2, 4), (2, 4), (2, 4), exact=exact)

        def add(a: Value, b: Value) -> Value:
            return table.call(aten.add.Tensor, (a, b), {})

        return add(add(x, y), z), add(x, add(z, y)), add(add(add(x, y), z), z)

    one, other, twice = orders(exact=False)
    assert one is other
    assert one is not twice
    one, other, _ = orders(exact=True)
    assert one is not other


def test_a_sum_that_is_broadcast_is_one_term() -> None:
    table, (x, a, b) = table_with((2, 4), (4,), (4,), exact=False)
    outer = table.call(aten.add.Tensor, (x, table.call(aten.add.Tensor, (a, b), {})), {})
    assert outer is not table.call(aten.add.Tensor, (table.call(aten.add.Tensor, (x, a), {}), b), {})


def test_batched_and_pruned_projections_are_resolved_up_to_rounding() -> None:
    table, (c, d, weight, bias) = table_with((2, 3), (2, 3), (8, 3), (8,), exact=False)
    one = table.call(aten.linear.default, (d, weight, bias), {})
    batch = table.call(aten.linear.default, (table.call(aten.cat.default, ([c, d],), {}), weight, bias), {})
    assert table.call(aten.slice.Tensor, (batch, 0, 2, 4), {}) is one
    assert table.call(aten.slice.Tensor, (batch, 0, 0, 2), {}) is not one
    assert table.call(aten.slice.Tensor, (batch, 0, 1, 3), {}) is not one
    rows = [table.call(aten.slice.Tensor, (p, 0, 4, 8), {}) for p in (weight, bias)]
    pruned = table.call(aten.linear.default, (d, *rows), {})
    unsqueezed = table.call(aten.unsqueeze.default, (one, 1), {})
    assert table.call(aten.slice.Tensor, (unsqueezed, -1, 4, 8), {}) is table.call(
        aten.unsqueeze.default, (pruned, 1), {}
    )
    assert table.call(aten.slice.Tensor, (one, -1, 3, 7), {}) is not pruned


def test_operands_that_do_not_fit_are_an_error_of_ours() -> None:
    table, (x, y) = table_with((2, 4), (3, 5), exact=True)
    with pytest.raises(VerificationError, match=r"add\.Tensor does not take"):
        table.call(aten.add.Tensor, (x, y), {})


@pytest.fixture(scope="module", autouse=True)
def captures() -> Iterator[None]:
    with captured_once():
        yield


MODEL = tiny_dit()


def built(pipeline: Pipeline, count: int = 4, loop: Loop | None = None) -> tuple[LoopGraph, LoopSkeleton, Proof]:
    row = [1, 0] * (count // 2)
    table = {"blocks.*.attn": row, "blocks.*.mlp": row}
    schedule = CacheSchedule.from_table(table).resolve([path for path, _ in MODEL.named_modules()])
    loop = loop or DDIM(count, guidance=Guidance(2.0, null={"y": 5}))
    noise, conditions = draw(1, 4, 4, 4), {"y": torch.tensor([1])}
    graph, _ = build_loop_graph(MODEL, loop, schedule, noise, conditions, pipeline)
    skeleton = trace_and_capture(MODEL, loop, schedule, noise, conditions)
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
    graph, _ = build_loop_graph(model, steps(5), schedule, draw(3, 4), {})
    skeleton = trace_and_capture(model, steps(5), schedule, draw(3, 4), {})
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
        graph, _ = build_loop_graph(model, steps(count), schedule, draw(3, 4), {})
        skeleton = trace_and_capture(model, steps(count), schedule, draw(3, 4), {})
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
