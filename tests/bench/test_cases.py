"""Every bench runs at its smallest, and what each must say."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest
import torch
from rich.progress import Progress

from bench.cases import CASES, BenchError, load
from bench.report import Row, Surroundings, records
from bench.speed import kernel_compile, packed_caches, predict, trace_time
from bench.speed.kernels import DIT, VIDEO
from bench.speed.trace_time import build, repeated
from bench.targets import read_targets
from bench.trust import forged_graphs, fuzz, malformed_files, mutations, version_matrix
from bench.trust.malformed_worker import Outcome as ReadingOutcome
from bench.trust.programs.checking import Checker, Mismatch, Outcome, Program, draw_programs
from l2c_compile.kernels._launch import INTERPRETED
from l2c_compile.models import DiT
from l2c_compile.schedules.router import Router
from l2c_compile.schedules.sites import Site
from tests.bench.test_golden import dit_record
from tests.tiny import seeded

LOOP = "--steps 2 --schedule every-second --backend eager"
SMALLEST = {
    "compile-time": f"--model tiny {LOOP} --steps 2 3",
    "equality": f"--model tiny --depth 1 {LOOP} --dtypes float32",
    "forged-graphs": "--count 2",
    "fuzz": "--minutes 0.001 --seed 2",
    "golden": "record.pt",
    "gpu-all": "--device cpu --tiny --parts golden --out results",
    "guards": "--modules 8 --rounds 1",
    "kernel-compile": "",
    "kernels": "--device cpu",
    "latency": f"--models tiny {LOOP} --rounds 1 --cuda-graph --batch 1 --sides",
    "malformed-files": "--count 2",
    "memory": f"--device cpu --model tiny {LOOP}",
    "mutations": "",
    "packed-caches": "--per-class 1 --evaluations 2",
    "predict": "--rounds 1 --batch 1 --steps 2",
    "removed-shares": "",
    "trace-time": "--router router.safetensors --evaluations 2",
    "version-matrix": "--torch 2.11.0 --quick",
}
"""``quality`` is not here: ``test_quality.py`` runs it with a judge that does not sample."""

METRICS = {
    "compile-time": "seconds_one_evaluation seconds_loop loop_over_one_evaluation regions nodes growth",
    "equality": "relative_error over_allowed",
    "forged-graphs": "files failure slowest crashed hung executed failures",
    "fuzz": "programs programs_a_minute mismatches refused_percent",
    "golden": "relative_error",
    "gpu-all": "part_seconds skipped",
    "guards": "guards guards_and_probes first_call_check capture call",
    "kernel-compile": "registers spill_bytes shared_bytes",
    "kernels": "kernel aot_eager eager copy kernel_gigabytes_a_second share_of_copy over_eager",
    "latency": "sampling multiply_adds_kept time_ratio skip_efficiency relative_error seconds_to_record",
    "malformed-files": "files failure slowest crashed hung executed failures",
    "memory": "planned_cache_peak_MiB skipped",
    "mutations": "right_graph_proven caught caught_share caught_by_numbers_share",
    "packed-caches": "relative_l2 pixel_error pixel_error_max schedule_pixel_error drawn_as_asked mean_KiB peak_KiB",
    "predict": "predicted_time_ratio measured_time_ratio error_percent multiply_adds_kept warned",
    "removed-shares": "removed_percent smoothcache_agreement",
    "trace-time": "seconds_2 cpu_seconds_2 stage_seconds nodes",
    "version-matrix": "installed",
}


def row(rows: list[Row], metric: str) -> Row:
    (found,) = [each for each in rows if each.metric == metric]
    return found


def run(name: str, *args: str) -> list[Row]:
    return load(name)(args, Progress(disable=True))


def small_digits_dit() -> DiT:
    """Return one block of the digits model's width."""
    model = DiT(input_size=8, in_channels=1, patch_size=2, hidden_size=96, depth=1, num_heads=2, num_classes=10)
    return seeded(model, std=0.1)  # type: ignore[no-any-return]


def small_dit(weights: str = "meta") -> DiT:
    with torch.device(weights):
        return DiT(input_size=32, patch_size=16, hidden_size=8, depth=1, num_heads=1, num_classes=1000).eval()


