"""Writes into what is read at the same time."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from l2c_compile.frontend.overlap import overlaps_in_part

X = torch.zeros(3, 4)


@pytest.mark.parametrize(
    ("written", "read", "wanted"),
    [
        (X[:, 1:], X[:, :-1], True),
        (X[1:], X[:-1], True),
        (X.view(-1)[1:], X.view(-1)[:-1], True),
        (X[:2], X[1:].flip(0), False),
        (X, X[0].expand(3, 4), True),
        (X, X, False),
        (X[:, 2:], X[:, :2], False),
        (X[::2], X[1::2], False),
        (X[0], torch.zeros(4), False),
        (X[:0], X, False),
    ],
)
def test_a_part_that_is_read_and_written_elsewhere_is_found(written: Tensor, read: Tensor, wanted: bool) -> None:
    assert overlaps_in_part(written, [read]) is wanted


def test_fake_tensors_have_places_too() -> None:
    with FakeTensorMode():
        x = torch.zeros(3, 4)
        written, read = x[:, 1:], x[:, :-1]
    assert overlaps_in_part(written, [x[:, :1], read])
