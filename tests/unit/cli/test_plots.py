"""Maps and pictures of schedules and routers."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from l2c_compile.cli.plots import (
    HIDDEN,
    PlotError,
    new_figure,
    save_figure,
    save_heat_map,
    source_ages,
    terminal_heat_map,
)
from l2c_compile.schedules.schedule import CacheSchedule

PNG = b"\x89PNG"

NESTED = {"blocks.0..blocks.1": [1, 1, 0, 0], "blocks.0.attn": [1, 0, 1, 1]}


def test_ages_tell_computed_reused_and_hidden() -> None:
    assert source_ages(CacheSchedule.from_table(NESTED)) == [[0, 0, 1, 2], [0, 1, HIDDEN, HIDDEN]]


def test_the_terminal_map_is_readable_without_colours() -> None:
    lines = [line.plain for line in terminal_heat_map(CacheSchedule.from_table(NESTED))]
    assert lines == [
        "                    0",
        "blocks.0..blocks.1  ##12   50%",
        "blocks.0.attn       #1..   25%",
    ]


def test_a_long_loop_is_continued_below() -> None:
    schedule = CacheSchedule.from_table({"a": [1] + [0] * 24})
    lines = [line.plain for line in terminal_heat_map(schedule, width=20)]
    assert lines == [
        "   0         10",
        "a  #123456789+    4%",
        "   11       20",
        "a  +++++++++++    4%",
        "   22",
        "a  +++    4%",
    ]
    assert max(map(len, lines)) <= 20


def test_pictures_of_schedules_and_routers_are_written(tmp_path: Path) -> None:
    save_heat_map(CacheSchedule.from_table(NESTED), tmp_path / "schedule.png")
    assert (tmp_path / "schedule.png").read_bytes().startswith(PNG)


def test_a_picture_that_fails_leaves_the_old_one(tmp_path: Path) -> None:
    path = tmp_path / "old.png"
    path.write_bytes(b"old")
    figure = new_figure(1.0, 1.0)
    figure.savefig = fail  # type: ignore[method-assign]
    with pytest.raises(KeyboardInterrupt):
        save_figure(figure, path)
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def fail(*args: object, **kwargs: object) -> None:
    raise KeyboardInterrupt


def test_a_missing_matplotlib_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(PlotError, match="pip install matplotlib"):
        save_heat_map(CacheSchedule.from_table(NESTED), tmp_path / "map.png")