def small_router() -> Router:
    scores = torch.tensor([[0.9, 0.9], [0.9, 0.0]])
    return Router(scores, (Site("blocks.0.attn"), Site("blocks.0.mlp")), cacheable=(1,), threshold=0.5)


def few_programs(rng: random.Random) -> Iterator[Program]:
    return itertools.islice(draw_programs(rng), 2)


def two_outcomes(seed: int, start: int, stop: int, *where: object) -> Iterator[ReadingOutcome]:
    yield ReadingOutcome(start, "router", "truncate", "refused", "FileFormatError: planted", 0.1)
    yield ReadingOutcome(start + 1, "sampler", "bomb", "HUNG", "planted", 2.0)


@pytest.fixture
def smallest(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, request: pytest.FixtureRequest
) -> Callable[[str], list[Row]]:
    """Return a function that runs a case with as little to do as it can have."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(fuzz, "draw_programs", few_programs)
    monkeypatch.setattr(malformed_files, "outcomes", two_outcomes)
    monkeypatch.setattr(forged_graphs, "outcomes", two_outcomes)
    monkeypatch.setattr(mutations, "PIPELINES", {"bitwise": mutations.PIPELINES["bitwise"]})
    monkeypatch.setattr(mutations, "MUTATIONS", ((mutations.dit, dict(itertools.islice(mutations.ON_DIT.items(), 1))),))
    monkeypatch.setattr(packed_caches, "load_digits_dit", small_digits_dit)
    monkeypatch.setattr(predict, "load_digits_dit", small_digits_dit)
    monkeypatch.setattr(trace_time, "_model", small_dit)
    monkeypatch.setattr(kernel_compile, "CONFIGS", kernel_compile.CONFIGS[-1:])
    monkeypatch.setattr(kernel_compile, "TARGETS", dict(itertools.islice(kernel_compile.TARGETS.items(), 1)))
    monkeypatch.setattr(version_matrix.Environment, "make", lambda *args: "no such version")

    def run_it(name: str) -> list[Row]:
        args = SMALLEST[name].split()
        if name == "latency":
            args += ["compiled uncached", "torch.compile in the eager loop", "eager cached by hooks", "eager uncached"]
            args += ["compiled cached, weights not packed"]
        elif name == "golden":
            torch.save(dit_record(), tmp_path / "record.pt")
        elif name == "trace-time":
            small_router().save(tmp_path / "router.safetensors")
        elif name == "gpu-all":
            monkeypatch.setenv("L2C_SHARED", str(tmp_path / "absent"))
        elif name == "removed-shares":
            args = [str(request.getfixturevalue("shared")("routers"))]
        elif name == "kernel-compile":
            pytest.importorskip("triton")
            if INTERPRETED:
                pytest.skip("kernels are interpreted, not compiled")
        return run(name, *args)

    return run_it


_ALL_GRAPHS = pytest.mark.slow(reason="it has no small form; test_mutations and test_state_mutations take its parts")


@pytest.mark.filterwarnings("ignore:TRITON_DEFAULT_FP_FUSION")
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=_ALL_GRAPHS) if name == "mutations" else name for name in SMALLEST]
)
def test_a_case_runs_at_its_smallest(name: str, smallest: Callable[[str], list[Row]]) -> None:
    rows = smallest(name)
    assert set(METRICS[name].split()) <= {each.metric for each in rows}
    assert all(each.device == "cpu" for each in rows)
    here = Surroundings(torch="2", triton="3", python="3", commit="0", date="2026-01-31")
    assert len(records(name, rows, here)) == len(rows)
    if name in MORE:
        MORE[name](rows)


def test_no_case_is_left_out() -> None:
    assert {*SMALLEST, "quality"} == set(CASES)


# What the rows of a case must say.


def equal(rows: list[Row]) -> None:
    bitwise = [each for each in rows if each.conditions["numerics"] == "bitwise"]
    assert bitwise
    assert all(each.value == 0 for each in bitwise)
    assert all(each.value <= 1 for each in rows)


def kernels_timed(rows: list[Row]) -> None:
    found = {(each.conditions["kernel"], each.metric) for each in rows}
    kernels = ("cached_residual", "cached_residual_norm", "packed")
    assert found >= {(kernel, metric) for kernel in kernels for metric in METRICS["kernels"].split()}
    assert all(each.value > 0 for each in rows)
    # What a target asks for is measured on CUDA only.
    assert "over_inductor" not in {each.metric for each in rows}


def no_error(rows: list[Row], metric: str) -> None:
    assert all(each.value == 0 for each in rows if each.metric == metric)


def packed_are_small_and_near(rows: list[Row]) -> None:
    found = {(each.metric, each.conditions["plan"], each.conditions["caches"]): each.value for each in rows}
    for plan in ("bitwise", "rounding"):
        for cache_format in ("fp8", "int8"):
            assert 0 < found["relative_l2", plan, cache_format] < 0.2
            assert found["pixel_error", plan, cache_format] < found["pixel_error_max", plan, cache_format]
            assert found["mean_KiB", plan, cache_format] < found["mean_KiB", plan, "none"]
        assert 0 <= found["drawn_as_asked", plan, "none"] <= 10
    # Rows of 96 float32 are 384 bytes, or 100 packed.
    assert found["peak_KiB", "bitwise", "int8"] * 384 == found["peak_KiB", "bitwise", "none"] * 100


def one_file_hung(rows: list[Row]) -> None:
    assert (row(rows, "failures").value, row(rows, "hung").value, row(rows, "crashed").value) == (1, 1, 0)
    assert row(rows, "slowest").conditions["kind"] == "sampler"


def two_programs(rows: list[Row]) -> None:
    assert row(rows, "programs").value == 2
    assert row(rows, "programs_a_minute").value > 0
    assert row(rows, "mismatches").value == 0


MORE: dict[str, Callable[[list[Row]], None]] = {
    "equality": equal,
    "fuzz": two_programs,
    "golden": partial(no_error, metric="relative_error"),
    "kernels": kernels_timed,
    "latency": partial(no_error, metric="graph_relative_error"),
    "forged-graphs": one_file_hung,
    "malformed-files": one_file_hung,
    "packed-caches": packed_are_small_and_near,
}


# Options.


@pytest.mark.parametrize(
    ("name", "args", "message"),
    [
        ("kernels", [], "arguments are required: --device"),
        ("kernels", ["--device"], "--device: expected one argument"),
        ("kernels", ["--device", "tpu"], "--device: invalid choice"),
        ("kernels", ["cuda"], "--device"),
        ("kernels", ["--device", "cpu", "--cases", "packed"], "kernels has no case 'packed' there"),
        ("mutations", ["--fast"], "mutations does not know --fast"),
        ("latency", ["--backend", "eager"], "with Inductor only"),
        ("latency", ["--models", "uvit", "--schedule", "every-second"], "use its published schedule"),
        ("memory", ["l2c_DDIM21_router"], "knows no router 'l2c_DDIM21_router'; did you mean"),
        ("trace-time", ["--router", "absent.pt"], "there is no absent.pt; name it with --router FILE"),
        ("trace-time", ["--rounds", "0"], "--rounds wants at least 1, got 0"),
        ("trace-time", ["--weights", "heavy"], "--weights: invalid choice"),
        ("trace-time", ["surprise"], "does not know surprise"),
        ("fuzz", ["--replay=x"], "replay wants"),
        ("fuzz", ["--replay=1:x"], "replay wants"),
        ("fuzz", ["--replay=2:999"], "has the programs"),
        ("fuzz", ["--replay=-1"], "replay wants"),
    ],
)
def test_a_wrong_argument_says_what_is_wanted(
    name: str, args: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(BenchError, match=message):
        run(name, *args)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize("name", ["compile-time", "equality", "golden", "kernels", "latency", "memory"])
def test_a_machine_without_cuda_is_refused(name: str) -> None:
    with pytest.raises(BenchError, match=f"{name} wants a CUDA device, got a machine without one"):
        run(name, "--device", "cuda")


def test_a_router_that_is_absent_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("L2C_SHARED", str(tmp_path))
    with pytest.raises(BenchError, match=r"the published router l2c_DDIM20_router\.pt in .*set L2C_SHARED"):
        run("memory", "--device", "cpu", "--model", "tiny")


def test_the_shapes_of_the_kernels_are_those_promised() -> None:
    assert {case.shape for case in DIT} == {(batch, 256, 1152) for batch in (2, 16, 64)}
    assert {case.shape for case in VIDEO} == {(1, 75_000, 5120)}
    assert {case.terms for case in DIT} >= {1, 56}
    assert len({case.name for case in (*DIT, *VIDEO)}) == len((*DIT, *VIDEO))


# trace-time.


def test_repeated_rows_keep_the_share_of_what_is_reused() -> None:
    schedule = repeated(small_router(), 6).schedule()
    assert schedule.row("blocks.0.attn") == [1, 1, 1, 1, 1, 1]
    assert schedule.row("blocks.0.mlp") == [1, 0, 1, 0, 1, 0]


@pytest.mark.parametrize("number", [0, 1, 3])
def test_rows_are_repeated_whole(number: int) -> None:
    with pytest.raises(BenchError, match="multiples of the router's 2"):
        repeated(small_router(), number)


def test_the_stages_are_the_whole_and_the_passes_follow_each_other() -> None:
    done = build(small_dit(), small_router().schedule())
    assert list(done.stages_s) == ["capture", "trace", "simplify", "unroll", "passes", "graph module"]
    assert all(seconds > 0 for seconds in done.stages_s.values())
    assert done.total_s == pytest.approx(sum(done.stages_s.values()) - done.stages_s["graph module"])
    assert all(a.nodes_after == b.nodes_before for a, b in zip(done.passes, done.passes[1:], strict=False))


# fuzz: what it finds can be replayed.


@pytest.fixture
def few(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fuzz, "draw_programs", few_programs)


@pytest.mark.usefixtures("few")
def test_a_failure_can_be_replayed(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn = list(few_programs(random.Random(2)))

    def check(self: Checker, program: Program) -> Outcome:
        if program == drawn[1]:
            raise Mismatch("planted")
        return Outcome(refused="ScheduleError: planted")

    monkeypatch.setattr(Checker, "check", check)
    rows = run("fuzz", "--replay", "2")
    assert row(rows, "mismatches").value == 1
    assert row(rows, "refused_percent").value == 50
    assert row(rows, "refused").conditions == {"error": "ScheduleError"}
    found = row(rows, "mismatch").conditions
    assert found["replay"] == "2:1"
    assert Program.from_json(str(found["program"])) == drawn[1]
    (again,) = [each for each in run("fuzz", "--replay", "2:1") if each.metric == "mismatch"]
    assert again.conditions["message"] == "Mismatch: planted"


@pytest.mark.usefixtures("few")
def test_it_hunts_through_dynamo_too(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = run("fuzz", "--minutes", "0.001", "--seed", "4", "--dynamo")
    assert row(rows, "programs").value == 1
    assert row(rows, "mismatches").value == 0
    assert row(rows, "refused_through_dynamo_percent").value == 0

    def check(self: Checker, program: Program) -> Outcome:
        raise Mismatch("planted")

    monkeypatch.setattr(Checker, "check_through_dynamo", check)
    rows = run("fuzz", "--replay", "2:1", "--dynamo")
    assert row(rows, "mismatch").conditions["message"] == "Mismatch: planted"


def test_a_seed_without_programs_is_a_find_and_loses_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    def draw(rng: random.Random) -> object:
        raise RuntimeError("planted")

    monkeypatch.setattr(fuzz, "draw_programs", draw)
    rows = run("fuzz", "--minutes", "0.0001", "--seed", "2")
    assert row(rows, "programs").value == 0
    found = next(each for each in rows if each.metric == "mismatch").conditions
    assert (found["replay"], found["message"]) == ("2", "no programs: RuntimeError: planted")


def test_one_mismatch_falls_short() -> None:
    (target,) = [each for each in read_targets() if each.metric == "mismatches"]
    assert (target.comparison, target.value) == ("==", 0)
