"""Masks and numpy arrays as operands."""

from __future__ import annotations

import operator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from l2c_compile.frontend.array_operands import computed_by_numpy, with_tensors
from tests.tiny import draw

MASK = torch.tensor([True, False, True, True])

# What an index may be in eager torch; the tensor has the shape (3, 4).
INDICES: list[Any] = [
    *((slice(None), MASK), MASK[:3], MASK.view(1, 4).expand(3, 4), (None, MASK[1:]), (..., MASK), (1, MASK)),
    *(np.array([2, 0]), np.array([True, False, True]), (np.array([0, 2]), np.array([1, 1]))),
    *([2, 0], [True, False, True], (slice(None), [0, 1]), 1, (slice(1), 2), torch.tensor([1, 1])),
    *(torch.zeros(3).bool(), (MASK[1:], torch.tensor([0, 3, 1])[:2])),
]


@pytest.mark.parametrize("index", INDICES, ids=str)
def test_an_index_without_masks_means_the_same(index: Any) -> None:  # noqa: ANN401
    x = draw(3, 4)
    func, args = with_tensors(Tensor.__getitem__, (x, index))
    assert torch.equal(func(*args), x[index])
    parts = args[1]
    assert not any(isinstance(part, (np.ndarray, list)) or getattr(part, "dtype", None) is torch.bool for part in parts)
    one, other = x.clone(), x.clone()
    func, args = with_tensors(Tensor.__setitem__, (one, index, 7.0))
    func(*args)
    other[index] = 7.0
    assert torch.equal(one, other)


@pytest.mark.filterwarnings("ignore:indexing with dtype torch.uint8")
def test_old_masks_of_integers_only_read() -> None:
    x, mask = draw(3, 4), MASK[:3].to(torch.uint8)
    func, args = with_tensors(Tensor.__getitem__, (x, mask))
    assert torch.equal(func(*args), x[mask])
    assert with_tensors(Tensor.__setitem__, (x, mask, 1.0))[1][1] == (mask,)


def test_a_selection_by_a_mask_is_an_index() -> None:
    x = draw(3, 4)
    for mask in (MASK, MASK[:3, None], MASK.expand(3, 4)):
        func, args = with_tensors(torch.masked_select, (x, mask))
        assert torch.equal(func(*args), torch.masked_select(x, mask))


def test_other_calls_stay() -> None:
    assert with_tensors(torch.add, (1, MASK)) == (torch.add, (1, MASK))


@pytest.mark.parametrize("ufunc", [np.add, np.subtract, np.multiply, np.divide])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.filterwarnings("ignore:__array_wrap__ must accept context")
def test_arithmetic_with_an_array_equals_numpys(ufunc: np.ufunc, dtype: Any) -> None:  # noqa: ANN401
    x, array = draw(3, 4), draw(4, seed=2).numpy().astype(dtype)
    wanted: Any = {
        np.add: operator.add,
        np.subtract: operator.sub,
        np.multiply: operator.mul,
        np.divide: operator.truediv,
    }
    assert torch.equal(computed_by_numpy(ufunc, (x, array)), wanted[ufunc](x, array))


def test_scalars_of_numpy_are_numbers() -> None:
    x = draw(3, 4)
    assert torch.equal(computed_by_numpy(np.subtract, (np.float32(0.3), x)), np.float32(0.3).item() - x)
    assert torch.equal(computed_by_numpy(np.less, (x, np.float64(0.0))), x < 0)


@pytest.mark.parametrize(
    ("ufunc", "operands"),
    [
        (np.sin, (draw(3),)),
        (np.multiply, (np.ones(3), draw(3))),
        (np.power, (draw(3), np.ones(3))),
        (np.multiply, (draw(3), np.ones(3, np.int64))),
        (np.multiply, (draw(3).half(), np.ones(3))),
        (np.multiply, (torch.tensor(1.0), np.ones(3))),
    ],
)
def test_what_numpy_may_round_in_another_way_is_not_computed(ufunc: np.ufunc, operands: tuple[Any, ...]) -> None:
    assert computed_by_numpy(ufunc, operands) is NotImplemented
