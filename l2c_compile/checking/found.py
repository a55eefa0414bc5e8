"""What a loop graph computes: the expression of every node."""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
from torch import fx
from torch._ops import OpOverload
from torch.fx.node import Node

from l2c_compile.checking.operators import on_values
from l2c_compile.checking.values import Leaves, Value, ValueTable, values_in
from l2c_compile.graphs.forms import TensorForm
from l2c_compile.graphs.loop_graph import LoopGraph
from l2c_compile.graphs.nodes import draws_random_numbers, evaluation_of, module_path, output_list, root_tensor


class FoundValues:
    """The expressions of a loop graph, node by node."""

    def __init__(self, graph: LoopGraph, table: ValueTable, leaves: Leaves) -> None:
        self.table = table
        self.leaves = leaves
        self.root = graph.root
        self.values: dict[Node, Any] = {}
        """The value of each node; a tuple of values for the call of a region."""
        self.made: list[tuple[Node, Value]] = []
        """Every operation in order, those inside regions included, without those that only return an argument."""
        self.draws: list[Value] = []
        self.folded: dict[str, Value] = {}
        for each in graph.folded:
            (outputs,) = each.recipe.output_node().args
            made = self._interpret(each.recipe, ())
            assert isinstance(outputs, tuple)
            self.folded.update(zip(each.names, (made[output] for output in outputs), strict=True))  # type: ignore[index]
        self.made.clear()
        inputs = [
            table.leaf("input", number, TensorForm.of(node.meta["val"]))
            for number, node in enumerate(graph.graph.find_nodes(op="placeholder"))
        ]
        self.values = self._interpret(graph.graph, inputs)
        self.results = [self.values[r] if isinstance(r, Node) else r for r in output_list(graph.graph)]

    def _interpret(self, graph: fx.Graph, inputs: Sequence[Value]) -> dict[Node, Any]:
        values: dict[Node, Any] = {}
        given = iter(inputs)
        for node in graph.nodes:
            self.table.place = (evaluation_of(node), module_path(node))
            if node.op == "placeholder":
                values[node] = next(given)
            elif node.op == "get_attr":
                values[node] = self._attribute(node)
            elif node.op == "call_function":
                values[node] = self._operation(node, values)
        return values

    def _attribute(self, node: Node) -> object:
        name = str(node.target)
        if name in self.folded:
            return self.folded[name]
        region = self.root._modules.get(name)
        return region if region is not None else self.leaves.of(root_tensor(self.root, node))

    def _operation(self, node: Node, values: Mapping[Node, Any]) -> object:
        args, kwargs = on_values(node, values)
        if node.target is torch.ops.higher_order.invoke_subgraph:
            region, _, *operands = args
            assert isinstance(region, fx.GraphModule)
            inner = self._interpret(region.graph, cast("list[Value]", operands))
            (outputs,) = region.graph.output_node().args
            return tuple(inner[output] for output in cast("tuple[Node, ...]", outputs))
        if node.target is operator.getitem and isinstance(args[0], tuple):
            return args[0][cast(int, args[1])]
        if draws_random_numbers(node):
            self.draws.append(self.table.draw(len(self.draws), cast(OpOverload, node.target), args, kwargs))
            return self.draws[-1]
        value = self.table.call(node.target, args, kwargs)
        # A node that only passes its argument on, such as a mark, a held value or a copy, computes nothing.
        if not any(operand is value for operand in values_in(args)):
            self.made.append((node, value))
        return value
