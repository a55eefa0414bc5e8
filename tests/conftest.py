"""Fixtures for all tests."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from l2c_compile import compile as compile_module
from l2c_compile.frontend.capture import capture
from tests.captures import shared_capture
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


@pytest.fixture(scope="session", autouse=True)
def _captures_are_shared() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(compile_module, "capture", shared_capture)
        yield


@pytest.fixture
def captured_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let each compilation of the test capture its denoiser."""
    monkeypatch.setattr(compile_module, "capture", capture)
