"""``l2c profile`` and ``l2c schedule``."""

from __future__ import annotations

from pathlib import Path

import pytest
from typer.testing import CliRunner

from l2c_compile import CacheSchedule, L2CError
from l2c_compile.cli.main import app
from l2c_compile.errors import FileFormatError
from l2c_compile.finders import Profile

STEPS = 6


def l2c(*args: object) -> str:
    result = CliRunner().invoke(app, list(map(str, args)), env={"COLUMNS": "140"})
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == 0, result.output
    return result.output


@pytest.fixture(scope="module")
def profile(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("profile")
    output = l2c("profile", "--steps", STEPS, "--runs", 2, "--out", folder / "p.safetensors", "--png", folder / "p.png")
    assert "2 runs, lags 1..5, 6 evaluations x 18 sites" in output
    assert (folder / "p.png").read_bytes().startswith(b"\x89PNG")
    return folder / "p.safetensors"


@pytest.mark.parametrize(
    ("method", "parameter"),
    [
        ("smooth-cache", ("--alpha", 0.2)),
        ("smooth-cache", ("--budget", 0.7, "--by", "site", "--lookahead", 2)),
        ("block-caching", ("--delta", 0.3)),
        ("block-caching", ("--budget", 0.7)),
        ("invar-diff", ("--strength", 0.63)),
        ("invar-diff", ("--budget", 0.7)),
        ("mag-cache", ("--threshold", 0.2, "--retention", 0.3)),
        ("mag-cache", ("--budget", 0.7)),
        ("pairwise", ("--budget", 0.7, "--error", "block-caching")),
        ("random", ("--budget", 0.7, "--seed", 3, "--pairs")),
    ],
)
def test_a_schedule_is_made_from_a_profile(
    tmp_path: Path, profile: Path, method: str, parameter: tuple[object, ...]
) -> None:
    path = tmp_path / "s.json"
    output = l2c("schedule", method, "--profile", profile, "--out", path, *parameter)
    schedule = CacheSchedule.load(path)
    assert schedule.num_evaluations == STEPS
    assert schedule.loop == Profile.load(profile).loop
    assert len(schedule.reuses) > 0
    kept = Profile.load(profile).work.kept(schedule)
    assert f"about {kept:.2%} of the multiply-adds kept" in output
    if "--budget" in parameter:
        assert kept >= 0.7
    assert f"{STEPS}" in l2c("inspect", path)


def test_a_formula_needs_no_profile(tmp_path: Path) -> None:
    path = tmp_path / "s.json"
    l2c("schedule", "uniform", "--evaluations", 7, "--interval", 3, "--anchor", "end", "--out", path)
    assert CacheSchedule.load(path).row("blocks.*.attn") == [1, 0, 0, 1, 0, 0, 1]
    l2c("schedule", "deep-cache", "--evaluations", 50, "--computed", 10, "--site", "up.0", "--out", path)
    assert sum(CacheSchedule.load(path).row("up.0")) == 10


def test_exactly_one_of_parameter_and_budget_is_given(tmp_path: Path, profile: Path) -> None:
    for given in ((), ("--alpha", 0.1, "--budget", 0.5)):
        with pytest.raises(L2CError, match="give either --alpha or --budget"):
            l2c("schedule", "smooth-cache", "--profile", profile, "--out", tmp_path / "s.json", *given)
    assert not (tmp_path / "s.json").exists()


def test_what_is_no_profile_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "s.json"
    CacheSchedule.from_table({"a": [1, 0]}).save(path)
    with pytest.raises(FileFormatError, match="not a safetensors file"):
        l2c("schedule", "block-caching", "--delta", 1, "--profile", path, "--out", tmp_path / "t.json")


def test_a_model_without_weights_is_refused(tmp_path: Path) -> None:
    with pytest.raises(L2CError, match=r"DiT-XL/2 has no weights here and cannot be sampled; take digits"):
        l2c("profile", "--model", "dit-xl/2", "--out", tmp_path / "p.safetensors")
    with pytest.raises(L2CError, match="no model is called 'digit'; did you mean 'digits'"):
        l2c("profile", "--model", "digit", "--out", tmp_path / "p.safetensors")
