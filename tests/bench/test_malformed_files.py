"""A slice of ``python -m bench malformed-files``, and what it found."""

from __future__ import annotations

import argparse
import json
import struct
import sys
from pathlib import Path

import pytest
import torch

import bench.trust.malformed_files as bench_module
from bench.trust.file_mutations import KINDS
from bench.trust.malformed_files import ALLOWED, outcomes
from l2c_compile import CacheSchedule, load, load_schedule_file
from l2c_compile.errors import FileFormatError, ScheduleError

linux = pytest.mark.skipif(sys.platform != "linux", reason="the limits and counts are Linux's")


@linux
def test_a_slice_of_malformed_files_is_refused_at_once_and_nothing_runs() -> None:
    done = list(outcomes(seed=1, start=0, stop=70))
    assert [each for each in done if each.outcome not in ALLOWED] == []
    assert [each.index for each in done] == list(range(70))
    assert {each.kind for each in done} == set(KINDS)
    # The files are broken: hardly any is read all the same.
    assert sum(each.outcome in ("refused", "not readable") for each in done) > 50


@linux
def test_a_reader_that_dies_or_hangs_is_one_outcome(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    # A worker that reads one file, then ends; and one that stops answering.
    line = json.dumps({"index": 7, "kind": "k", "mutation": "m", "outcome": "refused", "detail": "", "seconds": 0.0})
    worker = tmp_path / "bench" / "trust" / "malformed_worker.py"
    worker.parent.mkdir(parents=True)
    # Packages: a checkout on PYTHONPATH would win over folders that are none.
    for folder in (worker.parent, worker.parent.parent):
        (folder / "__init__.py").touch()
    monkeypatch.setattr(bench_module, "ROOT", tmp_path)
    # Long enough for Python to start on a busy machine.
    monkeypatch.setattr(bench_module, "_HANG_SECONDS", 60.0)
    worker.write_text(f"print('ready')\nprint('''{line}''')\n")
    assert [each.outcome for each in outcomes(0, 7, 9)] == ["refused", "CRASHED"]
    monkeypatch.setattr(bench_module, "_HANG_SECONDS", 2.0)
    worker.write_text("import time\nprint('ready', flush=True)\ntime.sleep(60)\n")
    assert [each.outcome for each in outcomes(0, 7, 8)] == ["HUNG"]


def test_rows_expanded_from_one_number_are_refused_before_they_are_copied(tmp_path: Path) -> None:
    row = torch.zeros(1).expand(100_000)
    torch.save({f"{e}.prob": row for e in range(2000)}, tmp_path / "r.pth")
    # The message says that they were counted; to copy them takes 800 MB.
    with pytest.raises(FileFormatError, match="at most 2000000 entries, got 2000 rows of 100000"):
        load_schedule_file(tmp_path / "r.pth")


def test_a_schedule_with_more_reuses_than_can_be_checked_in_a_second_is_refused() -> None:
    row = [1] + [0] * 999
    with pytest.raises(ScheduleError, match="at most 100000 reused entries, got 100899"):
        CacheSchedule.from_table({f"blocks.{i}": row for i in range(101)})


def test_a_message_is_short_and_nothing_in_it_controls_a_terminal() -> None:
    text = str(FileFormatError("key \x1b[2J \u202e \ud800 " + "x" * 10_000 + " is unknown; update l2c_compile"))
    assert len(text) < 700
    assert text.isprintable()
    assert text.endswith("is unknown; update l2c_compile")


def test_training_arguments_of_a_pickle_are_kept_only_if_they_can_be_saved(tmp_path: Path) -> None:
    for value in (float("nan"), 10**400, "x" * 10**6):
        arguments = argparse.Namespace(model="DiT", lr=value)
        torch.save({"routers": {f"{e}.prob": torch.ones(4) for e in range(4)}, "args": arguments}, tmp_path / "r.pt")
        router = load_schedule_file(tmp_path / "r.pt")
        assert router.info["model"] == "DiT"
        router.save(tmp_path / "again")
        assert load_schedule_file(tmp_path / "again") == router


@pytest.mark.parametrize("read", [load, load_schedule_file])
def test_a_zip_directory_before_the_beginning_of_the_file_is_a_damaged_file(read: object, tmp_path: Path) -> None:
    end = struct.pack("<4s4H2LH", b"PK\5\6", 0, 0, 1, 1, 1000, 0, 0)
    (tmp_path / "x.pt").write_bytes(b"PK\3\4" + bytes(96) + end)
    with pytest.raises(FileFormatError):
        read(tmp_path / "x.pt")  # type: ignore[operator]
