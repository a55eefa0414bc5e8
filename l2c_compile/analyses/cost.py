"""What the nodes of a graph cost: multiply-adds and bytes, which are counted, and times, which are measured by form."""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor, fx
from torch._ops import OpOverload
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException
from torch.fx.node import Node
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from l2c_compile.graphs.forms import form_of
from l2c_compile.graphs.loop_graph import EvaluationPrice
from l2c_compile.graphs.marks import INPUT_PORT, site_marks
from l2c_compile.graphs.nodes import infer, num_bytes
from l2c_compile.graphs.skeleton import LoopSkeleton


class MultiplyAdds:
    """Counts the multiply-adds of matrix products, convolutions and attention; elementwise work counts as none.

    It uses torch's own formulas on fake tensors and asks once for each form of operation.
    """

    def __init__(self) -> None:
        self._known: dict[object, int] = {}

    def of(self, node: Node) -> int:
        """Return the multiply-adds of one node."""
        if node.op != "call_function" or not isinstance(node.target, torch._ops.OpOverload):
            return 0
        if node.target.namespace != "aten" or not _may_multiply(node.target):
            return 0
        key = (node.target, _work_key((node.args, node.kwargs)))
        if key not in self._known:
            self._known[key] = _count(node)
        return self._known[key]

    def total(self, nodes: Iterable[Node]) -> int:
        """Return the multiply-adds of several nodes."""
        return sum(map(self.of, nodes))


def bytes_moved(node: Node) -> int:
    """Return the bytes that a node reads and writes when it runs by itself; a view moves none."""
    if node.op != "call_function" or not isinstance(node.target, torch._ops.OpOverload) or node.target.is_view:
        return 0
    return num_bytes(node) + sum(map(num_bytes, node.all_input_nodes))


def prices_of(skeleton: LoopSkeleton) -> tuple[EvaluationPrice, ...]:
    """Return the price of each evaluation of a loop that computes everything."""
    count = MultiplyAdds()
    prices: dict[int, EvaluationPrice] = {}
    for evaluation in skeleton.evaluations():
        sizes: Counter[str] = Counter()
        for mark in site_marks(evaluation.graph):
            if mark.port != INPUT_PORT:
                sizes[mark.site] += num_bytes(mark.node)
        prices[id(evaluation)] = EvaluationPrice(count.total(evaluation.graph.nodes), dict(sizes))
    return tuple(prices[id(call.graph)] for call in skeleton.calls)


class NodeTimes:
    """Measures how long each form of operation takes in eager mode, on tensors of that form with random values.

    Args:
        device: the device to measure on; not the meta device.
        rounds: how often each form is measured; the fastest round counts.
    """

    def __init__(self, device: torch.device, rounds: int = 3) -> None:
        self.device = device
        self.rounds = rounds
        self._known_s: dict[object, float] = {}
        self._generator = torch.Generator(device).manual_seed(0)

    def measure(self, nodes: Iterable[Node]) -> None:
        """Measure every form among the nodes that is not known yet.

        The rounds are taken one after another over all forms, so that a slow moment hits no form in all of them.
        """
        new: dict[object, Node] = {}
        for node in nodes:
            if node.op == "call_function" and (key := _timing_key(node)) not in self._known_s:
                new.setdefault(key, node)
        with torch.no_grad():
            for _ in range(self.rounds):
                for key, node in new.items():
                    self._known_s[key] = min(self._time(node), self._known_s.get(key, float("inf")))

    def of(self, node: Node) -> float:
        """Return the time of one node in seconds; it is 0 for a node that is no operation.

        Raises:
            KeyError: if its form was not measured.
        """
        return self._known_s[_timing_key(node)] if node.op == "call_function" else 0.0

    def total(self, nodes: Iterable[Node]) -> float:
        """Return the time of several nodes, one after another, in seconds."""
        return sum(map(self.of, nodes))

    def _time(self, node: Node) -> float:
        args, kwargs = fx.node.map_arg((node.args, node.kwargs), lambda argument: self._real(argument.meta["val"]))
        call: Callable[..., object] = node.target  # type: ignore[assignment]

        def run(times: int) -> float:
            self._wait()
            start = time.perf_counter()
            for _ in range(times):
                call(*args, **kwargs)
            self._wait()
            return (time.perf_counter() - start) / times

        run(1)
        once = min(run(1), run(1))
        return run(int(_ROUND_S / once)) if once < _ROUND_S / 2 else once

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def _real(self, value: Any) -> Any:  # noqa: ANN401 - a tensor, or what a node returns that is none
        if isinstance(value, (tuple, list)):
            return type(value)(map(self._real, value))
        if not isinstance(value, Tensor):
            return value
        # Zeros are valid indices into anything.
        real = torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device=self.device).zero_()
        return real.normal_(generator=self._generator) if real.is_floating_point() else real


