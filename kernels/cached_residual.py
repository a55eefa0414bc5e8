"""cached_residual: x + sum_i weight_i * gate_i * (scale_i * cache_i + shift_i), one pass over memory.

    x (B, T, D) or (N, D), any strides          caches[i]: as x, or packed with token_scales[i] (B, T) or (N,)
    gates[i], scales[i], shifts[i]: (B, D), (B, 1, D), (D,), (1,), () or whatever broadcasts to x, any strides

A run of skipped sublayers is this sum: the caches were read once, the stream is read and written once, however many
terms there are. Sums are float32 and rounded once, to the dtype of x, which the result keeps whatever the gates are.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from l2c_compile.kernels._launch import (
    Launch,
    Layout,
    Terms,
    Tile,
    add_terms,
    add_terms_reference,
    jit,
    load_tile,
    next_power_of_2,
    no_gradient,
    plan_sum,
    refuse_backward,
    runs_triton,
    store_tile,
    tile_position,
    tl,
)


def decompose_cached_residual(x: Tensor, *lists: Sequence[Any]) -> Tensor:
    """Compute the sum in plain torch: the reference. It has a gradient, and Inductor fuses it into one loop on a CPU.

    The arguments are those of ``torch.ops.l2c.cached_residual``.
    """
    return add_terms_reference(x, Terms.of(*lists)).to(x.dtype)


@jit
def _cached_residual_kernel(
    x,
    terms,
    num_terms,
    out_ptr,
    num_tokens,
    dim,
    NUM_TERMS: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    place = tile_position(num_tokens, dim, BLOCK_T, BLOCK_D)
    # [BLOCK_T, BLOCK_D]
    total = load_tile(x, place, BLOCK_T, BLOCK_D)
    total = add_terms(total, terms, num_terms, place, NUM_TERMS, GROUP, BLOCK_T, BLOCK_D)
    store_tile(out_ptr, total, place)


def plan_cached_residual(x: Tensor, terms: Terms, out: Tensor) -> list[Launch]:
    """Return the launches that write the sum to ``out`` (contiguous, of the shape of ``x``), in order."""
    return plan_sum(_cached_residual_kernel, _tile(Layout.of(x)), x, terms, out)


def _tile(layout: Layout) -> Tile:
    # Channels: the largest power of two in the width, so that no lane idles; 1152 is 9 x 128. A width without one gets
    # at most 256, where the idle part of the last tile is small.
    divisor = layout.dim & -layout.dim
    block_dim = min(divisor, 1024) if divisor >= 128 else min(next_power_of_2(layout.dim), 256)
    # Elements: 16 a thread are two 16-byte loads a term, enough in flight to reach the memory's bandwidth; 8 where the
    # stream is so small that an H100 (132 multiprocessors) would otherwise get fewer than 8 programs each.
    elements = 2048 if layout.num_rows * layout.dim >= 2048 * 1024 else 1024
    # Tokens: the rest of the tile. A gate that does not vary along them comes from beyond the L1 cache once a tile.
    return Tile(min(elements // block_dim, next_power_of_2(layout.num_tokens)), block_dim)


@torch.library.custom_op("l2c::cached_residual", mutates_args=(), schema=f"(Tensor x, {Terms.SCHEMA}) -> Tensor")
def cached_residual_op(x: Tensor, *lists: Sequence[Any]) -> Tensor:
    """Compute the sum; passes emit this op. Each list has one entry a term or is empty. The result is contiguous."""
    terms = Terms.of(*lists)
    terms.check("cached_residual", x)
    if not runs_triton(x):
        result = decompose_cached_residual(x, *lists)
        # Without terms the reference returns x itself, which an op must not.
        return x.clone(memory_format=torch.contiguous_format) if result is x else result.contiguous()
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    for launch in plan_cached_residual(x, terms, out):
        launch.run(x.device)
    return out


@cached_residual_op.register_fake
def _(x: Tensor, *lists: Sequence[Any]) -> Tensor:
    Terms.of(*lists).check("cached_residual", x)
    return torch.empty_like(x, memory_format=torch.contiguous_format)


cached_residual_op.register_autograd(refuse_backward(no_gradient("cached_residual")))


def cached_residual(
    x: Tensor,
    caches: Sequence[Tensor],
    gates: Sequence[Tensor | None] | None = None,
    scales: Sequence[Tensor | None] | None = None,
    shifts: Sequence[Tensor | None] | None = None,
    weights: Sequence[float] | None = None,
    token_scales: Sequence[Tensor | None] | None = None,
) -> Tensor:
    """Return ``x + sum_i weight_i * gate_i * (scale_i * cache_i + shift_i)``, rounded once.

    Args:
        x: (B, T, D) or (N, D) in float32, bfloat16 or float16. Rows with a last stride of 1 are read at full speed;
            any other strides are read where they lie as well, but not coalesced.
        caches: one tensor of the shape of ``x`` a term, any float dtype; or what ``pack_cache`` returned.
        gates: one a term: (B, D), (B, 1, D), (D,), (1,), () or whatever broadcasts to ``x``; None is 1.
        scales: as gates, applied to the cached value; None is 1.
        shifts: as gates, added after the scale; None is 0.
        weights: one number a term.
        token_scales: (B, T) or (N,), for packed caches and for no others.

    Returns:
        A new contiguous tensor with the shape and dtype of ``x``.

    Raises:
        KernelError: if something does not fit; or, in the backward, always, because there is none.
    """
    terms = Terms.of(caches, gates, scales, shifts, weights, token_scales)
    result: Tensor = cached_residual_op(x, *terms.lists)
    return result
