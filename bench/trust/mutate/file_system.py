"""What is no plain file, or not for long."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path


def _make_link_loop(path: Path, content: bytes) -> None:
    path.symlink_to(path.name)


def _make_folder(path: Path, content: bytes) -> None:
    path.mkdir()


def _make_nothing(path: Path, content: bytes) -> None:
    pass


def _make_pipe(path: Path, content: bytes) -> None:
    os.mkfifo(path)


def _make_endless(path: Path, content: bytes) -> None:
    path.symlink_to("/dev/zero")


def _make_sparse(path: Path, content: bytes) -> None:
    path.write_bytes(content)
    # As long as it claims, and without a block on the disk.
    os.truncate(path, 2**40)


def _make_vanishing(path: Path, content: bytes) -> None:
    path.write_bytes(content)


FILE_SYSTEM: dict[str, Callable[[Path, bytes], None]] = {
    "folder": _make_folder,
    "missing": _make_nothing,
    "link loop": _make_link_loop,
    "pipe": _make_pipe,
    "endless": _make_endless,
    "sparse": _make_sparse,
    "vanishes": _make_vanishing,
}
