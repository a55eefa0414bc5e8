"""Values: which expressions count as equal."""

from __future__ import annotations

import operator

import pytest
import torch

from l2c_compile.checking.values import Value, ValueTable
from l2c_compile.errors import VerificationError
from l2c_compile.graphs.forms import TensorForm

aten = torch.ops.aten


def table_with(*shapes: tuple[int, ...], exact: bool) -> tuple[ValueTable, list[Value]]:
    table = ValueTable(exact=exact)
    return table, [table.leaf("input", i, TensorForm.of(torch.empty(shape))) for i, shape in enumerate(shapes)]


@pytest.mark.parametrize("exact", [True, False])
def test_equal_expressions_are_one_object(exact: bool) -> None:
    table, (x, y) = table_with((2, 4), (2, 4), exact=exact)
    assert table.call(aten.mul.Tensor, (x, y), {}) is table.call(aten.mul.Tensor, (x,), {"other": y})
    assert table.call(aten.mul.Tensor, (x, y), {}) is not table.call(aten.mul.Tensor, (y, x), {})
    assert table.call(aten.mul.Tensor, (x, 1), {}) is not table.call(aten.mul.Tensor, (x, 1.0), {})
    assert table.call(aten.mul.Tensor, (x, 0.0), {}) is not table.call(aten.mul.Tensor, (x, -0.0), {})


@pytest.mark.parametrize("exact", [True, False])
def test_what_changes_nothing_is_its_argument(exact: bool) -> None:
    table, (x,) = table_with((2, 4), exact=exact)
    assert table.call(aten.clone.default, (x,), {}) is x
    assert table.call(aten.view.default, (x, [2, 4]), {}) is x
    assert table.call(aten.dropout.default, (x, 0.5, False), {}) is x
    assert table.call(aten.dropout.default, (x, 0.5, True), {}) is not x
    assert table.call(aten.slice.Tensor, (x, 1, 0, 99), {}) is x
    assert table.call(aten._to_copy.default, (x,), {"dtype": torch.float64}) is not x


@pytest.mark.parametrize("exact", [True, False])
def test_a_square_transposed_is_another_value(exact: bool) -> None:
    table, (x,) = table_with((4, 4), exact=exact)
    assert table.call(aten.t.default, (x,), {}) is not x


@pytest.mark.parametrize("exact", [True, False])
def test_parts_of_a_split_are_slices_and_slices_of_slices_are_slices(exact: bool) -> None:
    table, (x,) = table_with((2, 12), exact=exact)
    parts = table.call(aten.split.Tensor, (x, 4, -1), {})
    second = table.call(torch.ops.aten.slice.Tensor, (x, 1, 4, 8), {})
    assert table.call(operator.getitem, (parts, 1), {}) is second
    assert table.call(operator.getitem, (parts, 2), {}) is not second
    wider = table.call(aten.slice.Tensor, (x, 1, 2, 10), {})
    assert table.call(aten.slice.Tensor, (wider, 1, 2, 6), {}) is second


def test_layout_counts_bit_for_bit_but_not_for_correctly_rounded_arithmetic() -> None:
    table, (x, y) = table_with((2, 8), (2, 4), exact=True)
    half = table.call(aten.slice.Tensor, (x, 1, 0, 4), {})
    copy = table.call(aten.clone.default, (half,), {})
    assert copy is not half
    assert table.call(aten.gelu.default, (copy,), {}) is not table.call(aten.gelu.default, (half,), {})
    assert table.call(aten.mul.Tensor, (copy, y), {}) is table.call(aten.mul.Tensor, (half, y), {})
    table, (x, y) = table_with((2, 8), (2, 4), exact=False)
    half = table.call(aten.slice.Tensor, (x, 1, 0, 4), {})
    assert table.call(aten.clone.default, (half,), {}) is half


def test_additions_are_multisets_up_to_rounding_only() -> None:
    def orders(exact: bool) -> tuple[Value, Value, Value]:
        table, (x, y, z) = table_with((2, 4), (2, 4), (2, 4), exact=exact)

        def add(a: Value, b: Value) -> Value:
            return table.call(aten.add.Tensor, (a, b), {})

        return add(add(x, y), z), add(x, add(z, y)), add(add(add(x, y), z), z)

    one, other, twice = orders(exact=False)
    assert one is other
    assert one is not twice
    one, other, _ = orders(exact=True)
    assert one is not other


def test_a_sum_that_is_broadcast_is_one_term() -> None:
    table, (x, a, b) = table_with((2, 4), (4,), (4,), exact=False)
    outer = table.call(aten.add.Tensor, (x, table.call(aten.add.Tensor, (a, b), {})), {})
    assert outer is not table.call(aten.add.Tensor, (table.call(aten.add.Tensor, (x, a), {}), b), {})


def test_batched_and_pruned_projections_are_resolved_up_to_rounding() -> None:
    table, (c, d, weight, bias) = table_with((2, 3), (2, 3), (8, 3), (8,), exact=False)
    one = table.call(aten.linear.default, (d, weight, bias), {})
    batch = table.call(aten.linear.default, (table.call(aten.cat.default, ([c, d],), {}), weight, bias), {})
    assert table.call(aten.slice.Tensor, (batch, 0, 2, 4), {}) is one
    assert table.call(aten.slice.Tensor, (batch, 0, 0, 2), {}) is not one
    assert table.call(aten.slice.Tensor, (batch, 0, 1, 3), {}) is not one
    rows = [table.call(aten.slice.Tensor, (p, 0, 4, 8), {}) for p in (weight, bias)]
    pruned = table.call(aten.linear.default, (d, *rows), {})
    unsqueezed = table.call(aten.unsqueeze.default, (one, 1), {})
    assert table.call(aten.slice.Tensor, (unsqueezed, -1, 4, 8), {}) is table.call(
        aten.unsqueeze.default, (pruned, 1), {}
    )
    assert table.call(aten.slice.Tensor, (one, -1, 3, 7), {}) is not pruned


def test_operands_that_do_not_fit_are_an_error_of_ours() -> None:
    table, (x, y) = table_with((2, 4), (3, 5), exact=True)
    with pytest.raises(VerificationError, match=r"add\.Tensor does not take"):
        table.call(aten.add.Tensor, (x, y), {})


@pytest.mark.parametrize("exact", [True, False])
def test_complex_numbers_and_their_parts_are_followed(exact: bool) -> None:
    table, (x,) = table_with((2, 4, 2), exact=exact)
    numbers = table.call(aten.view_as_complex.default, (x,), {})
    assert numbers is table.call(aten.view_as_complex.default, (x,), {})
    assert numbers is not table.call(aten.view_as_complex.default, (table.call(aten.neg.default, (x,), {}),), {})
    assert isinstance(numbers.form, TensorForm)
    assert (numbers.form.shape, numbers.form.dtype) == ((2, 4), torch.complex64)


def test_elements_that_are_named_by_their_place_are_followed_bit_for_bit_only() -> None:
    table, (x,) = table_with((2, 4), exact=True)
    assert table.call(aten.as_strided.default, (x, [2], [1]), {}) is not x
    table, (x,) = table_with((2, 4), exact=False)
    with pytest.raises(VerificationError, match=r"as_strided\.default .*compile with numerics='bitwise'"):
        table.call(aten.as_strided.default, (x, [2], [1]), {})
