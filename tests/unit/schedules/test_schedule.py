"""Schedules: derived sources, every way to be invalid, patterns, statistics, files."""

from __future__ import annotations

import copy
import json
import pickle
import random
import sys
from collections.abc import Callable
from pathlib import Path
from types import FrameType

import pytest

from l2c_compile.errors import FileFormatError, ScheduleError, UnknownSiteError
from l2c_compile.schedules.schedule import FORMAT, MAX_EVALUATIONS, CacheSchedule, Reuse
from l2c_compile.schedules.sites import Site
from tests.tiny import calls_in

A = Site("a")
STACK = "blocks.0..blocks.1"
PATHS = ["", "blocks", *(f"blocks.{i}{part}" for i in range(2) for part in ("", ".attn", ".mlp"))]


def sources(schedule: CacheSchedule, site: str) -> list[tuple[int, ...] | None]:
    """Return the sources at every evaluation, None where the table says compute."""
    entries = [schedule.reuse(e, site) for e in range(schedule.num_evaluations)]
    return [None if entry is None else entry.sources for entry in entries]


def test_the_source_is_the_latest_computed_evaluation() -> None:
    schedule = CacheSchedule.from_table({"a": [1, 0, 0, 1, 0], "b": [1, 1, True, False, True]})
    assert sources(schedule, "a") == [None, (0,), (0,), None, (3,)]
    assert sources(schedule, "b") == [None, None, None, (2,), None]
    assert schedule.row("a") == [1, 0, 0, 1, 0]
    assert schedule.cacheable == {1, 2, 3, 4}


def test_sources_stay_within_their_branch() -> None:
    schedule = CacheSchedule.from_table({"a": [1, 1, 0, 0, 1, 0]}, branches=2)
    assert sources(schedule, "a") == [None, None, (0,), (1,), None, (1,)]


def test_a_covered_entry_is_inactive_and_not_refreshed() -> None:
    schedule = CacheSchedule.from_table({STACK: [1, 1, 0, 1], "blocks.0.attn": [1, 0, 1, 0], "blocks.1": [1, 1, 0, 1]})
    assert [schedule.computes(e, "blocks.0.attn") for e in range(4)] == [True, False, False, False]
    # At 2 it says compute, but the stack is reused: the source of 3 stays 0.
    assert sources(schedule, "blocks.0.attn") == [None, (0,), None, (0,)]
    assert schedule.reuse(2, "blocks.1") == Reuse(())
    assert schedule.active(2, "blocks.1") is None
    assert schedule.active(2, STACK) == Reuse((1,))
    assert CacheSchedule.from_json(schedule.to_json()) == schedule


def test_reusing_the_output_hides_the_change_of_the_same_modules() -> None:
    schedule = CacheSchedule.from_table({"a": [1, 0, 1], "delta(a)": [1, 1, 0]})
    assert not schedule.computes(1, "delta(a)")
    assert sources(schedule, "delta(a)") == [None, None, (0,)]


def test_nested_sites_may_be_given_in_any_order() -> None:
    table = {"blocks.0.attn": [1, 0, 0], "blocks.0": [1, 1, 0], "blocks.0..blocks.1": [1, 1, 0]}
    schedule = CacheSchedule.from_table(dict(reversed(table.items())))
    assert not schedule.computes(2, "blocks.0")
    assert schedule.active(2, "blocks.0.attn") is None


def reused(e: int, *from_: int, site: Site = A) -> dict[tuple[int, Site], Reuse]:
    return {(e, site): Reuse(from_)}


