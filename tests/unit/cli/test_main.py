"""The command ``l2c``: its errors and its help."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from tests.root import ROOT


def l2c(*args: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "l2c_compile", *map(str, args)]
    return subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)


def test_an_error_is_one_line_and_exit_code_2(tmp_path: Path) -> None:
    path = tmp_path / "file.json"
    path.write_text("no schedule")
    done = l2c("inspect", path)
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.startswith("l2c: error: the file has no known form")
    assert done.stderr.count("\n") == 1


def test_help_lists_the_command() -> None:
    done = l2c("--help")
    assert done.returncode == 0
    assert "inspect" in done.stdout
