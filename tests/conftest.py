"""Fixtures for all tests."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.root import ROOT

_SHARED = Path(os.environ.get("L2C_SHARED", ROOT.parent / "shared"))


@pytest.fixture(scope="session")
def shared() -> Callable[[str], Path]:
    """Return a function from a name in the shared folder to its path; it skips the test where the file is absent.

    The folder lies next to the repository; the environment variable L2C_SHARED names another.
    """

    def shared_file(name: str) -> Path:
        path = _SHARED / name
        if not path.exists():
            pytest.skip(f"../shared/{name} is absent")
        return path

    return shared_file
