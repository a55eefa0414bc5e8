"""Store the latent in memory order as soon as something is computed from a permuted view of it.

    h = transpose(conv(x), 1, 2)                h = transpose(conv(x), 1, 2)
    y = add(h, pos)        # as strided as h -> c = clone(h, contiguous)
    z = add(y, f)          # and so on          y = add(c, pos); z = add(y, f)

Pointwise operators return the strides that they are given, so one transpose in the patch embedding leaves the whole
residual stream with its channels far apart: each norm gathers them, and each backend has to keep them so between
regions. One copy, which a compiling backend fuses away, puts them side by side. A matrix product may round differently
where the layout of an operand changes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.fx.node import Node

from l2c_compile.graph import (
    LoopGraph,
    ProgramGraph,
    argument_key,
    emit,
    evaluation_of,
    infer,
    is_pointwise,
    output_list,
    packet_of,
)
from l2c_compile.liveness import Storages
from l2c_compile.passes.base import Numerics, Pass, PassReport
from l2c_compile.verify import Fact

__all__ = ["ContiguousLayout"]

aten = torch.ops.aten


@dataclass(frozen=True)
class ContiguousLayout(Pass):
    """Copy the permuted views that pointwise operators read, and follow the new strides through the graph."""

    name: ClassVar[str] = "contiguous-layout"
    needs: ClassVar[frozenset[Fact]] = frozenset({Fact.SITES_LOWERED})
    numerics: ClassVar[Numerics] = Numerics.ROUNDING

    def run(self, program: ProgramGraph) -> PassReport:  # noqa: D102
        assert isinstance(program, LoopGraph)
        report = PassReport()
        by_strides = [node for node in program.graph.nodes if packet_of(node) is aten.as_strided]
        if by_strides:
            report.left_alone[by_strides[0].name] = "addresses memory by strides, so none may change"
            return report
        storages = Storages(program.graph.nodes)
        copies: dict[Node, Node] = {}
        for node in list(program.graph.nodes):
            if not is_pointwise(node) or not _is_permuted(node):
                continue
            for view in node.all_input_nodes:
                if storages.base(view) is not view and _is_permuted(view):
                    if view not in copies:
                        copies[view] = _copy(program, view)
                    node.replace_input_with(view, copies[view])
                    report.rewrites += 1
        if copies:
            _follow(program, set(copies.values()))
        return report


def _is_permuted(node: Node) -> bool:
    """Tell whether the value fills its memory, but in another order than that of its dimensions."""
    value = node.meta.get("val")
    return isinstance(value, Tensor) and not value.is_contiguous() and _permutation(value) is not None


def _permutation(value: Tensor) -> list[int] | None:
    """Return the dimensions from the farthest apart to the nearest if the value fills its memory, else None."""
    strides = value.stride()
    order = sorted(range(value.ndim), key=lambda dim: -strides[dim])
    return order if value.permute(order).is_contiguous() else None


def _copy(program: LoopGraph, view: Node) -> Node:
    with program.graph.inserting_after(view):
        copy = program.graph.call_function(aten.clone.default, (view,), {"memory_format": torch.contiguous_format})
    copy.meta.update(
        val=infer(copy.target, copy.args, copy.kwargs),
        evaluation=evaluation_of(view),
        nn_module_stack=view.meta.get("nn_module_stack", {}),
    )
    return copy


def _follow(program: LoopGraph, changed: set[Node]) -> None:
    """Find the strides of all that is computed from ``changed``; those of what the loop returns are restored."""
    results = [node for node in output_list(program.graph) if isinstance(node, Node)]
    wanted = {node: node.meta["val"] for node in results}
    known: dict[object, tuple[object, object]] = {}
    for node in program.graph.nodes:
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
    for node in results:
        if _strides(node.meta["val"]) != _strides(wanted[node]):
            _restore(program, node, wanted[node])


def _infer(node: Node) -> tuple[object, object]:
    """Return the operator for the arguments' new strides, and what it returns."""
    if packet_of(node) is aten.view:
        # What was viewed in another shape may lie in another order now.
        return aten.reshape.default, infer(aten.reshape.default, node.args, node.kwargs)
    return node.target, infer(node.target, node.args, node.kwargs)


def _form(node: Node) -> object:
    return _forms(node.meta["val"])


def _forms(value: object) -> object:
    if isinstance(value, (tuple, list)):
        return tuple(map(_forms, value))
    return (value.shape, value.stride(), value.dtype, value.device) if isinstance(value, Tensor) else value


def _strides(value: object) -> object:
    if isinstance(value, (tuple, list)):
        return tuple(map(_strides, value))
    return value.stride() if isinstance(value, Tensor) else None


def _restore(program: LoopGraph, node: Node, like: Tensor) -> None:
    """Give what the loop returns the order in memory that it had."""
    order = _permutation(like)
    if order is None:
        return  # it had gaps, or overlapped: the loop itself could not have kept that through an operator
    output = program.graph.output_node()
    back = [order.index(dim) for dim in range(len(order))]
    with program.graph.inserting_before(output):
        permuted = emit(program.graph, aten.permute.default, (node, order), None)
        copy = emit(program.graph, aten.contiguous.default, (permuted,), None)
        restored = emit(program.graph, aten.permute.default, (copy, back), None)
    output.replace_input_with(node, restored)
