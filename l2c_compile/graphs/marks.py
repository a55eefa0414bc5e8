"""The marker operators of a loop graph: a site, and a read of a cached value."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, fx
from torch.fx.node import Node

from l2c_compile.schedules.rules import Reading, Rule, rule_from_dict

INPUT_PORT = -1
"""The port of a site's input, which is marked only where the site or its rule needs it."""


def strided_copy(value: Tensor) -> Tensor:
    """Return a copy with memory of its own and exactly the strides of ``value``, expanded dimensions included."""
    copy = torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device=value.device)
    write_into(copy, value)
    return copy


def write_into(target: Tensor, value: Tensor) -> None:
    """Write ``value`` into a tensor of the same strides; elements that expanded dimensions share are written once."""
    for dim, (size, stride) in enumerate(zip(target.shape, target.stride(), strict=True)):
        if stride == 0 and size > 1:
            target, value = target.narrow(dim, 0, 1), value.narrow(dim, 0, 1)
    target.copy_(value)


@torch.library.custom_op("l2c::site", mutates_args=())
def _site(value: Tensor, site: str, port: int, evaluation: int) -> Tensor:
    # An op may not return its input, and the copy must keep the strides that the graph was captured with.
    return strided_copy(value)


@_site.register_fake
def _(value: Tensor, site: str, port: int, evaluation: int) -> Tensor:
    return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device=value.device)


@torch.library.custom_op("l2c::cache_read", mutates_args=())
def _cache_read(
    history: list[Tensor],
    inputs: list[Tensor],
    current_input: Tensor | None,
    site: str,
    port: int,
    evaluation: int,
    sources: list[int],
    rule: str,
) -> Tensor:
    reading = Reading(history=tuple(history), inputs=tuple(inputs), current_input=current_input)
    return strided_copy(rule_from_dict(json.loads(rule)).combine(reading))


@_cache_read.register_fake
def _(
    history: list[Tensor],
    inputs: list[Tensor],
    current_input: Tensor | None,
    site: str,
    port: int,
    evaluation: int,
    sources: list[int],
    rule: str,
) -> Tensor:
    reading = Reading(history=tuple(history), inputs=tuple(inputs), current_input=current_input)
    value = rule_from_dict(json.loads(rule)).combine(reading)
    return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device=value.device)


SITE: torch._ops.OpOverload[..., Tensor] = torch.ops.l2c.site.default
CACHE_READ: torch._ops.OpOverload[..., Tensor] = torch.ops.l2c.cache_read.default


@dataclass(frozen=True)
class SiteMark:
    """An ``l2c::site`` node with its arguments by name."""

    node: Node
    value: Node
    site: str
    port: int
    evaluation: int

    @classmethod
    def of(cls, node: Node) -> SiteMark:
        """Return the arguments of the node by name."""
        return cls(node, *node.args)  # type: ignore[arg-type]


@dataclass(frozen=True)
class CacheRead:
    """An ``l2c::cache_read`` node with its arguments by name."""

    node: Node
    history: Sequence[Node]
    inputs: Sequence[Node]
    current_input: Node | None
    site: str
    port: int
    evaluation: int
    sources: Sequence[int]
    rule_json: str

    @classmethod
    def of(cls, node: Node) -> CacheRead:
        """Return the arguments of the node by name."""
        return cls(node, *node.args)  # type: ignore[arg-type]

    @property
    def rule(self) -> Rule:
        """The rule that makes the value."""
        return rule_from_dict(json.loads(self.rule_json))


def site_marks(graph: fx.Graph) -> list[SiteMark]:
    """Return the ``l2c::site`` nodes of a graph in order."""
    return [SiteMark.of(node) for node in graph.find_nodes(op="call_function", target=SITE)]


def cache_reads(graph: fx.Graph) -> list[CacheRead]:
    """Return the ``l2c::cache_read`` nodes of a graph in order."""
    return [CacheRead.of(node) for node in graph.find_nodes(op="call_function", target=CACHE_READ)]
