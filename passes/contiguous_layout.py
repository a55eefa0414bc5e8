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
from torch.fx.node import Argument, Node

from l2c_compile.graphs.facts import Fact
from l2c_compile.graphs.loop_graph import LoopGraph
from l2c_compile.graphs.nodes import emit, is_pointwise
from l2c_compile.graphs.storages import Storages
from l2c_compile.graphs.strides import permutation
from l2c_compile.passes.base import LoopPass, Numerics, PassReport

aten = torch.ops.aten


@dataclass(frozen=True)
class ContiguousLayout(LoopPass):
    """Copy the permuted views that pointwise operators read, and follow the new strides through the graph."""

    name: ClassVar[str] = "contiguous-layout"
    needs: ClassVar[frozenset[Fact]] = frozenset({Fact.SITES_LOWERED})
    numerics: ClassVar[Numerics] = Numerics.ROUNDING
    changes_strides: ClassVar[bool] = True

    def rewrite(self, graph: LoopGraph, report: PassReport) -> None:  # noqa: D102
        storages = Storages(graph.graph.nodes)
        copies: dict[Node, Node] = {}
        for node in list(graph.graph.nodes):
            if not is_pointwise(node) or not _is_permuted(node):
                continue
            for view in node.all_input_nodes:
                if storages.base(view) is not view and _is_permuted(view):
                    if view not in copies:
                        with graph.graph.inserting_after(view):
                            form: dict[str, Argument] = {"memory_format": torch.contiguous_format}
                            copies[view] = emit(graph.graph, aten.clone.default, (view,), kwargs=form, like=view)
                    node.replace_input_with(view, copies[view])
                    report.rewrites += 1
        report.other_strides.update(copies.values())


def _is_permuted(node: Node) -> bool:
    """Return whether the value fills its memory, but in another order than that of its dimensions."""
    value = node.meta.get("val")
    return isinstance(value, Tensor) and not value.is_contiguous() and permutation(value) is not None
