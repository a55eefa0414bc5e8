"""Errors of the folder where torch keeps what it compiles; ``tests/behaviour/test_faults.py`` has them with torch."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from l2c_compile.errors import BackendError
from l2c_compile.files.torch_cache import cache_folder_named


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    path = tmp_path / "cache"
    path.mkdir()
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(path))
    return path


def test_an_error_of_the_folder_names_it_and_the_way_out(folder: Path) -> None:
    for error in (OSError(errno.ENOSPC, "full"), PermissionError(errno.EACCES, "denied", str(folder / "ab" / "x.tmp"))):
        internals = RuntimeError("as torch wraps it")
        internals.__cause__ = error
        with pytest.raises(BackendError, match="TORCHINDUCTOR_CACHE_DIR to a folder") as raised, cache_folder_named():
            raise internals
        assert str(folder) in str(raised.value)
        assert os.strerror(error.errno or 0) in str(raised.value)


def test_other_errors_stay_what_they_are(folder: Path) -> None:
    elsewhere = FileNotFoundError(errno.ENOENT, "no such file", str(folder.parent / "mine"))
    for error in (elsewhere, OSError(errno.ENOENT, "nameless"), ValueError("mine")):
        with pytest.raises(type(error)) as raised, cache_folder_named():
            raise error
        assert raised.value is error