INVALID: dict[str, tuple[Callable[[], object], str]] = {
    "no source yet": (lambda: CacheSchedule.from_table({"a": [0, 1]}), "site a is reused at evaluation 0"),
    "no source in the branch": (lambda: CacheSchedule.from_table({"a": [1, 0]}, branches=2), "branch 1"),
    "source is now": (lambda: CacheSchedule(3, (A,), reused(1, 1)), "from source 1; a source is an earlier evaluation"),
    "source is later": (lambda: CacheSchedule(3, (A,), reused(1, 2)), "earlier"),
    "source is negative": (lambda: CacheSchedule(3, (A,), reused(1, -1)), "earlier"),
    "source is reused": (
        lambda: CacheSchedule(3, (A,), {**reused(1, 0), **reused(2, 1)}),
        "site a is reused at evaluation 2 from source 1, where it is reused itself; the latest that computes it is 0",
    ),
    "source is hidden": (
        lambda: CacheSchedule(
            3, (Site("b"), Site("b.c")), {**reused(1, 0, site=Site("b")), **reused(2, 1, site=Site("b.c"))}
        ),
        "a site that shares its work is reused",
    ),
    "too many sources": (lambda: CacheSchedule(3, (A,), reused(2, 1, 0)), "wants 1 source"),
    "no sources": (lambda: CacheSchedule(3, (A,), reused(2)), "wants 1 source"),
    "unknown site": (lambda: CacheSchedule(3, (A,), reused(1, 0, site=Site("b"))), "not among the sites"),
    "entry beyond the end": (lambda: CacheSchedule(3, (A,), reused(3, 0)), "evaluation 3; the schedule has 0..2"),
    "site twice": (lambda: CacheSchedule(3, (A, A), {}), "twice"),
    "no evaluations": (lambda: CacheSchedule.all_compute(0), "evaluations"),
    "too many evaluations": (lambda: CacheSchedule.all_compute(MAX_EVALUATIONS + 1), "evaluations"),
    "too many entries": (
        lambda: CacheSchedule.all_compute(MAX_EVALUATIONS, [f"a{i}" for i in range(100)]),
        "entries",
    ),
    "rows differ": (lambda: CacheSchedule.from_table({"a": [1, 0], "b": [1]}), "a has 2, b has 1"),
    "no rows": (lambda: CacheSchedule.from_table(dict[str, list[int]]()), "at least one row"),
    "entry 2": (lambda: CacheSchedule.from_table({"a": [1, 2]}), "site a at evaluation 1 wants 1"),
    "entry half": (lambda: CacheSchedule.from_table({"a": [1, 0.5]}), "got 0.5"),  # type: ignore[arg-type]
    "not cacheable": (lambda: CacheSchedule.from_table({"a": [1, 0, 0]}, cacheable=[2]), "add 1 to cacheable"),
    "cacheable beyond the end": (lambda: CacheSchedule.from_table({"a": [1, 1]}, cacheable=[2]), "evaluation 2"),
    "branches": (lambda: CacheSchedule.from_table({"a": [1, 1]}, branches=0), "branches"),
    "out and delta": (lambda: CacheSchedule.from_table({"a": [1, 0], "delta(a)": [1, 0]}), "neither contains"),
    "partial overlap": (
        lambda: CacheSchedule.from_table({"b.0..b.2": [1, 0], "b.2..b.3": [1, 0]}),
        "sites b.0..b.2 and b.2..b.3 overlap, neither contains the other, and both are reused at evaluation 1",
    ),
    "one site in two rows": (
        lambda: CacheSchedule.from_table(dict[Site | str, list[int]]({"a": [1], A: [1]})),
        "two rows",
    ),
}


@pytest.mark.parametrize("name", INVALID)
def test_an_entry_that_cannot_take_effect_is_an_error(name: str) -> None:
    make, message = INVALID[name]
    with pytest.raises(ScheduleError) as caught:
        make()
    assert message in str(caught.value)


def test_overlapping_sites_may_be_reused_at_different_evaluations() -> None:
    schedule = CacheSchedule.from_table({"b.0..b.2": [1, 0, 1], "b.2..b.3": [1, 1, 0]})
    assert sources(schedule, "b.2..b.3") == [None, None, (0,)]


def test_asking_for_what_is_not_there_is_an_error() -> None:
    schedule = CacheSchedule.from_table({"blocks.0.attn": [1, 0]})
    with pytest.raises(UnknownSiteError, match=r"did you mean 'blocks.0.attn'\?"):
        schedule.computes(0, "blocks.0.atn")
    with pytest.raises(ScheduleError, match=r"0\.\.1, got 2"):
        schedule.reuse(2, "blocks.0.attn")


