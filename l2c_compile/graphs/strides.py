"""Follow the strides through a graph where a rewrite changes some.

Backends compile for the strides that nodes note, and how kernels round depends on strides. So a value that takes the
place of another one either has its strides, or all that is computed from it is noted anew (``follow``).
"""

from __future__ import annotations

import heapq
from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor, fx
from torch.fx.node import Node

from l2c_compile.graphs.forms import form_of
from l2c_compile.graphs.nodes import argument_key, emit, infer, output_list, packet_of

aten = torch.ops.aten


def relaid(changed: Mapping[Node, Any], without: Collection[Node] = ()) -> dict[Node, Any] | None:
    """Return the values of all nodes once some nodes make tensors of the same shape in another memory layout.

    Args:
        changed: the new fake values of these nodes.
        without: the users that will be gone.

    Returns:
        The new fake value of every node whose value changes, those of ``changed`` included; None if an operation does
        not take the new layout (a view of it is no view any more) or the graph would return another one.
    """
    values = dict(changed)
    waiting = [user for node in changed for user in node.users]
    heapq.heapify(waiting)
    known: Node | None = None
    while waiting:
        node = heapq.heappop(waiting)
        if node is known or node in values or node in without:
            continue
        known = node
        if node.op == "output" or packet_of(node) is torch.ops.aten.as_strided:
            return None
        try:
            value = infer(node.target, node.args, node.kwargs, lambda a: values.get(a, a.meta["val"]))
        except (RuntimeError, ValueError):
            return None
        if _strides(value) != _strides(node.meta["val"]):
            values[node] = value
            for user in node.users:
                heapq.heappush(waiting, user)
    return values


def addresses_memory(graph: fx.Graph) -> Node | None:
    """Return a node that depends on the strides of its argument, so that none may change; None if there is none."""
    return next((node for node in graph.nodes if packet_of(node) is aten.as_strided), None)


def same_strides(node: Node, other: Node) -> bool:
    """Return whether two nodes make tensors of equal strides."""
    return _strides(node.meta["val"]) == _strides(other.meta["val"])


def permutation(value: Tensor) -> list[int] | None:
    """Return the dimensions by stride, largest first, if the value fills its memory without gaps; otherwise None."""
    strides = value.stride()
    order = sorted(range(value.ndim), key=lambda dim: -strides[dim])
    return order if value.permute(order).is_contiguous() else None


def follow(graph: fx.Graph, replaced: Collection[Node], *, restore_results: bool = True) -> None:
    """Note the new strides of all that is computed from ``replaced``.

    Args:
        graph: a graph that holds no node that ``addresses_memory``.
        replaced: the nodes that took the place of nodes with other strides; their own strides are noted.
        restore_results: whether the results of the graph are given the strides that they had.
    """
    if not replaced:
        return
    changed = set(replaced)
    # Each result is restored once, because a loop may return a value twice.
    wanted = {node: node.meta["val"] for node in output_list(graph) if isinstance(node, Node)}
    known: dict[object, tuple[object, object]] = {}
    for node in graph.nodes:
        if node.op != "call_function" or changed.isdisjoint(node.all_input_nodes):
            continue
        key = (node.target, argument_key(node.args, _form), argument_key(tuple(node.kwargs.items()), _form))
        if key not in known:
            known[key] = _infer(node)
        target, value = known[key]
        node.target = target
        if _strides(value) != _strides(node.meta["val"]):
            node.meta["val"] = value
            changed.add(node)
    for node, before in wanted.items() if restore_results else ():
        if _strides(node.meta["val"]) != _strides(before):
            _restore(graph, node, before)


def _infer(node: Node) -> tuple[object, object]:
    """Return the operator that fits the arguments' new strides, and what it returns."""
    if packet_of(node) is aten.view:
        # The elements of a view in another shape may lie in another order now.
        return aten.reshape.default, infer(aten.reshape.default, node.args, node.kwargs)
    return node.target, infer(node.target, node.args, node.kwargs)


def _form(node: Node) -> object:
    return form_of(node.meta["val"])


def _strides(value: object) -> object:
    if isinstance(value, (tuple, list)):
        return tuple(map(_strides, value))
    return value.stride() if isinstance(value, Tensor) else None


def _restore(graph: fx.Graph, node: Node, like: Tensor) -> None:
    """Give a result of the graph the order in memory that it had."""
    order = permutation(like)
    if order is None:
        return  # it had gaps, or overlapped: the loop itself could not have kept that through an operator
    output = graph.output_node()
    back = [order.index(dim) for dim in range(len(order))]
    with graph.inserting_before(output):
        permuted = emit(graph, aten.permute.default, (node, order))
        copy = emit(graph, aten.contiguous.default, (permuted,))
        restored = emit(graph, aten.permute.default, (copy, back))
    output.replace_input_with(node, restored)
