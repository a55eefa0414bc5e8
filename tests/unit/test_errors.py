"""Errors: what kind they are, what they quote, and what they suggest."""

from __future__ import annotations

import pytest

from l2c_compile import errors
from l2c_compile.errors import FileFormatError, L2CError, nearest

KINDS = [each for each in vars(errors).values() if isinstance(each, type) and issubclass(each, L2CError)]
OURS = {"FirstCallError", "L2CError", "PassFailed", "StaleConstantsError", "VerificationError"}
"""Raised for what the caller could not know: a bug of ours, or weights that changed."""


@pytest.mark.parametrize("kind", KINDS)
def test_a_mistake_of_the_caller_is_a_value_error_too(kind: type[L2CError]) -> None:
    assert issubclass(kind, ValueError) is (kind.__name__ not in OURS)
    assert str(kind("text")) == "text"


def test_what_a_file_says_is_cut_in_the_middle_and_cannot_control_a_terminal() -> None:
    text = str(FileFormatError("key \x1b[2J\u202e " + "x" * 10_000 + " is unknown;\nupdate l2c_compile"))
    assert len(text) < 700
    assert text.replace("\n", "").isprintable()
    assert text.startswith("key \\x1b[2J\\u202e ")
    assert text.endswith("is unknown;\nupdate l2c_compile")


def test_near_names_are_suggested_and_far_ones_are_not() -> None:
    assert nearest("inducto", ["eager", "inductor"]) == "did you mean 'inductor'?"
    assert nearest("zzz", ["eager", "inductor"]) == ""
    assert nearest("block", ["block1", "block2", "block3", "block4"], count=2).count("'block") == 2