def test_patterns_resolve_to_the_most_specific_key() -> None:
    schedule = CacheSchedule.from_table(
        {"blocks.*.attn": [1, 0, 0], "blocks.1.attn": [1, 1, 0], "blocks.*.*": [1, 1, 1], "delta(blocks.*)": [1, 1, 1]}
    )
    resolved = schedule.resolve(PATHS)
    assert resolved.row("blocks.0.attn") == [1, 0, 0]
    assert resolved.row("blocks.1.attn") == [1, 1, 0]
    assert resolved.row("blocks.0.mlp") == [1, 1, 1]
    assert len(resolved.sites) == 6
    # In the order of the model.
    assert [str(site) for site in resolved.sites[:3]] == ["delta(blocks.0)", "blocks.0.attn", "blocks.0.mlp"]
    assert resolved.resolve(PATHS) is resolved


def test_sources_are_derived_again_when_a_pattern_resolves() -> None:
    schedule = CacheSchedule.from_table({STACK: [1, 1, 0, 1, 1], "blocks.*.attn": [1, 1, 1, 0, 1]})
    assert sources(schedule, "blocks.*.attn")[3] == (2,)
    assert sources(schedule.resolve(PATHS), "blocks.0.attn")[3] == (1,)


def test_given_sources_survive_the_resolution_of_a_pattern() -> None:
    pattern = Site("blocks.*.attn")
    schedule = CacheSchedule(3, (pattern,), {(2, pattern): Reuse((0,))})
    assert sources(schedule.resolve(PATHS), "blocks.1.attn") == [None, None, (0,)]


@pytest.mark.parametrize(
    ("site", "message"),
    [
        ("blocks.0.atn", "did you mean 'blocks.0.attn'"),
        ("blocks.*.attention", "no module of that form"),
        ("blocks.0..blocks.2", "no module 'blocks.2'"),
    ],
)
def test_a_site_that_the_model_lacks_is_an_error(site: str, message: str) -> None:
    with pytest.raises(UnknownSiteError) as caught:
        CacheSchedule.all_compute(2, [site]).resolve(PATHS)
    assert message in str(caught.value)


def test_two_patterns_of_one_rank_are_an_error_unless_a_row_decides() -> None:
    table = {"blocks.0.*": [1, 0], "blocks.*.0": [1, 1]}
    with pytest.raises(ScheduleError, match=r"give blocks.0.0 a row of its own"):
        CacheSchedule.from_table(table).resolve(["blocks.0.0"])
    resolved = CacheSchedule.from_table({**table, "blocks.0.0": [1, 0]}).resolve(["blocks.0.0"])
    assert resolved.row("blocks.0.0") == [1, 0]


def test_statistics_count_what_really_runs() -> None:
    schedule = CacheSchedule.from_table(
        {STACK: [1, 1, 0, 1], "blocks.0": [1, 0, 1, 1], "blocks.1": [1, 1, 1, 1]}, cacheable=[1, 2, 3]
    )
    assert schedule.computed_per_evaluation() == [3, 2, 0, 3]
    assert schedule.computed_share() == 8 / 12
    assert schedule.computed_in_cacheable() == (5, 9)
    assert schedule.removed_share() == 4 / 9
    assert schedule.computed_share_per_site() == {
        Site("blocks.0", "blocks.1"): 0.75,
        Site("blocks.0"): 0.5,
        Site("blocks.1"): 0.75,
    }


def test_the_schedule_without_sites_computes_everything() -> None:
    schedule = CacheSchedule.all_compute(3)
    assert (schedule.computed_share(), schedule.removed_share()) == (1.0, 0.0)
    assert schedule.computed_per_evaluation() == [0, 0, 0]
    assert CacheSchedule.from_json(schedule.to_json()) == schedule


