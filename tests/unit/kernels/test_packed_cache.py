"""pack_cache: the error of a packed cache is what its format says, and the kernel packs the same bytes as torch."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from l2c_compile.errors import KernelError
from l2c_compile.kernels._launch import FLOATS, PACKED
from l2c_compile.kernels.packed_cache import decompose_pack_cache, pack_cache
from tests.exact import U

OP = torch.ops.l2c.pack_cache.default


def rows(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Return rows of very different size, one of them zero."""
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    first = torch.logspace(-4, 4, shape[0]).reshape(-1, *[1] * (len(shape) - 1))
    x = (x * first).to(dtype)
    x[0] = 0
    return x


@pytest.mark.parametrize("packed", PACKED)
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("shape", [(2, 1, 1), (3, 5, 37), (2, 4, 1152), (7, 130), (2, 8192)])
def test_the_error_is_what_the_format_says(shape: tuple[int, ...], dtype: torch.dtype, packed: torch.dtype) -> None:
    x = rows(*shape, dtype=dtype)
    q, scale = pack_cache(x, packed)
    assert (q.dtype, q.shape, scale.dtype, scale.shape) == (packed, shape, torch.float32, shape[:-1])
    step = scale.double().unsqueeze(-1)
    error = (q.float().double() * step - x.double()).abs()
    # fp8: half of the last of three bits of mantissa; below 2^-6 the unit is 2^-9.
    fp8 = torch.maximum(x.double().abs() * 2**-4, step * 2**-10)
    half_a_unit = step / 2 if packed == torch.int8 else fp8
    # The quotient and the scale are each rounded to float32, which moves the largest value out of range by as much.
    assert bool((error <= half_a_unit + 4 * U * x.double().abs()).all())


@pytest.mark.parametrize("packed", PACKED)
@pytest.mark.parametrize("dtype", FLOATS)
def test_the_bytes_are_those_of_torch(dtype: torch.dtype, packed: torch.dtype) -> None:
    # Every float16 there is, in rows of one size, so that every rounding and every tie comes up.
    halves = torch.arange(2**16, dtype=torch.int32).to(torch.int16).view(torch.float16)
    x = halves[halves.isfinite()].sort().values[: 62 * 1024].reshape(62, 1024).to(dtype)
    x[5] = torch.linspace(-448, 448, 1024)
    q, scale = pack_cache(x, packed)
    wanted_q, wanted_scale = decompose_pack_cache(x, packed)
    assert torch.equal(q.view(torch.uint8), wanted_q.view(torch.uint8))
    assert torch.equal(scale, wanted_scale)


@pytest.mark.parametrize("packed", PACKED)
def test_every_value_of_the_format_comes_back(packed: torch.dtype) -> None:
    every_byte = torch.arange(256, dtype=torch.int32).to(torch.uint8).view(packed).float()
    largest = 448.0 if packed == torch.float8_e4m3fn else 127.0
    x = every_byte[every_byte.abs() <= largest].unsqueeze(0)
    q, scale = pack_cache(x, packed)
    assert torch.equal(q.float() * scale.unsqueeze(-1), x)
    assert torch.equal(scale, torch.ones(1))


@pytest.mark.parametrize("packed", PACKED)
def test_any_strides(packed: torch.dtype) -> None:
    for x in (rows(5, 3, 16).transpose(0, 1), rows(3, 16, 5).transpose(1, 2), rows(3, 5, 40)[..., 8:24]):
        q, scale = pack_cache(x, packed)
        wanted_q, wanted_scale = pack_cache(x.contiguous(), packed)
        assert q.is_contiguous()
        assert torch.equal(q.view(torch.uint8), wanted_q.view(torch.uint8))
        assert torch.equal(scale, wanted_scale)


@pytest.mark.parametrize("shape", [(0, 5, 16), (2, 0, 16), (0, 16)])
def test_an_empty_cache_is_packed_empty(shape: tuple[int, ...]) -> None:
    q, scale = pack_cache(torch.empty(shape), torch.int8)
    assert (q.shape, scale.shape) == (shape, shape[:-1])


def test_what_does_not_fit_is_said() -> None:
    x = torch.ones(2, 8)
    with pytest.raises(KernelError, match="wants dtype float8_e4m3fn or int8"):
        pack_cache(x, torch.float16)
    with pytest.raises(KernelError, match="wants x in float32, bfloat16 or float16"):
        pack_cache(x.double(), torch.int8)
    with pytest.raises(KernelError, match="wants 1 to 8192 channels, got 0"):
        pack_cache(x[:, :0], torch.int8)
    _, scale = pack_cache(x.requires_grad_(), torch.int8)
    with pytest.raises(KernelError, match="has no gradient, because rounding has none"):
        torch.autograd.backward(scale.sum())


@pytest.mark.parametrize("packed", PACKED)
def test_it_is_a_proper_op(packed: torch.dtype) -> None:
    for x in (rows(3, 5, 16), rows(5, 3, 16).transpose(0, 1), rows(3, 16, 5).transpose(1, 2)):
        torch.library.opcheck(OP, (x, packed))
