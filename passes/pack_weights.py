"""Multiply with weights that are arranged for the processor once, not in every call.

    y = linear(x, W, b)         ->   y = packed_linear(x, W, b)
    y = gelu(linear(x, W, b))   ->   y = packed_linear(x, W, b, "gelu")     where nothing else reads the product

For CPUs, and for products with enough rows to be worth it: see ``kernels/packed_linear.py``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.fx.node import Node

from l2c_compile.graphs.facts import Fact
from l2c_compile.graphs.loop_graph import LoopGraph
from l2c_compile.graphs.nodes import evaluation_of
from l2c_compile.kernels.packed_linear import can_pack, packed_linear_op
from l2c_compile.passes.base import LoopPass, Numerics, PassReport, Reason

aten = torch.ops.aten


@dataclass(frozen=True)
class PackWeights(LoopPass):
    """Let linear layers of the denoiser use packed weights, and apply the activation that follows."""

    min_rows: int = 16
    """The fewest rows to pack for: with fewer, reading the weight takes longer than multiplying, in any order."""

    name: ClassVar[str] = "pack-weights"
    needs: ClassVar[frozenset[Fact]] = frozenset({Fact.SITES_LOWERED})
    numerics: ClassVar[Numerics] = Numerics.ROUNDING

    def rewrite(self, graph: LoopGraph, report: PassReport) -> None:  # noqa: D102
        for node in graph.graph.find_nodes(op="call_function", target=aten.linear.default):
            reason = self._why_not(node)
            if reason is None:
                node.target = packed_linear_op
                node.args = (*node.args, *([None] * (3 - len(node.args))))
                _apply_activation(node)
            report.note(node, reason)

    def _why_not(self, node: Node) -> Reason | None:
        x, weight, *_ = node.args
        assert isinstance(x, Node)
        assert isinstance(weight, Node)
        if weight.op != "get_attr" or evaluation_of(node) is None:
            return Reason("multiplies once, or with something made in the graph")
        if not can_pack(weight.meta["val"]):
            return Reason("has a weight that cannot be packed on its device or in its dtype")
        value: Tensor = x.meta["val"]
        if value.numel() < self.min_rows * value.shape[-1]:
            return Reason("multiplies fewer than {} rows", self.min_rows)
        if not node.meta["val"].is_contiguous():
            return Reason("is read in another memory layout than the kernel writes")
        return None


def _apply_activation(product: Node) -> None:
    """Move the activation that is a packed product's only reader, if it is one, into the product."""
    if len(product.users) != 1:
        return
    (reader,) = product.users
    act = _activation_of(reader)
    if act is not None:
        product.args = (*product.args, act)
        product.meta["val"] = reader.meta["val"]
        reader.replace_all_uses_with(product)
        reader.graph.erase_node(reader)


def _activation_of(node: Node) -> str | None:
    if node.target is aten.gelu.default:
        return "gelu_tanh" if node.kwargs.get("approximate") == "tanh" else "gelu"
    if node.target is aten.relu.default:
        return "relu"
    return "silu" if node.target is aten.silu.default else None