def test_equality_and_digest_leave_out_where_a_schedule_comes_from() -> None:
    table = {"a": [1, 0]}
    schedule = CacheSchedule.from_table(table, info={"by": "hand"})
    assert schedule == CacheSchedule.from_table(table)
    assert hash(schedule) == hash(CacheSchedule.from_table(table))
    assert len(schedule.digest) == 64
    assert schedule != CacheSchedule.from_table({"a": [1, 1]})
    assert schedule != CacheSchedule.from_table(table, loop={"name": "ddim"})
    assert schedule != "a"


def test_a_schedule_cannot_be_changed() -> None:
    loop = {"name": "ddim", "steps": [1, 2]}
    schedule = CacheSchedule.from_table({"a": [1, 0]}, loop=loop)
    loop["name"] = "euler"
    assert schedule.loop == {"name": "ddim", "steps": (1, 2)}
    with pytest.raises(AttributeError):
        schedule.num_evaluations = 3  # type: ignore[misc]
    with pytest.raises(TypeError):
        schedule.reuses[0, A] = Reuse((0,))  # type: ignore[index]


def test_copies_are_equal() -> None:
    schedule = CacheSchedule.from_table({"a": [1, 0]}, info={"by": "hand"})
    assert copy.deepcopy(schedule) == schedule
    again = pickle.loads(pickle.dumps(schedule))
    assert again == schedule
    assert again.info == schedule.info


def test_a_file_comes_back_and_replaces_the_old_one(tmp_path: Path) -> None:
    path = tmp_path / "schedule.json"
    CacheSchedule.all_compute(3).save(path)
    schedule = CacheSchedule(
        4,
        (A, Site("blocks.*", kind="delta")),
        {(2, A): Reuse((1,)), (3, A): Reuse((1,))},
        frozenset({2, 3}),
        2,
        {"name": "ddim"},
        {"by": "hand"},
    )
    schedule.save(path)
    again = CacheSchedule.load(path)
    assert again == schedule
    assert again.info == {"by": "hand"}
    assert list(tmp_path.iterdir()) == [path]
    # Only the source that would not be derived is written: within branch 0 it would be 0.
    assert json.loads(path.read_text())["sources"] == {"a": {"2": [1]}}


