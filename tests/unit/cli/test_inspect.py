"""``l2c inspect`` and its maps and plots."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from l2c_compile.cli.main import app
from l2c_compile.cli.plots import HIDDEN, PlotError, save_heat_map, source_ages, terminal_heat_map
from l2c_compile.schedules.importers import import_l2c_dit
from l2c_compile.schedules.schedule import CacheSchedule

PNG = b"\x89PNG"


NESTED = {"blocks.0..blocks.1": [1, 1, 0, 0], "blocks.0.attn": [1, 0, 1, 1]}


def inspect(*args: object) -> str:
    result = CliRunner().invoke(app, ["inspect", *map(str, args)], env={"COLUMNS": "100"})
    assert result.exit_code == 0, result.output
    return result.output


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


def test_a_schedule_is_inspected(tmp_path: Path) -> None:
    path = tmp_path / "schedule.json"
    CacheSchedule.from_table(NESTED, cacheable=[1, 2, 3], info={"by": "hand"}).save(path)
    output = inspect(path, "--evaluations")
    assert "3 of 8 entries (37.50%)" in output
    assert "3 evaluations, 1 of 6 entries computed" in output
    assert "83.33%" in output
    assert "by hand" in output
    assert "blocks.0.attn       #1..   25%" in output
    rows = [line.split() for line in output.splitlines()]
    assert ["1", "1/2", "50.0%", "yes"] in rows


def test_patterns_and_branches_are_pointed_out(tmp_path: Path) -> None:
    path = tmp_path / "schedule.json"
    CacheSchedule.from_table({"blocks.*.attn": [1, 1, 0, 0]}, branches=2).save(path)
    output = inspect(path)
    assert "1 of them patterns" in output
    assert "each with its own cache" in output


def test_a_file_cannot_steer_the_terminal(tmp_path: Path) -> None:
    path = tmp_path / "schedule.json"
    CacheSchedule.all_compute(2, ["a"]).save(path)
    path.write_text(path.read_text().replace('"info": {}', '"info": {"by": "\\u001b[2J[red]x"}'))
    output = inspect(path)
    assert "\x1b" not in output
    assert "by ?[2J[red]x" in output


def test_a_schedule_without_sites_is_inspected(tmp_path: Path) -> None:
    path = tmp_path / "schedule.json"
    CacheSchedule.all_compute(2).save(path)
    assert "there are no sites" in inspect(path, "--evaluations")
    with pytest.raises(PlotError, match="at least one site"):
        save_heat_map(CacheSchedule.load(path), tmp_path / "map.png")


def test_pictures_are_written(tmp_path: Path) -> None:
    router = tmp_path / "router.pt"
    torch.save({"routers": {f"{row}.prob": torch.full((4,), -5.0) for row in range(4)}}, router)
    output = inspect(router, "--png", tmp_path / "router.png", "--threshold", 0.5)
    assert "router at threshold 0.5" in output
    assert (tmp_path / "router.png").read_bytes().startswith(PNG)
    save_heat_map(CacheSchedule.from_table(NESTED), tmp_path / "schedule.png")
    assert (tmp_path / "schedule.png").read_bytes().startswith(PNG)


def test_a_missing_matplotlib_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(PlotError, match="pip install matplotlib"):
        save_heat_map(CacheSchedule.from_table(NESTED), tmp_path / "map.png")


def test_a_published_router_is_inspected(shared: Callable[[str], Path]) -> None:
    path = shared("routers/l2c_DDIM20_router.pt")
    output = inspect(path)
    assert "10 evaluations, 312 of 560 entries computed" in output
    assert "44.29%" in output
    assert import_l2c_dit(path).schedule().digest[:16] in output


def test_what_the_passes_do_is_listed_on_request(tmp_path: Path) -> None:
    path = tmp_path / "schedule.json"
    CacheSchedule.from_table({"blocks.*.attn": [1, 0]}).save(path)
    output = inspect(path, "--passes")
    assert "digits, ddim, 2 evaluations, batch 1" in output
    assert re.search(r"read-reused-sites +. +8 .*\n", output)
    assert "candidates left alone" in output


def test_options_of_the_list_of_passes_are_not_ignored_without_it(tmp_path: Path) -> None:
    path = tmp_path / "schedule.json"
    CacheSchedule.from_table({"blocks.*.attn": [1, 0]}).save(path)
    result = CliRunner().invoke(app, ["inspect", str(path), "--model", "digits"])
    assert result.exit_code == 2
    assert "for --passes only" in result.output
