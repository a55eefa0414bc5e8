"""For any shapes, strides, dtypes, terms and gates: the sum and the norm are what float64 says."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from l2c_compile.kernels._launch import FLOATS, PACKED, Terms
from l2c_compile.kernels.cached_residual import cached_residual
from l2c_compile.kernels.cached_residual_norm import cached_residual_norm_op
from l2c_compile.kernels.packed_cache import pack_cache
from tests.exact import assert_within, exact_norm, exact_sum, sum_bound

# Of a (B, T, D) stream; next to (N, D) only those without a T are drawn.
FORMS = ["none", "()", "(1,)", "(D,)", "(B, D)", "chunk of (B, 6 D)", "(D, B) transposed"]
FORMS_3D = [*FORMS, "(B, 1, D)", "(B, 1, 1)", "(B, T, 1)", "(B, T, D)"]
LAYOUTS = ["contiguous", "rows of a wider tensor", "reversed dimensions", "every other row"]


@dataclass(frozen=True)
class Case:
    """A stream and its terms, as words; the data comes from the seed."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    layout: str
    terms: tuple[tuple[str, str, str, str, torch.dtype], ...]
    """Cache layout (or ``packed``), gate, scale and shift form, and the dtype of these three."""
    packed: torch.dtype
    weighted: bool
    seed: int

    def tensor(self, shape: tuple[int, ...], dtype: torch.dtype, layout: str = "contiguous") -> Tensor:
        """Draw a tensor with the strides in question."""
        if layout == "rows of a wider tensor":
            return torch.randn(*shape[:-1], shape[-1] + 24).to(dtype)[..., 8:-16]
        if layout == "reversed dimensions":
            return torch.randn(*reversed(shape)).to(dtype).permute(*reversed(range(len(shape))))
        if layout == "every other row":
            return torch.randn(*shape[:-2], 2 * shape[-2], shape[-1]).to(dtype)[..., ::2, :]
        return torch.randn(shape).to(dtype)

    def operand(self, form: str, dtype: torch.dtype) -> Tensor | None:
        """Draw a gate, scale or shift."""
        batch, dim = self.shape[0], self.shape[-1]
        if form == "none":
            return None
        if form == "chunk of (B, 6 D)":
            return self.tensor((batch, 6 * dim), dtype).chunk(6, dim=1)[2]
        if form == "(D, B) transposed":
            return self.tensor((dim, batch), dtype).t()
        sizes = {"B": batch, "T": self.shape[1], "D": dim, "1": 1}
        return self.tensor(tuple(sizes[letter] for letter in form if letter in sizes), dtype)

    def draw(self) -> tuple[Tensor, Terms]:
        """Draw the data."""
        torch.manual_seed(self.seed)
        x = self.tensor(self.shape, self.dtype, self.layout)
        caches, gates, scales, shifts, token_scales = [], [], [], [], []
        for layout, gate, scale, shift, dtype in self.terms:
            cache, token_scale = self.tensor(self.shape, self.dtype, layout), None
            if layout == "packed":
                cache, token_scale = pack_cache(cache, self.packed)
            caches.append(cache)
            token_scales.append(token_scale)
            gates.append(self.operand(gate, dtype))
            scales.append(self.operand(scale, dtype))
            shifts.append(self.operand(shift, dtype))
        weights = [0.5 - index for index in range(len(caches))] if self.weighted else []
        return x, Terms(caches, gates, scales, shifts, weights, token_scales)


@st.composite
def cases(draw: st.DrawFn) -> Case:
    # Not larger: to the interpreter each row is a program of its own, and takes milliseconds.
    rows, dim = draw(st.sampled_from([1, 2, 5, 17])), draw(st.sampled_from([1, 3, 16, 37, 130]))
    shape = (draw(st.sampled_from([1, 3])), rows, dim) if draw(st.booleans()) else (rows, dim)
    form = st.sampled_from(FORMS_3D if len(shape) == 3 else FORMS)
    term = st.tuples(st.sampled_from([*LAYOUTS, "packed"]), form, form, form, st.sampled_from(FLOATS))
    return Case(
        shape=shape,
        dtype=draw(st.sampled_from(FLOATS)),
        layout=draw(st.sampled_from(LAYOUTS)),
        terms=tuple(draw(st.lists(term, max_size=6))),
        packed=draw(st.sampled_from(PACKED)),
        weighted=draw(st.booleans()),
        seed=draw(st.integers(0, 2**16)),
    )


@given(cases())
def test_the_sum_is_what_float64_says(case: Case) -> None:
    x, terms = case.draw()
    got = cached_residual(x, *terms.lists)
    total, magnitude = exact_sum(x, terms)
    assert_within(got, total, sum_bound(total, magnitude, len(terms), x.dtype))


@given(cases(), st.sampled_from(["layer", "rms"]), st.tuples(*[st.sampled_from(FORMS)] * 4))
def test_the_stream_and_its_norm_are_what_float64_says(case: Case, norm: str, forms: tuple[str, ...]) -> None:
    x, terms = case.draw()
    affine = tuple(case.operand(form, torch.float32) for form in forms)
    stream, normed = cached_residual_norm_op(x, *terms.lists, norm, 1e-6, *affine)
    total, magnitude = exact_sum(x, terms)
    assert_within(stream, total, sum_bound(total, magnitude, len(terms), x.dtype))
    assert_within(normed, *exact_norm(stream, norm, 1e-6, affine))
