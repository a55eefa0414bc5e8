"""``python -m bench gpu-all``: a rehearsal runs every part, nothing pretends to be a GPU, nothing is done twice."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from rich.progress import Progress
from typer.testing import CliRunner

from bench.__main__ import app
from bench.cases import CASES, BenchError, load
from bench.report import Row
from bench.speed import compile_time, gpu_all, kernels, latency, memory
from bench.speed.gpu_all import PARTS, TOTAL_S, Part, parts
from bench.trust import equality, golden

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
        # What Dynamo does in these calls is tested case by case.
        patch.setattr(torch, "compile", lambda function, **options: function)
        return folder, run(folder, *REHEARSAL)


def test_a_rehearsal_runs_every_part_and_writes_a_file_for_each(rehearsed: tuple[Path, list[Row]]) -> None:
    folder, rows = rehearsed
    found = documents(folder)
    assert set(found) == {f"rehearsal-{name}" for name in (*PARTS, "gpu-all")}
    together = found.pop("rehearsal-gpu-all")
    assert set(together["parts"]) == set(PARTS)
    assert all(document["error"] is None and document["records"] for document in found.values())
    metrics = {row.metric for row in rows}
    assert metrics >= {"over_allowed", "seconds_one_evaluation", "seconds_loop", "loop_over_one_evaluation"}
    assert metrics >= {"sampling", "multiply_adds_kept", "time_ratio", "skip_efficiency", "relative_error"}
    assert metrics >= {"seconds_to_record", "graph_time_ratio", "graph_relative_error", "planned_cache_peak_MiB"}
    assert metrics >= {"share_of_copy", "over_eager", "kernel_gigabytes_a_second", "part_seconds", "skipped"}


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
    equal = [row for row in rows if row.metric == "over_allowed"]
    assert {row.conditions["dtype"] for row in equal} == {"bfloat16", "float16", "float32"}
    assert all(row.value <= 1 for row in equal)
    assert all(row.value == 0 for row in equal if row.conditions["numerics"] == "bitwise")
    sides = {row.conditions["side"] for row in rows if row.metric == "sampling"}
    assert sides >= {"compiled cached", "compiled uncached", "torch.compile in the eager loop", "eager uncached"}
    assert sides >= {"eager cached by hooks", "compiled cached, CUDA graph", "compiled uncached, CUDA graph"}
    peaks = {row.conditions["side"] for row in rows if row.metric == "planned_cache_peak_MiB"}
    assert peaks == {"uncached", "cached", "fp8", "int8"}
    schedules = {row.conditions.get("schedule") for row in rows} - {None}
    assert schedules == {"formula: odd evaluations reuse everything"}


def test_what_was_skipped_is_said(rehearsed: tuple[Path, list[Row]]) -> None:
    _, rows = rehearsed
    skipped = [str(row.conditions["what"]) for row in rows if row.metric == "skipped"]
    for what in ("no records in", "no published routers in", "peak of hooks: torch measures memory on a GPU only"):
        assert any(what in each for each in skipped)


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Replace the parts by one that counts and one that fails while ``fixed`` is not in the list."""
    log: list[str] = []

    def run_fake(args: Sequence[str], progress: Progress) -> list[Row]:
        progress.add_task("faking")
        log.append(args[0])
        if args[0] == "fails" and "fixed" not in log:
            raise RuntimeError("out of luck")
        return [Row("answer", 42)]

    module = ModuleType("a_fake_bench")
    module.__dict__["run"] = run_fake
    monkeypatch.setitem(sys.modules, "a_fake_bench", module)
    monkeypatch.setitem(CASES, "fake", "a_fake_bench:run")
    fake = {
        "golden": Part(10, 1, [["fake", "works"]]),
        "memory": Part(10, 1, [["fake", "before"], ["fake", "fails"], ["fake", "after"]]),
    }
    monkeypatch.setattr(gpu_all, "PARTS", tuple(fake))
    monkeypatch.setattr(gpu_all, "parts", lambda tiny: fake)
    return log


def test_a_part_that_is_done_is_not_run_again_unless_asked(counted: list[str], tmp_path: Path) -> None:
    counted.append("fixed")
    first = run(tmp_path, *REHEARSAL)
    again = run(tmp_path, *REHEARSAL)
    assert counted == ["fixed", "works", "before", "fails", "after"]
    assert [(row.metric, row.value) for row in again] == [(row.metric, row.value) for row in first]
    run(tmp_path, *REHEARSAL, "--redo", "--parts", "golden")
    assert counted == ["fixed", "works", "before", "fails", "after", "works"]


