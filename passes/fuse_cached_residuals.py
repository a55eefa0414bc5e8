"""Add what earlier evaluations kept to the residual stream, and norm it for the next layer, in one kernel.

    p = mul(gate, f5); h = add(add(x, p), g5)            h, y = cached_residual_norm(x, [f5, g5], [gate, None], ...)
    n = layer_norm(h); y = add(mul(n, add(s, 1)), t)

A stream is one pass over a tensor of x's size. Where a product is fused into its addition and a modulation into its
norm, and nothing else, k terms take 3 k streams and the norm 2 more. The kernel takes k + 2, and 1 more for y. So it
saves 2 k - 2 streams, or 2 k - 1 with a norm: one term alone is left as it is.

The kernel adds in float32 and rounds once, to the dtype of x; the graph before rounds after every operation. With u
half the eps of float32, h is within ((k + 6) u + eps / 2) of the exact sum over absolute values. ``tests/exact.py``
derives this bound and that of the norm, and holds the kernels to them.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import ClassVar

import torch
from torch import Tensor
from torch.fx.node import Argument, Node

from l2c_compile.analyses.kept import cache_work, is_kept, made_of_kept_values
from l2c_compile.graphs.facts import Fact
from l2c_compile.graphs.forms import TensorForm
from l2c_compile.graphs.loop_graph import LoopGraph
from l2c_compile.graphs.nodes import (
    arguments_of,
    emit,
    evaluation_of,
    fits,
    outputs_of,
    packet_of,
)
from l2c_compile.graphs.strides import relaid
from l2c_compile.kernels._launch import FLOATS, MAX_DIM
from l2c_compile.kernels.cached_residual import cached_residual_op
from l2c_compile.kernels.cached_residual_norm import cached_residual_norm_op
from l2c_compile.passes.base import LoopPass, Numerics, PassReport, Reason

aten = torch.ops.aten

_ADD, _NORM = cached_residual_op._opoverload, cached_residual_norm_op._opoverload

_ADDITIONS = frozenset({aten.add.Tensor, aten.sub.Tensor})
_CASTS = frozenset({aten._to_copy.default, aten.to.dtype, aten.to.dtype_layout})


@dataclass(frozen=True)
class _Term:
    """A term ``weight * gate * (scale * cache + shift)`` of a sum."""

    cache: Node
    weight: float = 1.0
    gate: Node | None = None
    scale: Node | None = None
    shift: Node | None = None
    peeled: tuple[Node, ...] = ()
    """The nodes that apply the factors, or cast, outermost first."""
    is_summand: bool = True
    """Whether the sum adds it as it is, factors included."""

    @property
    def is_plain(self) -> bool:
        """Whether there are no factors."""
        return self.weight == 1.0 and self.gate is None and self.is_bare

    @property
    def as_base(self) -> Node:
        """The term as the base of a sum: without its casts, but with its factors, which the op has no place for."""
        return self.cache if self.is_plain or not self.peeled else self.peeled[0]

    @property
    def is_bare(self) -> bool:
        """Whether nothing is between the weight and the cached value but a gate: then it commutes with sums."""
        return self.scale is None and self.shift is None


@dataclass(frozen=True)
class _Norm:
    """The norm of a sum, and the modulation behind it."""

    last: Node
    """The node that makes the final value."""
    nodes: tuple[Node, ...]
    kind: str
    eps: float
    weight: Node | None = None
    bias: Node | None = None
    mod_scale: Node | None = None
    mod_shift: Node | None = None


@dataclass
class _Sum:
    """A sum of ``base`` and terms, and the norm that follows it, if any."""

    root: Node
    """The last addition."""
    base: Node
    terms: list[_Term]
    nodes: set[Node] = field(default_factory=set)
    """The nodes that compute the sum in the graph, the root included."""
    norm: _Norm | None = None

    @property
    def streams_saved(self) -> int:
        return 2 * len(self.terms) - (2 if self.norm is None else 1)

    @property
    def last(self) -> Node:
        return self.root if self.norm is None else self.norm.last


@dataclass(frozen=True)
class FuseCachedResiduals(LoopPass):
    """Replace sums of the residual stream and kept values, and the norm that follows, by the ops of ``kernels/``."""

    devices: frozenset[str] = frozenset({"cuda"})
    """The devices on which to do so. On a CPU Inductor fuses the graph into loops, which an op would split."""

    name: ClassVar[str] = "fuse-cached-residuals"
    needs: ClassVar[frozenset[Fact]] = frozenset({Fact.SITES_LOWERED, Fact.NO_DEAD_NODES})
    breaks: ClassVar[frozenset[Fact]] = frozenset({Fact.NO_DEAD_NODES})
    numerics: ClassVar[Numerics] = Numerics.ROUNDING
    is_followed_by_proof: ClassVar[bool] = False

    def rewrite(self, graph: LoopGraph, report: PassReport) -> None:  # noqa: D102
        if not any(_is_on(node, self.devices) for node in graph.graph.nodes):
            first = next(iter(graph.graph.nodes))
            kernels = ", ".join(sorted(self.devices))
            report.leave(first, Reason("is a graph without tensors on {}, where the kernels pay", kernels))
            return
        finder = _SumFinder(graph, self.devices)
        # A sum may be the base of the next, so the first is replaced first: the next then finds the op in its place.
        renamed: dict[Node, Node] = {}
        for found in reversed(list(finder.sums())):
            report.note(found.root, _why_not(found) or _replace(graph, found, renamed))


def _why_not(found: _Sum) -> Reason | None:
    value: Tensor = found.root.meta["val"]
    if value.dim() not in (2, 3) or value.dtype not in FLOATS:
        return Reason("is {}; the kernel takes (B, T, D) floats", TensorForm.of(value))
    if found.streams_saved < 1:
        return Reason("adds one kept value and no norm follows: nothing to save")
    return None


class _SumFinder:
    """Finds the sums and norms in a loop graph; changes nothing."""

    def __init__(self, program: LoopGraph, devices: frozenset[str]) -> None:
        self.nodes = list(program.graph.nodes)
        self.devices = devices
        self.early = program.known_before_the_loop()
        self.kept_work = made_of_kept_values(self.nodes, self.early, _CASTS)
        # This work is left to PlanMemory, which moves it to where it frees memory.
        self.ahead = cache_work(self.nodes)

    def sums(self) -> Iterator[_Sum]:
        """Yield the largest sums with a kept term, last to first."""
        inside: set[Node] = set()
        for node in reversed(self.nodes):
            is_sum = self._is_sum(node)
            if node in inside or not (is_sum or self._is_rounded_sum(node)):
                continue
            if node in self.ahead or node in self.kept_work:
                continue
            leaves: list[_Term] = []
            nodes: set[Node] = set()
            self._split(_Term(node if is_sum else node.all_input_nodes[0]), leaves, nodes, node)
            # The kernel's result has the dtype of the base. A term without factors is the best base, because the
            # factors of a base stay in the graph.
            fitting = [t for t in leaves if t.is_summand and fits(t.as_base, node)]
            bases = [t for t in fitting if not self._is_kept(t.as_base, node)]
            if bases or is_sum:
                inside |= nodes
            if bases and any(self._is_kept(term.cache, node) for term in leaves):
                base = min(bases, key=lambda term: not term.is_plain)
                terms = [term for term in leaves if term is not base]
                gone = nodes.union((node,), *(term.peeled for term in leaves if term is not base or term.is_plain))
                found = _Sum(node, base.as_base, terms, gone)
                found.norm = self._norm_of(found)
                yield found

    def _is_rounded_sum(self, node: Node) -> bool:
        """Return whether a node casts a sum that nobody else reads, as where a bfloat16 stream is added in float32."""
        source = node.args[0] if node.target in _CASTS else None
        return isinstance(source, Node) and self._is_inner(source, node) and self._is_sum(source) and _is_float(node)

    def _is_sum(self, node: Node) -> bool:
        """Return whether a node adds two tensors of its own shape in an evaluation on one of the devices."""
        if node.target not in _ADDITIONS or evaluation_of(node) is None or node in self.early:
            return False
        value = node.meta["val"]
        return value.device.type in self.devices and all(
            isinstance(a, Node) and _shape(a) == value.shape and _is_float(a) for a in node.args
        )

    def _is_kept(self, value: Node, reader: Node) -> bool:
        return value in self.kept_work or (value not in self.early and is_kept(value, reader))

    def _split(self, term: _Term, leaves: list[_Term], nodes: set[Node], root: Node) -> None:
        """Split a term into those it is a sum of, as far as no other node reads the sums in between."""
        node = term.cache
        if node is not root and not self._is_inner(node, root):
            leaves.append(term)
            return
        if term.is_bare and self._is_sum(node) and not self._is_better_kept_whole(node):
            nodes.update((node, *term.peeled))
            sign = float(arguments_of(node)["alpha"]) * (-1 if node.target is aten.sub.Tensor else 1)  # type: ignore[arg-type]
            for argument, factor in zip(node.args, (1.0, sign), strict=True):
                assert isinstance(argument, Node)
                is_summand = term.is_plain and factor == 1.0
                part = replace(term, cache=argument, weight=term.weight * factor, peeled=(), is_summand=is_summand)
                self._split(part, leaves, nodes, root)
            return
        inner = self._peel(term, root)
        if inner is None:
            leaves.append(term)
        else:
            self._split(replace(inner, peeled=(*term.peeled, node)), leaves, nodes, root)

    def _is_inner(self, node: Node, root: Node) -> bool:
        """Return whether only the sum at ``root`` needs the node, so that the op can take its place as well."""
        same = evaluation_of(node) == evaluation_of(root) and node not in self.early
        return same and node.op == "call_function" and len(node.users) == 1

    def _is_better_kept_whole(self, node: Node) -> bool:
        """Return whether a sum of kept values is better added where they are made: one tensor is then kept, not two."""
        if node not in self.kept_work:
            return False
        alone = [value for value in self._kept_leaves(node) if all(self._is_over(user, node) for user in value.users)]
        return len(alone) > 1

    def _is_over(self, user: Node, node: Node) -> bool:
        """Return whether what a user of a kept value does could be done before the evaluation of ``node``."""
        return user in self.kept_work or evaluation_of(user) is None or is_kept(user, node)

    def _kept_leaves(self, node: Node) -> set[Node]:
        stack, leaves = [node], set[Node]()
        while stack:
            for argument in stack.pop().all_input_nodes:
                if argument in self.kept_work:
                    stack.append(argument)
                elif argument not in self.early:
                    leaves.add(argument)
        return leaves

    def _peel(self, term: _Term, root: Node) -> _Term | None:
        """Return a term without its outermost factor or shift; None if the kernel has no argument for that."""
        node = term.cache
        packet = packet_of(node)
        if node.target in _CASTS:
            return self._through_cast(term, root)
        if packet is aten.neg:
            return _weighted(term, -1.0, node.args[0])
        if packet in (aten.mul, aten.div) and len(node.args) == 2 and isinstance(node.args[1], (int, float)):
            number = float(node.args[1])
            return _weighted(term, number if packet is aten.mul else 1.0 / number, node.args[0]) if number else None
        if node.target in (aten.mul.Tensor, aten.add.Tensor) and not node.kwargs:
            value, operand = self._value_and_operand(node, root)
            if value is not None and operand is not None:
                return _with_operand(term, value, operand, is_product=node.target is aten.mul.Tensor)
        return None

    def _through_cast(self, term: _Term, root: Node) -> _Term | None:
        """Return a term without its cast to the stream's dtype or a finer one: the kernel adds in float32."""
        source, target = term.cache.args[0], term.cache.meta["val"].dtype
        if not isinstance(source, Node) or not _is_float(source) or source.meta["val"].device != _device(root):
            return None
        return replace(term, cache=source) if target in (root.meta["val"].dtype, torch.float32) else None

    def _value_and_operand(self, node: Node, root: Node) -> tuple[Node | None, Node | None]:
        """Return the tensor of the stream's shape and the operand that is broadcast to it, in this order."""
        a, b = node.args
        for value, other in ((a, b), (b, a)):
            if not isinstance(value, Node) or not isinstance(other, Node):
                continue
            operand = self._operand(other, root)
            if operand is not None and value not in self.early and _shape(value) == _shape(root) and _is_float(value):
                return value, operand
        return None, None

    def _operand(self, node: Node | None, root: Node) -> Node | None:
        """Return a gate, scale or shift as the kernel takes it, without its expansion; None if it is none."""
        while node is not None and node.target is aten.expand.default:
            node = node.args[0] if isinstance(node.args[0], Node) else None
        if node is None or not _is_float(node):
            return None
        value, stream = node.meta["val"], root.meta["val"]
        is_smaller = node in self.early or value.numel() < stream.numel()
        pairs = zip(reversed(value.shape), reversed(stream.shape), strict=False)
        broadcasts = value.dim() <= stream.dim() and all(size in (1, full) for size, full in pairs)
        return node if is_smaller and broadcasts and value.device == stream.device else None

    def _norm_of(self, found: _Sum) -> _Norm | None:
        """Return the norm over the channels of a sum, with its modulation, if all other users come after them."""
        root = found.root
        if root.meta["val"].shape[-1] > MAX_DIM or root.meta["val"].dim() not in (2, 3):
            return None
        for user in sorted(root.users):
            first = self._only_user(user) if user.target in _CASTS and _is_float(user) else user
            norm = None if first is None else self._read_norm(first, user, found)
            if norm is None:
                continue
            others = [other for other in root.users if other not in norm.nodes]
            if all(norm.last < other for other in others):
                return norm
        return None

    def _read_norm(self, node: Node, user: Node, found: _Sum) -> _Norm | None:
        if evaluation_of(node) != evaluation_of(found.root):
            return None
        packet = packet_of(node)
        if packet not in (aten.layer_norm, aten.native_layer_norm, aten.rms_norm):
            return None
        given = arguments_of(node)
        channels = found.root.meta["val"].shape[-1]
        if given["input"] is not (user if user is not node else found.root) or given["normalized_shape"] != [channels]:
            return None
        kind = "rms" if packet is aten.rms_norm else "layer"
        eps = given["eps"] if given["eps"] is not None else torch.finfo(node.args[0].meta["val"].dtype).eps  # type: ignore[union-attr]
        last: Node | None = node
        if packet is aten.native_layer_norm:
            last = next(iter(node.users)) if len(node.users) == 1 else None
            if last is None or last.args[1] != 0:
                return None
        weight, bias = given["weight"], given.get("bias")
        affine = [each for each in (weight, bias) if each is not None]
        if not all(isinstance(each, Node) and self._operand(each, found.root) is each for each in affine):
            return None
        assert isinstance(eps, float)
        nodes = tuple(dict.fromkeys((user, node, last)))
        norm = _Norm(last, nodes, kind, eps, weight, bias)  # type: ignore[arg-type]
        return self._with_modulation(norm, found.root)

    def _with_modulation(self, norm: _Norm, root: Node) -> _Norm | None:
        """Return the norm with as much of the modulation and casts after it as the kernel computes.

        None if no point on the way has a value in the form of the stream.
        """
        best = norm if fits(norm.last, root) else None
        while (grown := self._one_more(norm, root)) is not None:
            norm = grown
            if fits(norm.last, root):
                best = norm
        return best

    def _one_more(self, norm: _Norm, root: Node) -> _Norm | None:
        user = self._only_user(norm.last)
        if user is None or evaluation_of(user) != evaluation_of(root):
            return None
        grown = replace(norm, last=user, nodes=(*norm.nodes, user))
        if user.target in _CASTS:
            return grown if user.meta["val"].dtype in FLOATS else None
        if norm.mod_shift is not None or user.kwargs or _shape(user) != _shape(root):
            return None
        if user.target not in (aten.mul.Tensor, aten.add.Tensor):
            return None
        a, b = user.args
        operand = (
            self._operand(b if a is norm.last else a, root) if isinstance(a, Node) and isinstance(b, Node) else None
        )
        if operand is None or a is b:
            return None
        if user.target is aten.add.Tensor:
            return replace(grown, mod_shift=operand)
        scale = _more_than_one(operand)
        if scale is not None and norm.mod_scale is None and self._operand(scale, root) is scale:
            return replace(grown, mod_scale=scale)
        if norm.weight is None and norm.bias is None and norm.mod_scale is None:
            return replace(grown, weight=operand)
        return None

    def _only_user(self, node: Node) -> Node | None:
        return next(iter(node.users)) if len(node.users) == 1 else None


