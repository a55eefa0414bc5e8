"""``python -m bench gpu-all``: a rehearsal runs every part, nothing pretends to be a GPU, nothing is done twice."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.progress import Progress
from typer.testing import CliRunner

from bench.__main__ import app
from bench.cases import BenchError
from bench.report import Row
from bench.speed import gpu_all
from bench.speed.gpu_all import CASES, PARTS, TOTAL_S, Budget, Part, Workshop

REHEARSAL = ["--device", "cpu", "--tiny"]


def run(folder: Path, *args: str) -> list[Row]:
    return gpu_all.run(["--out", str(folder), *args], Progress(disable=True))


def documents(folder: Path) -> dict[str, dict[str, Any]]:
    return {path.stem: json.loads(path.read_text()) for path in folder.glob("*.json")}


@pytest.fixture(scope="module")
def rehearsed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Row]]:
    folder = tmp_path_factory.mktemp("gpu-all")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("L2C_SHARED", str(folder / "absent"))
        return folder, run(folder, *REHEARSAL)


def test_a_rehearsal_runs_every_part_and_writes_a_file_for_each(rehearsed: tuple[Path, list[Row]]) -> None:
    folder, rows = rehearsed
    found = documents(folder)
    assert set(found) == {f"rehearsal-{name}" for name in (*PARTS, "gpu-all")}
    together = found.pop("rehearsal-gpu-all")
    assert set(together["parts"]) == set(PARTS)
    assert all(document["error"] is None and document["records"] for document in found.values())
    metrics = {row.metric for row in rows}
    assert metrics >= {"equality_relative_error", "seconds_loop", "loop_over_one_evaluation", "time_ratio"}
    assert metrics >= {"skip_efficiency", "graph_time_ratio", "graph_relative_error", "planned_cache_peak_MiB"}
    assert metrics >= {"share_of_copy", "part_seconds", "skipped"}


def test_no_figure_of_a_rehearsal_can_be_taken_for_one_of_a_gpu(rehearsed: tuple[Path, list[Row]]) -> None:
    folder, rows = rehearsed
    assert all("REHEARSAL" in str(row.conditions["on"]) and row.device == "cpu" for row in rows)
    for document in documents(folder).values():
        assert document["rehearsal"] is True
    assert not any(row.metric == "measured_peak_MiB" for row in rows)


def test_a_rehearsal_measures_what_is_right(rehearsed: tuple[Path, list[Row]]) -> None:
    _, rows = rehearsed
    by_metric = {row.metric: row for row in rows}
    assert by_metric["graph_relative_error"].value == 0.0
    equal = [row for row in rows if row.metric == "equality_over_allowed"]
    assert {row.conditions["dtype"] for row in equal} == {"bfloat16", "float16", "float32"}
    assert all(row.value <= 1 for row in equal)
    assert all(row.value == 0 for row in equal if row.conditions["numerics"] == "bitwise")
    sides = {row.conditions["side"] for row in rows if row.metric == "sampling"}
    assert sides >= {"compiled cached", "compiled uncached", "torch.compile in the eager loop", "eager uncached"}
    assert sides >= {"eager cached by hooks", "compiled cached, CUDA graph", "compiled uncached, CUDA graph"}
    schedules = {row.conditions.get("schedule") for row in rows} - {None}
    assert schedules == {"formula: odd evaluations reuse everything"}


def test_what_was_skipped_is_said(rehearsed: tuple[Path, list[Row]]) -> None:
    _, rows = rehearsed
    skipped = [str(row.conditions["what"]) for row in rows if row.metric == "skipped"]
    assert any("no records" in what for what in skipped)
    assert any("torch measures memory on a GPU only" in what for what in skipped)


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Replace the parts by one that counts and one that fails while ``fails`` is in the list."""
    log: list[str] = []

    def good(shop: Workshop, budget: Budget, rows: list[Row]) -> None:
        log.append("golden")
        rows.append(shop.row("answer", 42, {}))

    def bad(shop: Workshop, budget: Budget, rows: list[Row]) -> None:
        log.append("memory")
        rows.append(shop.row("before", 1, {}))
        if "fixed" not in log:
            raise RuntimeError("out of luck")

    monkeypatch.setattr(gpu_all, "PARTS", {"golden": Part(good, 10), "memory": Part(bad, 10)})
    return log


