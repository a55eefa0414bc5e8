"""The one hypothesis profile: the same draws on every machine; ``L2C_EXAMPLES`` asks for more of them.

A slow test without a reason is an error.
"""

from __future__ import annotations

import gc
import os

import pytest
from hypothesis import settings

settings.register_profile(
    "l2c",
    derandomize=True,
    database=None,
    deadline=None,
    print_blob=True,
    max_examples=int(os.environ.get("L2C_EXAMPLES", "25")),
)
settings.load_profile("l2c")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Refuse slow tests that do not say why they are."""
    for item in items:
        for mark in item.iter_markers("slow"):
            if mark.args or not mark.kwargs.get("reason"):
                raise pytest.UsageError(f"{item.nodeid}: write @pytest.mark.slow(reason=...), in one line")


def pytest_collection_finish() -> None:
    """Leave what was imported out of the searches for garbage, and search less often: most objects are torch's."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(20_000, 10, 10)


def pytest_sessionfinish() -> None:
    """Let the interpreter free what was left out, so that no library takes it for a leak."""
    gc.unfreeze()
