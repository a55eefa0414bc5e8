"""The version matrix, without making an environment."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
from rich.progress import Progress

from bench.trust import version_matrix
from bench.trust.version_matrix import OLDEST, PINNED, Counts, Environment, counts_in, run
from tests.root import ROOT


@pytest.mark.parametrize(
    ("output", "wanted"),
    [
        ("...\n3 failed, 700 passed, 12 skipped in 60.00s\n", Counts(700, 3, 12, 0)),
        ("700 passed, 1 warning in 60.00s (0:01:00)", Counts(700)),
        ("1 skipped, 2 errors in 0.10s", Counts(skipped=1, errors=2)),
        ("ImportError: no torch", Counts(errors=1)),
        ("", Counts(errors=1)),
    ],
)
def test_the_last_line_of_pytest_is_read(output: str, wanted: Counts) -> None:
    assert counts_in(output) == wanted


def test_the_versions_are_those_of_the_project() -> None:
    assert f'"torch>={OLDEST.removesuffix(".0")}"' in (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    assert f"torch=={PINNED}" in (ROOT / "Makefile").read_text(encoding="utf-8")


def test_what_cannot_be_installed_is_a_row_and_what_can_is_tested(monkeypatch: pytest.MonkeyPatch) -> None:
    def make(folder: Path, torch: str, index: str | None, any_build: bool) -> Environment | str:
        return "no such version" if torch == "2.11.0" else Environment(folder, torch)

    monkeypatch.setattr(Environment, "make", make)
    monkeypatch.setattr(Environment, "test", lambda self, files: Counts(passed=len(files)))
    rows = run(["--torch", "2.11.0", "2.13.0", "--quick"], Progress(disable=True))
    found = {(row.conditions["tested_torch"], row.metric): row.value for row in rows}
    assert found["2.11.0", "installed"] == 0
    assert rows[0].conditions["reason"] == "no such version"
    assert found["2.13.0", "passed"] == len(version_matrix._QUICK)
    for name in version_matrix._QUICK:
        assert (ROOT / name).exists()


@pytest.mark.parametrize(
    ("url", "cuda"), [("file:///torch-2.13.0-cp311.whl", False), ("https://x/nvidia_nccl-1.whl", True)]
)
def test_a_build_with_cuda_is_not_fetched_unasked(
    url: str, cuda: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    commands: list[tuple[str, ...]] = []

    def pip(self: Environment, *arguments: str) -> subprocess.CompletedProcess[str]:
        commands.append(arguments)
        return subprocess.CompletedProcess(arguments, 0, f'{{"install": [{{"url": "{url}"}}]}}', "")

    monkeypatch.setattr("venv.create", lambda folder, with_pip: folder.mkdir())
    monkeypatch.setattr(Environment, "_pip", pip)
    made = Environment.make(tmp_path / "e", "2.13.0", None, any_build=False)
    assert isinstance(made, str) == cuda
    assert [command for command in commands if "--dry-run" not in command] == ([] if cuda else commands[1:])
