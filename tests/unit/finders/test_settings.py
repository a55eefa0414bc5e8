"""Settings that make no sense."""

from __future__ import annotations

from typing import Any

import pytest

from l2c_compile.errors import ScheduleError
from tests.learning import (
    settings,
)


@pytest.mark.parametrize(
    "changes",
    [
        {"rounds": 0},
        {"penalty": None},
        {"penalty": 1e-3, "budget": 0.5},
        {"penalty": -1.0},
        {"budget": 1.5},
        {"threshold": 1.0},
        {"learning_rate": 0.0},
    ],
)
def test_settings_that_make_no_sense_are_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(ScheduleError, match="want"):
        settings(**changes)
