"""What a user may choose, and what follows from it."""

from __future__ import annotations

from typing import Any

import pytest

from l2c_compile.backends.options import Options
from l2c_compile.errors import BackendError
from l2c_compile.passes.base import Numerics
from l2c_compile.passes.pipeline import KERNELS


def names(pipeline: Any) -> list[str]:  # noqa: ANN401
    return [each.name for each in pipeline.passes]


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        ({"backend": "inducto"}, BackendError, "did you mean 'inductor'"),
        ({"backend": "zzz"}, BackendError, "there are .*aot_eager"),
        ({"mode": "max-autotune"}, BackendError, "mode wants 'reduce-overhead' or None, got 'max-autotune'"),
        ({"caches": "int4"}, ValueError, "caches wants one of int8, fp8 or None, got 'int4'"),
        ({"numerics": "approximate"}, ValueError, "numerics wants one of bitwise, rounding, got 'approximate'"),
        ({"without": ["no-such-pass"]}, ValueError, "there is no pass 'no-such-pass'"),
        ({"without": ["lower-cache-reads"]}, ValueError, "needs READS_LOWERED"),
        ({"without": ["read-reused-sites"]}, ValueError, "the pass that applies the schedule"),
    ],
)
def test_a_choice_that_cannot_be_honoured_is_refused(
    given: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        Options(**given)


@pytest.mark.parametrize(
    ("given", "is_bitwise"),
    [
        ({}, True),
        ({"numerics": "rounding"}, False),
        ({"backend": "inductor"}, False),
        ({"backend": "aot_eager", "numerics": "bitwise"}, False),
        ({"backend": "eager", "numerics": "bitwise", "caches": "int8"}, False),
    ],
)
def test_only_the_eager_backend_with_exact_passes_returns_the_bits_of_the_loop(
    given: dict[str, Any], is_bitwise: bool
) -> None:
    assert Options(**given).is_bitwise is is_bitwise


def test_each_backend_takes_the_numerics_that_it_has_anyway() -> None:
    assert Options().passes == Options(numerics="bitwise").passes
    assert Options(backend="inductor").passes == Options(numerics="rounding").passes
    assert all(each.numerics is Numerics.BITWISE for each in Options().passes.passes)


def test_kernels_are_for_the_backends_that_take_them() -> None:
    assert names(Options(backend="inductor").kernels) == names(KERNELS)
    assert names(Options(backend="aot_eager").kernels) == []
    left_out = names(KERNELS)[0]
    assert left_out not in names(Options(backend="inductor", without=[left_out]).kernels)
    assert names(Options(backend="inductor", without=[left_out]).passes) == names(Options(backend="inductor").passes)


def test_packed_caches_are_passes_of_their_own() -> None:
    assert {*names(Options(caches="int8").passes)} - {*names(Options().passes)} == {"pack-caches"}
