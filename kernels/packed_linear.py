"""packed_linear: a linear layer on a CPU that keeps its weight a second time, in the order oneDNN multiplies it in.

    y = act(x W^T + b)        x (..., K), weight (N, K), bias (N,) or None -> y (..., N)

A sampler multiplies with the same weights in every evaluation, so they are worth arranging once. MKL, which
``aten::linear`` calls for float32, arranges them in every call, and on processors that are not Intel's takes its slow
paths besides: 50 to 93 GFLOP/s against 220 for DiT shapes on one core of an AMD EPYC.

``act`` is applied to each tile while it is in the cache: 1.3 ms in place of 2.4 for the first half of a digits MLP.

The copy is made at the first call, and anew when the weight was written to, by its version counter. It is as large as
the weight and goes when the weight goes. Sums are float32 in both, in another order: ROUNDING.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from l2c_compile.errors import KernelError


class Activation(NamedTuple):
    """A function of one element that follows the product."""

    plain: Callable[[Tensor], Tensor]
    """The function itself, in torch."""
    onednn: tuple[str, str]
    """The name that oneDNN has for it, and the formula."""


functional = torch.nn.functional

ACTIVATIONS: Mapping[str, Activation] = {
    "none": Activation(lambda x: x, ("none", "")),
    "gelu": Activation(functional.gelu, ("gelu", "none")),
    "gelu_tanh": Activation(partial(functional.gelu, approximate="tanh"), ("gelu", "tanh")),
    "relu": Activation(functional.relu, ("relu", "")),
    "silu": Activation(functional.silu, ("swish", "")),
}


class _PackedWeight(NamedTuple):
    """A weight in oneDNN's order, for one number of rows."""

    weight: weakref.ref[Tensor]
    version: int
    memory: int
    """The address of the weight: assigning to ``weight.data`` changes it and leaves the version."""
    packed: Tensor


_copies: dict[tuple[int, int], _PackedWeight] = {}
"""The copies by identity of the weight and number of rows. The copies of a weight are dropped with it."""


def can_pack(weight: Tensor) -> bool:
    """Return whether this build and processor multiply with a packed weight of this dtype and device."""
    if weight.device.type != "cpu" or weight.dim() != 2 or not torch.backends.mkldnn.is_available():
        return False
    if weight.dtype == torch.bfloat16:
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    return weight.dtype == torch.float32


torch.library.define("l2c::packed_linear", "(Tensor x, Tensor weight, Tensor? bias, str act='none') -> Tensor")


@torch.library.impl("l2c::packed_linear", "CPU")
def packed_linear(x: Tensor, weight: Tensor, bias: Tensor | None, act: str = "none") -> Tensor:
    """Return ``act(torch.nn.functional.linear(x, weight, bias))`` in the dtype of ``x``; without a gradient.

    Raises:
        KernelError: if shapes or dtypes do not fit, weights of this dtype cannot be packed here, a gradient is wanted,
            or there is no such activation.
    """
    num_rows = x.numel() // max(1, x.shape[-1])
    copy = _copies.get((id(weight), num_rows))
    if (
        copy is None
        or copy.weight() is not weight
        or copy.version != weight._version
        or copy.memory != weight.data_ptr()
        or torch.is_grad_enabled()
    ):
        _check(x, weight, bias, act)
        if not num_rows or weight.is_inference():  # nothing to do, or nobody counts what is written to the weight
            return ACTIVATIONS[act].plain(functional.linear(x, weight, bias))
        copy = _pack(weight, num_rows)
    name, formula = ACTIVATIONS[act].onednn
    result: Tensor = torch.ops.mkldnn._linear_pointwise(x, copy.packed, bias, name, [], formula)
    return result


packed_linear_op = torch.ops.l2c.packed_linear.default


def _pack(weight: Tensor, num_rows: int) -> _PackedWeight:
    if not can_pack(weight):
        raise KernelError(
            f"packed_linear has no kernel for {weight.dtype} on this machine; compile without=('pack-weights',)"
        )
    key = id(weight), num_rows
    packed = torch.ops.mkldnn._reorder_linear_weight(weight.detach(), num_rows)
    copy = _PackedWeight(weakref.ref(weight, lambda _: _forget(key)), weight._version, weight.data_ptr(), packed)
    _copies[key] = copy
    return copy


def _forget(key: tuple[int, int]) -> None:
    copy = _copies.get(key)
    # A newer weight may have the same identity by now.
    if copy is not None and copy.weight() is None:
        del _copies[key]


@torch.library.register_fake("l2c::packed_linear")
def _(x: Tensor, weight: Tensor, bias: Tensor | None, act: str = "none") -> Tensor:
    _check(x, weight, bias, act)
    return x.new_empty((*x.shape[:-1], weight.shape[0]))


def _check(x: Tensor, weight: Tensor, bias: Tensor | None, act: str) -> None:
    if act not in ACTIVATIONS:
        raise KernelError(f"packed_linear knows the activations {', '.join(ACTIVATIONS)}, got {act!r}")
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, weight, bias)):
        raise KernelError("packed_linear has no gradient: samplers run without; train with the denoiser itself")
    if weight.dim() != 2 or x.dim() < 1 or x.shape[-1] != weight.shape[1]:
        raise KernelError(
            f"packed_linear wants x (..., K) and weight (N, K), got {list(x.shape)}, {list(weight.shape)}"
        )
    if bias is not None and bias.shape != weight.shape[:1]:
        raise KernelError(f"packed_linear wants a bias of {weight.shape[0]} elements, got {list(bias.shape)}")
    for name, tensor in (("weight", weight), ("bias", bias)):
        if tensor is not None and (tensor.dtype, tensor.device) != (x.dtype, x.device):
            found = f"{tensor.dtype} on {tensor.device}"
            raise KernelError(f"packed_linear wants {name} as x, {x.dtype} on {x.device}, got {found}")