def test_a_failed_save_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "schedule.json"
    CacheSchedule.all_compute(3).save(path)

    def fail(*_: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr("l2c_compile.files.documents.os.replace", fail)
    with pytest.raises(OSError, match="disk full"):
        CacheSchedule.all_compute(4).save(path)
    assert list(tmp_path.iterdir()) == [path]
    assert CacheSchedule.load(path).num_evaluations == 3


def document(**changes: object) -> dict[str, object]:
    return {
        "format": FORMAT,
        "version": 1,
        "num_evaluations": 3,
        "orientation": "execution",
        "sites": {"a": [1, 0, 1]},
        **changes,
    }


def test_a_minimal_document_is_enough() -> None:
    assert CacheSchedule.from_json(json.dumps(document())) == CacheSchedule.from_table({"a": [1, 0, 1]})


MALFORMED: dict[str, str | bytes] = {
    "empty": "",
    "not JSON": "{",
    "not UTF-8": b"\xff\xfe\xfa",
    "a list": "[]",
    "deep": '{"a":' + "[" * 100_000 + "]" * 100_000 + "}",
    "large": " " * (5 * 2**20),
    "many lists": '{"a":[' + "[]," * 1_000_000 + "0]}",
    "NaN": '{"a": NaN}',
    "infinite": '{"a": 1e999}',
    "long number": '{"a": ' + "9" * 10_000 + "}",
    "key twice": '{"a": 1, "a": 2}',
    "other format": json.dumps(document(format="other")),
    "no version": json.dumps(document(version=None)),
    "version true": json.dumps(document(version=True)),
    "clean-end orientation": json.dumps(document(orientation="clean")),
    "unknown key": json.dumps(document(site={})),
    "sites a list": json.dumps(document(sites=[])),
    "row a number": json.dumps(document(sites={"a": 1})),
    "row too long": json.dumps(document(sites={"a": [1, 1, 1, 1]})),
    "entry 2": json.dumps(document(sites={"a": [1, 2, 1]})),
    "entry text": json.dumps(document(sites={"a": ["1", "0", "1"]})),
    "entry 0.0": json.dumps(document(sites={"a": [1, 0.0, 1]})),
    "no site": json.dumps(document(sites={"a@b": [1, 0, 1]})),
    "two spellings": json.dumps(document(sites={"0": [1, 0, 1], "0..0": [1, 0, 1]})),
    "many evaluations": json.dumps(document(num_evaluations=10**9, sites={})),
    "negative evaluations": json.dumps(document(num_evaluations=-1)),
    "fractional evaluations": json.dumps(document(num_evaluations=3.0)),
    "huge runs": json.dumps(document(sites={f"a{i}.0..a{i}.4000": [1, 1, 1] for i in range(1000)})),
    "overlapping runs": json.dumps(
        document(num_evaluations=1, sites={f"a.{i}..a.{i + 150}": [1] for i in range(1300)})
    ),
    "no source": json.dumps(document(sites={"a": [0, 1, 1]})),
    "source of a computed entry": json.dumps(document(sources={"a": {"2": [0]}})),
    "source text": json.dumps(document(sources={"a": {"1": ["0"]}})),
    "source key": json.dumps(document(sources={"a": {"01": [0]}})),
    "source later": json.dumps(document(sources={"a": {"1": [2]}})),
    "source of an unknown site": json.dumps(document(sources={"b": {"1": [0]}})),
    "sources a list": json.dumps(document(sources=[])),
    "rules an object": json.dumps(document(rules={})),
    "rule unknown": json.dumps(document(rules=[{"rule": {"name": "x"}, "entries": {"a": [1]}}])),
    "rule without entries": json.dumps(document(rules=[{"rule": {"name": "hold"}}])),
    "rule of a computed entry": json.dumps(document(rules=[{"rule": {"name": "hold"}, "entries": {"a": [2]}}])),
    "cacheable text": json.dumps(document(cacheable=["1"])),
    "cacheable lacks": json.dumps(document(cacheable=[2])),
    "branches 0": json.dumps(document(branches=0)),
    "loop a list": json.dumps(document(loop=[])),
    "info null": json.dumps(document(info=None)),
    "info deep": json.dumps(document(info={"a": json.loads("[" * 40 + "]" * 40)})),
}


@pytest.mark.parametrize("name", MALFORMED)
def test_a_malformed_file_is_refused_with_little_work(name: str, tmp_path: Path) -> None:
    path = tmp_path / "schedule.json"
    text = MALFORMED[name]
    path.write_bytes(text if isinstance(text, bytes) else text.encode())

    def read() -> None:
        with pytest.raises(FileFormatError):
            CacheSchedule.load(path)

    # The largest takes 250 000 calls; a million take a second.
    assert calls_in(read) < 500_000


def test_a_newer_version_says_so() -> None:
    with pytest.raises(FileFormatError, match="of version 2, this l2c_compile reads up to 1; update"):
        CacheSchedule.from_json(json.dumps(document(version=2, novelty=True)))


def calls_for_a_schedule_of(num_evaluations: int) -> int:
    """Return how many Python functions are called to make a schedule of 57 sites, write it, read it and count."""
    draw = random.Random(0)
    table = {
        f"blocks.{i}.{kind}": [1] + [draw.randint(0, 1) for _ in range(num_evaluations - 1)]
        for i in range(28)
        for kind in ("attn", "mlp")
    }
    table["blocks.0..blocks.27"] = [1, 1, 0, 1, 0] * (num_evaluations // 5)
    calls = 0

    def count(frame: FrameType, event: str, argument: object) -> None:
        nonlocal calls
        calls += event in ("call", "c_call")

    sys.setprofile(count)
    try:
        schedule = CacheSchedule.from_table(table)
        assert CacheSchedule.from_json(schedule.to_json()) == schedule
        schedule.removed_share()
    finally:
        sys.setprofile(None)
    return calls


def test_work_on_a_schedule_is_linear_in_its_evaluations() -> None:
    assert calls_for_a_schedule_of(250) < 2.2 * calls_for_a_schedule_of(125)
