"""The command ``l2c``: its table, its errors and its help."""

from __future__ import annotations

import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest

from l2c_compile.cli.main import COMMANDS
from tests.command_line import l2c
from tests.root import ROOT


def python(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)


def test_an_error_is_one_line_and_exit_code_2(tmp_path: Path) -> None:
    path = tmp_path / "file.json"
    path.write_text("no schedule")
    done = python("-m", "l2c_compile", "inspect", path)
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.startswith("l2c: error: the file has no known form")
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize("option", ["--help", "--version"])
def test_help_and_version_do_not_wait_for_torch(option: str) -> None:
    code = f"""
import sys
sys.argv = ["l2c", {option!r}]
from l2c_compile.cli.main import main
try:
    main()
except SystemExit as ended:
    assert ended.code == 0
assert "l2c_compile" in sys.modules
assert "torch" not in sys.modules
"""
    done = python("-c", code)
    assert done.returncode == 0, done.stderr


def test_help_lists_every_command_in_one_line() -> None:
    done = l2c("--help", columns=80)
    assert done.code == 0
    for name, summary in COMMANDS.items():
        assert f"  {name:<8}  {summary}\n" in done.out


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_says_how_it_is_used(name: str) -> None:
    done = l2c(name, "--help")
    assert done.code == 0
    assert f"l2c {name} [OPTIONS]" in done.out
    assert "--install-completion" not in done.out


def test_the_version_is_that_of_the_package_and_of_torch() -> None:
    done = l2c("--version")
    assert (done.code, done.out) == (0, f"l2c-compile {version('l2c-compile')}, torch {version('torch')}\n")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("inspct", "x"), "No such command 'inspct'"),
        (("inspect", "missing.json"), "'missing.json' does not exist"),
        (("demo", "--steps", "7"), "'7' is not one of '20', '50'"),
        (("schedule", "unifrm"), "No such command 'unifrm'"),
        (("schedule", "random"), "Missing option"),
    ],
)
def test_bad_usage_ends_with_2(arguments: tuple[str, ...], message: str) -> None:
    done = l2c(*arguments)
    assert (done.code, done.out) == (2, "")
    assert message in " ".join(done.err.split())


def test_a_command_without_arguments_shows_its_help() -> None:
    for arguments in ((), ("schedule",)):
        done = l2c(*arguments)
        assert "Commands:" in done.out + done.err
