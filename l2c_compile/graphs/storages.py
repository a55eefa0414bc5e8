"""Which nodes of a graph share memory, and how large each storage is."""

from __future__ import annotations

import functools
import operator
from collections.abc import Iterable

import torch
from torch import Tensor
from torch.fx.node import Node

from l2c_compile.graphs.nodes import expression, num_bytes, packet_of

aten = torch.ops.aten


class Storages:
    """Finds which nodes share memory; it asks torch once for each form of view."""

    def __init__(self, nodes: Iterable[Node]) -> None:
        self._base: dict[Node, Node] = {}
        self._viewed_operand: dict[object, int | None] = {}
        for node in nodes:
            source = self._viewed(node)
            self._base[node] = node if source is None else self._base[source]

    def base(self, node: Node) -> Node:
        """Return the node that allocated the memory of ``node``: itself, or what it is a view of."""
        return self._base[node]

    def knows(self, node: Node) -> bool:
        """Return whether the node was there when the storages were found."""
        return node in self._base

    def num_bytes(self, node: Node) -> int:
        """Return the size in bytes of the memory that ``node`` lies in."""
        base = self._base[node]
        value = base.meta.get("val")
        return int(value.untyped_storage().nbytes()) if isinstance(value, Tensor) else num_bytes(base)

    def _viewed(self, node: Node) -> Node | None:
        """Return the argument that ``node`` is a view of; None if it has memory of its own."""
        if node.op != "call_function" or not node.all_input_nodes:
            return None
        if node.target is operator.getitem:
            source = node.all_input_nodes[0]
            # The outputs of an ordinary node are tensors of their own; those of a split are parts of one.
            return source if self._base[source] is not source else None
        if not _may_be_view(node):
            return None
        operands = node.all_input_nodes
        if not all(isinstance(operand.meta.get("val"), Tensor) for operand in operands):
            return operands[0] if node.target.is_view else None  # type: ignore[union-attr]
        result = node.meta.get("val")
        if isinstance(result, Tensor) and all(result.device != operand.meta["val"].device for operand in operands):
            return None
        key = expression(node, lambda operand: (operands.index(operand), _form(operand.meta["val"])))
        if key not in self._viewed_operand:
            self._viewed_operand[key] = _viewed_operand(node)
        position = self._viewed_operand[key]
        return None if position is None else operands[position]


def base_of(node: Node) -> Node:
    """Return the node that allocated the memory of ``node``; only what it may be a view of is looked at."""
    found: dict[Node, None] = {}
    waiting = [node]
    while waiting:
        each = waiting.pop()
        found[each] = None
        if each.target is operator.getitem or _may_be_view(each):
            waiting += [operand for operand in each.all_input_nodes if operand not in found]
    return Storages(sorted(found)).base(node)


def _may_be_view(node: Node) -> bool:
    """Return whether an operator sometimes returns a view of an argument, or the argument itself."""
    target = node.target
    if not isinstance(target, torch._ops.OpOverload) or torch.Tag.dynamic_output_shape in target.tags:
        return False
    return target.is_view or packet_of(node) in (aten._unsafe_view, aten.dropout) or _is_composite(target)


def _form(value: Tensor) -> object:
    return tuple(value.shape), value.stride(), value.dtype


@functools.cache
def _is_composite(target: torch._ops.OpOverload) -> bool:
    """Return whether an operator is made of others, so that it may return its argument, as ``type_as`` does."""
    name = target.name()  # type: ignore[no-untyped-call]
    return torch._C._dispatch_has_kernel_for_dispatch_key(name, "CompositeImplicitAutograd")


def _viewed_operand(node: Node) -> int | None:
    """Return which operand the result is a view of, None if of none; for ``reshape`` the strides decide."""
    fakes: dict[Node, Tensor] = {}
    for operand in node.all_input_nodes:
        value = operand.meta["val"]
        fakes[operand] = torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device="meta")
    given = torch.fx.node.map_arg((node.args, dict(node.kwargs)), fakes.__getitem__)
    meta = torch.device("meta")
    args, kwargs = torch.fx.node.map_aggregate(given, lambda a: meta if isinstance(a, torch.device) else a)
    result = node.target(*args, **kwargs)  # type: ignore[operator]
    first = result[0] if isinstance(result, (tuple, list)) else result
    storages = [fake.untyped_storage()._cdata for fake in fakes.values()]
    made = first.untyped_storage()._cdata if isinstance(first, Tensor) else None
    return storages.index(made) if made in storages else None
