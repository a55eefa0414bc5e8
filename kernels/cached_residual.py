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

from l2c_compile.errors import KernelError
from l2c_compile.kernels._launch import (
    Argument,
    Launch,
    Layout,
    Terms,
    accumulator,
    add_terms,
    add_terms_reference,
    align,
    check_stream,
    jit,
    load_tile,
    next_power_of_2,
    runs_triton,
    store_tile,
    tile_position,
    tl,
)

__all__ = ["cached_residual", "cached_residual_op", "decompose_cached_residual", "plan_cached_residual"]


def decompose_cached_residual(
    x: Tensor,
    caches: Sequence[Tensor],
    gates: Sequence[Tensor | None],
    scales: Sequence[Tensor | None] = (),
    shifts: Sequence[Tensor | None] = (),
    weights: Sequence[float] = (),
    token_scales: Sequence[Tensor | None] = (),
) -> Tensor:
    """Compute the sum in plain torch: the reference, and what a pass puts in the place of the op for Inductor on a CPU.

    The arguments are those of ``torch.ops.l2c.cached_residual``.
    """
    terms = Terms(caches, gates, scales, shifts, weights, token_scales)
    return add_terms_reference(x, terms).to(x.dtype)


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
    layout = Layout.of(x)
    block_tokens, block_dim = _tile(layout)
    programs = layout.num_batches * -(-layout.num_tokens // block_tokens) * -(-layout.dim // block_dim)
    chunks = terms.chunks()
    launches, source = [], x
    for chunk in chunks:
        # A sum that further launches go on with stays in float32, so that it is rounded once.
        last = chunk is chunks[-1]
        target = out if last else torch.empty_like(out, dtype=torch.float32)
        arguments: dict[str, Argument] = {
            "x": layout.operand(source, x),
            "terms": layout.terms(chunk, x),
            "num_terms": len(chunk),
            "out_ptr": target,
            "num_tokens": layout.num_tokens,
            "dim": layout.dim,
            "NUM_TERMS": len(chunk),
            "GROUP": chunk.group(),
            "BLOCK_T": block_tokens,
            "BLOCK_D": block_dim,
        }
        launches.append(Launch(_cached_residual_kernel, programs, arguments, num_warps=4))
        source = target
    return launches


def _tile(layout: Layout) -> tuple[int, int]:
    """Return tokens and channels of a tile."""
    # Channels: the largest power of two in the width, so that no lane idles; 1152 is 9 x 128. A width without one gets
    # at most 256, where the idle part of the last tile is small.
    divisor = layout.dim & -layout.dim
    block_dim = min(divisor, 1024) if divisor >= 128 else min(next_power_of_2(layout.dim), 256)
    # Elements: 16 a thread are two 16-byte loads a term, enough in flight to reach the memory's bandwidth; 8 where the
    # stream is so small that an H100 (132 multiprocessors) would otherwise get fewer than 8 programs each.
    elements = 2048 if layout.num_rows * layout.dim >= 2048 * 1024 else 1024
    # Tokens: the rest of the tile. A gate that does not vary along them comes from beyond the L1 cache once a tile.
    return min(elements // block_dim, next_power_of_2(layout.num_tokens)), block_dim


@torch.library.custom_op(
    "l2c::cached_residual",
    mutates_args=(),
    schema=(
        "(Tensor x, Tensor[] caches, Tensor?[] gates, Tensor?[] scales, Tensor?[] shifts, float[] weights, "
        "Tensor?[] token_scales) -> Tensor"
    ),
)
def cached_residual_op(
    x: Tensor,
    caches: Sequence[Tensor],
    gates: Sequence[Tensor | None],
    scales: Sequence[Tensor | None],
    shifts: Sequence[Tensor | None],
    weights: Sequence[float],
    token_scales: Sequence[Tensor | None],
) -> Tensor:
    """Compute the sum; what a pass emits. Each list has one entry a term or is empty. The result is contiguous."""
    terms = Terms(caches, gates, scales, shifts, weights, token_scales)
    _check(x, terms)
    if not runs_triton(x):
        return _fresh(decompose_cached_residual(x, caches, gates, scales, shifts, weights, token_scales), x)
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    if out.numel():
        for launch in plan_cached_residual(x, terms, out):
            launch.run(x.device)
    return out


@cached_residual_op.register_fake
def _(
    x: Tensor,
    caches: Sequence[Tensor],
    gates: Sequence[Tensor | None],
    scales: Sequence[Tensor | None],
    shifts: Sequence[Tensor | None],
    weights: Sequence[float],
    token_scales: Sequence[Tensor | None],
) -> Tensor:
    _check(x, Terms(caches, gates, scales, shifts, weights, token_scales))
    return torch.empty_like(x, memory_format=torch.contiguous_format)


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
        caches: One tensor of the shape of ``x`` a term, any float dtype; or what ``pack_cache`` returned.
        gates: One a term: (B, D), (B, 1, D), (D,), (1,), () or whatever broadcasts to ``x``; None is 1.
        scales: As gates, applied to the cached value; None is 1.
        shifts: As gates, added after the scale; None is 0.
        weights: One number a term.
        token_scales: (B, T) or (N,), for packed caches and for no others.

    Returns:
        A new contiguous tensor with the shape and dtype of ``x``.

    Raises:
        KernelError: Something does not fit.
    """
    terms = Terms(caches, gates or (), scales or (), shifts or (), weights or (), token_scales or ())
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in (x, *terms.tensors())):
        one = x.new_ones(())
        terms = Terms(
            terms.caches,
            _without_none(terms.gates, one),
            _without_none(terms.scales, one),
            _without_none(terms.shifts, x.new_zeros(())),
            terms.weights,
            terms.token_scales,
        )
    lists = (terms.gates, terms.scales, terms.shifts, terms.weights, terms.token_scales)
    result: Tensor = cached_residual_op(x, list(terms.caches), *map(list, lists))
    return result


class _Context(torch.autograd.function.FunctionCtx):
    """What the forward leaves for the backward."""

    needs_input_grad: tuple[bool | list[bool], ...]
    saved_tensors: tuple[Tensor | None, ...]
    num_terms: int
    present: list[bool]
    """Of caches, gates, scales, shifts, token_scales: whether the list was given."""
    weights: Sequence[float]


def _save(ctx: _Context, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, caches, gates, scales, shifts, weights, token_scales = inputs
    lists = (caches, gates, scales, shifts, token_scales)
    _refuse_lost_gradients(lists)
    if any(tensor is not None and tensor.requires_grad for tensor in token_scales):
        raise KernelError("cached_residual has no gradient for token_scales; detach them, or keep the cache unpacked")
    ctx.save_for_backward(*(tensor for entries in lists for tensor in entries))
    ctx.num_terms, ctx.weights, ctx.present = len(caches), weights, [bool(entries) for entries in lists]


def _backward(ctx: _Context, grad: Tensor) -> tuple[Tensor | list[Tensor | None] | None, ...]:
    saved = iter(ctx.saved_tensors)
    absent: list[Tensor | None] = [None] * ctx.num_terms
    lists = [[next(saved) for _ in range(ctx.num_terms)] if given else absent for given in ctx.present]
    dtype = accumulator(grad.dtype)
    grads: list[list[Tensor | None]] = [[], [], [], []]
    for index, (cache, gate, scale, shift, token_scale) in enumerate(zip(*lists, strict=True)):
        assert cache is not None
        # term = weight * gate * (scale * value + shift)
        value = cache.to(dtype) if token_scale is None else cache.to(dtype) * token_scale.to(dtype).unsqueeze(-1)
        outer = grad.to(dtype) * ctx.weights[index] if ctx.weights else grad.to(dtype)
        inner = outer if gate is None else outer * align(gate, grad).to(dtype)
        for position, operand in enumerate((cache, gate, scale, shift)):
            flags = ctx.needs_input_grad[1 + position]
            if operand is None or not isinstance(flags, list) or not flags[index]:
                grads[position].append(None)
                continue
            if position == 0:
                gradient = inner if scale is None else inner * align(scale, grad).to(dtype)
            elif position == 1:
                scaled = value if scale is None else value * align(scale, grad).to(dtype)
                gradient = outer * (scaled if shift is None else scaled + align(shift, grad).to(dtype))
            else:
                gradient = inner * value if position == 2 else inner
            grads[position].append(_sum_to(gradient, operand))
    # Autograd wants a list for a list of tensors, empty ones included, and None for any other, such as [tensor, None].
    grads += [absent, absent]
    return (
        grad,
        *(
            entries[: len(flags)] if isinstance(flags, list) else None
            for entries, flags in zip(grads, ctx.needs_input_grad[1:], strict=True)
        ),
    )


cached_residual_op.register_autograd(_backward, setup_context=_save)


def _check(x: Tensor, terms: Terms) -> None:
    check_stream("cached_residual", x)
    terms.check("cached_residual", x)
    if torch.is_grad_enabled():
        _refuse_lost_gradients((terms.caches, terms.gates, terms.scales, terms.shifts, terms.token_scales))


def _refuse_lost_gradients(lists: Sequence[Sequence[Tensor | None]]) -> None:
    # torch.library does not look for tensors that require gradients in a list that also has a None.
    for entries in lists:
        given = [entry for entry in entries if entry is not None]
        if len(given) < len(entries) and any(entry.requires_grad for entry in given):
            raise KernelError(
                "l2c::cached_residual wants no None beside an operand that requires a gradient, which would be lost; "
                "call the function cached_residual, which fills the gaps"
            )


def _without_none(entries: Sequence[Tensor | None], neutral: Tensor) -> Sequence[Tensor | None]:
    # torch.library sees no gradient in a list that has a None in it.
    return [neutral if entry is None else entry for entry in entries]


def _sum_to(gradient: Tensor, operand: Tensor) -> Tensor:
    return gradient.sum_to_size(align(operand, gradient).shape).reshape(operand.shape).to(operand.dtype)


def _fresh(result: Tensor, x: Tensor) -> Tensor:
    # Without terms the reference returns x itself, which an op must not.
    return x.clone(memory_format=torch.contiguous_format) if result is x else result.contiguous()
