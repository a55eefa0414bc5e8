"""What a module returns beside tensors."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from l2c_compile.graphs.site_results import SiteResult

X = torch.ones(2)


@pytest.mark.parametrize(
    ("one", "other", "fit"),
    [
        ((X, 1), (X * 2, 3), True),
        ([X], (X,), False),
        ([X], [X, X], False),
        ((X, None), (None, X), False),
        ({"a": X, "b": None}, {"a": X, "b": None}, True),
        ({"a": X}, {"b": X}, False),
    ],
)
def test_results_fit_iff_their_containers_do(one: object, other: object, fit: bool) -> None:
    assert SiteResult.of(one).fits(SiteResult.of(other)) == fit


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        (1, 1, True),
        (1, 1.0, False),
        (True, 1, False),
        (0.0, -0.0, False),
        (float("nan"), float("nan"), True),
        ("a", "b", False),
        (None, None, True),
        (np.ones(2), np.ones(2), False),
    ],
)
def test_python_values_are_the_same_iff_type_and_value_are(one: object, other: object, same: bool) -> None:
    differing = SiteResult.of((X, one)).first_other_value(SiteResult.of((X, other)))
    assert (differing is None) == same


def test_a_result_is_printed_as_its_containers() -> None:
    assert str(SiteResult.of((X, [None, X]))) == "(tensor, [NoneType, tensor])"
    assert SiteResult.of((X, [None, X])).num_tensors == 2