def test_a_call_that_fails_loses_nothing_and_its_part_is_run_again(counted: list[str], tmp_path: Path) -> None:
    with pytest.raises(BenchError, match="memory: RuntimeError: out of luck; tracebacks in"):
        run(tmp_path, *REHEARSAL)
    found = documents(tmp_path)
    assert found["rehearsal-memory"]["error"][-1] == "RuntimeError: out of luck"
    assert [record["metric"] for record in found["rehearsal-memory"]["records"]] == ["answer", "answer", "part_seconds"]
    assert found["rehearsal-golden"]["error"] is None
    assert set(found["rehearsal-gpu-all"]["parts"]) == {"golden", "memory"}
    counted[:] = ["fixed"]
    rows = run(tmp_path, *REHEARSAL)
    assert counted == ["fixed", "before", "fails", "after"]
    assert {row.metric for row in rows} == {"answer", "part_seconds"}


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


def test_a_call_is_skipped_if_one_before_it_took_longer_than_is_left(
    counted: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now_s = [0.0]

    def take_six_seconds(args: Sequence[str], progress: Progress) -> list[Row]:
        now_s[0] += 6.0
        return []

    monkeypatch.setattr("time.perf_counter", lambda: now_s[0])
    monkeypatch.setattr(sys.modules["a_fake_bench"], "run", take_six_seconds)
    monkeypatch.setattr(gpu_all, "parts", lambda tiny: {"memory": Part(10, 1, [["fake", "a"], ["fake", "b"]])})
    rows = run(tmp_path, *REHEARSAL, "--parts", "memory")
    (skipped,) = [row for row in rows if row.metric == "skipped"]
    assert skipped.conditions["what"] == "fake b: would take 6 s, 4 s are left"


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_nothing_is_run_and_the_exit_says_so(tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["gpu-all", "--out", str(tmp_path / "results")])
    assert result.exit_code == 2
    assert "gpu-all wants a CUDA device, got a machine without one" in result.output
    assert not (tmp_path / "results").exists()


@pytest.mark.parametrize("args", [["--device", "cpu"], ["--tiny"], ["--device", "cuda", "--tiny"]])
def test_a_rehearsal_is_asked_for_in_full(args: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    with pytest.raises(BenchError, match="--device cpu and --tiny go together"):
        run(tmp_path, *args)


def touch_published_files(folder: Path) -> None:
    for file in ("routers/l2c_DDIM20_router.pt", "routers/l2c_DDIM50_router.pt", "golden/a.pt"):
        (folder / file).parent.mkdir(exist_ok=True)
        (folder / file).touch()


@pytest.mark.parametrize("published", [True, False])
def test_the_parts_fit_into_nine_minutes_and_the_loops_are_those_promised(
    published: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("L2C_SHARED", str(tmp_path))
    if published:
        touch_published_files(tmp_path)
    found = parts(tiny=False)
    assert sum(part.budget_s for part in found.values()) <= TOTAL_S < 9 * 60
    assert tuple(found) == PARTS
    timed = [" ".join(call) for call in found["latency"].calls]
    for schedule in ("published", "every-second"):
        of_schedule = [call for call in timed if f"--schedule {schedule}" in call]
        wanted = published or schedule == "every-second"
        for steps, batch in ((20, 1), (20, 8), (50, 1), (50, 8)):
            assert any(f"--steps {steps} --batch {batch} " in call for call in of_schedule) == wanted
    assert all("dit-xl" in call and "--device cuda" in call for call in timed)
    assert (not found["golden"].absent, not found["latency"].absent) == (published, published)
    assert len(found["kernels"].calls) == len({*kernels.DIT, *kernels.VIDEO})


class Reached(Exception):
    """The call was understood."""


def test_every_call_is_understood_by_its_bench(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def reach(*args: object, **options: object) -> None:
        raise Reached

    for module, name in (
        *((module, "workload") for module in (equality, latency, memory)),
        *((compile_time, "_warm_up"), (golden, "replay"), (kernels, "_time_case")),
    ):
        monkeypatch.setattr(module, name, reach)
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setenv("L2C_SHARED", str(tmp_path))
    touch_published_files(tmp_path)
    for part in parts(tiny=False).values():
        assert part.calls
        for bench, *args in part.calls:
            with pytest.raises(Reached):
                load(bench)(args, Progress(disable=True))
