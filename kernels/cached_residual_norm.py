"""cached_residual_norm: the sum of cached_residual and the modulated norm that the next computed sublayer starts with.

    h = x + sum_i weight_i * gate_i * (scale_i * cache_i + shift_i)
    y = (1 + mod_scale) * (norm(h) * norm_weight + norm_bias) + mod_shift        -> (h, y)

    norm: "layer", (h - mean) / sqrt(var + eps), or "rms", h / sqrt(mean(h^2) + eps), over D
    norm_weight, norm_bias, mod_scale, mod_shift: (B, D), (B, 1, D), (D,), () or absent, any strides; the rest as there

The norm sees h as it is returned, rounded: y is a function of h, whether or not the two are computed together. Sums are
float32; h and y are rounded once each, to the dtype of x. Every row is in registers once: the caches and x are read
once, h and y are written once. D is at most 8192.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from l2c_compile.errors import KernelError
from l2c_compile.kernels._launch import (
    MAX_DIM,
    Argument,
    Launch,
    Layout,
    Terms,
    Tile,
    accumulator,
    add_terms,
    add_terms_reference,
    align,
    check_operand,
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


class Norm(NamedTuple):
    """The norm and the modulation after the sum, in the form that the op takes. What is None is absent."""

    kind: str
    eps: float
    norm_weight: Tensor | None = None
    norm_bias: Tensor | None = None
    mod_scale: Tensor | None = None
    mod_shift: Tensor | None = None

    @property
    def affine(self) -> dict[str, Tensor | None]:
        """The factors and summands of the normalised values, by name."""
        return dict(zip(self._fields[2:], self[2:], strict=True))


def _read(arguments: Sequence[Any]) -> tuple[Terms, Norm]:
    """Return the terms and the norm that the arguments of the op after ``x`` describe."""
    return Terms.of(*arguments[: Terms.NUM_LISTS]), Norm(*arguments[Terms.NUM_LISTS :])


def decompose_cached_residual_norm(x: Tensor, *arguments: Any) -> tuple[Tensor, Tensor]:  # noqa: ANN401 - the schema's
    """Compute both in plain torch: the reference. It has a gradient.

    The arguments are those of ``torch.ops.l2c.cached_residual_norm``.
    """
    terms, norm = _read(arguments)
    dtype = accumulator(x.dtype)
    stream = add_terms_reference(x, terms).to(x.dtype)
    centered = stream.to(dtype)
    if norm.kind == "layer":
        centered = centered - centered.mean(-1, keepdim=True)
    normed = centered * torch.rsqrt((centered * centered).mean(-1, keepdim=True) + norm.eps)
    if norm.norm_weight is not None:
        normed = normed * align(norm.norm_weight, x).to(dtype)
    if norm.norm_bias is not None:
        normed = normed + align(norm.norm_bias, x).to(dtype)
    if norm.mod_scale is not None:
        normed = normed * (1 + align(norm.mod_scale, x).to(dtype))
    if norm.mod_shift is not None:
        normed = normed + align(norm.mod_shift, x).to(dtype)
    return stream, normed.to(x.dtype)


@jit
def _cached_residual_norm_kernel(
    x,
    terms,
    num_terms,
    affine,
    out_ptr,
    normed_ptr,
    num_tokens,
    dim,
    eps,
    NUM_TERMS: tl.constexpr,
    GROUP: tl.constexpr,
    LAYER: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    place = tile_position(num_tokens, dim, BLOCK_T, BLOCK_D)
    # [BLOCK_T, BLOCK_D]
    total = load_tile(x, place, BLOCK_T, BLOCK_D)
    total = add_terms(total, terms, num_terms, place, NUM_TERMS, GROUP, BLOCK_T, BLOCK_D)
    store_tile(out_ptr, total, place)
    # A launch that further terms follow has no norm.
    if normed_ptr is not None:
        normed = total.to(out_ptr.dtype.element_ty).to(tl.float32)
        size = tl.cast(dim, tl.float32)
        if LAYER:
            mean = tl.sum(normed, axis=1) / size
            normed = tl.where((place[2] < dim)[None, :], normed - mean[:, None], 0.0)
        square = tl.sum(normed * normed, axis=1) / size
        normed = normed * (1.0 / tl.sqrt_rn(square + tl.cast(eps, tl.float32)))[:, None]
        if affine[0] is not None:
            normed *= load_tile(affine[0:4], place, BLOCK_T, BLOCK_D)
        if affine[4] is not None:
            normed += load_tile(affine[4:8], place, BLOCK_T, BLOCK_D)
        if affine[8] is not None:
            normed *= 1.0 + load_tile(affine[8:12], place, BLOCK_T, BLOCK_D)
        if affine[12] is not None:
            normed += load_tile(affine[12:16], place, BLOCK_T, BLOCK_D)
        store_tile(normed_ptr, normed, place)


def plan_norm(x: Tensor, terms: Terms, norm: Norm, stream: Tensor, normed: Tensor) -> list[Launch]:
    """Return the launches that write ``stream`` and ``normed`` (contiguous, of the shape of ``x``), in order."""
    layout = Layout.of(x)
    epilogue: dict[str, Argument] = {
        "affine": tuple(entry for tensor in norm.affine.values() for entry in layout.operand(tensor, x)),
        "normed_ptr": normed,
        "eps": norm.eps,
        "LAYER": norm.kind == "layer",
    }
    return plan_sum(_cached_residual_norm_kernel, _tile(layout), x, terms, stream, epilogue)


def _tile(layout: Layout) -> Tile:
    # Channels: all of them, because the norm needs the whole row; what is beyond the width moves no memory.
    block_dim = max(next_power_of_2(layout.dim), 16)
    # Tokens: up to 4096 elements a tile, for which a gate comes from beyond the L1 cache once; fewer where the stream
    # is so small that an H100 (132 multiprocessors) would get fewer than 8 programs each.
    block_tokens = max(4096 // block_dim, 1)
    while block_tokens > 1 and layout.num_rows < 1024 * block_tokens:
        block_tokens //= 2
    return Tile(block_tokens, block_dim)


@torch.library.custom_op(
    "l2c::cached_residual_norm",
    mutates_args=(),
    schema=(
        f"(Tensor x, {Terms.SCHEMA}, str norm, float eps, Tensor? norm_weight, Tensor? norm_bias, Tensor? mod_scale, "
        "Tensor? mod_shift) -> (Tensor, Tensor)"
    ),
)
def cached_residual_norm_op(x: Tensor, *arguments: Any) -> tuple[Tensor, Tensor]:  # noqa: ANN401 - the schema's
    """Compute both; passes emit this op. Each list has one entry a term or is empty. The results are contiguous."""
    terms, norm = _read(arguments)
    _check(x, terms, norm)
    if not runs_triton(x):
        stream, normed = decompose_cached_residual_norm(x, *arguments)
        # Without terms the reference returns x itself, which an op must not.
        return torch.clone(stream, memory_format=torch.contiguous_format), normed.contiguous()
    stream, normed = (torch.empty_like(x, memory_format=torch.contiguous_format) for _ in range(2))
    for launch in plan_norm(x, terms, norm, stream, normed):
        launch.run(x.device)
    return stream, normed


@cached_residual_norm_op.register_fake
def _(x: Tensor, *arguments: Any) -> tuple[Tensor, Tensor]:  # noqa: ANN401 - the schema's
    _check(x, *_read(arguments))
    stream, normed = (torch.empty_like(x, memory_format=torch.contiguous_format) for _ in range(2))
    return stream, normed


cached_residual_norm_op.register_autograd(refuse_backward(no_gradient("cached_residual_norm")))


def _check(x: Tensor, terms: Terms, norm: Norm) -> None:
    op = "cached_residual_norm"
    terms.check(op, x)
    if x.shape[-1] > MAX_DIM:
        raise KernelError(f"{op} wants at most {MAX_DIM} channels, got {x.shape[-1]}; norm the sum of cached_residual")
    if norm.kind not in ("layer", "rms"):
        raise KernelError(f"{op} wants norm 'layer' or 'rms', got {norm.kind!r}")
    for name, tensor in norm.affine.items():
        check_operand(op, name, tensor, x)


def cached_residual_norm(
    x: Tensor,
    caches: Sequence[Tensor],
    gates: Sequence[Tensor | None] | None = None,
    scales: Sequence[Tensor | None] | None = None,
    shifts: Sequence[Tensor | None] | None = None,
    weights: Sequence[float] | None = None,
    token_scales: Sequence[Tensor | None] | None = None,
    *,
    norm: str = "layer",
    eps: float = 1e-6,
    norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
    mod_scale: Tensor | None = None,
    mod_shift: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Return the residual stream after its cached terms, and its modulated norm.

    Args:
        x: the stream, as for ``cached_residual``, with at most 8192 channels.
        caches: as for ``cached_residual``; there may be none.
        gates: as for ``cached_residual``.
        scales: as for ``cached_residual``.
        shifts: as for ``cached_residual``.
        weights: as for ``cached_residual``.
        token_scales: as for ``cached_residual``.
        norm: ``"layer"`` or ``"rms"``.
        eps: what is added to the variance, or to the mean square.
        norm_weight: what the normalised values are multiplied with; None is 1.
        norm_bias: what is added then; None is 0.
        mod_scale: the result is multiplied with one more than this; None is 0.
        mod_shift: what is added last; None is 0.

    Returns:
        Two new contiguous tensors with the shape and dtype of ``x``.

    Raises:
        KernelError: if something does not fit; or, in the backward, always, because there is none.
    """
    terms = Terms.of(caches, gates, scales, shifts, weights, token_scales)
    result: tuple[Tensor, Tensor] = cached_residual_norm_op(
        x, *terms.lists, norm, eps, norm_weight, norm_bias, mod_scale, mod_shift
    )
    return result