def _weighted(term: _Term, number: float, cache: Argument) -> _Term | None:
    # A weight multiplies the shift as well, so a number that does not cannot become one.
    if not isinstance(cache, Node) or not _is_float(cache) or term.shift is not None or not math.isfinite(number):
        return None
    return replace(term, cache=cache, weight=term.weight * number)


def _with_operand(term: _Term, value: Node, operand: Node, *, is_product: bool) -> _Term | None:
    if not is_product:
        free = term.shift is None and term.scale is None
        return replace(term, cache=value, shift=operand) if free else None
    if term.gate is None and term.shift is None and term.scale is None:
        return replace(term, cache=value, gate=operand)
    return replace(term, cache=value, scale=operand) if term.scale is None else None


def _more_than_one(operand: Node) -> Node | None:
    """Return s where the operand is ``1 + s``."""
    if operand.target in (aten.add.Tensor, aten.add.Scalar) and not operand.kwargs and operand.args[1] == 1:
        return operand.args[0] if isinstance(operand.args[0], Node) else None
    return None


def _replace(program: LoopGraph, found: _Sum, renamed: dict[Node, Node]) -> Reason | None:
    """Replace a sum by the op, or return why that is not possible."""
    norm, graph = found.norm, program.graph
    old = [found.root] if norm is None else [found.root, norm.last]
    inside = found.nodes.union(norm.nodes if norm else ())
    contiguous = {node: torch.empty_like(node.meta["val"], memory_format=torch.contiguous_format) for node in old}
    moved = {node: value for node, value in contiguous.items() if value.stride() != node.meta["val"].stride()}
    values = relaid(moved, inside) if moved else {}
    if values is None:
        return Reason("is read in its memory layout, which is not the contiguous one that the kernel writes")
    with graph.inserting_before(found.last):
        args = _arguments(program, found, renamed)
        call = emit(graph, _ADD if norm is None else _NORM, args, evaluation_of(found.root))
    # The op belongs to no module: as a part of its own it makes no variants of the parts around it.
    call.meta["nn_module_stack"] = {}
    new = (call,) if norm is None else outputs_of(call)
    for before, after in zip(old, new, strict=True):
        if "sites" in before.meta:
            after.meta["sites"] = before.meta["sites"]
        before.replace_all_uses_with(after, delete_user_cb=lambda user: user not in inside)
        renamed[before] = after
    for node, value in values.items():
        node.meta["val"] = value
    return None


