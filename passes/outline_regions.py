"""Give each part of the loop that repeats a body of its own, so that a backend compiles it once.

    n0 = layer_norm(x); f0 = linear(n0, W0); y = add(x, f0);      y = invoke_subgraph(region_0, "region_0", x, W0)
    n1 = layer_norm(y); f1 = linear(n1, W1); z = add(y, f1)   ->  z = invoke_subgraph(region_0, "region_0", y, W1)

50 evaluations of 28 blocks are 1400 copies of a handful of variants: computed or skipped, kept for later or not.
Where a part begins and ends is read from the module paths (a numbered module, as in ``blocks.3``, is a part; what
lies between is one, too), and inside it from the dataflow: where a single tensor is all that goes on, as between the
attention and the MLP of a block, it is cut in two. So the variants of attention and those of the MLP add up instead
of multiplying. Which parts are equal is decided by structure alone: the same operations on the same shapes in the
same order. Weights, conditions and cached values are operands.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import ClassVar, cast

import torch
from torch import Tensor, fx
from torch.fx.node import Node

from l2c_compile.graph import (
    LoopGraph,
    ProgramGraph,
    argument_key,
    draws_random_numbers,
    emit,
    evaluation_of,
    module_path,
    packet_of,
)
from l2c_compile.liveness import cache_work
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
        early = program.known_before_the_loop()
        _sink(program.graph, early)
        aside = early | cache_work(program.graph.nodes)
        for part in list(self._parts(program.graph, aside)):
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

    def _parts(self, graph: fx.Graph, aside: set[Node]) -> Iterator[list[Node]]:
        """Yield the runs of nodes to outline, in order."""
        light: list[list[Node]] = []
        for key, part in _neighbours(graph):
            if key is not None and not any(packet_of(node) in _HEAVY for node in part):
                light.append(part)
                continue
            yield from self._join(light)
            light = []
            if key is not None:
                yield from _cut(part, aside)
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


def _sink(graph: fx.Graph, early: set[Node]) -> None:
    """Move what is known before the loop to its first user, so that it crosses no cut.

    A split is made into one slice for each user first: it is one node with many users in many places.
    """
    for split in graph.find_nodes(op="call_function", target=aten.split.Tensor):
        if split not in early or evaluation_of(split) is None:
            continue
        source, size, *dims = split.args
        assert isinstance(size, int)
        dim = dims[0] if dims else split.kwargs.get("dim", 0)
        for getitem in list(split.users):
            start = cast(int, getitem.args[1]) * size
            with graph.inserting_before(getitem):
                piece = emit(graph, aten.slice.Tensor, (source, dim, start, start + size), evaluation_of(split))
            piece.meta["nn_module_stack"] = getitem.meta.get("nn_module_stack", {})
            early.add(piece)
            getitem.replace_all_uses_with(piece)
            graph.erase_node(getitem)
        graph.erase_node(split)
    for node in reversed(list(graph.nodes)):
        if node in early and node.op == "call_function" and evaluation_of(node) is not None:
            first = min(node.users)
            if evaluation_of(first) == evaluation_of(node):
                first.prepend(node)


def _cut(part: list[Node], aside: set[Node]) -> Iterator[list[Node]]:
    """Yield the pieces of a part: a cut where one tensor goes on, and both sides have a matrix product.

    What is known before the loop, or made for later evaluations (``aside``), does not count.
    """
    evaluation = evaluation_of(part[0])
    index = {node: position for position, node in enumerate(part)}
    last_heavy = max(position for node, position in index.items() if packet_of(node) in _HEAVY)
    # Living values at each position: what this evaluation makes or is given, from there to its last use in it.
    born: dict[int, list[Node]] = {}
    dies: dict[int, list[Node]] = {}
    arguments = (argument for user in part for argument in user.all_input_nodes)
    for node in dict.fromkeys([*part, *arguments]):
        if node in aside or evaluation_of(node) not in (None, evaluation):
            continue
        last = max((index[user] for user in node.users if user in index), default=-1)
        if node in index and any(u not in index and evaluation_of(u) in (None, evaluation) for u in node.users):
            last = len(part)
        born.setdefault(index.get(node, -1), []).append(node)
        dies.setdefault(last, []).append(node)
    alive = set(born.get(-1, ()))
    piece: list[Node] = []
    is_heavy = False
    for position, node in enumerate(part):
        piece.append(node)
        is_heavy = is_heavy or packet_of(node) in _HEAVY
        alive = (alive | set(born.get(position, ()))) - set(dies.get(position, ()))
        if is_heavy and position < last_heavy and len(alive) == 1 and isinstance(next(iter(alive)).meta["val"], Tensor):
            yield piece
            piece, is_heavy = [], False
    yield piece


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
