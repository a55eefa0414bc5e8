"""``l2c schedule``."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from l2c_compile import CacheSchedule
from l2c_compile.cli.schedule import METHODS
from l2c_compile.finders import Profile
from tests.command_line import l2c, small_models

STEPS = 6


def lines(*arguments: object) -> str:
    done = l2c(*arguments)
    assert done.code == 0, done.err
    return done.out


@pytest.fixture(scope="module")
def profile(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("profile") / "p.safetensors"
    with small_models():
        printed = lines("profile", "--steps", STEPS, "--runs", 2, "--out", path)
    assert "2 runs, lags 1..5, 6 evaluations x 6 sites" in printed
    return path


@pytest.mark.parametrize(
    ("method", "parameter"),
    [
        ("smooth-cache", ("--alpha", 1.5)),
        ("smooth-cache", ("--budget", 0.7, "--by", "site", "--lookahead", 2)),
        ("block-caching", ("--delta", 3)),
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
    output = lines("schedule", method, "--profile", profile, "--out", path, *parameter)
    schedule = CacheSchedule.load(path)
    assert schedule.num_evaluations == STEPS
    assert schedule.loop == Profile.load(profile).loop
    assert len(schedule.reuses) > 0
    kept = Profile.load(profile).work.kept(schedule)
    assert f"about {kept:.2%} of the multiply-adds kept" in output
    if "--budget" in parameter:
        assert kept >= 0.7
    assert f"{STEPS}" in lines("inspect", path)


def test_a_formula_needs_no_profile(tmp_path: Path) -> None:
    path = tmp_path / "s.json"
    lines("schedule", "uniform", "--evaluations", 7, "--interval", 3, "--anchor", "end", "--out", path)
    assert CacheSchedule.load(path).row("blocks.*.attn") == [1, 0, 0, 1, 0, 0, 1]
    lines("schedule", "deep-cache", "--evaluations", 50, "--computed", 10, "--site", "up.0", "--out", path, "--force")
    assert sum(CacheSchedule.load(path).row("up.0")) == 10
    lines("schedule", "uniform", "--evaluations", 4, "--interval", 2, "--branches", 2, "--out", path, "--force")
    assert CacheSchedule.load(path).row("blocks.*.mlp") == [1, 1, 0, 0]


def test_exactly_one_of_parameter_and_budget_is_given(tmp_path: Path, profile: Path) -> None:
    for given in ((), ("--alpha", 0.1, "--budget", 0.5)):
        done = l2c("schedule", "smooth-cache", "--profile", profile, "--out", tmp_path / "s.json", *given)
        assert done.code == 2
        assert "give either --alpha or --budget" in done.err
    assert not (tmp_path / "s.json").exists()


@pytest.mark.parametrize(
    "options",
    [("smooth-cache", "--lookahead", 2), ("mag-cache", "--max-skip", 1), ("pairwise",), ("random", "--pairs")],
)
def test_a_budget_that_cannot_be_met_is_an_error_that_says_the_least(
    options: tuple[object, ...], tmp_path: Path, profile: Path
) -> None:
    path = tmp_path / "s.json"
    command = ("schedule", *options, "--profile", profile, "--out", path)
    done = l2c(*command, "--budget", 0.01)
    assert (done.code, done.out) == (2, "")
    assert not path.exists()
    met = re.search(r"at least (\d+\.\d\d)% .* --budget of (0\.\d{4}) or more, .* --nearest", done.err)
    assert met is not None
    output = lines(*command, "--budget", 0.01, "--nearest")
    nearest = CacheSchedule.load(path)
    kept = Profile.load(profile).work.kept(nearest)
    assert 0 <= float(met[2]) - kept <= 1e-4
    assert float(met[1]) == pytest.approx(100 * float(met[2]))
    assert f"about {kept:.2%} of the multiply-adds kept" in output
    # What it says can be met.
    lines(*command, "--budget", met[2], "--force")
    assert Profile.load(profile).work.kept(CacheSchedule.load(path)) >= float(met[2])


def test_what_is_no_profile_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "s.json"
    CacheSchedule.from_table({"a": [1, 0]}).save(path)
    done = l2c("schedule", "block-caching", "--delta", 1, "--profile", path, "--out", tmp_path / "t.json")
    assert done.code == 2
    assert f"{path} is a schedule or router, no profile; `l2c profile --out FILE` makes one" in done.err.replace(
        "\n", " "
    )


@pytest.mark.parametrize("method", METHODS)
def test_every_method_says_what_each_of_its_options_means(method: str) -> None:
    done = l2c("schedule", method, "--help")
    assert done.code == 0
    # Wrapped at hyphens as well.
    assert "".join(METHODS[method].summary.split()) in "".join(done.out.split())
    options = re.findall(r"^  (--[a-z-]+)(?: \S+)?(.*(?:\n {10,}.*)*)", done.out, re.MULTILINE)
    assert {name for name, _ in options} >= {"--out", "--force", "--help"}
    assert [name for name, text in options if not text.strip()] == []


def test_values_that_make_no_sense_are_named(tmp_path: Path, profile: Path) -> None:
    for options, message in (
        (("smooth-cache", "--profile", profile, "--alpha", 1, "--lookahead", 0), "lookahead wants a whole number"),
        (("smooth-cache", "--profile", profile, "--alpha", 1, "--by", "name"), "'name' is not one of 'type', 'site'"),
        (("invar-diff", "--profile", profile, "--strength", 2), "wants a number in [0, 1]"),
        (("uniform", "--evaluations", 4, "--interval", 0), "an interval wants a whole number from 1"),
        (("random", "--profile", profile, "--budget", 0), "a budget wants the share that is kept"),
    ):
        done = l2c("schedule", *options, "--out", tmp_path / "s.json")
        assert (done.code, done.out) == (2, "")
        assert message in " ".join(done.err.split())
