"""Which nodes of a graph share memory, and how large each storage is."""

from __future__ import annotations

import operator
from collections.abc import Iterable

import torch
from torch import Tensor
from torch.fx.node import Node

from l2c_compile.graphs.nodes import num_bytes, packet_of

aten = torch.ops.aten


class Storages:
    """Finds which nodes share memory; it asks torch once for each form of view."""

    def __init__(self, nodes: Iterable[Node]) -> None:
        self._base: dict[Node, Node] = {}
        self._is_view: dict[object, bool] = {}
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
        if node.op != "call_function" or not node.args or not isinstance(node.args[0], Node):
            return None
        source = node.args[0]
        if node.target is operator.getitem:
            # The outputs of an ordinary node are tensors of their own; those of a split are parts of one.
            return source if self._base[source] is not source else None
        target = node.target
        if not isinstance(target, torch._ops.OpOverload):
            return None
        if not target.is_view and packet_of(node) not in (aten._unsafe_view, aten.dropout):
            return None
        value = source.meta.get("val")
        if not isinstance(value, Tensor):
            return source
        result = node.meta.get("val")
        if isinstance(result, Tensor) and result.device != value.device:
            return None
        key = (target, tuple(value.shape), value.stride(), value.dtype, repr(node.args[1:]), repr(node.kwargs))
        if key not in self._is_view:
            self._is_view[key] = _shares_memory(node, value)
        return source if self._is_view[key] else None


def _shares_memory(node: Node, value: Tensor) -> bool:
    """Return whether the result is a view: ``reshape`` and ``contiguous`` return one or a copy, as strides permit."""
    source = torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device="meta")
    given = torch.fx.node.map_arg((node.args[1:], dict(node.kwargs)), _on_meta)
    rest, kwargs = torch.fx.node.map_aggregate(given, lambda a: source.device if isinstance(a, torch.device) else a)
    result = node.target(source, *rest, **kwargs)  # type: ignore[operator]
    first = result[0] if isinstance(result, (tuple, list)) else result
    return bool(first.untyped_storage()._cdata == source.untyped_storage()._cdata)


def _on_meta(argument: Node) -> Tensor:
    value = argument.meta["val"]
    return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device="meta")
