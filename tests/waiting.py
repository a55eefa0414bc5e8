"""Waiting for threads, however slow the machine is."""

from __future__ import annotations

import time
from collections.abc import Callable

from l2c_compile.frontend import weights_lock

HANG_S = 300
"""Only a test that fails waits so long."""


def wait_until(condition: Callable[[], bool]) -> None:
    """Return once the condition holds, however slow the machine is."""
    give_up_s = time.monotonic() + HANG_S
    while not condition():
        assert time.monotonic() < give_up_s, "a thread hangs"
        time.sleep(0.001)


def num_blocked() -> int:
    """Return how many threads wait for the lock of the weights."""
    return len(weights_lock._weights._changed._waiters)  # type: ignore[attr-defined]
