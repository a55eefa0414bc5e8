"""How a long stage tells the user what it is about to do."""

from __future__ import annotations

from collections.abc import Callable

__all__ = ["Progress", "silent"]

Progress = Callable[[str], None]
"""Told what the compiler is about to do, in a few words."""


def silent(what: str) -> None:
    """Tell nobody: the progress of who wants none."""
