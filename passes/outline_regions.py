"""Give each part of the loop that repeats a body of its own, so that a backend compiles it once.

    n0 = layer_norm(x); f0 = linear(n0, W0); y = add(x, f0);      y = invoke_subgraph(region_0, "region_0", x, W0)
    n1 = layer_norm(y); f1 = linear(n1, W1); z = add(y, f1)   ->  z = invoke_subgraph(region_0, "region_0", y, W1)

50 evaluations of 28 blocks are 1400 copies of a handful of variants: computed or skipped, kept for later or not.
Where a part begins and ends is read from the module paths (a numbered module, as in ``blocks.3``, is a part; what
lies between is one, too), and inside it from the dataflow: where a single tensor is all that goes on, as between the
attention and the MLP of a block, it is cut in two. What is added of cached values, or summed up for later, is taken
out of either, so a block is the same two regions whatever the schedule does around it. Which parts are equal is decided
by structure alone: the same operations on the same shapes in the same order. Weights, conditions and cached values are
operands.
"""

from __future__ import annotations

import operator
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import ClassVar, cast

import torch
from torch import Tensor, fx
from torch._ops import OpOverload
from torch.fx.node import Argument, Node

from l2c_compile.analyses.kept import cache_work
from l2c_compile.graphs.facts import Fact
from l2c_compile.graphs.loop_graph import LoopGraph
from l2c_compile.graphs.nodes import (
    argument_key,
    draws_random_numbers,
    emit,
    evaluation_of,
    is_pointwise,
    module_path,
    packet_of,
)
from l2c_compile.graphs.storages import Storages
from l2c_compile.kernels.packed_linear import packed_linear_op
from l2c_compile.passes.base import LoopPass, PassReport, Reason

aten = torch.ops.aten

_SPLITS = frozenset({aten.split, aten.split_with_sizes, aten.unbind})
_HEAVY = frozenset(
    {aten.linear, aten.mm, aten.addmm, aten.bmm, aten.baddbmm, aten.matmul, aten.einsum, aten.convolution}
    | {aten.conv1d, aten.conv2d, aten.conv3d, aten.scaled_dot_product_attention}
    | {packed_linear_op._overloadpacket}
)


@dataclass(frozen=True)
class OutlineRegions(LoopPass):
    """Move repeated parts into submodules of the root, one for each distinct structure."""

    max_light_parts: int = 8
    """The most neighbouring parts without matrix products that become one region. Runs of skipped blocks have any
    length; cutting them into 8, 4, 2 and 1 keeps the regions few and the passes over memory fewer still."""

    name: ClassVar[str] = "outline-regions"
    needs: ClassVar[frozenset[Fact]] = frozenset({Fact.SITES_LOWERED, Fact.NO_DEAD_NODES})
    gives: ClassVar[frozenset[Fact]] = frozenset({Fact.OUTLINED})

    def rewrite(self, graph: LoopGraph, report: PassReport) -> None:  # noqa: D102
        early = graph.known_before_the_loop()
        _hoist_views(graph, early)
        _sink(graph.graph, early)
        forms: list[_PartForm] = []
        for part in list(self._parts(graph.graph, early, cache_work(graph.graph.nodes))):
            form = _PartForm(part)
            if form.outputs:
                forms.append(form)
            else:
                report.leave(part[0], Reason("computes nothing that anybody uses"))
        outputs: dict[object, set[int]] = {}
        for form in forms:
            outputs.setdefault(form.key, set()).update(form.outputs)
        bodies: dict[object, str] = {}
        moved: dict[Node, Node] = {}
        for form in forms:
            form.operands = [moved.get(operand, operand) for operand in form.operands]
            returned = sorted(outputs[form.key])
            if form.key not in bodies:
                bodies[form.key] = graph.new_region(form.body(returned))
            moved.update(_replace(graph.graph, form, returned, bodies[form.key]))
            report.rewrites += 1

    def _parts(self, graph: fx.Graph, early: set[Node], ahead: set[Node]) -> Iterator[list[Node]]:
        """Yield the runs of nodes to outline, in order."""
        light: list[list[Node]] = []
        for key, part in list(_neighbours(graph)):
            if key is not None and not any(packet_of(node) in _HEAVY for node in part):
                light.append(part)
                continue
            yield from self._join(light)
            light = []
            if key is not None:
                for piece in _cut(part, early | ahead):
                    yield from _separate_caches(piece, early, ahead)
        yield from self._join(light)

    def _join(self, light: list[list[Node]]) -> Iterator[list[Node]]:
        size, start = self.max_light_parts, 0
        while start < len(light):
            while size > len(light) - start:
                size //= 2
            yield [node for part in light[start : start + size] for node in part]
            start += size


