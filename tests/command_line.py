"""The command ``l2c``, run in this process, and models of two blocks to run it on."""

from __future__ import annotations

import io
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from unittest import mock

import pytest

from l2c_compile.cli.main import main
from l2c_compile.models import DIT_PRESETS, DiT
from l2c_compile.models.digits import load_digits_dit

__all__ = ["Done", "l2c", "small_models", "two_blocks"]


@dataclass(frozen=True)
class Done:
    """What a command ended with."""

    code: int
    out: str
    err: str


def l2c(*arguments: object, columns: int = 140) -> Done:
    """Run a command as a shell would, its errors and exit code included."""
    out, err = io.StringIO(), io.StringIO()
    with (
        mock.patch.object(sys, "argv", ["l2c", *map(str, arguments)]),
        mock.patch.dict(os.environ, COLUMNS=str(columns)),
        redirect_stdout(out),
        redirect_stderr(err),
        pytest.raises(SystemExit) as ended,
    ):
        main()
    assert isinstance(ended.value.code, int)
    return Done(ended.value.code, out.getvalue(), err.getvalue())


def two_blocks() -> DiT:
    """Return the first two of the eight blocks of the digits model, with all around them."""
    model = load_digits_dit()
    model.blocks = model.blocks[:2]
    return model


@contextmanager
def small_models() -> Iterator[None]:
    """Let commands take two blocks for the digits model, and for DiT-S/8."""
    with pytest.MonkeyPatch.context() as patch:
        for home in ("l2c_compile.models.named", "l2c_compile.cli.demo"):
            patch.setattr(f"{home}.load_digits_dit", two_blocks)
        patch.setitem(DIT_PRESETS, "DiT-S/8", {**DIT_PRESETS["DiT-S/8"], "depth": 2})
        yield
