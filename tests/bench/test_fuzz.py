"""The hunt for bugs counts what it tried, replays a seed, and says what it found."""

from __future__ import annotations

import itertools
import random

import pytest
from rich.progress import Progress

from bench.cases import BenchError, load
from bench.report import Row
from bench.targets import read_targets
from bench.trust import fuzz
from bench.trust.programs.checking import Checker, Mismatch, Outcome, Program, draw_programs


def row(rows: list[Row], metric: str) -> Row:
    (found,) = [each for each in rows if each.metric == metric]
    return found


@pytest.fixture
def few(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fuzz, "draw_programs", lambda rng: itertools.islice(draw_programs(rng), 2))


@pytest.mark.usefixtures("few")
def test_it_counts_programs_and_finds_nothing() -> None:
    rows = load("fuzz")(["--minutes", "0.001", "--seed", "2"], Progress(disable=True))
    assert row(rows, "programs").value == 2
    assert row(rows, "programs_a_minute").value > 0
    assert row(rows, "mismatches").value == 0


@pytest.mark.usefixtures("few")
def test_a_failure_can_be_replayed(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn = list(itertools.islice(draw_programs(random.Random(2)), 2))

    def check(self: Checker, program: Program) -> Outcome:
        if program == drawn[1]:
            raise Mismatch("planted")
        return Outcome(refused="ScheduleError: planted")

    monkeypatch.setattr(Checker, "check", check)
    rows = fuzz.run(["--replay", "2"], Progress(disable=True))
    assert row(rows, "mismatches").value == 1
    assert row(rows, "refused_percent").value == 50
    assert row(rows, "refused").conditions == {"error": "ScheduleError"}
    found = row(rows, "mismatch").conditions
    assert found["replay"] == "2:1"
    assert Program.from_json(str(found["program"])) == drawn[1]
    (again,) = [r for r in fuzz.run(["--replay", "2:1"], Progress(disable=True)) if r.metric == "mismatch"]
    assert again.conditions["message"] == "Mismatch: planted"


@pytest.mark.usefixtures("few")
def test_it_hunts_through_dynamo_too(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = fuzz.run(["--minutes", "0.001", "--seed", "4", "--dynamo"], Progress(disable=True))
    assert row(rows, "programs").value == 1
    assert row(rows, "mismatches").value == 0
    assert row(rows, "refused_through_dynamo_percent").value == 0

    def check(self: Checker, program: Program) -> Outcome:
        raise Mismatch("planted")

    monkeypatch.setattr(Checker, "check_through_dynamo", check)
    rows = fuzz.run(["--replay", "2:1", "--dynamo"], Progress(disable=True))
    assert row(rows, "mismatch").conditions["message"] == "Mismatch: planted"


def test_a_seed_without_programs_is_a_find_and_loses_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    def draw(rng: random.Random) -> object:
        raise RuntimeError("planted")

    monkeypatch.setattr(fuzz, "draw_programs", draw)
    rows = fuzz.run(["--minutes", "0.0001", "--seed", "2"], Progress(disable=True))
    assert row(rows, "programs").value == 0
    found = next(each for each in rows if each.metric == "mismatch").conditions
    assert (found["replay"], found["message"]) == ("2", "no programs: RuntimeError: planted")


@pytest.mark.parametrize("text", ["x", "1:x", "2:999", "-1"])
def test_a_replay_wants_a_seed(text: str) -> None:
    with pytest.raises(BenchError, match=r"replay wants|has the programs"):
        fuzz.run([f"--replay={text}"], Progress(disable=True))


def test_one_mismatch_falls_short() -> None:
    (target,) = [t for t in read_targets() if t.metric == "mismatches"]
    assert (target.comparison, target.value) == ("==", 0)