@dataclass
class _PartForm:
    """A part in a form that is equal for two parts iff one body serves both."""

    nodes: list[Node]
    operands: list[Node] = field(default_factory=list)
    outputs: list[int] = field(default_factory=list)
    """The positions in ``nodes`` of the values that others use."""
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
        self.outputs = [inside[node] for node in self.nodes if any(user not in inside for user in node.users)]
        # A product is in memory anyway. So all bodies return it if one must, and returning it makes no variant.
        fused = tuple(index for index in self.outputs if packet_of(self.nodes[index]) not in _HEAVY)
        self.key = (operations, tuple(map(_operand_key, self.operands)), fused)

    def body(self, returned: Sequence[int]) -> fx.GraphModule:
        """Return the part as a function of its operands that returns the tuple of the nodes at these positions."""
        graph = fx.Graph()
        copies: dict[Node, Node] = {}
        for index, operand in enumerate(self.operands):
            copies[operand] = graph.placeholder(f"operand_{index}")
            copies[operand].meta["val"] = operand.meta["val"]
        for node in self.nodes:
            copies[node] = graph.node_copy(node, copies.__getitem__)
        results = [self.nodes[index] for index in returned]
        graph.output(tuple(copies[node] for node in results)).meta["val"] = tuple(node.meta["val"] for node in results)
        return fx.GraphModule(torch.nn.Module(), graph)


def _replace(graph: fx.Graph, form: _PartForm, returned: Sequence[int], name: str) -> dict[Node, Node]:
    """Replace a part by a call of region ``name``; return the new node of each of its outputs."""
    moved: dict[Node, Node] = {}
    with graph.inserting_after(form.nodes[-1]):
        body = graph.create_node("get_attr", name)
    with graph.inserting_after(body):
        call = graph.call_function(torch.ops.higher_order.invoke_subgraph, (body, name, *form.operands))
    results = [form.nodes[index] for index in returned]
    call.meta.update(evaluation=evaluation_of(form.nodes[0]), val=tuple(node.meta["val"] for node in results))
    after = call
    for index, (position, node) in enumerate(zip(returned, results, strict=True)):
        if position not in form.outputs:
            continue  # returned for the sake of other calls
        with graph.inserting_after(after):
            after = graph.call_function(operator.getitem, (call, index))
        after.meta = {key: node.meta[key] for key in ("val", "evaluation", "sites") if key in node.meta}
        node.replace_all_uses_with(after)
        moved[node] = after
    for node in reversed(form.nodes):
        graph.erase_node(node)
    return moved


def _hoist_views(graph: LoopGraph, early: set[Node]) -> None:
    """Move views of what was made before the loop out of the evaluations: regions then do not depend on their base."""
    storages = Storages(graph.graph.nodes)
    for node in list(graph.graph.nodes):
        if node in early and node.op == "call_function" and evaluation_of(node) is not None:
            is_view = storages.base(node) is not node
            if is_view and all(evaluation_of(source) is None for source in node.all_input_nodes):
                max(node.all_input_nodes).append(node)
                node.meta["evaluation"] = None


def _sink(graph: fx.Graph, early: set[Node]) -> None:
    """Move what is known before the loop to its first user, so that it crosses no cut.

    What is split is made into one view for each user first: a split is one node with many users in many places.
    """
    for split in list(graph.nodes):
        if packet_of(split) not in _SPLITS or split not in early or evaluation_of(split) is None:
            continue
        for getitem in list(split.users):
            with graph.inserting_before(getitem):
                piece = emit(graph, *_piece(split, cast(int, getitem.args[1])), like=getitem)
            early.add(piece)
            getitem.replace_all_uses_with(piece)
            graph.erase_node(getitem)
        graph.erase_node(split)
    for node in reversed(list(graph.nodes)):
        if node in early and node.op == "call_function" and evaluation_of(node) is not None:
            first = min(node.users)
            if evaluation_of(first) == evaluation_of(node):
                first.prepend(node)
    for node in list(graph.nodes):
        if node.target is operator.getitem:
            # One of several results stays behind what makes them all: between regions only tensors are passed.
            source = node.args[0]
            assert isinstance(source, Node)
            source.append(node)
            node.meta = {**source.meta, "val": node.meta["val"]}


