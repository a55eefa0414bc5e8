"""The one hypothesis profile: the same draws on every machine; ``L2C_EXAMPLES`` asks for more of them.

A slow test without a reason is an error.
"""

from __future__ import annotations

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
