"""What is kept over the border of an evaluation: who reads it later, what is made of it, and what works ahead.

A cache is nothing but a value of a loop graph that a later evaluation than its own reads.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass
from typing import Generic, TypeVar

import torch
from torch._ops import OpOverload
from torch.fx.node import Node

from l2c_compile.graphs.nodes import draws_random_numbers, evaluation_of, fits

aten = torch.ops.aten

T = TypeVar("T")


def is_kept(value: Node, reader: Node) -> bool:
    """Return whether ``value`` waits for the evaluation of ``reader``: an earlier one makes it."""
    made, read = evaluation_of(value), evaluation_of(reader)
    return made is not None and read is not None and made < read


def later_readers(value: Node) -> list[Node]:
    """Return the users of ``value`` in later evaluations than its own, in the order of the graph."""
    return sorted(user for user in value.users if is_kept(value, user))


def cache_work(nodes: Iterable[Node]) -> set[Node]:
    """Return the nodes of an evaluation that work for later evaluations only, as the sum of two kept values."""
    found: set[Node] = set()
    for node in reversed(list(nodes)):
        if evaluation_of(node) is None or not node.users:
            continue
        if all(user in found or is_kept(node, user) for user in node.users):
            found.add(node)
    return found


def is_light(node: Node) -> bool:
    """Return whether a node is elementwise arithmetic or a view, and draws nothing."""
    if not isinstance(node.target, OpOverload) or draws_random_numbers(node):
        return False
    return node.target.is_view or torch.Tag.pointwise in node.target.tags


def made_of_kept_values(nodes: Iterable[Node], early: set[Node], also: Collection[OpOverload] = ()) -> set[Node]:
    """Return the arithmetic of an evaluation on nothing but kept values: it could as well run where those are made.

    Args:
        nodes: the nodes of a loop graph, in order.
        early: what is known before the loop; it is not kept, and may be read as well.
        also: further operators that count as light.
    """
    found: set[Node] = set()
    for node in nodes:
        if evaluation_of(node) is None or node in early or not (is_light(node) or node.target in also):
            continue
        if all(a in early or a in found or is_kept(a, node) for a in node.all_input_nodes):
            found.add(node)
    return found


@dataclass(frozen=True)
class KeptRun(Generic[T]):
    """``add(...add(add(base, terms[0]), terms[1])...)`` in one evaluation, the terms kept from earlier ones."""

    base: Node
    terms: tuple[T, ...]
    adds: tuple[Node, ...]

    @property
    def last(self) -> Node:
        """What the run makes."""
        return self.adds[-1]


def kept_runs(nodes: Iterable[Node], term_of: Callable[[Node, Node], T | None]) -> Iterator[KeptRun[T]]:
    """Yield the longest runs of at least two additions, last to first.

    Args:
        nodes: the nodes of a loop graph, in order.
        term_of: a function that takes what is added and the addition, and returns the term, or None if it is not kept.
    """
    inner: set[Node] = set()
    for node in reversed(list(nodes)):
        if node in inner:
            continue
        adds: list[Node] = []
        terms: list[T] = []
        base = node
        while (split := _split(base, term_of)) is not None and (not adds or len(base.users) == 1):
            adds.append(base)
            base, term = split
            terms.append(term)
        if len(terms) > 1:
            inner.update(adds)
            yield KeptRun(base, tuple(reversed(terms)), tuple(reversed(adds)))


def _split(node: Node, term_of: Callable[[Node, Node], T | None]) -> tuple[Node, T] | None:
    """Split ``add(x, term)`` into x and the term; None if the node is no such addition."""
    if node.target is not aten.add.Tensor or node.kwargs or evaluation_of(node) is None:
        return None
    a, b = node.args
    for rest, added in ((a, b), (b, a)):
        if not isinstance(rest, Node) or not isinstance(added, Node) or not fits(rest, node):
            continue
        term = term_of(added, node)
        if term is not None:
            return rest, term
    return None