def _piece(split: Node, index: int) -> tuple[OpOverload, tuple[Argument, ...]]:
    """Return the view that is one of the parts of a split."""
    source, *rest = split.args
    dim = split.kwargs.get("dim", 0)
    if packet_of(split) is aten.unbind:
        return aten.select.int, (source, *(rest or [dim]), index)
    sizes, *dims = rest
    if isinstance(sizes, int):
        low, high = index * sizes, (index + 1) * sizes
    else:
        *before, size = cast("Sequence[int]", sizes)[: index + 1]
        low, high = sum(before), sum(before) + size
    return aten.slice.Tensor, (source, *(dims or [dim]), low, high)


def _cut(part: list[Node], aside: set[Node]) -> Iterator[list[Node]]:
    """Yield the pieces of a part: a cut where one tensor goes on, and both sides have a matrix product.

    What is known before the loop, or made for later evaluations (``aside``), does not count.
    """
    evaluation = evaluation_of(part[0])
    index = {node: position for position, node in enumerate(part)}
    last_heavy = max(position for node, position in index.items() if packet_of(node) in _HEAVY)
    # A value is live from where this evaluation makes it or is given it to its last use in the evaluation.
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


def _separate_caches(piece: list[Node], early: set[Node], ahead: set[Node]) -> Iterator[list[Node]]:
    """Yield a piece in three: what first adds cached values to its input, itself, and what adds them to its output.

    Sums that are kept for later evaluations (``ahead``) are of the third. Whether cached values are added, or sums
    begun or continued, differs from call to call, and each is one pass over memory: on their own they are a few small
    regions, inside they would make variants of every large one.
    """
    evaluation = evaluation_of(piece[0])
    inside = set(piece)
    # What is made only of cached values and of what is known before the loop. What more than pointwise operators read
    # is the input of the piece.
    cached = {
        argument
        for node in piece
        for argument in node.all_input_nodes
        if argument not in inside and argument not in early and evaluation_of(argument) not in (None, evaluation)
        if all(is_pointwise(user) for user in argument.users if user in inside)
    }
    adds_cached: set[Node] = set()
    for node in piece:
        if is_pointwise(node) and not cached.isdisjoint(node.all_input_nodes):
            adds_cached.add(node)
            if all(argument in cached or argument in early for argument in node.all_input_nodes):
                cached.add(node)
    # One of several results stays with what makes them all: between regions only tensors are passed.
    after = {n for n in ahead & inside if n.target is not operator.getitem or n.args[0] in ahead}
    for node in reversed(piece):
        if node in adds_cached and all(user in after or user not in inside for user in node.users):
            after.add(node)
    before: set[Node] = set()
    for node in piece:
        inner = (a for a in node.all_input_nodes if a in inside and a not in early)
        if node in adds_cached and node not in after and before.issuperset(inner):
            before.add(node)
    for node in reversed(piece):
        if node in early and not before.isdisjoint(node.users):
            before.add(node)
    parts = (
        [node for node in piece if node in before],
        [node for node in piece if node not in before and node not in after],
        [node for node in piece if node in after],
    )
    end = piece[-1].next
    for part in parts:
        for node in part:
            end.prepend(node)
    yield from filter(None, parts)


_Key = tuple[int, str]
"""The evaluation, and the path of the module: down to its number, or one component where there is none."""


def _neighbours(graph: fx.Graph) -> Iterator[tuple[_Key | None, list[Node]]]:
    """Yield runs of nodes that belong to the same part, with its key; the key is None for nodes of no evaluation."""
    run: list[Node] = []
    current: _Key | None = None
    for node in graph.nodes:
        if node.op != "call_function":
            continue
        key = _part_key(node)
        if key is not None and current is not None and key[0] == current[0] and _joins(node, current):
            key = current
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
    path = module_path(node)
    numbered = re.match(r"(?:[^.]+\.)*?\d+(?=\.|$)", path)
    return evaluation, numbered.group() if numbered else path.partition(".")[0]


def _joins(node: Node, current: _Key) -> bool:
    """Return whether a node joins the run before it.

    One that a pass made does. One of the denoiser itself does unless the run is a numbered module.
    """
    return "nn_module_stack" not in node.meta or (not module_path(node) and not current[1][-1:].isdigit())


def _operand_key(operand: Node) -> object:
    value = operand.meta["val"]
    assert isinstance(value, Tensor)
    return tuple(value.shape), value.stride(), value.dtype, value.device