def test_a_part_that_is_done_is_not_run_again_unless_asked(counted: list[str], tmp_path: Path) -> None:
    counted.append("fixed")
    first = run(tmp_path, *REHEARSAL)
    again = run(tmp_path, *REHEARSAL)
    assert counted == ["fixed", "golden", "memory"]
    assert [(row.metric, row.value) for row in again] == [(row.metric, row.value) for row in first]
    run(tmp_path, *REHEARSAL, "--redo", "--parts", "golden")
    assert counted == ["fixed", "golden", "memory", "golden"]


def test_a_part_that_fails_loses_nothing_and_is_run_again(counted: list[str], tmp_path: Path) -> None:
    with pytest.raises(BenchError, match="memory: RuntimeError: out of luck; tracebacks in"):
        run(tmp_path, *REHEARSAL)
    found = documents(tmp_path)
    assert found["rehearsal-memory"]["error"][-1] == "RuntimeError: out of luck"
    assert [record["metric"] for record in found["rehearsal-memory"]["records"]] == ["before", "part_seconds"]
    assert found["rehearsal-golden"]["error"] is None
    assert set(found["rehearsal-gpu-all"]["parts"]) == {"golden", "memory"}
    counted.append("fixed")
    rows = run(tmp_path, *REHEARSAL)
    assert counted == ["golden", "memory", "fixed", "memory"]
    assert {row.metric for row in rows} == {"answer", "before", "part_seconds"}


def test_a_damaged_or_renamed_result_is_named(counted: list[str], tmp_path: Path) -> None:
    counted.append("fixed")
    run(tmp_path, *REHEARSAL)
    path = tmp_path / "rehearsal-golden.json"
    for content, message in (("{", "is no result of gpu-all"), ('{"part": 1}', "is no result of gpu-all")):
        path.write_text(content)
        with pytest.raises(BenchError, match=message):
            run(tmp_path, *REHEARSAL)
    path.write_text((tmp_path / "rehearsal-memory.json").read_text())
    with pytest.raises(BenchError, match="holds another part"):
        run(tmp_path, *REHEARSAL)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_nothing_is_run_and_the_exit_says_so(tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["gpu-all", "--out", str(tmp_path / "results")])
    assert result.exit_code != 0
    assert "there is no CUDA device, so nothing was run" in result.output
    assert not (tmp_path / "results").exists()


@pytest.mark.parametrize("args", [["--device", "cpu"], ["--tiny"], ["--device", "cuda", "--tiny"]])
def test_a_rehearsal_is_asked_for_in_full(args: list[str], tmp_path: Path) -> None:
    with pytest.raises(BenchError, match="--device cpu and --tiny go together"):
        run(tmp_path, *args)


def test_the_parts_fit_into_nine_minutes_and_the_cases_are_those_promised() -> None:
    assert sum(part.budget_s for part in PARTS.values()) <= TOTAL_S < 9 * 60
    assert set(PARTS) == {"golden", "equality", "compile-time", "latency", "cuda-graph", "memory", "kernels"}
    assert {(case.steps, case.batch) for case in CASES} == {(20, 1), (20, 8), (50, 1), (50, 8)}
    assert {case.dtype for case in CASES} == {"bfloat16", "float32"}


def test_a_budget_skips_what_takes_longer_than_is_left() -> None:
    now = [0.0]
    budget = Budget(10.0, clock_s=lambda: now[0])
    with budget.fits("a", 1) as fits:
        assert fits
        now[0] = 6.0
    with budget.fits("b", 1) as fits:
        assert not fits
    assert budget.skipped == ["b: would take 6 s, 4 s are left"]
