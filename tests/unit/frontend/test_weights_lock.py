"""One capture at a time, and none while a sampler reads weights."""

from __future__ import annotations

import threading

import pytest

from l2c_compile import CacheSchedule, l2c_compile
from l2c_compile.errors import CaptureError
from l2c_compile.frontend import weights_lock
from tests.tiny import calls_in, draw, residual, steps
from tests.waiting import HANG_S, num_blocked, wait_until


def test_a_capture_within_a_run_is_an_error_and_no_deadlock() -> None:
    sampler = l2c_compile(residual(), CacheSchedule.from_table({"a": [1, 0]}), steps(2))
    with weights_lock.weights_in_use(), pytest.raises(CaptureError, match="in the same thread"):
        sampler.capture(draw(2, 4))
    sampler.capture(draw(2, 4))


def test_the_lock_may_be_taken_again_by_its_thread() -> None:
    with weights_lock.weights_swapped(), weights_lock.weights_in_use(), weights_lock.weights_swapped():
        pass
    with weights_lock.weights_in_use(), weights_lock.weights_in_use():
        pass


def test_a_reader_that_is_in_goes_on_though_a_writer_waits() -> None:
    def write() -> None:
        with weights_lock.weights_swapped():
            pass

    with weights_lock.weights_in_use():
        writer = threading.Thread(target=write)
        writer.start()
        wait_until(lambda: num_blocked() == 1)
        with weights_lock.weights_in_use():
            assert writer.is_alive()
    writer.join(HANG_S)
    assert not writer.is_alive()


def test_the_lock_costs_a_call_little() -> None:
    def sample() -> None:
        with weights_lock.weights_in_use():
            pass

    assert calls_in(sample) < 20
