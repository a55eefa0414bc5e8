"""pack_cache: a cached value in one byte an element, with one scale a token; half the bytes of bfloat16.

    scale = max over D of |x| / largest value of the dtype        x (B, T, D) or (N, D) -> q, scale (B, T) or (N,)
    q = round(x / scale)

The other kernels read what this one writes: a cache of dtype fp8 e4m3 or int8 with its token_scales. It is not the
value that was there: |x - scale * q| is at most |x| / 16 in fp8 e4m3 (three bits of mantissa; scale / 1024 below
scale / 64) and scale / 2 in int8, plus the rounding of the division. Nobody packs unless asked to: APPROXIMATE.
x must be finite. D is at most 8192.
"""

from __future__ import annotations

import torch
from torch import Tensor

from l2c_compile.errors import KernelError
from l2c_compile.kernels._launch import (
    FLOATS,
    MAX_DIM,
    PACKED,
    Argument,
    Launch,
    Layout,
    Tile,
    check_stream,
    jit,
    load_tile,
    next_power_of_2,
    refuse_backward,
    runs_triton,
    store_tile,
    tile_position,
    tl,
)

LARGEST = {torch.float8_e4m3fn: 448.0, torch.int8: 127.0}
"""The largest value of each dtype; -128 is not used."""

SMALLEST_SCALE = 2.0**-126
"""The scale of a row of zeros, the smallest normal float32."""


def decompose_pack_cache(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Compute both in plain torch: the reference."""
    largest = LARGEST[dtype]
    values = x.to(torch.float32)
    scale = (values.abs().amax(-1) * (1.0 / largest)).clamp(min=SMALLEST_SCALE)
    quotient = (values / scale.unsqueeze(-1)).clamp(-largest, largest)
    return (quotient.round() if dtype == torch.int8 else quotient).to(dtype), scale


@jit
def _pack_cache_kernel(
    x,
    q_ptr,
    scale_ptr,
    num_tokens,
    dim,
    LARGEST_VALUE: tl.constexpr,
    SMALLEST: tl.constexpr,
    FP8: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    place = tile_position(num_tokens, dim, BLOCK_T, BLOCK_D)
    # [BLOCK_T, BLOCK_D]
    values = load_tile(x, place, BLOCK_T, BLOCK_D)
    # [BLOCK_T]
    scale = tl.maximum(tl.max(tl.abs(values), axis=1) * (1.0 / LARGEST_VALUE), SMALLEST)
    rows = place[0] * num_tokens + place[1]
    tl.store(scale_ptr + rows, scale, mask=place[1] < num_tokens)
    # The usual division may be off by two units in the last place, which changes a byte here and there.
    quotient = tl.div_rn(values, tl.broadcast_to(scale[:, None], (BLOCK_T, BLOCK_D)))
    quotient = tl.minimum(tl.maximum(quotient, -LARGEST_VALUE), LARGEST_VALUE)
    if FP8:
        store_tile(q_ptr, _encode_e4m3(quotient), place)
    else:
        # Adding 1.5 * 2^23 leaves no bits below 1: the sum is rounded to the nearest integer, ties to even.
        rounded = (quotient + 12582912.0) - 12582912.0
        store_tile(q_ptr, rounded.to(tl.int32), place)


@jit
def _encode_e4m3(value):
    """Round a float32 of at most 448 to fp8 e4m3, nearest, ties to even, as torch does; on any device."""
    bits = value.to(tl.uint32, bitcast=True)
    magnitude = bits & 0x7FFFFFFF
    # Normal: keep 3 of 23 bits of mantissa, rounding into the exponent where it carries, and move the bias from 127
    # to 7.
    normal = ((magnitude + 0x7FFFF + ((magnitude >> 20) & 1)) >> 20) - (120 << 3)
    # Below 2^-6 the unit is 2^-9, which is the last bit of a float32 around 2^14.
    shifted = magnitude.to(tl.float32, bitcast=True) + 16384.0
    subnormal = shifted.to(tl.uint32, bitcast=True) & 0xF
    byte = tl.where(magnitude < 0x3C800000, subnormal, normal)
    return (byte | ((bits >> 24) & 0x80)).to(tl.uint8)


def plan_pack_cache(x: Tensor, q: Tensor, scale: Tensor) -> list[Launch]:
    """Return the one launch that writes ``q`` and ``scale``, both contiguous."""
    # As for cached_residual_norm, which has a reduction over the row as well; there are no gates to share.
    layout, block_dim = Layout.of(x), max(next_power_of_2(x.shape[-1]), 16)
    fp8 = q.dtype == torch.float8_e4m3fn
    arguments: dict[str, Argument] = {
        "x": layout.operand(x, x),
        "q_ptr": q.view(torch.uint8) if fp8 else q,
        "scale_ptr": scale,
        "LARGEST_VALUE": LARGEST[q.dtype],
        "SMALLEST": SMALLEST_SCALE,
        "FP8": fp8,
    }
    return [layout.launch(_pack_cache_kernel, Tile(max(2048 // block_dim, 1), block_dim), arguments)]


@torch.library.custom_op("l2c::pack_cache", mutates_args=())
def pack_cache(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return ``x`` (B, T, D) or (N, D) packed as ``dtype`` (float8_e4m3fn or int8), and its scale a token, float32.

    Raises:
        KernelError: if ``x`` or ``dtype`` does not fit; or, in the backward, always, because there is none.
    """
    _check(x, dtype)
    if not runs_triton(x):
        packed, scale = decompose_pack_cache(x, dtype)
        return packed.contiguous(), scale.contiguous()
    packed, scale = _empty(x, dtype)
    if x.numel():
        for launch in plan_pack_cache(x, packed, scale):
            launch.run(x.device)
    return packed, scale


@pack_cache.register_fake
def _(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    _check(x, dtype)
    return _empty(x, dtype)


pack_cache.register_autograd(
    refuse_backward("l2c::pack_cache has no gradient, because rounding has none; train with unpacked caches")
)


def _check(x: Tensor, dtype: torch.dtype) -> None:
    check_stream("pack_cache", x)
    if x.dtype not in FLOATS:
        raise KernelError(f"pack_cache wants x in float32, bfloat16 or float16, got {x.dtype}")
    if dtype not in PACKED:
        raise KernelError(f"pack_cache wants dtype float8_e4m3fn or int8, got {dtype}")
    if not 0 < x.shape[-1] <= MAX_DIM:
        raise KernelError(f"pack_cache wants 1 to {MAX_DIM} channels, got {x.shape[-1]}")


def _empty(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    packed = torch.empty_like(x, dtype=dtype, memory_format=torch.contiguous_format)
    return packed, torch.empty(x.shape[:-1], dtype=torch.float32, device=x.device)
