"""Give each part of the loop that repeats a body of its own, so that a backend compiles it once.

    n0 = layer_norm(x); f0 = linear(n0, W0); y = add(x, f0);      y = invoke_subgraph(region_0, "region_0", x, W0)
    n1 = layer_norm(y); f1 = linear(n1, W1); z = add(y, f1)   ->  z = invoke_subgraph(region_0, "region_0", y, W1)

50 evaluations of 28 blocks are 1400 copies of a handful of block variants: computed or skipped, kept for later or not.
Where a part begins and ends is read from the module paths (a numbered module, as in ``blocks.3``, is a part; what lies
between is one, too). Which parts are equal is decided by structure alone: the same operations on the same shapes in
the same order. Weights, conditions and cached values are operands.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor, fx
from torch.fx.node import Node

from l2c_compile.graph import LoopGraph, ProgramGraph, argument_key, draws_random_numbers, module_path, packet_of
from l2c_compile.passes.base import Pass, PassReport
from l2c_compile.verify import Fact

__all__ = ["OutlineRegions"]

aten = torch.ops.aten

_HEAVY = frozenset(
    {aten.linear, aten.mm, aten.addmm, aten.bmm, aten.baddbmm, aten.matmul, aten.einsum, aten.convolution}
    | {aten.conv1d, aten.conv2d, aten.conv3d, aten.scaled_dot_product_attention}
)


@dataclass(frozen=True)
class OutlineRegions(Pass):
    """Move repeated parts into submodules of the root, one for each distinct structure."""

    max_light_parts: int = 8
    """How many neighbouring parts without matrix products become one region at most. Runs of skipped blocks come in
    every length; cutting them into 8, 4, 2 and 1 keeps the regions few and the passes over memory fewer still."""

    name: ClassVar[str] = "outline-regions"
    needs: ClassVar[frozenset[Fact]] = frozenset({Fact.SITES_LOWERED, Fact.NO_DEAD_NODES})
    gives: ClassVar[frozenset[Fact]] = frozenset({Fact.OUTLINED})

    def run(self, program: ProgramGraph) -> PassReport:  # noqa: D102
        assert isinstance(program, LoopGraph)
        report = PassReport()
        bodies: dict[object, str] = {}
        for part in list(self._parts(program.graph)):
            form = _Form(part)
            if not form.outputs:
                report.left_alone[part[0].name] = "computes nothing that anybody uses"
                continue
            name = bodies.get(form.key)
            if name is None:
                name = bodies[form.key] = program.new_region(form.body())
            _replace(program.graph, part, form, name)
            report.rewrites += 1
        return report

    def _parts(self, graph: fx.Graph) -> Iterator[list[Node]]:
        """Yield the runs of nodes to outline, in order."""
        light: list[list[Node]] = []
        for key, part in _neighbours(graph):
            if key is not None and not any(packet_of(node) in _HEAVY for node in part):
                light.append(part)
                continue
            yield from self._join(light)
            light = []
            if key is not None:
                yield part
        yield from self._join(light)

    def _join(self, light: list[list[Node]]) -> Iterator[list[Node]]:
        size, start = self.max_light_parts, 0
        while start < len(light):
            while size > len(light) - start:
                size //= 2
            yield [node for part in light[start : start + size] for node in part]
            start += size


@dataclass
class _Form:
    """A part in a form that is equal for two parts iff one body serves both."""

    nodes: list[Node]
    operands: list[Node] = field(default_factory=list)
    outputs: list[Node] = field(default_factory=list)
    key: object = None

    def __post_init__(self) -> None:
        inside = {node: index for index, node in enumerate(self.nodes)}
        numbers: dict[Node, int] = {}

        def number(argument: Node) -> object:
            if argument in inside:
                return "inner", inside[argument]
            if argument not in numbers:
                numbers[argument] = len(numbers)
            return "operand", numbers[argument]

        operations = tuple(
            (
                node.target,
                argument_key(node.args, number),
                tuple((name, argument_key(value, number)) for name, value in node.kwargs.items()),
            )
            for node in self.nodes
        )
        self.operands = list(numbers)
        self.outputs = [node for node in self.nodes if any(user not in inside for user in node.users)]
        self.key = (operations, tuple(map(_operand_key, self.operands)), tuple(inside[node] for node in self.outputs))

    def body(self) -> fx.GraphModule:
        """Return the part as a function of its operands that returns the tuple of its outputs."""
        graph = fx.Graph()
        copies: dict[Node, Node] = {}
        for index, operand in enumerate(self.operands):
            copies[operand] = graph.placeholder(f"operand_{index}")
            copies[operand].meta["val"] = operand.meta["val"]
        for node in self.nodes:
            copies[node] = graph.node_copy(node, copies.__getitem__)
        graph.output(tuple(copies[node] for node in self.outputs)).meta["val"] = tuple(
            node.meta["val"] for node in self.outputs
        )
        return fx.GraphModule(torch.nn.Module(), graph)


def _replace(graph: fx.Graph, part: list[Node], form: _Form, name: str) -> None:
    """Put a call of region ``name`` in the place of ``part``."""
    with graph.inserting_after(part[-1]):
        body = graph.create_node("get_attr", name)
    with graph.inserting_after(body):
        call = graph.call_function(torch.ops.higher_order.invoke_subgraph, (body, name, *form.operands))
    evaluation = part[0].meta.get("evaluation")
    call.meta.update(evaluation=evaluation, val=tuple(node.meta["val"] for node in form.outputs))
    after = call
    for index, output in enumerate(form.outputs):
        with graph.inserting_after(after):
            after = graph.call_function(operator.getitem, (call, index))
        after.meta = {key: output.meta[key] for key in ("val", "evaluation", "sites") if key in output.meta}
        output.replace_all_uses_with(after)
    for node in reversed(part):
        graph.erase_node(node)


_Key = tuple[int, str]


def _neighbours(graph: fx.Graph) -> Iterator[tuple[_Key | None, list[Node]]]:
    """Yield runs of nodes that belong to the same part, with (evaluation, numbered module); None: to no evaluation."""
    run: list[Node] = []
    current: _Key | None = None
    for node in graph.nodes:
        if node.op != "call_function":
            continue
        key = _part_key(node)
        if key is not None and current is not None and "nn_module_stack" not in node.meta and key[0] == current[0]:
            key = current  # made by a pass, between the nodes of a module
        if run and key != current:
            yield current, run
            run = []
        current = key
        run.append(node)
    if run:
        yield current, run


def _part_key(node: Node) -> _Key | None:
    evaluation = node.meta.get("evaluation")
    if evaluation is None or draws_random_numbers(node):
        return None
    numbered: list[str] = []
    for name in module_path(node).split("."):
        numbered.append(name)
        if name.isdigit():
            return evaluation, ".".join(numbered)
    return evaluation, ""


def _operand_key(operand: Node) -> object:
    value = operand.meta["val"]
    assert isinstance(value, Tensor)
    return tuple(value.shape), value.stride(), value.dtype, value.device
