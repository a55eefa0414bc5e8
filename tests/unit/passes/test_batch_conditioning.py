"""batch-conditioning: what needs no latent is computed for all evaluations at once."""

from __future__ import annotations

import operator

import pytest
import torch

from l2c_compile.passes.batch_conditioning import BatchConditioning
from l2c_compile.passes.drop_dead import DropDead
from l2c_compile.passes.merge_common import MergeCommon
from l2c_compile.passes.prune_projections import PruneProjections
from tests.dit_loops import DIM, INPUTS, ROWS, close, loop_graph, projections
from tests.tiny import assert_strides_as_noted, run

aten = torch.ops.aten


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
        assert set(report.reasons()) == {"no other evaluation projects with these weights"}
        (left,) = report.left_alone.values()
        assert (left.count, left.evaluation) == (4 * 3, 0)


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


def test_batched_vectors_have_other_strides_and_the_graph_says_so() -> None:
    rows = {site: [1] * 4 for site in ROWS}
    graph = loop_graph(rows)
    assert BatchConditioning().run(graph).rewrites > 0
    DropDead().run(graph)
    assert_strides_as_noted(graph, *INPUTS)