_ROUND_S = 1e-3


def _timing_key(node: Node) -> object:
    # Numbers among the arguments change from evaluation to evaluation: where a slice starts, what x is scaled by.
    return node.target, tuple(form_of(a.meta.get("val")) for a in node.all_input_nodes), form_of(node.meta.get("val"))


def _work_key(argument: object) -> object:
    if isinstance(argument, Node):
        return _sizes(argument.meta.get("val"))
    if isinstance(argument, (tuple, list)):
        return tuple(map(_work_key, argument))
    if isinstance(argument, dict):
        return tuple((name, _work_key(value)) for name, value in argument.items())
    return repr(argument)


def _sizes(value: object) -> object:
    if isinstance(value, (tuple, list)):
        return tuple(map(_sizes, value))
    return (tuple(value.shape), value.dtype) if isinstance(value, Tensor) else type(value)


def _may_multiply(target: torch._ops.OpOverload[Any, Any]) -> bool:
    """Return whether torch has a formula for an operator, or takes it apart into others that may have one."""
    composite = torch._C._dispatch_has_kernel_for_dispatch_key(
        target.name(),  # type: ignore[no-untyped-call]
        "CompositeImplicitAutograd",
    )
    return target.overloadpacket in _FORMULAS or composite


def _attention_flops(query: Any, qkv_weight: Any, proj_weight: Any) -> int:  # noqa: ANN401 - sizes or tensors
    """Return twice the multiply-adds of attention of ``query`` to itself, projections included."""
    *batch, num_tokens, width = query.shape
    tokens = math.prod(batch) * num_tokens
    return int(2 * tokens * (qkv_weight.numel() + proj_weight.numel() + 2 * num_tokens * width))


def _native_attention_flops(
    query: Any,  # noqa: ANN401
    key: object,
    value: object,
    embed_dim: int,
    num_head: int,
    qkv_weight: Any,  # noqa: ANN401
    qkv_bias: object,
    proj_weight: Any,  # noqa: ANN401
    *rest: object,
    **named: object,
) -> int:
    return _attention_flops(query, qkv_weight, proj_weight)


def _encoder_layer_flops(src: Any, embed_dim: int, num_heads: int, *weights: Any, **named: object) -> int:  # noqa: ANN401
    """Return twice the multiply-adds of an ``nn.TransformerEncoderLayer``: attention, and the two layers behind it."""
    matrices = [weight for weight in weights if isinstance(weight, Tensor) and weight.dim() == 2]
    qkv_weight, proj_weight, *layers = matrices[:4]
    tokens = int(src.numel()) // embed_dim
    return _attention_flops(src, qkv_weight, proj_weight) + 2 * tokens * sum(weight.numel() for weight in layers)


_FORMULAS: Mapping[object, Callable[..., int]] = {
    **flop_registry,
    torch.ops.aten._native_multi_head_attention: _native_attention_flops,
    torch.ops.aten._transformer_encoder_layer_fwd: _encoder_layer_flops,
}
"""The formulas of torch, and those of the operators that fuse attention with its projections."""


def _count(node: Node) -> int:
    # How large a result is may depend on values; what comes up to there is counted.
    with _FlopCount() as count, suppress(DynamicOutputShapeException, DataDependentOutputException):
        infer(node.target, node.args, node.kwargs)
    return int(count.total // 2)


class _FlopCount(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Adds up torch's formulas over what runs in this thread.

    Torch's ``FlopCounterMode`` hooks every module of the process meanwhile, those that other threads run included.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.total: int = 0

    @classmethod
    def is_infra_mode(cls) -> bool:
        """Return whether Dynamo shall pass over the mode: with any other mode on, it compiles nothing in any thread."""
        return True

    def __torch_dispatch__(
        self,
        func: OpOverload[Any, Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:  # noqa: ANN401 - whatever the operator returns
        given = dict(kwargs or {})
        # What torch asks of a tensor itself; no work.
        if func.namespace == "prim":
            return func(*args, **given)
        with self:
            parts = func.decompose(*args, **given)
        if parts is not NotImplemented:
            return parts
        result = func(*args, **given)
        formula = _FORMULAS.get(func.overloadpacket)
        if formula is not None:
            self.total += int(formula(*args, **given, out_val=result))
        return result
