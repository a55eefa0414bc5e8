"""Count multiply-adds from a graph, without running it."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor
from torch.fx.node import Node
from torch.utils.flop_counter import FlopCounterMode

from l2c_compile.graph import infer

__all__ = ["MultiplyAdds"]


class MultiplyAdds:
    """Counts the multiply-adds of matrix products, convolutions and attention; elementwise work counts as none.

    Uses torch's own formulas on fake tensors and asks once for each form of operation.
    """

    def __init__(self) -> None:
        self._known: dict[object, int] = {}

    def of(self, node: Node) -> int:
        """Return the multiply-adds of one node."""
        if node.op != "call_function" or not isinstance(node.target, torch._ops.OpOverload):
            return 0
        if node.target.namespace != "aten" or node.target.is_view:
            return 0
        key = (node.target, _form((node.args, node.kwargs)))
        if key not in self._known:
            self._known[key] = _count(node)
        return self._known[key]

    def total(self, nodes: Iterable[Node]) -> int:
        """Return the multiply-adds of several nodes."""
        return sum(map(self.of, nodes))


def _form(argument: object) -> object:
    if isinstance(argument, Node):
        value = argument.meta.get("val")
        return (tuple(value.shape), value.dtype) if isinstance(value, Tensor) else type(value)
    if isinstance(argument, (tuple, list)):
        return tuple(map(_form, argument))
    if isinstance(argument, dict):
        return tuple((name, _form(value)) for name, value in argument.items())
    return repr(argument)


def _count(node: Node) -> int:
    with FlopCounterMode(display=False) as counter:
        infer(node.target, node.args, node.kwargs)
    return int(counter.get_total_flops()) // 2
