"""Which nodes share memory, and how large it is."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, fx

from l2c_compile.graphs.storages import Storages, base_of
from tests.tiny import draw, program, run

aten = torch.ops.aten

FUNCTIONS: dict[str, Callable[[Tensor], list[Tensor]]] = {
    "views of views": lambda x: [(x + 1).t()[1:].unsqueeze(0)],
    "parts of a split": lambda x: list(torch.split(x * 2, 2, 1)),
    "several outputs of an operation": lambda x: [*torch.max(x + 1, 1)],
    "a reshape that copies, and one that does not": lambda x: [(x + 1).t().reshape(12), (x + 1).reshape(12)],
    "a contiguous copy, and one of what is contiguous": lambda x: [(x + 1).t().contiguous(), (x + 1).contiguous()],
}


COMPOSITES: dict[str, Callable[[Tensor], list[Tensor]]] = {
    "a cast to the same type": lambda x: [aten.type_as.default(aten.neg.default(x), x)],
    "a cast to another type": lambda x: [aten.type_as.default(x, aten.to.dtype(x, torch.float64))],
    "an operand, seen from elsewhere": lambda x: [aten.einsum.default("ij->ji", [aten.neg.default(x)])],
    "a product of two": lambda x: [aten.einsum.default("ij,ij->ij", [x, aten.neg.default(x)])],
    "a projection": lambda x: [aten.linear.default(aten.neg.default(x), x)],
}


@pytest.mark.parametrize("function", COMPOSITES.values(), ids=COMPOSITES)
def test_an_operator_made_of_others_may_return_its_operand(function: Callable[[Tensor], list[Tensor]]) -> None:
    x = draw(3, 4)
    graph = fx.symbolic_trace(function)
    values: dict[fx.Node, Tensor] = {}

    class Kept(fx.Interpreter):
        def run_node(self, n: fx.Node) -> object:
            value = super().run_node(n)
            if isinstance(value, Tensor):
                values[n], n.meta["val"] = value, value
            return value

    Kept(graph).run(x)
    storages = Storages(graph.graph.nodes)
    for one, first in values.items():
        assert base_of(one) is storages.base(one)
        for other, second in values.items():
            shared = first.untyped_storage().data_ptr() == second.untyped_storage().data_ptr()
            assert (storages.base(one) is storages.base(other)) == shared, (one, other)


@pytest.mark.parametrize("function", FUNCTIONS.values(), ids=FUNCTIONS)
def test_nodes_share_memory_iff_their_values_do(function: Callable[[Tensor], list[Tensor]]) -> None:
    x = draw(3, 4)
    graph = program(function, x)
    values: dict[fx.Node, Tensor] = {}

    class Kept(fx.Interpreter):
        def run_node(self, n: fx.Node) -> object:
            value = super().run_node(n)
            if isinstance(value, Tensor):
                values[n] = value
            return value

    Kept(graph.root, graph=graph.graph).run(x)
    storages = Storages(graph.graph.nodes)
    for one, first in values.items():
        assert storages.knows(one)
        for other, second in values.items():
            shared = first.untyped_storage().data_ptr() == second.untyped_storage().data_ptr()
            assert (storages.base(one) is storages.base(other)) == shared, (one, other)
    assert len(run(graph, x)) == len(function(x))


def test_a_part_is_as_large_as_the_memory_that_it_lies_in() -> None:
    graph = program(lambda x: [(x + 1)[:1].exp(), (x + 1)[:1]], draw(3, 4))
    storages = Storages(graph.graph.nodes)
    sizes = {n.target: storages.num_bytes(n) for n in graph.graph.nodes if n.op == "call_function"}
    assert sizes[aten.slice.Tensor] == 3 * 4 * 4
    assert sizes[aten.exp.default] == 1 * 4 * 4


def test_a_copy_on_another_device_has_memory_of_its_own() -> None:
    devices = (torch.device("cpu"), torch.device("meta"))
    graph = program(lambda x: [x + 1, x + 2], draw(3, 4))
    moved = []
    for add, device in zip(graph.graph.find_nodes(op="call_function", target=aten.add.Tensor), devices, strict=True):
        with graph.graph.inserting_after(add):
            moved.append(graph.graph.call_function(aten.to.device, (add, device, torch.float32)))
        moved[-1].meta["val"] = torch.empty(3, 4, device=device)
    storages = Storages(graph.graph.nodes)
    assert [storages.base(node) is node for node in moved] == [False, True]


def test_nodes_that_come_later_are_not_known() -> None:
    graph = program(lambda x: [x + 1], draw(3, 4))
    storages = Storages(graph.graph.nodes)
    (add,) = graph.graph.find_nodes(op="call_function", target=aten.add.Tensor)
    with graph.graph.inserting_after(add):
        assert not storages.knows(graph.graph.call_function(aten.neg.default, (add,)))
