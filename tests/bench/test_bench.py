"""The bench harness, with cases and clocks that are made up."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType

import pytest
from rich.progress import Progress
from typer.testing import CliRunner, Result

import bench.report
from bench.__main__ import app
from bench.cases import CASES, BenchError, load, summary
from bench.measure import MeasureError, Timing, compare, quantile, ratio
from bench.report import Record, ReportError, Row, Surroundings, records, write_json
from bench.targets import check, read_targets
from l2c_compile.errors import FileFormatError, L2CError

HERE = Surroundings(
    torch="2.13.0", triton="3.9.0", python="3.11.7", commit="0123456789ab", date="2026-01-31T12:00:00+00:00"
)
ONE_TARGET = """
[[target]]
bench = "fake"
metric = "error"
comparison = "<="
value = 1e-4
reason = "made up"
"""


class FakeClock:
    """A clock that moves only when a side runs."""

    def __init__(self) -> None:
        self.now_s = 0.0

    def __call__(self) -> float:
        return self.now_s

    def side(self, *durations_ms: float) -> Callable[[], None]:
        remaining = iter(durations_ms)

        def run() -> None:
            self.now_s += next(remaining) / 1e3

        return run


def recording(name: str, log: list[str]) -> Callable[[], None]:
    return lambda: log.append(name)


def recorded(*rows: Row) -> list[Record]:
    return records("fake", rows, HERE)


def targets_file(folder: Path, text: str) -> Path:
    path = folder / "targets.toml"
    path.write_text(text, encoding="utf-8")
    return path


def run_fake(monkeypatch: pytest.MonkeyPatch, rows: Sequence[Row], *options: str) -> tuple[Result, list[str]]:
    """Run ``python -m bench fake`` with a case that returns the rows; also return the arguments the case got."""
    received: list[str] = []

    def run(args: Sequence[str], progress: Progress) -> list[Row]:
        received.extend(args)
        progress.advance(progress.add_task("faking", total=1))
        return list(rows)

    module = ModuleType("a_fake_bench")
    module.__dict__["run"] = run
    monkeypatch.setitem(sys.modules, "a_fake_bench", module)
    monkeypatch.setitem(CASES, "fake", "a_fake_bench:run")
    return CliRunner().invoke(app, ["fake", *options]), received


# The timer.


def test_sides_run_in_turn_and_each_round_starts_one_later() -> None:
    log: list[str] = []
    compare({name: recording(name, log) for name in "abc"}, rounds=3, warmup=1)
    assert "".join(log) == "abc" + "abc" + "bca" + "cab"


def test_the_warm_up_is_not_counted() -> None:
    clock = FakeClock()
    timings = compare({"side": clock.side(1000, 2, 4, 6)}, rounds=3, warmup=1, clock_s=clock)
    assert timings["side"].samples_ms == pytest.approx((2, 4, 6))
    assert timings["side"].median_ms == pytest.approx(4)


def test_the_device_is_waited_for_before_each_start_and_before_each_stop() -> None:
    log: list[str] = []
    compare({"a": recording("a", log)}, rounds=2, warmup=0, sync=recording("-", log))
    assert "".join(log) == "-" + "-a-" + "-a-"


def test_progress_is_told_of_every_round() -> None:
    log: list[str] = []
    compare({"a": lambda: None, "b": lambda: None}, rounds=4, warmup=2, on_round=recording("r", log))
    assert log == ["r"] * 4


def test_a_ratio_is_of_medians_and_its_spread_is_paired() -> None:
    slow, fast = Timing((20.0, 40.0, 60.0)), Timing((10.0, 20.0, 30.0))
    got = ratio(slow, fast)
    assert (got.value, got.p20, got.p80) == pytest.approx((2.0, 2.0, 2.0))


def test_a_ratio_of_two_runs_is_refused() -> None:
    with pytest.raises(MeasureError, match="one compare, got 2 and 1 rounds"):
        ratio(Timing((1.0, 2.0)), Timing((1.0,)))


def test_quantiles_are_interpolated() -> None:
    samples = (50.0, 10.0, 30.0, 20.0, 40.0, 60.0)
    assert [quantile(samples, share) for share in (0, 0.2, 0.5, 1)] == pytest.approx([10, 20, 35, 60])


def test_comparing_nothing_is_refused() -> None:
    with pytest.raises(MeasureError, match="at least one side"):
        compare({})


# Rows and files.


def test_every_record_carries_the_surroundings_and_the_name_of_the_device() -> None:
    (record,) = recorded(Row.timed("compiled", Timing((1.0, 2.0, 3.0)), {"steps": 20}))
    assert (record.bench, record.metric, record.value, record.unit) == ("fake", "compiled", 2.0, "ms")
    assert (record.torch, record.commit, record.date) == (HERE.torch, HERE.commit, HERE.date)
    assert record.device not in {"", "cpu"}


def test_the_surroundings_are_read_from_this_machine() -> None:
    here = Surroundings.here_and_now()
    assert here.torch[0].isdigit()
    assert here.date.endswith("+00:00")
    assert here.commit


def test_json_holds_every_field_and_null_for_what_is_not_finite(tmp_path: Path) -> None:
    path = tmp_path / "new" / "rows.json"
    write_json(path, recorded(Row("error", 2e-6, conditions={"model": "dit"}), Row("error", float("nan"))))
    first, second = json.loads(path.read_text(encoding="utf-8"))
    assert first["value"] == 2e-6
    assert first["conditions"] == {"model": "dit"}
    assert second["value"] is None
    for key in ("bench", "metric", "unit", "p20", "p80", "device", "torch", "triton", "python", "commit", "date"):
        assert key in first
    assert [file.name for file in path.parent.iterdir()] == ["rows.json"]


def test_a_kept_result_is_not_written_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench.report, "RESULTS", tmp_path)
    write_json(tmp_path / "a.json", recorded(Row("error", 1.0)))
    with pytest.raises(ReportError, match="choose a new dated name"):
        write_json(tmp_path / "a.json", recorded(Row("error", 2.0)))
    assert json.loads((tmp_path / "a.json").read_text(encoding="utf-8"))[0]["value"] == 1.0


# Targets.


def test_the_targets_of_this_project_are_readable_and_about_registered_benches() -> None:
    targets = read_targets()
    assert {target.bench for target in targets} <= set(CASES)
    assert all(target.reason for target in targets)


@pytest.mark.parametrize(
    ("comparison", "value", "met"),
    [
        ("<=", 5.0, True),
        ("<=", 5.1, False),
        (">=", 5.0, True),
        (">=", 4.9, False),
        ("==", 5.0, True),
        ("==", 5.1, False),
    ],
)
def test_each_comparison_has_the_measured_value_on_its_left(
    tmp_path: Path, comparison: str, value: float, met: bool
) -> None:
    text = ONE_TARGET.replace('"<="', f'"{comparison}"').replace("1e-4", "5.0")
    (verdict,) = check("fake", read_targets(targets_file(tmp_path, text)), recorded(Row("error", value)))
    assert verdict.met is met


def test_a_target_holds_only_if_it_holds_for_every_row_it_is_about(tmp_path: Path) -> None:
    targets = read_targets(targets_file(tmp_path, ONE_TARGET))
    rows = recorded(Row("error", 1e-6, conditions={"model": "dit"}), Row("error", 1e-3, conditions={"model": "uvit"}))
    (verdict,) = check("fake", targets, rows)
    assert str(verdict) == "falls short: fake error <= 0.0001, got 0.001 (made up)"


def test_conditions_narrow_a_target_down(tmp_path: Path) -> None:
    targets = read_targets(targets_file(tmp_path, ONE_TARGET + 'conditions = { model = "dit" }\n'))
    rows = recorded(
        Row("error", 1e-6, conditions={"model": "dit", "steps": 20}), Row("error", 1.0, conditions={"model": "uvit"})
    )
    (verdict,) = check("fake", targets, rows)
    assert verdict.met


def test_decimals_round_the_measured_value(tmp_path: Path) -> None:
    text = ONE_TARGET.replace('"<="', '"=="').replace("1e-4", "44.29") + "decimals = 2\n"
    targets = read_targets(targets_file(tmp_path, text))
    assert check("fake", targets, recorded(Row("error", 100 * 248 / 560)))[0].met
    assert not check("fake", targets, recorded(Row("error", 44.28)))[0].met


def test_nan_never_meets_a_target(tmp_path: Path) -> None:
    targets = read_targets(targets_file(tmp_path, ONE_TARGET))
    assert not check("fake", targets, recorded(Row("error", float("nan"))))[0].met


def test_targets_of_other_benches_are_not_asked_for(tmp_path: Path) -> None:
    assert check("another", read_targets(targets_file(tmp_path, ONE_TARGET)), []) == []


@pytest.mark.parametrize(
    ("before", "after", "message"),
    [
        ('reason = "made up"', "", "wants the keys bench, comparison, metric, reason, value"),
        ('reason = "made up"', 'reason = "made up"\nwhy = 1', "got bench, comparison, metric, reason, value, why"),
        ('"<="', '"<"', "wants one of <=, >=, ==, got '<'"),
        ("1e-4", '"small"', "wants a number as value, got 'small'"),
        ("[[target]]", "[[target", "wants TOML"),
    ],
)
def test_a_bad_target_is_named(tmp_path: Path, before: str, after: str, message: str) -> None:
    path = targets_file(tmp_path, ONE_TARGET.replace(before, after))
    with pytest.raises(FileFormatError, match=message):
        read_targets(path)


# The registry.


def test_a_bench_that_cannot_be_imported_says_what_it_lacks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(CASES, "fake", "bench.no_such_file:run")
    with pytest.raises(BenchError, match=r"wants the module bench\.no_such_file, which does not exist"):
        load("fake")


def test_a_missing_dependency_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "needs_much.py").write_text("import a_package_nobody_has\n", encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setitem(CASES, "fake", "needs_much:run")
    with pytest.raises(BenchError, match="wants 'a_package_nobody_has', which is not installed"):
        load("fake")


def test_the_catalogue_reads_docstrings_without_importing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "explodes.py").write_text('"""Time an explosion.\n\nMore.\n"""\n1 / 0\n', encoding="utf-8")
    (tmp_path / "garbled.py").write_text("def\n", encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setitem(CASES, "one", "explodes:run")
    monkeypatch.setitem(CASES, "two", "garbled:run")
    monkeypatch.setitem(CASES, "three", "absent:run")
    assert summary("one") == "Time an explosion."
    assert summary("two") == "(garbled does not parse)"
    assert summary("three") == "(absent does not exist)"


# The command.


def test_help_lists_every_bench() -> None:
    result = CliRunner().invoke(app, ["--help"])
    assert result.exit_code == 0
    for name in CASES:
        assert name in result.output


def test_an_unknown_bench_exits_with_2_and_the_nearest_name() -> None:
    result = CliRunner().invoke(app, ["goldne"])
    assert result.exit_code == 2
    assert "no bench named 'goldne': did you mean 'golden'?" in result.output


def test_a_run_prints_a_table_and_writes_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "rows.json"
    result, received = run_fake(monkeypatch, [Row("error", 0.5)], "a.pt", "--threads", "2", "--json", str(path), "b.pt")
    assert result.exit_code == 0
    assert "error" in result.output
    assert "0.5" in result.output
    assert received == ["a.pt", "--threads", "2", "b.pt"]
    assert json.loads(path.read_text(encoding="utf-8"))[0]["bench"] == "fake"


@pytest.mark.parametrize(
    ("rows", "exit_code", "line"),
    [
        ([Row("error", 1e-6)], 0, "met: fake error <= 0.0001"),
        ([Row("error", 1e-2)], 1, "falls short: fake error <= 0.0001, got 0.01 (made up)"),
        ([Row("other", 1e-6)], 1, "not measured: fake error <= 0.0001"),
        ([], 1, "not measured: fake error <= 0.0001"),
    ],
)
def test_check_lists_the_verdicts_and_exits_with_1_if_one_is_not_met(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rows: list[Row], exit_code: int, line: str
) -> None:
    targets = read_targets(targets_file(tmp_path, ONE_TARGET))
    monkeypatch.setattr("bench.__main__.read_targets", lambda: targets)
    result, _ = run_fake(monkeypatch, rows, "--check")
    assert line in result.output
    assert result.exit_code == exit_code


def test_a_miss_without_check_is_no_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    result, _ = run_fake(monkeypatch, [Row("error", 1e9)])
    assert result.exit_code == 0


def test_a_mistake_of_the_user_is_printed_without_a_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    def run(args: Sequence[str], progress: Progress) -> list[Row]:
        raise L2CError("golden wants a file, got none; give one")

    module = ModuleType("a_failing_bench")
    module.__dict__["run"] = run
    monkeypatch.setitem(sys.modules, "a_failing_bench", module)
    monkeypatch.setitem(CASES, "fake", "a_failing_bench:run")
    result = CliRunner().invoke(app, ["fake"])
    assert result.exit_code == 2
    assert "golden wants a file, got none; give one" in result.output
    assert "Traceback" not in result.output
