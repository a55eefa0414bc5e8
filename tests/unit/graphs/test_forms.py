"""The forms of tensors and of calls."""

from __future__ import annotations

import copy
from dataclasses import replace
from decimal import Decimal

import numpy as np
import pytest
import torch

from l2c_compile.graphs.forms import (
    StaticValue,
    TensorForm,
    form_of,
    overlaps_of,
    repeats_of,
    signature_of,
    tensors_in,
)


def test_a_form_makes_tensors_like_the_one_that_it_was_read_off() -> None:
    value = torch.empty(4, 3, dtype=torch.float64).t()
    form = TensorForm.of(value)
    assert TensorForm.of(form.empty()) == form
    assert str(form) == "float64[3, 4], strides [1, 3]"
    assert form.fits(TensorForm.of(torch.empty(3, 4, dtype=torch.float64)))
    assert not form.fits(TensorForm.of(torch.empty(3, 4)))


def test_a_copy_has_neither_gaps_nor_overlaps() -> None:
    assert TensorForm.of(torch.empty(3, 8)[:, ::2]).of_copy().stride == (4, 1)
    assert TensorForm.of(torch.empty(3, 1).expand(3, 4)).of_copy().stride == (4, 1)
    assert TensorForm.of(torch.empty(4, 3).t()).of_copy().stride == (1, 3)


@pytest.mark.parametrize(("one", "other"), [(1, 1.0), (1, True), (0.0, -0.0), ("1", 1), (None, False)])
def test_values_that_python_calls_equal_are_told_apart(one: object, other: object) -> None:
    assert StaticValue.of(one) == StaticValue.of(one)
    assert StaticValue.of(one) != StaticValue.of(other)
    assert signature_of(one) != signature_of(other)


def test_a_signature_puts_other_tensors_in_the_places_of_its_own() -> None:
    call = ((torch.zeros(2), 3), {"y": {"z": torch.zeros(1), "w": "static"}})
    signature = signature_of(*call)
    assert [form.shape for form in signature.tensor_forms()] == [(2,), (1,)]
    first, second = torch.ones(2), torch.ones(1)
    args, kwargs = signature.unflatten([first, second])
    assert args == (first, 3)
    assert kwargs == {"y": {"z": second, "w": "static"}}
    assert tensors_in((args, kwargs)) == [first, second]


def test_calls_of_equal_form_have_equal_signatures() -> None:
    assert signature_of(torch.zeros(2, 3)) == signature_of(torch.ones(2, 3))
    assert hash(signature_of(torch.zeros(2, 3), 1)) == hash(signature_of(torch.ones(2, 3), 1))
    assert signature_of(torch.zeros(2, 3)) != signature_of(torch.zeros(3, 2).t())
    assert signature_of([torch.zeros(2)]) != signature_of((torch.zeros(2),))


def test_the_form_of_nested_values() -> None:
    value = torch.zeros(2)
    assert form_of((value, [value, 1])) == (TensorForm.of(value), (TensorForm.of(value), 1))


def test_overlaps_are_stretches_of_one_memory() -> None:
    memory = torch.zeros(4, 4)
    top, bottom, left = memory[:2], memory[2:], memory[:, :2]
    assert overlaps_of([top, bottom, torch.zeros(4, 4)]) == frozenset()
    assert overlaps_of([memory, top, bottom]) == {(0, 1), (0, 2)}
    assert overlaps_of([top, left, memory[:0]]) == {(0, 1)}


def test_a_tensor_that_is_given_twice_is_given_twice() -> None:
    x, y = torch.zeros(2), torch.ones(2)
    assert repeats_of([x, y]) == ()
    assert repeats_of([y, x, y]) == (0, 1, 0)
    args, _ = replace(signature_of((y, x, y), {}), repeats=(0, 1, 0)).unflatten([x, y, torch.zeros(3)])
    assert args[0] is args[2]


@pytest.mark.parametrize(
    ("one", "other"),
    [
        *((1, 1.0), (1, True), (0.0, -0.0), (complex(0.0), complex(-0.0)), (np.float64(0.0), np.float64(-0.0))),
        *((frozenset({1}), frozenset({1.0})), (Decimal("1.0"), Decimal("1.00")), (np.float32(1), np.float64(1))),
    ],
)
def test_equal_values_that_code_can_tell_apart_are_two_keys(one: object, other: object) -> None:
    assert StaticValue.of(one) != StaticValue.of(other)
    assert StaticValue.of(one) == StaticValue.of(copy.deepcopy(one))
