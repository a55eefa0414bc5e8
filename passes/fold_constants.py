"""Compute at compile time what depends on weights and timesteps only.

    emb = linear(sin(t7), W); h = mul(x, emb)   ->   h = mul(x, _folded_7)

Only small values are kept; the weights themselves and views of them stay references. The recipe is kept beside the
values, so that ``refresh`` can make them again after the weights changed.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, fx, nn
from torch.fx.node import Argument, Node

from l2c_compile.errors import CaptureError
from l2c_compile.graphs.facts import Fact
from l2c_compile.graphs.loop_graph import FoldedConstants, LoopGraph
from l2c_compile.graphs.marks import strided_copy
from l2c_compile.graphs.nodes import draws_random_numbers, evaluation_of, infer, module_path, num_bytes, output_list
from l2c_compile.graphs.storages import base_of
from l2c_compile.passes.base import LoopPass, PassReport, Reason

aten = torch.ops.aten


@dataclass(frozen=True)
class FoldConstants(LoopPass):
    """Replace small values that depend on no input by buffers."""

    max_bytes: int = 2**20
    """The size above which a value is computed in every call instead of kept."""

    name: ClassVar[str] = "fold-constants"
    # A site may be a constant: its users then read the folded value, not the mark.
    breaks: ClassVar[frozenset[Fact]] = frozenset({Fact.SITES_MARKED, Fact.READS_CACHE, Fact.NO_DEAD_NODES})

    def rewrite(self, graph: LoopGraph, report: PassReport) -> None:  # noqa: D102
        constant = _constant_nodes(graph.graph)
        returned = {base_of(result) for result in output_list(graph.graph) if isinstance(result, Node)}
        chosen = []
        for node in graph.graph.nodes:
            if node not in constant or node.op == "get_attr" or all(user in constant for user in node.users):
                continue
            reason = self._why_not(node, returned)
            report.note(node, reason)
            if reason is None:
                chosen.append(node)
        if not chosen:
            return
        recipe = _recipe(chosen)
        values = make_constants(graph, recipe)
        names = [graph.new_constant(value, "_folded") for value in values]
        for node, name, value in zip(chosen, names, values, strict=True):
            with graph.graph.inserting_before(node):
                folded = graph.graph.create_node("get_attr", name)
            folded.meta = {"val": node.meta["val"]}
            if not _has_strides(value, node.meta["val"]):
                # Operators without values expect others where arguments are expanded (torch 2.13).
                form: dict[str, Argument] = {"dtype": value.dtype, "device": value.device}
                folded.meta["val"] = infer(aten.empty_strided.default, (value.shape, value.stride()), form)
                report.other_strides.add(folded)
            node.replace_all_uses_with(folded)
        weights = tuple(
            str(n.target) for n in recipe.find_nodes(op="get_attr") if str(n.target).startswith("denoiser.")
        )
        graph.folded.append(FoldedConstants(recipe, tuple(names), weights))

    def _why_not(self, node: Node, returned: set[Node]) -> Reason | None:
        if not isinstance(node.meta.get("val"), Tensor):
            return Reason("is not a tensor")
        if _is_view_of_weight(node):
            return Reason("is a view of a weight")
        if num_bytes(node) > self.max_bytes:
            return Reason("{} bytes, more than {}", num_bytes(node), self.max_bytes)
        if base_of(node) in returned:
            return Reason("is returned by the loop: the caller may write into it")
        return None


def _has_strides(value: Tensor, noted: Tensor) -> bool:
    # The stride of a dimension of size 1 says nothing.
    return all(size <= 1 or a == b for size, a, b in zip(value.shape, value.stride(), noted.stride(), strict=True))


def make_constants(program: LoopGraph, recipe: fx.Graph) -> list[Tensor]:
    """Run a recipe on the weights as they are and return its values, each with memory of its own.

    Raises:
        CaptureError: if torch refuses an operation, which it took on tensors without values.
    """
    with torch.no_grad():
        values = _RecipeInterpreter(program.root, recipe).run()
    return [strided_copy(value) if value._is_view() else value for value in values]


class _RecipeInterpreter(fx.Interpreter):
    """Runs a recipe, and names the operation that torch refuses."""

    def __init__(self, root: nn.Module, recipe: fx.Graph) -> None:
        super().__init__(root, garbage_collect_values=True, graph=recipe)
        # Torch would write the code of the node into the error.
        self.extra_traceback = False

    def run_node(self, n: Node) -> object:
        try:
            return super().run_node(n)
        except (RuntimeError, ValueError, TypeError, IndexError) as error:
            evaluation = evaluation_of(n)
            where = "the loop" if evaluation is None else f"evaluation {evaluation}, module '{module_path(n)}'"
            raise CaptureError(
                f"{n.target} fails in {where} ({error}); so it would in the eager loop: run that once to see where"
            ) from error


def _constant_nodes(graph: fx.Graph) -> set[Node]:
    constant: set[Node] = set()
    for node in graph.nodes:
        if node.op == "get_attr" or (
            node.op == "call_function"
            and not draws_random_numbers(node)
            and all(argument in constant for argument in node.all_input_nodes)
        ):
            constant.add(node)
    return constant


def _is_view_of_weight(node: Node) -> bool:
    while node.op == "call_function" and isinstance(node.target, torch._ops.OpOverload) and node.target.is_view:
        node = node.all_input_nodes[0]
    return node.op == "get_attr"


def _recipe(chosen: list[Node]) -> fx.Graph:
    """Return the graph that makes the values of ``chosen`` from the weights, in the order of the original graph."""
    wanted: set[Node] = set()
    stack = list(chosen)
    while stack:
        node = stack.pop()
        if node not in wanted:
            wanted.add(node)
            stack.extend(node.all_input_nodes)
    recipe = fx.Graph()
    copies: dict[Node, Node] = {}
    for node in chosen[0].graph.nodes:
        if node in wanted:
            copies[node] = recipe.node_copy(node, copies.__getitem__)
    recipe.output(tuple(copies[node] for node in chosen))
    return recipe
