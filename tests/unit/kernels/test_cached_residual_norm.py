"""cached_residual_norm: the stream is that of cached_residual, the norm is one of the stream; and as a torch op."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

from l2c_compile.errors import KernelError
from l2c_compile.kernels._launch import FLOATS, INTERPRETED, MAX_TERMS, Terms
from l2c_compile.kernels.cached_residual_norm import (
    Norm,
    cached_residual_norm,
    decompose_cached_residual_norm,
    plan_norm,
)
from tests.exact import assert_within, exact_norm, exact_sum, sum_bound

OP = torch.ops.l2c.cached_residual_norm.default
NORMS = ["layer", "rms"]


@pytest.fixture(autouse=True)
def _seeded_and_without_lucky_zeros() -> Iterator[None]:
    """Seed the draws, and have torch fill with NaN what is allocated and not written."""
    torch.manual_seed(0)
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def normal(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape).to(dtype)


def check(
    x: Tensor,
    terms: Terms,
    norm: str = "layer",
    affine: tuple[Tensor | None, ...] = (None, None, None, None),
    eps: float = 1e-6,
) -> tuple[Tensor, Tensor]:
    """Hold both results against float64 and return them."""
    stream, normed = OP(x, *terms.lists, norm, eps, *affine)
    assert (stream.dtype, normed.dtype) == (x.dtype, x.dtype)
    assert stream.is_contiguous()
    assert normed.is_contiguous()
    total, magnitude = exact_sum(x, terms)
    assert_within(stream, total, sum_bound(total, magnitude, len(terms), x.dtype))
    assert_within(normed, *exact_norm(stream, norm, eps, affine))
    return stream, normed


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("shape", [(1, 1, 1), (3, 5, 37), (2, 4, 1152), (7, 130), (1, 8192)])
def test_the_stream_is_the_sum_and_the_norm_is_of_the_stream(
    shape: tuple[int, ...], dtype: torch.dtype, norm: str
) -> None:
    batch, dim = shape[0], shape[-1]
    chunks = normal(batch, 6 * dim, dtype=dtype).chunk(6, dim=1)
    caches = [normal(*shape, dtype=dtype) for _ in range(3)]
    terms = Terms(caches, [chunks[2], normal(dim), None], weights=[1.0, -0.5, 3.25])
    check(normal(*shape, dtype=dtype), terms, norm, (normal(dim), normal(dim), chunks[1], chunks[0]))


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("present", [0b0000, 0b0001, 0b0010, 0b0100, 0b1000, 0b1111])
def test_each_part_of_the_modulation_may_be_absent(present: int, norm: str) -> None:
    operands = (normal(37), normal(37), normal(3, 37), normal(3, 1, 37))
    affine = tuple(operand if present >> index & 1 else None for index, operand in enumerate(operands))
    check(normal(3, 5, 37), Terms([normal(3, 5, 37)]), norm, affine)


@pytest.mark.parametrize("norm", NORMS)
def test_it_is_what_torch_computes(norm: str) -> None:
    x, cache, weight = normal(2, 5, 64, dtype=torch.float64), normal(2, 5, 64, dtype=torch.float64), normal(64).double()
    stream, normed = cached_residual_norm(x, [cache], norm=norm, eps=1e-5, norm_weight=weight)
    layer, rms = torch.nn.functional.layer_norm, torch.nn.functional.rms_norm
    wanted = layer(x + cache, (64,), weight, eps=1e-5) if norm == "layer" else rms(x + cache, (64,), weight, eps=1e-5)
    torch.testing.assert_close(stream, x + cache)
    torch.testing.assert_close(normed, wanted)


def test_a_row_of_equal_values_has_a_norm_of_zero() -> None:
    x = torch.full((3, 37), 5.0)
    _, normed = check(x, Terms([]))
    assert bool((normed.abs() < 1e-2).all())


@pytest.mark.parametrize("num_terms", [0, 9, MAX_TERMS + 3])
def test_any_number_of_terms(num_terms: int) -> None:
    terms = Terms([normal(2, 2, 20) for _ in range(num_terms)], [normal(2, 20) for _ in range(num_terms)])
    check(normal(2, 2, 20, dtype=torch.bfloat16), terms, "layer", (None, None, normal(2, 20), normal(2, 20)))


@pytest.mark.parametrize("norm", NORMS)
def test_any_strides(norm: str) -> None:
    x, cache = normal(5, 3, 16).transpose(0, 1), normal(3, 16, 5).transpose(1, 2)
    check(x, Terms([cache, x], [normal(16, 3).t(), None]), norm, (None, None, normal(16, 3).t(), None))


def test_packed_caches() -> None:
    q, token_scale = torch.randint(-127, 128, (3, 5, 24), dtype=torch.int8), normal(3, 5).abs()
    check(normal(3, 5, 24), Terms([q], [normal(24)], token_scales=[token_scale]))


@pytest.mark.parametrize("shape", [(0, 5, 16), (2, 0, 16), (0, 16)])
def test_an_empty_stream_gives_empty_results(shape: tuple[int, ...]) -> None:
    stream, normed = cached_residual_norm(torch.empty(shape), [torch.empty(shape)])
    assert (stream.shape, normed.shape) == (shape, shape)


def test_without_terms_the_stream_is_a_copy() -> None:
    x = normal(3, 5, 16)
    stream, _ = check(x, Terms([]))
    assert torch.equal(stream, x)
    assert stream.data_ptr() != x.data_ptr()


@pytest.mark.skipif(not INTERPRETED, reason="without a GPU only the interpreter runs a launch")
def test_another_number_of_tokens_a_tile_gives_the_same_bits_and_writes_nothing_else() -> None:
    x, terms = normal(2, 5, 37), Terms([normal(2, 5, 37)], [normal(2, 37)])
    wanted = cached_residual_norm(x, terms.caches, terms.gates)
    guarded = torch.full((5, 370), 7.0)
    (launch,) = plan_norm(x, terms, Norm("layer", 1e-6), guarded[1], guarded[3])
    arguments = {**launch.arguments, "BLOCK_T": 4}
    dataclasses.replace(launch, num_programs=4, arguments=arguments).run(x.device)
    assert torch.equal(guarded[1], wanted[0].flatten())
    assert torch.equal(guarded[3], wanted[1].flatten())
    assert bool((guarded[::2] == 7.0).all())


def test_what_does_not_fit_is_said() -> None:
    x = normal(2, 8)
    with pytest.raises(KernelError, match="wants norm 'layer' or 'rms', got 'batch'"):
        cached_residual_norm(x, [x], norm="batch")
    with pytest.raises(KernelError, match=r"wants mod_scale of shape \(2, 8\), \(8,\) or \(\)"):
        cached_residual_norm(x, [x], mod_scale=normal(7))
    with pytest.raises(KernelError, match="wants at most 8192 channels, got 8193"):
        cached_residual_norm(normal(1, 8193), [])
    with pytest.raises(KernelError, match="as many gates as caches"):
        cached_residual_norm(x, [x], [None, None])


def test_it_has_no_gradient_and_says_what_has() -> None:
    x, gate = normal(2, 8), normal(8).requires_grad_()
    message = "_norm has no gradient: .*call decompose_cached_residual_norm, which is plain torch"
    stream, _ = cached_residual_norm(x.clone().requires_grad_(), [x])
    with pytest.raises(KernelError, match=message):
        torch.autograd.backward(stream.sum())
    with pytest.raises(KernelError, match=message):
        cached_residual_norm(x, [x, x], [gate, None])
    _, normed = decompose_cached_residual_norm(x, [x, x], [gate, None], [], [], [], [], "layer", 1e-6)
    (gradient,) = torch.autograd.grad(normed.square().sum(), gate)
    assert bool(gradient.isfinite().all())


@pytest.mark.parametrize("requires_grad", [False, True])
@pytest.mark.parametrize("layout", ["contiguous", "tokens first", "channels first"])
def test_it_is_a_proper_op(layout: str, requires_grad: bool) -> None:
    torch.use_deterministic_algorithms(False)
    order = {"contiguous": (0, 1, 2), "tokens first": (1, 0, 2), "channels first": (0, 2, 1)}[layout]
    shape = [(3, 5, 16)[axis] for axis in order]
    x, cache = (normal(*shape).permute(order) for _ in range(2))
    x.requires_grad_(requires_grad)
    terms = Terms([cache], [normal(16, 3).t()], weights=[0.5])
    arguments = (x, *terms.lists, "layer", 1e-6, None, None, normal(3, 16), None)
    # Its backward is an error, which the last of the checks would run into.
    checks = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(OP, arguments, test_utils=checks if requires_grad else (*checks, "test_aot_dispatch_dynamic"))


def test_its_schema_is_that_of_saved_samplers() -> None:
    assert str(OP._schema) == (
        "l2c::cached_residual_norm(Tensor x, Tensor[] caches, Tensor?[] gates, Tensor?[] scales, Tensor?[] shifts, "
        "float[] weights, Tensor?[] token_scales, str norm, float eps, Tensor? norm_weight, Tensor? norm_bias, "
        "Tensor? mod_scale, Tensor? mod_shift) -> (Tensor, Tensor)"
    )


def test_it_compiles_without_a_graph_break() -> None:
    torch.use_deterministic_algorithms(False)
    x, gate = normal(2, 3, 8), normal(2, 8)
    compiled = torch.compile(cached_residual_norm, backend="aot_eager", fullgraph=True)
    for got, wanted in zip(
        compiled(x, [x, x], [gate, None]), cached_residual_norm(x, [x, x], [gate, None]), strict=True
    ):
        assert torch.equal(got, wanted)


def test_the_decomposition_is_aten_only_and_the_same_bits() -> None:
    x, gate = normal(2, 3, 8).bfloat16(), normal(2, 8)
    arguments: tuple[Any, ...] = (x, [x, x], [gate, None], [], [], [1.0, 0.5], [], "rms", 1e-6, gate, None, gate, gate)
    graph = make_fx(OP, decomposition_table={OP: decompose_cached_residual_norm})(*arguments)
    called = [node.target for node in graph.graph.nodes if node.op == "call_function"]
    assert {target.namespace for target in called if isinstance(target, torch._ops.OpOverload)} == {"aten"}
    compiled = torch.compile(decompose_cached_residual_norm, backend="aot_eager", fullgraph=True)
    wanted = decompose_cached_residual_norm(*arguments)
    for stream, normed in (graph(*arguments), compiled(*arguments)):
        assert torch.equal(stream, wanted[0])
        assert torch.equal(normed, wanted[1])
