"""What the kernels share: the terms they add, how an operand is read through its own strides, and how one is launched.

A term is ``weight * gate * (scale * cache + shift)``. Each of its factors may vary along any of the dimensions

    B batch, T tokens, D channels

and is read where it lies: an operand is a pointer and three strides, and the stride of a dimension along which it does
not vary is None, which the compiler sees. A gate that is a chunk of a (B, 6 D) projection is never copied, and one that
is absent costs nothing.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, ClassVar, NamedTuple, TypeAlias

import torch
from torch import Tensor

from l2c_compile.errors import KernelError

try:
    import triton
    import triton.language as tl
except ModuleNotFoundError:  # torch for a machine without a GPU may come without Triton; the references need none
    triton = tl = None


FLOATS = (torch.float32, torch.bfloat16, torch.float16)
"""The dtypes that the kernels read and write; float64 is for tests and runs the reference."""

PACKED = (torch.float8_e4m3fn, torch.int8)
"""How ``pack_cache`` stores a cache."""

MAX_DIM = 8192
"""The widest row that a kernel with a reduction holds in registers: 16 warps with 16 values a thread."""

MAX_TERMS = 64
"""The most terms of one launch. DiT-XL/2 has 56 sublayers, so each of its runs is one launch. 64 terms with a gate are
2 KB of arguments and with all their factors 5 KB; CUDA takes 4 KB, from 12.1 on 32 KB. More terms are several launches
with a float32 sum in between."""

TERM_WIDTH = 21 if tl is None else tl.constexpr(21)
"""The number of entries for each term in what ``Layout.terms`` returns."""

INTERPRETED: bool = triton is not None and triton.knobs.runtime.interpret
"""Whether TRITON_INTERPRET=1 was set when this module was imported: kernel bodies then run on a CPU."""

Operand: TypeAlias = "tuple[Tensor | int | float | None, ...]"
"""Pointer and strides over B, T, D; or several such groups one after the other. Unrolled at compile time."""

Argument: TypeAlias = "Tensor | int | float | Operand | None"
"""An argument of a kernel."""


def jit(function: Callable[..., Any]) -> Any:  # noqa: ANN401 - Triton is untyped
    """Compile with Triton where there is Triton; without it the function is never called."""
    return function if triton is None else triton.jit(function)


def runs_triton(x: Tensor) -> bool:
    """Return whether the Triton body runs on ``x``: on a GPU, or on a CPU under the interpreter; never in float64."""
    if x.dtype == torch.float64:
        return False
    if x.is_cuda and triton is None:
        raise KernelError(f"a tensor on {x.device} wants Triton, which is not installed: pip install triton")
    return x.is_cuda or (INTERPRETED and x.device.type == "cpu")


def accumulator(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype of the sums: float32, or float64 for float64."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def next_power_of_2(number: int) -> int:
    """Return the smallest power of two that is not below ``number``."""
    return 1 << max(number - 1, 0).bit_length()


def no_gradient(op: str) -> str:
    """Return the message of the error that asking for the gradient of a sum raises."""
    return (
        f"l2c::{op} has no gradient: run it under torch.no_grad() or detach its operands; to train through it, call "
        f"decompose_{op}, which is plain torch"
    )


def refuse_backward(message: str) -> Callable[..., None]:
    """Return the backward of an op that has none: it raises a KernelError that says ``message``."""

    def backward(*_: object) -> None:
        raise KernelError(message)

    return backward


class Term(NamedTuple):
    """``weight * gate * (scale * cache + shift)``; a factor that is None is absent."""

    cache: Tensor
    gate: Tensor | None
    scale: Tensor | None
    shift: Tensor | None
    weight: float | None
    token_scale: Tensor | None


@dataclass(frozen=True)
class Terms:
    """What is added to the stream. Each list has one entry a term, or is empty: absent everywhere."""

    SCHEMA: ClassVar[str] = (
        "Tensor[] caches, Tensor?[] gates, Tensor?[] scales, Tensor?[] shifts, float[] weights, Tensor?[] token_scales"
    )
    """The fields as arguments of an op, in their order."""
    NUM_LISTS: ClassVar[int] = 6

    caches: Sequence[Tensor]
    """The cached values, each of the shape of the stream."""
    gates: Sequence[Tensor | None] = ()
    """The last factors of the cached values."""
    scales: Sequence[Tensor | None] = ()
    """The first factors of the cached values."""
    shifts: Sequence[Tensor | None] = ()
    """What is added between the two."""
    weights: Sequence[float] = ()
    """One number a term: the coefficients of a linear combination."""
    token_scales: Sequence[Tensor | None] = ()
    """What each token of a packed cache is multiplied with."""

    @classmethod
    def of(cls, *lists: Sequence[Any] | None) -> Terms:
        """Return the terms that the arguments of an op describe, in the order of ``SCHEMA``; None is an empty list."""
        return cls(*(list(entries or ()) for entries in lists))

    @property
    def lists(self) -> tuple[Sequence[Any], ...]:
        """The arguments of an op that describe the terms."""
        return (self.caches, self.gates, self.scales, self.shifts, self.weights, self.token_scales)

    def __len__(self) -> int:
        return len(self.caches)

    def __iter__(self) -> Iterator[Term]:
        absent = [None] * len(self)
        return (Term(*entries) for entries in zip(*(each or absent for each in self.lists), strict=True))

    def chunks(self) -> list[Terms]:
        """Split into pieces of at most ``MAX_TERMS``; one empty piece if there are no terms."""
        starts = range(0, max(len(self), 1), MAX_TERMS)
        return [Terms(*(entries[start : start + MAX_TERMS] for entries in self.lists)) for start in starts]

    def group(self) -> int:
        """Return how many terms may have their loads in flight at once.

        With 16 elements a thread, 4 caches of two bytes are 16 KB a program, and some 25 KB a multiprocessor cover the
        latency of an H100. Twice as much spilled here and there: 8 terms of two bytes, or 4 of four.
        """
        return 2 if any(cache.element_size() > 2 for cache in self.caches) else 4

    def check(self, op: str, x: Tensor) -> None:
        """Check the stream ``x``, and the terms against it.

        Raises:
            KernelError: if a list is neither empty nor as long as ``caches``, a tensor does not fit, or one requires a
                gradient.
        """
        check_stream(op, x)
        for field, entries in zip(fields(self), self.lists, strict=True):
            if len(entries) not in (0, len(self)):
                raise KernelError(
                    f"{op} wants as many {field.name} as caches ({len(self)}) or none, got {len(entries)}"
                )
        for index, term in enumerate(self):
            what, cache, token_scale = f"caches[{index}]", term.cache, term.token_scale
            if cache.shape != x.shape:
                raise KernelError(f"{op} wants {what} of shape {_shape(x)}, that of x, got {_shape(cache)}")
            if cache.device != x.device:
                raise KernelError(f"{op} wants {what} on {x.device}, where x is, got {cache.device}")
            if (cache.dtype in PACKED) != (token_scale is not None):
                raise KernelError(
                    f"{op} wants token_scales[{index}] for a packed cache and for no other, got "
                    f"{'None' if token_scale is None else 'one'} with {what} of {cache.dtype}; pack_cache makes both"
                )
            if cache.dtype not in (*PACKED, *FLOATS, torch.float64):
                raise KernelError(f"{op} wants {what} of a float type, fp8 e4m3 or int8, got {cache.dtype}")
            if token_scale is not None and token_scale.shape != x.shape[:-1]:
                wanted = tuple(x.shape[:-1])
                raise KernelError(f"{op} wants token_scales[{index}] of shape {wanted}, got {_shape(token_scale)}")
            if token_scale is not None and token_scale.device != x.device:
                got = token_scale.device
                raise KernelError(f"{op} wants token_scales[{index}] on {x.device}, where x is, got {got}")
            for name in ("gate", "scale", "shift"):
                check_operand(op, f"{name}s[{index}]", getattr(term, name), x)
        # torch.library does not look for tensors that require gradients in a list that also has a None.
        entries = [entry for each in self.lists for entry in each if isinstance(entry, Tensor)]
        if torch.is_grad_enabled() and any(entry.requires_grad for entry in entries):
            raise KernelError(no_gradient(op))


def check_stream(op: str, x: Tensor) -> None:
    """Check that ``x`` is something the kernels work on.

    Raises:
        KernelError: if it is not.
    """
    if x.dim() not in (2, 3):
        raise KernelError(
            f"{op} wants x of shape (tokens, channels) or (batch, tokens, channels), got {_shape(x)}; "
            "flatten the dimensions in between"
        )
    if x.dtype not in (*FLOATS, torch.float64):
        raise KernelError(f"{op} wants x in float32, bfloat16 or float16 (float64 is slow, for tests), got {x.dtype}")


def check_operand(op: str, name: str, tensor: Tensor | None, x: Tensor) -> None:
    """Check that a gate, scale or shift fits ``x``.

    Raises:
        KernelError: if it does not.
    """
    if tensor is None:
        return
    if not tensor.dtype.is_floating_point or tensor.dtype in PACKED:
        raise KernelError(f"{op} wants {name} of a float type, got {tensor.dtype}")
    if tensor.device != x.device:
        raise KernelError(f"{op} wants {name} on {x.device}, where x is, got {tensor.device}")
    sizes = align(tensor, x).shape if tensor.dim() <= x.dim() else None
    if sizes is None or any(
        size not in (1, full) for size, full in zip(reversed(sizes), reversed(x.shape), strict=False)
    ):
        batch, dim = x.shape[0], x.shape[-1]
        raise KernelError(
            f"{op} wants {name} of shape ({batch}, {dim}), ({dim},) or () for x of shape {_shape(x)}, or one that "
            f"broadcasts to x, got {_shape(tensor)}"
        )


def align(tensor: Tensor, x: Tensor) -> Tensor:
    """Return a view that broadcasts to ``x``: next to a (B, T, D) stream, two dimensions are (B, D)."""
    return tensor.unsqueeze(1) if x.dim() == 3 and tensor.dim() == 2 else tensor


def add_terms_reference(x: Tensor, terms: Terms) -> Tensor:
    """Return ``x`` plus the terms in plain torch, unrounded: in float32, or float64 if ``x`` is."""
    dtype = accumulator(x.dtype)
    total = x.to(dtype)
    for term in terms:
        value = term.cache.to(dtype)
        if term.token_scale is not None:
            value = value * term.token_scale.to(dtype).unsqueeze(-1)
        if term.scale is not None:
            value = value * align(term.scale, x).to(dtype)
        if term.shift is not None:
            value = value + align(term.shift, x).to(dtype)
        if term.gate is not None:
            value = value * align(term.gate, x).to(dtype)
        if term.weight is not None:
            value = value * term.weight
        total = total + value
    return total


class Tile(NamedTuple):
    """The number of tokens and of channels that one program computes."""

    tokens: int
    channels: int

    @property
    def num_warps(self) -> int:
        """The number of warps for 16 elements a thread; at least 4."""
        return min(max(self.tokens * self.channels // 512, 4), 16)


@dataclass(frozen=True)
class Layout:
    """The sizes of a stream as the kernels see it, and the operands that go with it.

    A stream with one token a sample, (B, 1, D) or (N, D), is one sample with B tokens: tiles span tokens.
    """

    num_batches: int
    num_tokens: int
    dim: int
    shape: torch.Size

    @classmethod
    def of(cls, x: Tensor) -> Layout:
        """Return the layout of ``x``."""
        batches, tokens, dim = x.shape if x.dim() == 3 else (x.shape[0], 1, x.shape[1])
        return cls(1, batches, dim, x.shape) if tokens == 1 else cls(batches, tokens, dim, x.shape)

    @property
    def num_rows(self) -> int:
        """The number of rows of channels."""
        return self.num_batches * self.num_tokens

    def operand(self, tensor: Tensor | None, x: Tensor) -> Operand:
        """Return pointer and strides over B, T and D; a stride is None where the value does not vary."""
        if tensor is None:
            return (None, None, None, None)
        full = align(tensor, x).expand(self.shape)
        batch, token, channel = full.stride() if full.dim() == 3 else (full.stride(0), 0, full.stride(1))
        if self.num_batches == 1 and self.shape[0] > 1:
            batch, token = 0, batch
        return (_as_bytes(tensor), batch, token or None, channel or None)

    def terms(self, terms: Terms, x: Tensor) -> Operand:
        """Return the terms as a kernel takes them.

        Flat, because Triton 3.6 cannot index a tuple of tuples that have None in them: for each term the operands
        cache, token_scale, scale, shift and gate, four entries each, and the weight.
        """
        flat: list[Tensor | int | float | None] = []
        for term in terms:
            row_scale = None if term.token_scale is None else term.token_scale.unsqueeze(-1)
            for operand in (term.cache, row_scale, term.scale, term.shift, term.gate):
                flat += self.operand(operand, x)
            flat.append(term.weight)
        return tuple(flat)

    def launch(self, kernel: object, tile: Tile, arguments: Mapping[str, Argument]) -> Launch:
        """Return the launch of ``kernel`` over all tiles of the stream; the sizes are added to its arguments."""
        programs = self.num_batches * -(-self.num_tokens // tile.tokens) * -(-self.dim // tile.channels)
        sizes: dict[str, Argument] = {
            "num_tokens": self.num_tokens,
            "dim": self.dim,
            "BLOCK_T": tile.tokens,
            "BLOCK_D": tile.channels,
        }
        return Launch(kernel, programs, {**arguments, **sizes}, tile.num_warps)


@dataclass(frozen=True)
class Launch:
    """One launch of one kernel, with everything that decides what is compiled."""

    kernel: Any
    """The function under ``@jit``."""
    num_programs: int
    """The size of the grid, which has one dimension: the others are limited to 65535."""
    arguments: dict[str, Argument]
    """The arguments by name, compile-time constants included."""
    num_warps: int

    def run(self, device: torch.device) -> None:
        """Launch on the device."""
        with torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext():
            self.kernel[(self.num_programs,)](**self.arguments, num_warps=self.num_warps)


def plan_sum(
    kernel: object, tile: Tile, x: Tensor, terms: Terms, out: Tensor, epilogue: Mapping[str, Argument] = {}
) -> list[Launch]:
    """Return the launches of ``kernel`` that write ``x`` plus the terms to ``out`` (contiguous), in order.

    ``epilogue`` holds the further arguments of the kernel. The last launch, which has the whole sum, gets them; those
    before get None for each of them. There is no launch if ``out`` is empty.
    """
    layout = Layout.of(x)
    chunks = terms.chunks() if out.numel() else []
    launches, source = [], x
    for number, chunk in enumerate(chunks, start=1):
        # A sum that further launches go on with stays in float32, so that it is rounded once.
        is_last = number == len(chunks)
        target = out if is_last else torch.empty_like(out, dtype=torch.float32)
        arguments: dict[str, Argument] = {
            "x": layout.operand(source, x),
            "terms": layout.terms(chunk, x),
            "num_terms": len(chunk),
            "out_ptr": target,
            "NUM_TERMS": len(chunk),
            "GROUP": chunk.group(),
            **(epilogue if is_last else dict.fromkeys(epilogue)),
        }
        launches.append(layout.launch(kernel, tile, arguments))
        source = target
    return launches


@jit
def tile_position(num_tokens, dim, BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr):
    """Return the place of this program: batch, tokens [BLOCK_T], channels [BLOCK_D], and the sizes they end at.

    Channels run fastest.
    """
    program = tl.program_id(0)
    num_channel_tiles = tl.cdiv(dim, BLOCK_D)
    num_token_tiles = tl.cdiv(num_tokens, BLOCK_T)
    channels = (program % num_channel_tiles) * BLOCK_D + tl.arange(0, BLOCK_D)
    program = program // num_channel_tiles
    tokens = (program % num_token_tiles).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    return (program // num_token_tiles).to(tl.int64), tokens, channels.to(tl.int64), num_tokens, dim


@jit
def load_tile(operand, place, BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr):
    """Load an operand in float32: [BLOCK_T, BLOCK_D], zero outside."""
    batch, tokens, channels, num_tokens, dim = place
    # Pointers are broadcast, values are not: a gate read as [1, BLOCK_D] comes in another register layout than the
    # caches and goes through shared memory, term after term. What threads read twice comes from the L1 cache.
    pointers = operand[0] + batch * operand[1]
    mask = (tokens < num_tokens)[:, None] & (channels < dim)[None, :]
    if operand[2] is not None:
        pointers = pointers + tokens[:, None] * operand[2]
    if operand[3] is not None:
        pointers = pointers + channels[None, :] * operand[3]
    tile = tl.load(tl.broadcast_to(pointers, (BLOCK_T, BLOCK_D)), mask=mask, other=0)
    if tile.dtype == tl.uint8:
        return decode_e4m3(tile)
    return tile.to(tl.float32)


@jit
def decode_e4m3(byte):
    """Decode fp8 e4m3 with integer arithmetic, for devices that cannot convert it."""
    # A float16 with the same mantissa on top and the same exponent bits is smaller by the difference of the exponent
    # biases, 15 - 7; subnormals included. The one NaN of each sign would become 480.
    bits = byte.to(tl.uint16)
    half = (((bits & 0x80) << 8) | ((bits & 0x7F) << 7)).to(tl.float16, bitcast=True)
    return tl.where((bits & 0x7F) == 0x7F, float("nan"), half.to(tl.float32) * 256.0)


@jit
def add_terms(
    total,
    terms,
    num_terms,
    place,
    NUM_TERMS: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Add the terms to ``total`` [BLOCK_T, BLOCK_D], float32, in the order given.

    Their number comes twice, once unknown to the compiler. The terms are not passed on as a whole: Triton looks at all
    of a tuple in each call, and 56 terms took eight times as long to compile.
    """
    for first in tl.static_range(0, NUM_TERMS, GROUP):
        # Always true, but unknown to the compiler: it keeps the loads of 56 terms from being hoisted to the front,
        # where they take all registers and spill.
        if first < num_terms:
            for at in tl.static_range(first * TERM_WIDTH, min(first + GROUP, NUM_TERMS) * TERM_WIDTH, TERM_WIDTH):
                value = load_tile(terms[at : at + 4], place, BLOCK_T, BLOCK_D)
                if terms[at + 4] is not None:
                    value *= load_tile(terms[at + 4 : at + 8], place, BLOCK_T, BLOCK_D)
                if terms[at + 8] is not None:
                    value *= load_tile(terms[at + 8 : at + 12], place, BLOCK_T, BLOCK_D)
                if terms[at + 12] is not None:
                    value += load_tile(terms[at + 12 : at + 16], place, BLOCK_T, BLOCK_D)
                if terms[at + 16] is not None:
                    value *= load_tile(terms[at + 16 : at + 20], place, BLOCK_T, BLOCK_D)
                if terms[at + 20] is not None:
                    # Inductor passes Python floats as float64.
                    value *= tl.cast(terms[at + 20], tl.float32)
                total += value
    return total


@jit
def store_tile(out_ptr, tile, place):
    """Store [BLOCK_T, BLOCK_D] to a contiguous output, rounded to its dtype."""
    batch, tokens, channels, num_tokens, dim = place
    rows = batch * num_tokens + tokens
    mask = (tokens < num_tokens)[:, None] & (channels < dim)[None, :]
    tl.store(out_ptr + rows[:, None] * dim + channels[None, :], tile.to(out_ptr.dtype.element_ty), mask=mask)


def _as_bytes(tensor: Tensor) -> Tensor:
    # Below sm_89, on AMD and in the interpreter fp8 e4m3 is decoded by hand.
    if tensor.dtype != torch.float8_e4m3fn or _converts_fp8(tensor.device):
        return tensor
    return tensor.view(torch.uint8)


def _converts_fp8(device: torch.device) -> bool:
    return device.type == "cuda" and torch.version.hip is None and torch.cuda.get_device_capability(device) >= (8, 9)


def _shape(tensor: Tensor) -> tuple[int, ...]:
    return tuple(tensor.shape)
