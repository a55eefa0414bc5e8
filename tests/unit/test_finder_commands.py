"""``l2c profile``, ``l2c schedule`` and ``l2c eval``: files of one are read by the next."""

from __future__ import annotations

import json
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


@pytest.mark.filterwarnings("ignore:a Frechet distance")
def test_a_schedule_is_evaluated(tmp_path: Path) -> None:
    path = tmp_path / "s.json"
    row = [1, 1, 0]
    CacheSchedule.from_table({"blocks.*.attn": row, "blocks.*.mlp": row}).save(path)
    output = l2c("eval", path, "--samples", 70, "--batch", 35, "--json", tmp_path / "q.json")
    assert "digits, ddim, 3 evaluations, 70 samples, seed 0" in output
    assert "drawn as asked" in output
    document = json.loads((tmp_path / "q.json").read_text())
    assert document["schedule"] == CacheSchedule.load(path).digest
    assert 0.66 < document["multiply_adds_kept"] < 0.68
    found = document["quality"]
    assert found["num_samples"] == 70
    assert 5 < found["psnr_db"]["low"] < found["psnr_db"]["value"] < found["psnr_db"]["high"] < 60
    assert 0 < found["relative_l2"]["value"] < 1
    assert found["frechet"]["value"] > 0
    assert set(found) == {
        *("num_samples", "psnr_db", "ssim", "relative_l1", "relative_l2", "frechet", "precision", "recall")
    }


def test_nothing_reused_is_nothing_lost(tmp_path: Path) -> None:
    path = tmp_path / "s.json"
    CacheSchedule.all_compute(2, ["blocks.0.attn"]).save(path)
    with pytest.warns(UserWarning, match="is mostly bias"):
        l2c("eval", path, "--samples", 66, "--batch", 33, "--json", tmp_path / "q.json")
    document = json.loads((tmp_path / "q.json").read_text())
    assert document["multiply_adds_kept"] == 1.0
    assert document["quality"]["psnr_db"]["value"] is None
    assert document["quality"]["relative_l2"] == {"value": 0.0, "low": 0.0, "high": 0.0}
    assert document["quality"]["precision"]["value"] == 1.0


def test_too_few_samples_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "s.json"
    CacheSchedule.from_table({"blocks.0.attn": [1, 0]}).save(path)
    with pytest.raises(L2CError, match="a Frechet distance of 64 features wants more than 64 samples"):
        l2c("eval", path, "--samples", 20)
