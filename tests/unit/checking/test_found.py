"""What a loop graph computes, whatever its form."""

from __future__ import annotations

import pytest
import torch
from torch import fx

from l2c_compile.passes.base import Pipeline
from l2c_compile.passes.outline_regions import OutlineRegions
from l2c_compile.passes.pipeline import BITWISE, LOOP
from tests.tiny import steps
from tests.traced_loops import traced

aten = torch.ops.aten


@pytest.mark.parametrize("passes", [Pipeline((), LOOP.assumes).without([]), BITWISE], ids=["no passes", "all passes"])
def test_a_right_graph_computes_what_the_loop_means(passes: Pipeline) -> None:
    # Without passes nothing is reused, so the loop means that only if nothing is to be.
    case = traced({"a": [1, 1, 1]} if not passes.passes else {"a": [1, 0, 1]}, passes=passes)
    assert case.found().results[0] is case.expected().results[0]


def test_another_number_is_another_value() -> None:
    case = traced()
    product = case.first(aten.mul.Tensor)
    right = case.found().values[product]
    product.args = (product.args[0], 0.5) if not isinstance(product.args[1], fx.Node) else product.args[::-1]
    assert case.found().values[product] is not right


def test_marks_and_copies_are_no_operations() -> None:
    case = traced(passes=Pipeline((), LOOP.assumes))
    made = {node.target for node, _ in case.found().made}
    assert aten.layer_norm.default in made
    assert torch.ops.l2c.site.default not in made


def test_regions_are_read_through_their_calls() -> None:
    flat, outlined = traced(), traced()
    OutlineRegions().run(outlined.graph)
    assert outlined.graph.graph.find_nodes(op="call_function", target=torch.ops.higher_order.invoke_subgraph)
    outlined.table, outlined.model = flat.table, flat.model
    outlined.graph.root.denoiser = flat.model
    for name, tensor in flat.graph.root.named_buffers(recurse=False):
        if name in outlined.graph.root._buffers:
            outlined.graph.root._buffers[name] = tensor
    assert outlined.found().results[0] is flat.found().results[0]


def test_a_folded_constant_is_what_its_recipe_says() -> None:
    case = traced(loop=steps(3))
    found = case.found()
    (folded,) = case.graph.folded
    assert found.folded.keys() == set(folded.names)
    assert all(found.folded[name] in case.expected().met for name in folded.names)
