"""What becomes of a graph where a rewrite changes strides."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, fx

from l2c_compile.graphs.loop_graph import ProgramGraph
from l2c_compile.graphs.strides import addresses_memory, follow, permutation, relaid, same_strides
from tests.tiny import draw, program, same_bits, targets

aten = torch.ops.aten


def node_of(graph: ProgramGraph, target: object) -> fx.Node:
    node: fx.Node = next(node for node in graph.graph.nodes if node.target is target)
    return node


def turned(value: Tensor) -> Tensor:
    """Return a tensor of the same shape whose elements lie in another order."""
    return value.transpose(-1, -2).contiguous().transpose(-1, -2)


def make_turned(graph: ProgramGraph, target: object) -> fx.Node:
    """Let what ``target`` makes lie in another order, as a kernel might leave it."""
    node = node_of(graph, target)
    with graph.graph.inserting_after(node):
        other: fx.Node = graph.graph.call_function(turned, (node,))
    node.replace_all_uses_with(other, delete_user_cb=lambda user: user is not other)
    other.meta["val"] = turned(node.meta["val"])
    return other


def run_checked(graph: ProgramGraph, *inputs: Tensor) -> list[Tensor]:
    class Checked(fx.Interpreter):
        def run_node(self, n: fx.Node) -> object:
            value = super().run_node(n)
            if n.op == "call_function":
                assert value.stride() == n.meta["val"].stride(), n.format_node()
            return value

    return list(Checked(graph.root, graph=graph.graph).run(*inputs))


def test_strides_are_followed_to_the_results_which_keep_theirs() -> None:
    def function(x: Tensor) -> list[Tensor]:
        y = torch.tanh(x)
        return [y * 2, y.view(12).exp()]

    x = draw(3, 4)
    graph = program(function, x)
    other = make_turned(graph, aten.tanh.default)
    follow(graph.graph, [other])
    # A view of what lies in another order is no view any more.
    assert "reshape.default" in targets(graph)
    assert "view.default" not in targets(graph)
    assert same_bits(run_checked(graph, x), function(x))


def test_what_the_graph_returns_may_follow_too() -> None:
    graph = program(lambda x: [torch.tanh(x) * 2], draw(3, 4))
    follow(graph.graph, [make_turned(graph, aten.tanh.default)], restore_results=False)
    assert run_checked(graph, draw(3, 4))[0].stride() == (1, 3)


def test_a_new_layout_is_foretold_node_by_node() -> None:
    graph = program(lambda x: [(torch.tanh(x) * 2).sum(0)], draw(3, 4))
    tanh, mul = node_of(graph, aten.tanh.default), node_of(graph, aten.mul.Tensor)
    values = relaid({tanh: turned(tanh.meta["val"])})
    assert values is not None
    assert {node: value.stride() for node, value in values.items()} == {tanh: (1, 3), mul: (1, 3)}
    assert relaid({tanh: turned(tanh.meta["val"])}, without=[mul]).keys() == {tanh}  # type: ignore[union-attr]


@pytest.mark.parametrize(
    "function",
    [
        lambda x: [torch.tanh(x)],
        lambda x: [torch.tanh(x).view(12).sum()],
        lambda x: [torch.as_strided(torch.tanh(x), (2,), (4,)).sum()],
    ],
    ids=["returned", "viewed", "addressed"],
)
def test_a_layout_that_cannot_change_is_refused(function: object) -> None:
    graph = program(function, draw(3, 4))  # type: ignore[arg-type]
    tanh = node_of(graph, aten.tanh.default)
    assert relaid({tanh: turned(tanh.meta["val"])}) is None


def test_a_node_that_addresses_memory_is_found() -> None:
    addressed = program(lambda x: [torch.as_strided(x + 1, (2,), (4,))], draw(3, 4))
    assert addresses_memory(addressed.graph) is node_of(addressed, aten.as_strided.default)
    assert addresses_memory(program(lambda x: [x + 1], draw(3, 4)).graph) is None


def test_two_nodes_have_the_same_strides_or_not() -> None:
    graph = program(lambda x: [x + 1, (x * 2).t().exp(), x - 3], draw(3, 3))
    add, exp, sub = (node_of(graph, t) for t in (aten.add.Tensor, aten.exp.default, aten.sub.Tensor))
    assert same_strides(add, sub)
    assert not same_strides(add, exp)


def test_the_order_in_memory_of_a_value_without_gaps() -> None:
    value = torch.empty(2, 3, 4)
    assert permutation(value) == [0, 1, 2]
    assert permutation(value.permute(2, 0, 1)) == [1, 2, 0]
    assert permutation(value[:, :2]) is None
    assert permutation(value[:, :1].expand(2, 3, 4)) is None
