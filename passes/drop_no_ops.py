"""Redirect the users of operations that return their argument unchanged.

    y = clone(x); z = mul(y, w)   ->   z = mul(x, w)

In a functional graph a copy is as good as its original. The value must come out with the same shape, strides, dtype and
device: a copy that changes the layout decides how later kernels round, so it stays. So does a view that exchanges two
dimensions over which the value repeats: a cache read may put one there that does not.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.fx.node import Node

from l2c_compile.graphs.facts import Fact
from l2c_compile.graphs.loop_graph import ProgramGraph
from l2c_compile.graphs.nodes import packet_of
from l2c_compile.graphs.storages import base_of
from l2c_compile.passes.base import Pass, PassReport, Reason

aten = torch.ops.aten

_COPIES = frozenset(
    {aten.clone, aten.alias, aten.detach, aten.lift_fresh, aten.lift_fresh_copy, aten.contiguous, aten._to_copy}
    | {aten.to, aten.dropout}
)
_VIEWS = frozenset(
    {aten.view, aten._unsafe_view, aten.reshape, aten.expand, aten.slice, aten.permute, aten.transpose, aten.t}
    | {aten.squeeze, aten.unsqueeze, aten.flatten, aten.unflatten, aten.movedim, aten.narrow}
)
_NOT_OWN = ("placeholder", "get_attr")
_REORDERS = frozenset({aten.permute, aten.transpose, aten.t, aten.movedim})


@dataclass(frozen=True)
class DropNoOps(Pass):
    """Redirect the users of no-ops to their argument; ``DropDead`` then removes the no-ops."""

    keep_returned: bool = True
    """Whether to leave a copy of an input or a weight that the graph returns: the caller may write into the result."""

    name: ClassVar[str] = "drop-no-ops"
    breaks: ClassVar[frozenset[Fact]] = frozenset({Fact.NO_DEAD_NODES})

    def rewrite(self, graph: ProgramGraph, report: PassReport) -> None:  # noqa: D102
        for node in list(graph.graph.nodes):
            packet = packet_of(node)
            if packet in _COPIES or packet in _VIEWS:
                source = node.args[0]
                assert isinstance(source, Node)
                reason = self._why_not(node, source)
                if reason is None:
                    node.replace_all_uses_with(source)
                report.note(node, reason)

    def _why_not(self, node: Node, source: Node) -> Reason | None:
        before, after = source.meta.get("val"), node.meta.get("val")
        if not isinstance(before, Tensor) or not isinstance(after, Tensor):
            return Reason("the graph does not say what it returns")
        if before.shape != after.shape or before.dtype != after.dtype or before.device != after.device:
            return Reason("changes shape, dtype or device")
        if before.stride() != after.stride():
            return Reason("changes the memory layout")
        packet = packet_of(node)
        if packet in _VIEWS and before.storage_offset() != after.storage_offset():
            return Reason("starts elsewhere in its storage")
        if packet in _REORDERS and _looks_the_same_in_another_order(before):
            return Reason("may exchange dimensions that only look alike because the value repeats over them")
        if packet is aten.dropout and node.args[1] and node.args[2]:
            return Reason("drops elements")
        if self.keep_returned and packet in _COPIES and _is_returned(node) and base_of(source).op in _NOT_OWN:
            return Reason("keeps the result from sharing memory with an input or a weight")
        return None


def _looks_the_same_in_another_order(value: Tensor) -> bool:
    strides = [stride for stride, size in zip(value.stride(), value.shape, strict=True) if size > 1]
    return len(set(strides)) < len(strides)


def _is_returned(node: Node) -> bool:
    return any(user.op == "output" for user in node.users)
