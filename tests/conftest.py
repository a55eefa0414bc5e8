"""Fixtures for all tests."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from bench.workloads import shared_folder
from l2c_compile import compile as compile_module
from l2c_compile.frontend.capture import capture
from tests.captures import shared_capture


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


@pytest.fixture(scope="session", autouse=True)
def _captures_are_shared() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(compile_module, "capture", shared_capture)
        yield


@pytest.fixture
def captured_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let each compilation of the test capture its denoiser."""
    monkeypatch.setattr(compile_module, "capture", capture)
