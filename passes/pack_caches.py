"""Keep values for later evaluations in one byte an element, with a scale for each token.

    f = attn(...)                                   f = attn(...); q, s = pack_cache(f)
    evaluation 5:  h = add(x, f)                ->  r = cast(mul(cast(q), unsqueeze(s, -1))); h = add(x, r)
    evaluation 5:  h = cached_residual(x, [f])  ->  h = cached_residual(x, [q], token_scales=[s])

The evaluation that makes a value reads it as it was. Later ones read another value: off by at most |f| / 16 in fp8 e4m3
and s / 2 in int8, plus the rounding of the division (``kernels/packed_cache.py``). Only on request: APPROXIMATE.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, fx
from torch.fx.node import Argument, Node

from l2c_compile.analyses.kept import later_readers
from l2c_compile.graphs.facts import Fact
from l2c_compile.graphs.forms import TensorForm
from l2c_compile.graphs.loop_graph import LoopGraph
from l2c_compile.graphs.nodes import emit, evaluation_of, outputs_of
from l2c_compile.graphs.strides import relaid
from l2c_compile.kernels._launch import FLOATS, MAX_DIM
from l2c_compile.kernels.cached_residual import cached_residual_op
from l2c_compile.kernels.cached_residual_norm import cached_residual_norm_op
from l2c_compile.kernels.packed_cache import pack_cache
from l2c_compile.passes.base import LoopPass, Numerics, PassReport, Reason

aten = torch.ops.aten

_PACK = pack_cache._opoverload
_READS_PACKED = frozenset({cached_residual_op._opoverload, cached_residual_norm_op._opoverload})
_TOKEN_SCALES = 6
"""The position of token_scales among the arguments of both ops."""


@dataclass(frozen=True)
class PackCaches(LoopPass):
    """Store what is kept for later evaluations packed, and let them read it unpacked."""

    dtype: torch.dtype
    """The dtype of a packed value, float8_e4m3fn or int8."""
    max_share: float = 0.75
    """The largest share of its bytes, scales included, that a packed value may have: a row of 8 bfloat16 or of 2
    float32 comes to it."""

    name: ClassVar[str] = "pack-caches"
    needs: ClassVar[frozenset[Fact]] = frozenset({Fact.SITES_LOWERED, Fact.NO_DEAD_NODES})
    numerics: ClassVar[Numerics] = Numerics.APPROXIMATE
    is_followed_by_proof: ClassVar[bool] = False

    def rewrite(self, graph: LoopGraph, report: PassReport) -> None:  # noqa: D102
        early = graph.known_before_the_loop()
        for node in list(graph.graph.nodes):
            if node in early or node.op != "call_function" or not isinstance(node.meta.get("val"), Tensor):
                continue
            readers = later_readers(node)
            if readers:
                report.note(node, self._why_not(node) or _pack(graph.graph, node, readers, self.dtype))

    def _why_not(self, node: Node) -> Reason | None:
        value = node.meta["val"]
        form = TensorForm.of(value)
        if value.dtype not in FLOATS:
            return Reason("is {}: only float32, bfloat16 and float16 are packed", form)
        if value.dim() not in (2, 3) or not 0 < value.shape[-1] <= MAX_DIM:
            return Reason("is {}: only (B, T, D) and (N, D) with D up to {} have a scale for each token", form, MAX_DIM)
        channels, plain = value.shape[-1], value.shape[-1] * value.element_size()
        if channels + 4 > self.max_share * plain:
            return Reason("is {}: a row would take {} bytes packed, and takes {}", form, channels + 4, plain)
        return None


def _pack(graph: fx.Graph, node: Node, readers: list[Node], dtype: torch.dtype) -> Reason | None:
    """Let ``readers`` read a packed copy, or return why that is not possible."""
    by_value = [reader for reader in readers if not _takes_packed(reader, node)]
    contiguous = torch.empty_like(node.meta["val"], memory_format=torch.contiguous_format)
    moved = contiguous.stride() != node.meta["val"].stride()
    values = relaid({node: contiguous}, set(node.users).difference(by_value)) if moved else {}
    if values is None:
        return Reason("is read in its memory layout, which a packed copy does not have")
    with graph.inserting_after(node):
        packed = emit(graph, _PACK, (node, dtype), like=node)
    q, scale = outputs_of(packed)
    for reader in readers:
        if reader not in by_value:
            _give_packed(reader, node, q, scale)
    for group in _by_evaluation(by_value):
        with graph.inserting_before(group[0]):
            value = _unpacked(graph, q, scale, node, evaluation_of(group[0]))
        for reader in group:
            reader.replace_input_with(node, value)
    for each, new in values.items():
        if each is not node:
            each.meta["val"] = new
    return None


def _takes_packed(reader: Node, node: Node) -> bool:
    """Return whether a reader is an op that reads the value as a cached term and as nothing else."""
    if reader.target not in _READS_PACKED:
        return False
    base, _, *rest = reader.args
    return base is not node and not any(node in _nodes(argument) for argument in rest)


def _nodes(argument: Argument) -> Iterable[Argument]:
    return argument if isinstance(argument, (tuple, list)) else (argument,)


def _give_packed(call: Node, node: Node, q: Node, scale: Node) -> None:
    base, caches, *rest = call.args
    assert isinstance(caches, (tuple, list))
    given = call.args[_TOKEN_SCALES]
    assert isinstance(given, (tuple, list))
    token_scales = [scale if c is node else g for c, g in zip(caches, given or [None] * len(caches), strict=True)]
    rest[_TOKEN_SCALES - 2] = token_scales
    call.args = (base, [q if cache is node else cache for cache in caches], *rest)


def _by_evaluation(readers: list[Node]) -> list[list[Node]]:
    groups: dict[int | None, list[Node]] = {}
    for reader in readers:
        groups.setdefault(evaluation_of(reader), []).append(reader)
    return list(groups.values())


def _unpacked(graph: fx.Graph, q: Node, scale: Node, node: Node, evaluation: int | None) -> Node:
    """Return what the kernels see of a packed value, in plain aten and in the dtype that it had."""
    dtype = node.meta["val"].dtype
    wide = emit(graph, aten._to_copy.default, (q,), evaluation, {"dtype": torch.float32})
    column = emit(graph, aten.unsqueeze.default, (scale, -1), evaluation)
    value = emit(graph, aten.mul.Tensor, (wide, column), evaluation)
    if dtype == torch.float32:
        return value
    return emit(graph, aten._to_copy.default, (value,), evaluation, {"dtype": dtype})
