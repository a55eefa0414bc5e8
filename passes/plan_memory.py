"""Free what is kept for later evaluations as early as the graph allows.

    f; g; h; ...; s = add(f, g); t = add(s, h)           ->   f; g; s = add(f, g); h; t = add(s, h); ...
    evaluation 8:  r = sub(mul(f5, 2.0), f3); y = x + r  ->   r behind f5: one tensor waits for evaluation 8, not two
    q, k = split(p); evaluation 5:  y = add(x, q)        ->   c = clone(q); ...; y = add(x, c): k is not kept

A value is freed after its last user in the order of the graph, so order is all there is to change. What is moved or
copied comes out as the same bits.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, fx
from torch.fx.node import Node

from l2c_compile.analyses.kept import cache_work, is_kept, is_light, made_of_kept_values
from l2c_compile.graphs.facts import Fact
from l2c_compile.graphs.loop_graph import LoopGraph
from l2c_compile.graphs.nodes import emit, evaluation_of, num_bytes, put_with
from l2c_compile.graphs.storages import Storages
from l2c_compile.passes.base import LoopPass, PassReport, Reason

aten = torch.ops.aten

# IEEE 754 rounds each element of these correctly, so it is the same in whichever loop: torch computes most other
# functions differently where elements lie side by side.
_SAME_IN_ANY_LAYOUT = frozenset({aten.add.Tensor, aten.sub.Tensor, aten.mul.Tensor, aten.div.Tensor, aten.neg.default})


@dataclass(frozen=True)
class PlanMemory(LoopPass):
    """Move work on kept values to where it frees them, and copy the kept part of a larger tensor."""

    name: ClassVar[str] = "plan-memory"
    needs: ClassVar[frozenset[Fact]] = frozenset({Fact.SITES_LOWERED, Fact.NO_DEAD_NODES})

    def rewrite(self, graph: LoopGraph, report: PassReport) -> None:  # noqa: D102
        early = graph.known_before_the_loop()
        nodes = list(graph.graph.nodes)
        storages = Storages(nodes)
        for group in list(_groups(nodes, early)):
            report.note(group.root, _move(group, early, storages))
        for base, kept in _kept_views(graph.graph.nodes, early, storages):
            report.note(base, _copy_parts(graph.graph, base, kept, storages))


@dataclass(frozen=True)
class _Group:
    """Nodes that could run elsewhere; only the last, the root, is used by others."""

    nodes: tuple[Node, ...]
    """The nodes, in the order of the graph."""

    @property
    def root(self) -> Node:
        return self.nodes[-1]

    def leaves(self, early: set[Node]) -> list[Node]:
        """Return what the group is made from, without what is known before the loop."""
        inside = set(self.nodes)
        found = {a for node in self.nodes for a in node.all_input_nodes if a not in inside and a not in early}
        return sorted(found)


def _groups(nodes: list[Node], early: set[Node]) -> Iterator[_Group]:
    """Yield what could run earlier: work for later evaluations, and work on nothing but kept values."""
    ahead = cache_work(nodes)
    # Only light work moves: a matrix product is done in the evaluation that it belongs to.
    ready = made_of_kept_values(nodes, early)
    for node in nodes:
        if node in ready and not all(user in ready for user in node.users):
            yield _Group(tuple(sorted(_tree(node, ready))))
        elif node in ahead and node not in ready and node not in early and is_light(node):
            yield _Group((node,))


def _tree(root: Node, ready: set[Node]) -> set[Node]:
    """Return the root and those ready nodes that only it needs, directly or through others of them."""
    found = {root}
    stack = [root]
    while stack:
        for argument in stack.pop().all_input_nodes:
            same = argument in ready and evaluation_of(argument) == evaluation_of(root)
            if same and argument not in found and found.issuperset(argument.users):
                found.add(argument)
                stack.append(argument)
    return found


def _move(group: _Group, early: set[Node], storages: Storages) -> Reason | None:
    """Move the group right behind the last of its leaves, or return why that would save nothing."""
    leaves = group.leaves(early)
    if not leaves:
        return Reason("is made of nothing that is kept")
    if len({storages.base(node) for node in group.nodes}) < len(group.nodes) or storages.base(group.root) in leaves:
        return Reason("is a view: its memory is kept either way")
    target = leaves[-1]
    inside = set(group.nodes)
    freed = {storages.base(leaf) for leaf in leaves if _is_freed(leaf, inside, group.root, target)}
    saved, added = sum(map(storages.num_bytes, freed)), num_bytes(group.root)
    if saved <= added:
        return Reason("would free {} bytes earlier and take {}", saved, added)
    for factor in sorted({a for node in group.nodes for a in node.all_input_nodes if a in early}):
        if target < factor:
            return Reason("waits for '{}'", factor.name)
    if all(_follows(node, before) for before, node in zip((target, *group.nodes), group.nodes, strict=False)):
        return Reason("runs right behind what it is made from")
    after = target
    for node in group.nodes:
        after.append(node)
        after = node
        put_with(node, target)
    return None


def _follows(node: Node, before: Node) -> bool:
    return before.next is node


def _is_freed(leaf: Node, inside: set[Node], root: Node, target: Node) -> bool:
    """Return whether the group is the last to use ``leaf``, and would be so at ``target`` or in its evaluation."""
    for user in leaf.users:
        if user in inside:
            continue
        if root < user:
            return False
        if target < user and evaluation_of(user) != evaluation_of(target):
            return False
    return True


def _kept_views(nodes: Iterable[Node], early: set[Node], storages: Storages) -> list[tuple[Node, list[Node]]]:
    """Return the tensors that later evaluations read only parts of, with these parts."""
    kept: dict[Node, list[Node]] = {}
    whole: set[Node] = set()
    for node in nodes:
        base = storages.base(node) if storages.knows(node) else node
        if base in early or base.op != "call_function":
            continue
        if any(is_kept(base, user) for user in node.users):
            kept.setdefault(base, []).append(node)
            if node is base:
                whole.add(base)
    return [(base, views) for base, views in kept.items() if base not in whole]


def _copy_parts(graph: fx.Graph, base: Node, views: list[Node], storages: Storages) -> Reason | None:
    """Let later evaluations read copies of the parts, or return why that is not possible."""
    copied, kept = sum(map(num_bytes, views)), storages.num_bytes(base)
    if copied >= kept:
        return Reason("copies of {} bytes save nothing, {} is what keeping it whole takes", copied, kept)
    later = {view: [user for user in view.users if is_kept(base, user)] for view in views}
    for view, users in later.items():
        for user in users:
            if not _reads_any_layout(user, view):
                return Reason(
                    "'{}' could round differently on a copy of '{}' with another memory layout", user.name, view.name
                )
    for view, users in later.items():
        with graph.inserting_after(view):
            copy = emit(graph, aten.clone.default, (view,), like=view)
        for user in users:
            user.replace_input_with(view, copy)
    return None


def _reads_any_layout(user: Node, view: Node) -> bool:
    """Return whether a reader gives the same bits, with the same strides, when it reads a copy instead."""
    if user.target not in _SAME_IN_ANY_LAYOUT or user.kwargs:
        return False
    expected = user.meta.get("val")

    def on_meta(argument: Node) -> Tensor:
        value = argument.meta["val"]
        tensor = torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device="meta")
        return tensor.clone() if argument is view else tensor

    args, kwargs = torch.fx.node.map_arg((user.args, dict(user.kwargs)), on_meta)
    result = user.target(*args, **kwargs)
    return isinstance(expected, Tensor) and isinstance(result, Tensor) and result.stride() == expected.stride()
