"""Fixtures for all tests."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from bench.workloads import shared_folder


@pytest.fixture(scope="session")
def shared() -> Callable[[str], Path]:
    """Return a function from a name in the shared folder to its path; it skips the test where the file is absent.

    The folder lies next to the repository or in it; the environment variable L2C_SHARED names another.
    """
    folder = shared_folder()

    def shared_file(name: str) -> Path:
        path = folder / name
        if not path.exists():
            pytest.skip(f"../shared/{name} is absent")
        return path

    return shared_file