def _arguments(program: LoopGraph, found: _Sum, renamed: dict[Node, Node]) -> tuple[Argument, ...]:
    stream = found.root.meta["val"].dim()

    def operand(node: Node | None) -> Node | None:
        # Two dimensions are tokens and channels to torch, but batch and channels to the kernel.
        if node is None or node.meta["val"].dim() != 2 or stream != 3:
            return node
        return emit(program.graph, aten.unsqueeze.default, (node, 0), evaluation_of(found.root))

    def column(nodes: list[Node | None]) -> list[Node | None]:
        return [operand(node) for node in nodes] if any(nodes) else []

    terms = found.terms
    weights = [term.weight for term in terms]
    args: tuple[Argument, ...] = (
        renamed.get(found.base, found.base),
        [renamed.get(term.cache, term.cache) for term in terms],
        column([term.gate for term in terms]),
        column([term.scale for term in terms]),
        column([term.shift for term in terms]),
        weights if any(weight != 1.0 for weight in weights) else [],
        [],
    )
    norm = found.norm
    if norm is None:
        return args
    modulation = (operand(norm.mod_scale), operand(norm.mod_shift))
    return (*args, norm.kind, norm.eps, operand(norm.weight), operand(norm.bias), *modulation)


def _shape(node: Node) -> torch.Size | None:
    value = node.meta.get("val")
    return value.shape if isinstance(value, Tensor) else None


def _device(node: Node) -> torch.device:
    device: torch.device = node.meta["val"].device
    return device


def _is_on(node: Node, devices: frozenset[str]) -> bool:
    value = node.meta.get("val")
    return isinstance(value, Tensor) and value.device.type in devices


def _is_float(node: Node) -> bool:
    value = node.meta.get("val")
    return isinstance(value, Tensor) and value.dtype in FLOATS
