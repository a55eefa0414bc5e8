"""``l2c inspect``."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from l2c_compile.schedules.importers import import_l2c_dit
from l2c_compile.schedules.schedule import CacheSchedule
from tests.command_line import l2c

PNG = b"\x89PNG"


NESTED = {"blocks.0..blocks.1": [1, 1, 0, 0], "blocks.0.attn": [1, 0, 1, 1]}


def inspect(*args: object) -> str:
    done = l2c("inspect", *args, columns=100)
    assert done.code == 0, done.err
    return done.out


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
    done = l2c("inspect", path, "--png", tmp_path / "map.png")
    assert done.code == 2
    assert "at least one site" in done.err
    assert not (tmp_path / "map.png").exists()


def test_a_picture_is_written(tmp_path: Path) -> None:
    router = tmp_path / "router.pt"
    torch.save({"routers": {f"{row}.prob": torch.full((4,), -5.0) for row in range(4)}}, router)
    output = inspect(router, "--png", tmp_path / "router.png", "--threshold", 0.5)
    assert "router at threshold 0.5" in output
    assert (tmp_path / "router.png").read_bytes().startswith(PNG)
    inspect(router, "--png", tmp_path / "router.png", "--force")


def test_a_published_router_is_inspected(shared: Callable[[str], Path]) -> None:
    path = shared("routers/l2c_DDIM20_router.pt")
    output = inspect(path)
    assert "10 evaluations, 312 of 560 entries computed" in output
    assert "44.29%" in output
    assert import_l2c_dit(path).schedule().digest[:16] in output


@pytest.mark.usefixtures("two_blocks_each")
def test_what_the_passes_do_is_listed_on_request(tmp_path: Path) -> None:
    path = tmp_path / "schedule.json"
    CacheSchedule.from_table({"blocks.*.attn": [1, 0]}).save(path)
    output = inspect(path, "--passes")
    assert "digits, ddim, 2 evaluations, batch 1" in output
    assert re.search(r"^read-reused-sites +2 ", output, re.MULTILINE)
    assert "candidates left alone" in output


def test_options_of_the_list_of_passes_are_not_ignored_without_it(tmp_path: Path) -> None:
    path = tmp_path / "schedule.json"
    CacheSchedule.from_table({"blocks.*.attn": [1, 0]}).save(path)
    done = l2c("inspect", path, "--model", "digits")
    assert done.code == 2
    assert "for --passes only" in done.err
