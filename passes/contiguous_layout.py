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

from l2c_compile.analyses.storages import Storages
from l2c_compile.graphs.facts import Fact
from l2c_compile.graphs.loop_graph import LoopGraph, ProgramGraph
from l2c_compile.graphs.nodes import evaluation_of, infer, is_pointwise
from l2c_compile.graphs.strides import addresses_memory, follow, permutation
from l2c_compile.passes.base import Numerics, Pass, PassReport

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
        by_strides = addresses_memory(program.graph)
        if by_strides is not None:
            report.left_alone[by_strides.name] = "addresses memory by strides, so none may change"
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
        follow(program.graph, copies.values())
        return report


def _is_permuted(node: Node) -> bool:
    """Tell whether the value fills its memory, but in another order than that of its dimensions."""
    value = node.meta.get("val")
    return isinstance(value, Tensor) and not value.is_contiguous() and permutation(value) is not None


def _copy(program: LoopGraph, view: Node) -> Node:
    with program.graph.inserting_after(view):
        copy = program.graph.call_function(aten.clone.default, (view,), {"memory_format": torch.contiguous_format})
    copy.meta.update(
        val=infer(copy.target, copy.args, copy.kwargs),
        evaluation=evaluation_of(view),
        nn_module_stack=view.meta.get("nn_module_stack", {}),
    )
    return copy
