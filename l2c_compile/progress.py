"""How a long stage tells the user what it is about to do."""

from __future__ import annotations

from collections.abc import Callable

Progress = Callable[[str], None]
"""A function that is told, in a few words, what the compiler is about to do."""


def silent(what: str) -> None:
    """Do nothing with the message; the default where the caller wants no progress."""
