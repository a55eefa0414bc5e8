"""What is read off a node of a graph, and how a node is made."""

from __future__ import annotations

import logging
import operator

import pytest
import torch
from torch import fx, nn

from l2c_compile.graphs.nodes import (
    arguments_of,
    draws_random_numbers,
    emit,
    evaluation_of,
    expression,
    infer,
    is_pointwise,
    num_bytes,
    output_list,
    outputs_of,
    packet_of,
    root_tensor,
    without_torchs_log,
)
from tests.tiny import draw, program

aten = torch.ops.aten


def graph_with_input(*shape: int) -> tuple[fx.Graph, fx.Node]:
    graph = fx.Graph()
    x = graph.placeholder("x")
    x.meta["val"] = torch.empty(*shape, device="meta")
    return graph, x


def call(target: object, *args: object, **kwargs: object) -> fx.Node:
    graph, x = graph_with_input(2, 4)
    return graph.call_function(target, (x, *args), kwargs)  # type: ignore[arg-type]


def test_a_node_is_made_with_what_it_returns_and_where_it_belongs() -> None:
    graph, x = graph_with_input(2, 4)
    node = emit(graph, aten.sum.dim_IntList, (x, [1]), 3, {"keepdim": True})
    assert (node.meta["val"].shape, evaluation_of(node)) == ((2, 1), 3)
    assert evaluation_of(x) is None


def test_each_of_several_outputs_gets_a_node_behind_their_source() -> None:
    graph, x = graph_with_input(2, 4)
    split = emit(graph, aten.split.Tensor, (x, 3, 1), 1)
    after = emit(graph, aten.neg.default, (x,), 1)
    outputs = outputs_of(split)
    assert [node.meta["val"].shape for node in outputs] == [(2, 3), (2, 1)]
    assert all(node.target is operator.getitem and evaluation_of(node) == 1 for node in outputs)
    assert list(graph.nodes) == [x, split, *outputs, after]


def test_what_a_node_would_return_for_other_arguments() -> None:
    _, x = graph_with_input(2, 4)
    assert infer(aten.t.default, (x,), {}).stride() == (1, 4)
    assert infer(aten.t.default, (x,), {}, lambda node: torch.empty(5, 2)).shape == (2, 5)
    with pytest.raises(RuntimeError):
        infer(aten.view.default, (x, [3, 3]), {})


@pytest.mark.parametrize(
    ("node", "draws"),
    [
        (call(aten.bernoulli.default), True),
        (call(aten.dropout.default, 0.5, True), True),
        (call(aten.dropout.default, 0.5, False), False),
        (call(aten.dropout.default, 0.0, True), False),
        (call(aten.rrelu.default, 0.1, 0.3, True), True),
        (call(aten.rrelu.default, 0.1, 0.3, False), False),
        (call(aten.neg.default), False),
        (call(operator.getitem, 0), False),
    ],
    ids=[
        "bernoulli",
        "dropout",
        "dropout outside training",
        "rate 0",
        "rrelu",
        "rrelu outside training",
        "neg",
        "getitem",
    ],
)
def test_a_node_draws_random_numbers_or_not(node: fx.Node, draws: bool) -> None:
    assert draws_random_numbers(node) is draws


def test_operators_are_known_whatever_their_overload() -> None:
    assert packet_of(call(aten.add.Scalar, 1)) is packet_of(call(aten.add.Tensor, 1)) is aten.add
    assert packet_of(call(operator.getitem, 0)) is None
    assert is_pointwise(call(aten.add.Tensor, 1))
    assert not is_pointwise(call(aten.sum.default))


def test_arguments_by_name_with_their_defaults() -> None:
    given = arguments_of(call(aten.sum.dim_IntList, [1], dtype=torch.float64))
    assert (given["dim"], given["keepdim"], given["dtype"]) == ([1], False, torch.float64)


def test_bytes_of_all_that_a_node_makes() -> None:
    graph, x = graph_with_input(2, 4)
    assert num_bytes(x) == 32
    assert num_bytes(emit(graph, aten.split.Tensor, (x, 3, 1), None)) == 32
    assert num_bytes(graph.call_function(operator.neg, (x,))) == 0


@pytest.mark.parametrize(
    ("one", "other", "equal"),
    [
        ((1.0,), (1.0,), True),
        ((1.0,), (1,), False),
        ((1,), (True,), False),
        ((0.0,), (-0.0,), False),
        (([1, 2],), ([1, 2],), True),
        (([1, 2],), ([1, 3],), False),
    ],
)
def test_two_nodes_are_one_computation_if_no_argument_can_tell_them_apart(
    one: tuple[fx.node.Argument, ...], other: tuple[fx.node.Argument, ...], equal: bool
) -> None:
    graph, x = graph_with_input(2, 4)
    first, second = (graph.call_function(aten.add.Tensor, (x, *rest)) for rest in (one, other))
    assert (expression(first) == expression(second)) is equal
    assert hash(expression(first)) is not None


def test_an_expression_may_rename_its_arguments() -> None:
    graph, x = graph_with_input(2, 4)
    y = graph.placeholder("y")
    first, second = (graph.call_function(aten.neg.default, (each,)) for each in (x, y))
    assert expression(first) != expression(second)
    assert expression(first, lambda node: "one") == expression(second, lambda node: "one")


def test_what_a_graph_returns_and_refers_to() -> None:
    x = draw(2, 4)
    graph = program(lambda x: [x + 1, x * 2], x)
    assert [node.target for node in output_list(graph.graph)] == [aten.add.Tensor, aten.mul.Tensor]  # type: ignore[union-attr]
    root = nn.Module()
    root.denoiser = nn.Linear(2, 2)
    assert root_tensor(root, fx.Graph().get_attr("denoiser.bias")) is root.denoiser.bias


def test_torchs_log_is_silent_inside_only() -> None:
    logger = logging.getLogger("torch._subclasses.fake_tensor")
    with without_torchs_log():
        assert logger.disabled
    assert not logger.disabled
