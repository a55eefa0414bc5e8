"""Fixtures for all tests."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="session")
def shared() -> Callable[[str], Path]:
    """Return a function from a name to a file beside the checkout (``../shared``, or ``$L2C_SHARED``).

    A test that asks for a file that is not there is skipped.
    """
    folder = Path(os.environ.get("L2C_SHARED", ROOT.parent / "shared"))

    def find(name: str) -> Path:
        path = folder / name
        if not path.exists():
            pytest.skip(f"needs {name} from the shared folder, which is not here")
        return path

    return find
