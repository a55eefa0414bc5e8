"""The summary of a sampler says what its checks cost."""

from __future__ import annotations

from l2c_compile import CacheSchedule, l2c_compile
from tests.tiny import draw, residual, steps


def test_the_summary_says_what_guards_and_the_first_call_cost() -> None:
    sampler = l2c_compile(residual(), CacheSchedule.from_table({"a": [1, 0]}), steps(2))
    sampler.capture(draw(2, 4))
    before = sampler.summary()
    assert before.first_call_s == 0
    assert before.guards_s > 0
    assert "first call" not in before.in_short()
    sampler(draw(2, 4))
    after = sampler.summary()
    assert after.first_call_s > 0
    assert "first call compared with the eager loop in" in str(after)
    assert "ms a call" in after.in_short()
    assert after.multiply_adds == before.multiply_adds
