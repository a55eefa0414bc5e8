"""cached_residual against float64, at its edges, and as a torch op."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

from l2c_compile.errors import KernelError
from l2c_compile.kernels._launch import FLOATS, INTERPRETED, MAX_TERMS, Launch, Terms
from l2c_compile.kernels.cached_residual import cached_residual, decompose_cached_residual, plan_cached_residual
from tests.exact import assert_within, exact_sum, sum_bound

OP = torch.ops.l2c.cached_residual.default


@pytest.fixture(autouse=True)
def _seeded_and_without_lucky_zeros() -> Iterator[None]:
    """Seed the draws, and have torch fill with NaN what is allocated and not written."""
    torch.manual_seed(0)
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def normal(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape).to(dtype)


def check(x: Tensor, terms: Terms) -> Tensor:
    """Hold the op against float64 and return its result."""
    got = cached_residual(x, *terms.lists)
    assert got.dtype == x.dtype
    assert got.is_contiguous()
    total, magnitude = exact_sum(x, terms)
    assert_within(got, total, sum_bound(total, magnitude, len(terms), x.dtype))
    return got


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("shape", [(1, 1, 1), (3, 5, 37), (2, 4, 1152), (7, 130), (1, 8192)])
def test_it_is_the_sum_in_float64_rounded_once(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    batch, dim = shape[0], shape[-1]
    gates = [normal(batch, 6 * dim, dtype=dtype).chunk(6, dim=1)[2], normal(dim), None]
    caches = [normal(*shape, dtype=dtype) for _ in gates]
    check(normal(*shape, dtype=dtype), Terms(caches, gates, weights=[1.0, -0.5, 3.25]))


@pytest.mark.parametrize("form", [(3, 37), (3, 1, 37), (37,), (1,), (), (3, 1, 1), (1, 37), (1, 5, 37), (3, 5, 1)])
def test_a_gate_a_scale_and_a_shift_may_have_any_form(form: tuple[int, ...]) -> None:
    x = normal(3, 5, 37)
    check(x, Terms([normal(3, 5, 37)], [normal(*form)], [normal(*form)], [normal(*form)], [0.3]))


@pytest.mark.parametrize("gate_dtype", FLOATS)
def test_gates_may_have_another_dtype_than_the_stream(gate_dtype: torch.dtype) -> None:
    shape = (2, 5, 24)
    check(
        normal(*shape, dtype=torch.bfloat16),
        Terms([normal(*shape, dtype=torch.float16)], [normal(2, 24, dtype=gate_dtype)]),
    )


@pytest.mark.parametrize("num_terms", [8, 9, 56])
def test_a_long_run_is_one_launch(num_terms: int) -> None:
    x = normal(2, 3, 20, dtype=torch.bfloat16)
    terms = Terms([normal(2, 3, 20) for _ in range(num_terms)], [normal(2, 20) for _ in range(num_terms)])
    assert len(plan_cached_residual(x, terms, torch.empty_like(x))) == 1
    check(x, terms)


def test_more_terms_than_a_launch_takes_are_still_rounded_once() -> None:
    count = MAX_TERMS + 3
    x = normal(2, 3, 20, dtype=torch.bfloat16)
    terms = Terms([normal(2, 3, 20) for _ in range(count)], weights=[0.01 * index for index in range(count)])
    launches = plan_cached_residual(x, terms, torch.empty_like(x))
    between = launches[0].arguments["out_ptr"]
    assert len(launches) == 2
    assert isinstance(between, Tensor)
    assert between.dtype == torch.float32
    check(x, terms)


def strided(layout: str, dtype: torch.dtype = torch.float32) -> Tensor:
    """Return a (3, 5, 16) tensor with the strides in question."""
    if layout == "rows of a wider tensor":
        return normal(3, 5, 40, dtype=dtype)[..., 8:24]
    if layout == "tokens first":
        return normal(5, 3, 16, dtype=dtype).transpose(0, 1)
    if layout == "channels first":
        return normal(3, 16, 5, dtype=dtype).transpose(1, 2)
    if layout == "one sample for all":
        return normal(1, 5, 16, dtype=dtype).expand(3, 5, 16)
    return normal(3, 5, 16, dtype=dtype)


LAYOUTS = ["contiguous", "rows of a wider tensor", "tokens first", "channels first", "one sample for all"]


@pytest.mark.parametrize("x_layout", LAYOUTS)
def test_any_strides_are_read_where_they_lie(x_layout: str) -> None:
    x, caches, gate = strided(x_layout), [strided(layout) for layout in LAYOUTS], normal(16, 3).t()
    terms = Terms(caches, [gate, None, gate, None, gate])
    check(x, terms)
    (launch,) = plan_cached_residual(x, terms, torch.empty(3, 5, 16))
    read = [tensor.data_ptr() for tensor in tensors_of(launch)]
    assert {tensor.data_ptr() for tensor in (x, *caches, gate)} <= set(read)


def tensors_of(launch: Launch) -> list[Tensor]:
    """Return the tensors that a launch gets."""

    def walk(value: object) -> Iterator[Tensor]:
        if isinstance(value, Tensor):
            yield value
        if isinstance(value, tuple):
            for entry in value:
                yield from walk(entry)

    return [tensor for value in launch.arguments.values() for tensor in walk(value)]


@pytest.mark.parametrize("shape", [(0, 5, 16), (2, 0, 16), (2, 5, 0), (0, 16)])
def test_an_empty_stream_gives_an_empty_stream(shape: tuple[int, ...]) -> None:
    assert cached_residual(torch.empty(shape), [torch.empty(shape)], [torch.ones(shape[-1])]).shape == shape


@pytest.mark.parametrize("layout", LAYOUTS)
def test_without_terms_it_is_a_copy(layout: str) -> None:
    x = strided(layout)
    got = cached_residual(x, [])
    assert torch.equal(got, x)
    assert got.is_contiguous()
    assert got.data_ptr() != x.data_ptr()


def test_a_packed_cache_is_read_with_its_token_scales() -> None:
    x, token_scale = normal(2, 5, 24, dtype=torch.bfloat16), normal(2, 5).abs()
    every_byte = torch.arange(240, dtype=torch.uint8).reshape(2, 5, 24)
    fp8 = every_byte.where((every_byte & 0x7F) != 0x7F, 0).view(torch.float8_e4m3fn)
    int8 = every_byte.view(torch.int8)
    check(x, Terms([fp8, int8, x], [normal(2, 24), None, None], token_scales=[token_scale, token_scale, None]))


def test_offsets_beyond_32_bits_are_right() -> None:
    torch.use_deterministic_algorithms(False)
    # Only the pages that are touched exist.
    cache = torch.empty(2**31 + 64, dtype=torch.int8).as_strided((2, 16), (2**31, 1))
    cache.copy_(torch.arange(32, dtype=torch.int8).reshape(2, 16))
    check(normal(2, 16), Terms([cache], token_scales=[torch.ones(2)]))


@pytest.mark.skipif(not INTERPRETED, reason="without a GPU only the interpreter runs a launch")
@pytest.mark.parametrize(("block_tokens", "block_dim"), [(1, 16), (2, 64), (16, 32)])
def test_another_tile_gives_the_same_bits_and_writes_nothing_else(block_tokens: int, block_dim: int) -> None:
    x = normal(2, 5, 37)
    terms = Terms([normal(2, 5, 37) for _ in range(3)], [normal(2, 37), None, normal(37)])
    wanted = cached_residual(x, terms.caches, terms.gates)
    guarded = torch.full((3, 370), 7.0)
    (launch,) = plan_cached_residual(x, terms, guarded[1])
    tiles = -(-5 // block_tokens) * -(-37 // block_dim) * 2
    arguments = {**launch.arguments, "BLOCK_T": block_tokens, "BLOCK_D": block_dim}
    dataclasses.replace(launch, num_programs=tiles, arguments=arguments).run(x.device)
    assert torch.equal(guarded[1], wanted.flatten())
    assert bool((guarded[[0, 2]] == 7.0).all())


@pytest.mark.parametrize(
    ("x", "terms", "message"),
    [
        (torch.ones(4), Terms([]), r"wants x of shape \(tokens, channels\)"),
        (torch.ones(2, 3, dtype=torch.int32), Terms([]), "wants x in float32"),
        (torch.ones(2, 3), Terms([torch.ones(3, 2)]), r"caches\[0\] of shape \(2, 3\), that of x, got \(3, 2\)"),
        (torch.ones(2, 3), Terms([torch.ones(2, 3)], [None, None]), "as many gates as caches"),
        (torch.ones(2, 5, 7), Terms([torch.ones(2, 5, 7)], [torch.ones(5, 7)]), r"gates\[0\] of shape \(2, 7\)"),
        (torch.ones(2, 7), Terms([torch.ones(2, 7)], [torch.ones(2, 1, 7)]), r"gates\[0\] of shape"),
        (torch.ones(2, 7), Terms([torch.ones(2, 7)], [torch.ones(7).int()]), "of a float type, got torch.int32"),
        (torch.ones(2, 7), Terms([torch.ones(2, 7, dtype=torch.int8)]), "pack_cache makes both"),
        (torch.ones(2, 7), Terms([torch.ones(2, 7)], token_scales=[torch.ones(2)]), "for a packed cache and for no"),
        (torch.ones(2, 7), Terms([torch.ones(2, 7, dtype=torch.int64)]), "of a float type, fp8 e4m3 or int8"),
        (torch.ones(2, 7), Terms([torch.ones(2, 7, device="meta")]), "where x is, got meta"),
        (
            torch.ones(2, 7),
            Terms([torch.ones(2, 7, dtype=torch.int8)], token_scales=[torch.ones(7)]),
            r"token_scales\[0\] of shape \(2,\), got \(7,\)",
        ),
        (
            torch.ones(2, 7),
            Terms([torch.ones(2, 7, dtype=torch.int8)], token_scales=[torch.ones(2, device="meta")]),
            r"token_scales\[0\] on cpu, where x is, got meta",
        ),
    ],
)
def test_what_does_not_fit_is_said(x: Tensor, terms: Terms, message: str) -> None:
    with pytest.raises(KernelError, match=message):
        cached_residual(x, *terms.lists)


def test_it_has_no_gradient_and_says_what_has() -> None:
    x, cache, gate = normal(2, 8), normal(2, 8), normal(8).requires_grad_()
    message = r"no gradient: run it under torch.no_grad\(\) .* call decompose_cached_residual, which is plain torch"
    with pytest.raises(KernelError, match=message):
        torch.autograd.backward(cached_residual(x, [cache, x], [gate, gate]).sum())
    # torch does not look into a list that has a None: there the gradient would be lost without a word.
    with pytest.raises(KernelError, match=message):
        cached_residual(x, [cache, x], [gate, None])
    with torch.no_grad():
        wanted = cached_residual(x, [cache, x], [gate, None])
    result = decompose_cached_residual(x, [cache, x], [gate, None])
    torch.testing.assert_close(result, wanted)
    torch.autograd.backward(result.sum())
    torch.testing.assert_close(gate.grad, cache.sum(0))


@pytest.mark.parametrize("requires_grad", [False, True])
@pytest.mark.parametrize("layout", ["contiguous", "tokens first", "channels first"])
def test_it_is_a_proper_op(layout: str, requires_grad: bool) -> None:
    torch.use_deterministic_algorithms(False)
    # Its backward is an error, which the last of the checks would run into.
    checks = ("test_schema", "test_autograd_registration", "test_faketensor")
    x, cache = (strided(layout).requires_grad_(requires_grad) for _ in range(2))
    arguments: tuple[Any, ...] = (x, [cache, x], [normal(16, 3).t(), None], [normal(16)] * 2, [], [1.0, 0.5], [])
    torch.library.opcheck(OP, arguments, test_utils=checks if requires_grad else (*checks, "test_aot_dispatch_dynamic"))


def test_its_schema_is_that_of_saved_samplers() -> None:
    assert str(OP._schema) == (
        "l2c::cached_residual(Tensor x, Tensor[] caches, Tensor?[] gates, Tensor?[] scales, Tensor?[] shifts, "
        "float[] weights, Tensor?[] token_scales) -> Tensor"
    )


def test_it_is_a_proper_op_on_packed_caches() -> None:
    torch.use_deterministic_algorithms(False)
    q = torch.ones(5, 2, 8, dtype=torch.int8).transpose(0, 1)
    torch.library.opcheck(OP, (normal(2, 5, 8), [q], [], [], [], [], [torch.ones(2, 5)]))


def test_it_compiles_without_a_graph_break() -> None:
    torch.use_deterministic_algorithms(False)
    x, cache, gate = normal(2, 3, 8), normal(2, 3, 8), normal(2, 8)
    compiled = torch.compile(cached_residual, backend="aot_eager", fullgraph=True)
    assert torch.equal(compiled(x, [cache, x], [gate, None]), cached_residual(x, [cache, x], [gate, None]))


def test_the_decomposition_is_aten_only_and_the_same_bits() -> None:
    x, cache, gate = (normal(2, 3, 8).bfloat16(), normal(2, 3, 8).bfloat16(), normal(2, 8))
    arguments: tuple[Any, ...] = (x, [cache, x], [gate, None], [], [None, gate], [1.0, 0.5], [])
    graph = make_fx(OP, decomposition_table={OP: decompose_cached_residual})(*arguments)
    called = [node.target for node in graph.graph.nodes if node.op == "call_function"]
    assert {target.namespace for target in called if isinstance(target, torch._ops.OpOverload)} == {"aten"}
    assert torch.equal(graph(*arguments), decompose_cached_residual(*arguments))


@pytest.mark.skipif(INTERPRETED or shutil.which("g++") is None, reason="Inductor needs a C++ compiler, and no kernel")
def test_inductor_fuses_the_decomposition_into_one_loop_on_a_cpu() -> None:
    torch.use_deterministic_algorithms(False)
    from torch._inductor.utils import run_and_get_code

    x, caches, gates = normal(2, 3, 64), [normal(2, 3, 64) for _ in range(3)], [normal(2, 64), None, normal(64)]
    compiled = torch.compile(decompose_cached_residual, fullgraph=True)
    got, (code,) = run_and_get_code(compiled, x, caches, gates)
    total, magnitude = exact_sum(x, Terms(caches, gates))
    assert_within(got, total, sum_bound(total, magnitude, 3, x.dtype))
    assert code.count("async_compile.cpp_pybinding(") == 1
