"""``l2c_compile``: what is given decides which sampler is made."""

from __future__ import annotations

import pytest

from l2c_compile import CacheSchedule, l2c_compile
from l2c_compile.loops import DDIM
from l2c_compile.passes.pipeline import LOOP
from tests.tiny import check_equals_reference, draw, residual, same_bits, steps


def test_the_loop_of_the_schedule_is_taken_where_none_is_given() -> None:
    table = {"a": [1, 0]}
    model, x = residual(), draw(3, 4)
    described = CacheSchedule.from_table(table, loop=DDIM(2).to_dict())
    given = check_equals_reference(model, CacheSchedule.from_table(table), DDIM(2), x)
    assert same_bits(l2c_compile(model, described)(x), given(x))


@pytest.mark.parametrize("without", [["read-reused-sites"], [each.name for each in LOOP.passes]], ids=["alone", "all"])
def test_the_pass_that_applies_the_schedule_cannot_be_left_out(without: list[str]) -> None:
    schedule = CacheSchedule.from_table({"a": [1, 0, 1]})
    with pytest.raises(ValueError, match=r"the pass that applies the schedule; .* CacheSchedule\.all_compute"):
        l2c_compile(residual(), schedule, steps(3), without=without)
