"""Take every GPU measurement of the project, part by part, in under nine minutes on one GPU.

``python -m bench gpu-all --out DIR``. Each part writes ``DIR/<part>.json`` when it is done, all at once; a part that is
done is not run again unless ``--redo`` is given, so an interrupted run goes on where it was. At the end all of it is in
``DIR/gpu-all.json`` and in a table. A part has a budget of seconds; what does not fit is skipped, and a row says so.
``--parts`` chooses. Exits with 2 where there is no CUDA device, having run nothing, and where a part failed.

golden        records of the authors' implementation, replayed on the GPU in float32 without TF32
equality      compiled loops against the eager loop with hooks: each dtype, passes that change no bit and that round
kernels       share of a copy's bandwidth, against eager torch and Inductor
compile-time  DiT-XL/2, the whole loop against torch.compile of one evaluation, from an empty cache
latency       DiT-XL/2, published routers, guidance: ours, ours uncached, torch.compile in the eager loop, hooks, eager
cuda-graph    the same loops as one CUDA graph, and whether it returns the same bits
memory        the peak that torch.cuda measures against the bytes that the plan counts

``--device cpu --tiny`` rehearses: every part runs on tiny shapes, nothing is compiled by Inductor, files are named
``rehearsal-<part>.json``, and every row says so. No figure of a rehearsal means anything.
"""

from __future__ import annotations

import argparse
import json
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import Progress
from torch import Tensor
from torch._inductor.utils import fresh_cache

from bench.cases import BenchError
from bench.measure import compare, ratio, synchronizer
from bench.report import Condition, Record, Row, Surroundings, records, results_table
from bench.speed import kernels
from bench.trust.golden import replay
from bench.workloads import published_router, routers_folder
from l2c_compile import CacheSchedule, CompiledSampler, l2c_compile, run_reference
from l2c_compile.backends.cuda_graphs import CudaRecorder, RecordedLoop, Recorder, check_capturable
from l2c_compile.files.documents import write_atomically
from l2c_compile.loops import DDIM, Guidance
from l2c_compile.methods import uniform_interval
from l2c_compile.models import DiT

__all__ = ["PARTS", "Budget", "run"]

_DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


@dataclass
class Budget:
    """The seconds of a part."""

    seconds: float
    clock_s: Callable[[], float] = time.perf_counter
    skipped: list[str] = field(default_factory=list)
    """What did not fit, and why."""

    def __post_init__(self) -> None:
        self._start = self.clock_s()
        self._longest = 0.0

    @property
    def used_s(self) -> float:
        """Seconds since the part began."""
        return self.clock_s() - self._start

    @contextmanager
    def fits(self, what: str, guess_s: float) -> Iterator[bool]:
        """Tell whether there is time for something that takes as long as the longest before it, or the guess."""
        needed, left = max(guess_s, self._longest), self.seconds - self.used_s
        if needed > left:
            self.skipped.append(f"{what}: would take {needed:.0f} s, {max(left, 0.0):.0f} s are left")
            yield False
            return
        before = self.used_s
        yield True
        self._longest = max(self._longest, self.used_s - before)


@dataclass(frozen=True)
class Case:
    """One loop over DiT-XL/2, or over a tiny one in a rehearsal."""

    steps: int
    batch: int
    dtype: str


CASES = (
    Case(20, 1, "bfloat16"),
    Case(20, 8, "bfloat16"),
    Case(50, 1, "bfloat16"),
    Case(20, 1, "float32"),
    Case(50, 8, "bfloat16"),
    Case(20, 8, "float32"),
    Case(50, 1, "float32"),
)
"""Most telling first: what comes last is skipped first."""

REHEARSED = (Case(2, 1, "bfloat16"),)


@dataclass
class Workshop:
    """What the parts share: the device, the model and what was compiled before."""

    device: str
    tiny: bool
    progress: Progress
    models: dict[str, DiT] = field(default_factory=dict)
    samplers: dict[object, CompiledSampler] = field(default_factory=dict)
    denoisers: dict[object, Any] = field(default_factory=dict)
    capture_s: dict[object, float] = field(default_factory=dict)

    @property
    def cases(self) -> tuple[Case, ...]:
        """The loops to measure."""
        return REHEARSED if self.tiny else CASES

    @property
    def backend(self) -> str:
        """What compiles."""
        return "eager" if self.tiny else "inductor"

    @property
    def rounds(self) -> int:
        """How often a side is timed."""
        return 1 if self.tiny else 5

    def where(self, **conditions: Condition) -> dict[str, Condition]:
        """Return the conditions of a row; those of a rehearsal say that it is one."""
        on = f"REHEARSAL on {self.device}, tiny shapes" if self.tiny else self.device
        return {"on": on, **conditions}

    def row(self, metric: str, value: float, where: Mapping[str, Condition], unit: str = "") -> Row:
        """Return a row measured here."""
        return Row(metric, value, unit, self.where(**where), device=self.device)

    def sync(self) -> None:
        """Wait for the device."""
        synchronizer(self.device)()

    def model(self, dtype: str) -> DiT:
        """Return the denoiser with random weights, made where it runs; zeros would make its layers idle."""
        if dtype not in self.models:
            with torch.device("meta"):
                tiny = {"input_size": 4, "hidden_size": 32, "depth": 2, "num_heads": 2} if self.tiny else {}
                model = DiT.from_preset("DiT-XL/2", **tiny)
            model = model.to(_DTYPES[dtype]).to_empty(device=self.device).eval()
            generator = torch.Generator(self.device).manual_seed(0)
            with torch.no_grad():
                for weight in model.parameters():
                    weight.normal_(std=0.02, generator=generator)
            self.models[dtype] = model
        return self.models[dtype]

    def loop(self, case: Case) -> DDIM:
        """Return the sampler, guidance in one call."""
        return DDIM(steps=case.steps, guidance=Guidance(scale=1.5, null={"y": 1000}, channels=3))

    def schedule(self, case: Case) -> tuple[CacheSchedule, str]:
        """Return the published schedule and its name; where its file is absent, a formula that says that it is one."""
        name = f"l2c_DDIM{case.steps}_router.pt"
        if not self.tiny and (routers_folder() / name).is_file():
            return published_router(name).schedule(), name
        paths = [path for path, _ in self.model(case.dtype).named_modules()]
        return uniform_interval(case.steps, ("blocks.*.attn", "blocks.*.mlp"), 2).resolve(
            paths
        ), "formula: odd evaluations reuse everything"

    def inputs(self, case: Case) -> tuple[Tensor, Tensor]:
        """Return noise and labels, equal for equal cases."""
        size = 4 if self.tiny else 32
        generator = torch.Generator().manual_seed(1)
        noise = torch.randn(case.batch, 4, size, size, generator=generator).to(self.device, _DTYPES[case.dtype])
        return noise, torch.randint(0, 1000, (case.batch,), generator=generator).to(self.device)

    def sampler(self, case: Case, *, cached: bool) -> CompiledSampler:
        """Return a captured and compiled loop; compiled once a process."""
        key = case, cached
        if key not in self.samplers:
            schedule, _ = self.schedule(case)
            if not cached:
                schedule = CacheSchedule.all_compute(schedule.num_evaluations, schedule.sites)
            sampler = l2c_compile(self.model(case.dtype), schedule, self.loop(case), backend=self.backend)
            noise, labels = self.inputs(case)
            start = time.perf_counter()
            sampler.capture(noise, y=labels)
            self.capture_s[key] = time.perf_counter() - start
            self.samplers[key] = sampler
        return self.samplers[key]

    def denoiser(self, case: Case) -> Callable[..., object]:
        """Return what a user would have without us: torch.compile of the denoiser."""
        key = case.batch, case.dtype
        if key not in self.denoisers:
            self.denoisers[key] = torch.compile(
                self.model(case.dtype), fullgraph=True, dynamic=False, backend=self.backend
            )
        compiled: Callable[..., object] = self.denoisers[key]
        return compiled

    def recorder(self, sampler: CompiledSampler, case: Case) -> RecordedLoop:
        """Return the loop of a sampler as one CUDA graph, compiled no second time."""
        noise, labels = self.inputs(case)
        program = sampler.capture(noise, y=labels)
        recorder: Recorder = _RunsAgain() if self.tiny else CudaRecorder(check_capturable(program.graph))
        return RecordedLoop(program.run, program.graph, recorder)


class _RunsAgain:
    """Stands for a CUDA graph in a rehearsal."""

    def warm_up(self, run: Callable[[], object]) -> None:
        run()

    def record(self, run: Callable[[], Sequence[object]]) -> tuple[Callable[[], None], Sequence[object]]:
        results = list(run())

        def replay() -> None:
            results[:] = run()

        return replay, results

    def drain(self) -> None: ...

    def wait_for_last(self) -> None: ...

    def mark_end(self) -> None: ...


def _golden(shop: Workshop, budget: Budget, rows: list[Row]) -> None:
    folder = routers_folder().parent / "golden"
    files = sorted(folder.glob("*.pt"))
    if not files:
        budget.skipped.append(f"no records in {folder.name}/ beside the routers; set L2C_SHARED to their folder")
    for path in files:
        with budget.fits(path.name, 5) as fits, _without_tf32():
            if fits:
                for result, error in replay(path, shop.device).items():
                    rows.append(shop.row("golden_relative_error", error, {"file": path.name, "result": result}))


def _equality(shop: Workshop, budget: Budget, rows: list[Row]) -> None:
    """Four blocks of DiT-XL/2's width, where Inductor needs seconds."""
    width, depth, heads, size = (32, 2, 2, 4) if shop.tiny else (1152, 4, 16, 32)
    steps = 2 if shop.tiny else 4
    for dtype in _DTYPES:
        with torch.device(shop.device):
            torch.manual_seed(0)
            sizes: dict[str, Any] = {"input_size": size, "hidden_size": width, "depth": depth, "num_heads": heads}
            model = DiT(patch_size=2, num_classes=1000, **sizes).eval()
        with torch.no_grad():
            for weight in model.parameters():
                weight.normal_(std=0.02)
        model.to(_DTYPES[dtype])
        loop = DDIM(steps=steps, guidance=Guidance(scale=1.5, null={"y": 1000}, channels=3))
        schedule = uniform_interval(steps, ("blocks.*.attn", "blocks.*.mlp"), 2).resolve(
            [path for path, _ in model.named_modules()]
        )
        noise = torch.randn(2, 4, size, size, generator=torch.Generator().manual_seed(1))
        inputs = noise.to(shop.device, _DTYPES[dtype]), torch.tensor([1, 2], device=shop.device)
        sides = (("eager", "bitwise"), ("eager", "rounding"), (shop.backend, "rounding"))
        for backend, numerics in dict.fromkeys(sides):
            with budget.fits(f"{dtype}, {backend}, {numerics}", 8) as fits, _without_tf32():
                if fits:
                    sampler = l2c_compile(model, schedule, loop, backend=backend, numerics=numerics)  # type: ignore[arg-type]
                    got = sampler(inputs[0], y=inputs[1])
                    wanted = run_reference(model, loop, schedule, inputs[0], {"y": inputs[1]})
                    error = _relative(got, wanted)
                    where: dict[str, Condition] = {"dtype": dtype, "backend": backend, "numerics": numerics}
                    rows.append(shop.row("equality_relative_error", error, where))
                    # For sums of products in another order; the demo allows twice that, for packed weights.
                    allowed = 64 * torch.finfo(_DTYPES[dtype]).eps * steps
                    rows.append(shop.row("equality_over_allowed", error / allowed, where))


def _kernels(shop: Workshop, budget: Budget, rows: list[Row]) -> None:
    first = [case for case in kernels.DIT if case.shape[0] in (2, 16) and case.terms in (1, 7, 28)]
    others = [case for case in (*kernels.VIDEO, *kernels.DIT) if case not in first]
    with torch.inference_mode():
        for case in kernels.SMOKE if shop.tiny else (*first, *others):
            with budget.fits(f"{case.kernel}, {case.model}, batch {case.shape[0]}, {case.terms} terms", 3) as fits:
                if fits:
                    for row in kernels.time_case(case, shop.device, 3 if shop.tiny else 20, lambda: None):
                        conditions = shop.where(**row.conditions)
                        rows.append(Row(row.metric, row.value, row.unit, conditions, row.p20, row.p80, shop.device))


def _compile_time(shop: Workshop, budget: Budget, rows: list[Row]) -> None:
    """Compile the denoiser first: both begin with an empty cache, and share none of what they compile."""
    case = shop.cases[0]
    with budget.fits("DiT-XL/2", 60) as fits:
        if not fits:
            return
        noise, labels = shop.inputs(case)
        call = _one_evaluation(shop, case)
        seconds = []
        for _ in range(3):
            start = time.perf_counter()
            call()
            shop.sync()
            seconds.append(time.perf_counter() - start)
        one = seconds[0] - min(seconds[1:])
        sampler = shop.sampler(case, cached=True)
        loop = shop.capture_s[case, True]
        sampler(noise, y=labels)
        where = _where(shop, case)
        rows.append(shop.row("seconds_one_evaluation", one, where, "s"))
        rows.append(shop.row("seconds_loop", loop, where, "s"))
        rows.append(shop.row("loop_over_one_evaluation", loop / one, where))


def _latency(shop: Workshop, budget: Budget, rows: list[Row]) -> None:
    for case in shop.cases:
        with budget.fits(f"{case}", 40) as fits:
            if fits:
                rows += _time_loops(shop, case)


def _time_loops(shop: Workshop, case: Case) -> Iterator[Row]:
    model, loop = shop.model(case.dtype), shop.loop(case)
    noise, labels = shop.inputs(case)
    schedule, _ = shop.schedule(case)
    ours, uncached = shop.sampler(case, cached=True), shop.sampler(case, cached=False)
    compiled = shop.denoiser(case)

    def plain(denoiser: Callable[..., object]) -> Callable[[], object]:
        return torch.no_grad()(lambda: loop(denoiser, noise, y=labels))  # type: ignore[arg-type]

    def hooks() -> object:
        return run_reference(model, loop, schedule, noise, {"y": labels})

    sides = {
        "compiled cached": lambda: ours(noise, y=labels),
        "compiled uncached": lambda: uncached(noise, y=labels),
        "torch.compile in the eager loop": plain(compiled),
        "eager cached by hooks": hooks,
        "eager uncached": plain(model),
    }
    timings = compare(sides, rounds=shop.rounds, warmup=1, sync=synchronizer(shop.device))
    where = shop.where(**_where(shop, case))
    for side, timing in timings.items():
        yield Row.timed("sampling", timing, {**where, "side": side}, device=shop.device)
    first, *others = timings
    kept = ours.summary().multiply_adds_kept
    yield Row("multiply_adds_kept", kept, "", where, device=shop.device)
    for side in others:
        time_ratio, at = ratio(timings[first], timings[side]), {**where, "against": side}
        yield Row.ratio("time_ratio", time_ratio, at, device=shop.device)
        if not side.startswith("eager"):
            yield Row("skip_efficiency", time_ratio.value / kept, "", at, device=shop.device)
    yield Row("relative_error", _relative(ours(noise, y=labels), hooks()), "", where, device=shop.device)


def _cuda_graph(shop: Workshop, budget: Budget, rows: list[Row]) -> None:
    for case in shop.cases[:3]:
        with budget.fits(f"{case}", 8) as fits:
            if fits:
                rows += _time_graphs(shop, case)


def _time_graphs(shop: Workshop, case: Case) -> Iterator[Row]:
    inputs = shop.inputs(case)
    noise, labels = inputs
    sides: dict[str, Callable[[], object]] = {}
    for name, cached in (("compiled cached", True), ("compiled uncached", False)):
        sampler = shop.sampler(case, cached=cached)
        recorded = shop.recorder(sampler, case)
        with torch.no_grad():
            start = time.perf_counter()
            got = recorded(*inputs)
            shop.sync()
            seconds = time.perf_counter() - start
            wanted = sampler(noise, y=labels)
        assert isinstance(wanted, Tensor)
        where: dict[str, Condition] = {**_where(shop, case), "side": name}
        yield shop.row("seconds_to_record", seconds, where, "s")
        yield shop.row("graph_relative_error", _relative(got[0], wanted), where)
        sides[name] = lambda sampler=sampler: sampler(noise, y=labels)  # type: ignore[misc]
        sides[f"{name}, CUDA graph"] = torch.no_grad()(lambda recorded=recorded: recorded(*inputs))
    timings = compare(sides, rounds=shop.rounds, warmup=1, sync=synchronizer(shop.device))
    for side, timing in timings.items():
        yield Row.timed("sampling", timing, shop.where(**_where(shop, case), side=side), device=shop.device)
    for name in ("compiled cached", "compiled uncached"):
        gain = ratio(timings[f"{name}, CUDA graph"], timings[name])
        yield Row.ratio("graph_time_ratio", gain, shop.where(**_where(shop, case), side=name), device=shop.device)


def _memory(shop: Workshop, budget: Budget, rows: list[Row]) -> None:
    """In eager mode, which frees a tensor after its last use, as the plan counts; nothing needs compiling."""
    case = shop.cases[0]
    model, loop = shop.model(case.dtype), shop.loop(case)
    schedule, _ = shop.schedule(case)
    noise, labels = shop.inputs(case)
    sides: dict[str, CompiledSampler] = {}
    nothing_reused = CacheSchedule.all_compute(schedule.num_evaluations, schedule.sites)
    wanted: Mapping[str, tuple[CacheSchedule, Any]] = {
        "uncached": (nothing_reused, None),
        "cached": (schedule, None),
        "cached, fp8": (schedule, "fp8"),
        "cached, int8": (schedule, "int8"),
    }
    for name, (each, caches) in wanted.items():
        with budget.fits(name, 6) as fits:
            if fits:
                sampler = l2c_compile(model, each, loop, numerics="rounding", caches=caches)
                sampler.capture(noise, y=labels)
                sides[name] = sampler
                where = {**_where(shop, case), "side": name}
                planned = sampler.summary().cache.peak_bytes / 2**20
                rows.append(shop.row("planned_cache_peak_MiB", planned, where, "MiB"))
                rows += _measured_peak(shop, budget, lambda s=sampler: s(noise, y=labels), where)  # type: ignore[misc]
    with budget.fits("hooks", 3) as fits:
        if fits:
            where = {**_where(shop, case), "side": "hooks"}
            rows += _measured_peak(
                shop, budget, lambda: run_reference(model, loop, schedule, noise, {"y": labels}), where
            )


def _measured_peak(
    shop: Workshop, budget: Budget, sample: Callable[[], object], where: Mapping[str, Condition]
) -> list[Row]:
    if shop.device == "cpu":
        sample()
        budget.skipped.append(f"peak of {where['side']}: torch measures memory on a GPU only")
        return []
    sample()
    shop.sync()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    sample()
    shop.sync()
    return [shop.row("measured_peak_MiB", (torch.cuda.max_memory_allocated() - before) / 2**20, where, "MiB")]


@dataclass(frozen=True)
class Part:
    """One file of results."""

    run: Callable[[Workshop, Budget, list[Row]], None]
    budget_s: float


PARTS = {
    "golden": Part(_golden, 25),
    "equality": Part(_equality, 55),
    "compile-time": Part(_compile_time, 110),
    "latency": Part(_latency, 200),
    "cuda-graph": Part(_cuda_graph, 45),
    "memory": Part(_memory, 45),
    "kernels": Part(_kernels, 45),
}
"""In this order: what the later ones need is compiled by then."""

TOTAL_S = 525.0
"""What one run may take; the parts' budgets are as long together, and the last ones get what is left."""


def run(args: Sequence[str], progress: Progress) -> list[Row]:
    """Run the parts that are not done, and return the rows of all.

    Raises:
        BenchError: there is no CUDA device, a file of results is damaged, or a part failed.
    """
    options = _options(args)
    options.out.mkdir(parents=True, exist_ok=True)
    shop = Workshop(options.device, options.tiny, progress)
    task = progress.add_task("gpu-all", total=len(options.parts))
    start = time.perf_counter()
    with nullcontext() if options.tiny else fresh_cache():
        for name in options.parts:
            progress.update(task, description=f"gpu-all: {name}")
            path = _file(options, name)
            if options.redo or not path.is_file() or _read(path)["error"] is not None:
                document = _run_part(shop, name, TOTAL_S - (time.perf_counter() - start))
                write_atomically(path, json.dumps(document, indent=1).encode())
            progress.advance(task)
    documents = {name: _read(_file(options, name)) for name in PARTS if _file(options, name).is_file()}
    for name, document in documents.items():
        if document["rehearsal"] != options.tiny or document["part"] != name:
            raise BenchError(f"{_file(options, name)} holds another part, or a rehearsal under another name; remove it")
    together = {"rehearsal": options.tiny, "parts": documents}
    write_atomically(_file(options, "gpu-all"), json.dumps(together, indent=1).encode())
    rows = [row for document in documents.values() for row in _rows_of(document)]
    failed = [f"{name}: {documents[name]['error'][-1]}" for name in documents if documents[name]["error"] is not None]
    if failed:
        # What the others measured is worth a look all the same.
        Console().print(results_table(records("gpu-all", rows, Surroundings.here_and_now())))
        raise BenchError(f"{'; '.join(failed)}; tracebacks in {options.out}; the same command runs these parts again")
    return rows


def _options(args: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench gpu-all")
    parser.add_argument("--out", type=Path, required=True, help="folder for the results")
    parser.add_argument("--parts", nargs="+", default=list(PARTS), choices=list(PARTS))
    parser.add_argument("--redo", action="store_true", help="also run parts that are done")
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--tiny", action="store_true", help="rehearse on tiny shapes; with --device cpu")
    options = parser.parse_args(list(args))
    if (options.device == "cpu") != options.tiny:
        raise BenchError("gpu-all measures on a GPU; --device cpu and --tiny go together, and rehearse the script")
    if options.device == "cuda" and not torch.cuda.is_available():
        raise BenchError("there is no CUDA device, so nothing was run; --device cpu --tiny rehearses the script")
    return options


def _file(options: argparse.Namespace, name: str) -> Path:
    folder: Path = options.out
    return folder / f"{'rehearsal-' if options.tiny else ''}{name}.json"


def _run_part(shop: Workshop, name: str, left_s: float) -> dict[str, Any]:
    """Run one part; return what its file holds."""
    part, rows, error = PARTS[name], list[Row](), None
    surroundings = Surroundings.here_and_now()
    budget = Budget(min(part.budget_s, left_s))
    try:
        part.run(shop, budget, rows)
    except Exception:  # one part that fails must not take the minutes of all others with it
        error = traceback.format_exc().splitlines()
    rows += [shop.row("skipped", 1, {"part": name, "what": what}) for what in budget.skipped]
    rows.append(shop.row("part_seconds", budget.used_s, {"part": name}, "s"))
    return {
        "part": name,
        "rehearsal": shop.tiny,
        "seconds": budget.used_s,
        "skipped": budget.skipped,
        "error": error,
        "records": [asdict(record) for record in records("gpu-all", rows, surroundings)],
        "devices": sorted({row.device for row in rows}),
    }


def _read(path: Path) -> dict[str, Any]:
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
        if not {"part", "rehearsal", "skipped", "error", "records"} <= document.keys():
            raise ValueError("it lacks a key")
    except (ValueError, AttributeError, UnicodeDecodeError) as error:
        raise BenchError(f"{path} is no result of gpu-all ({error}); remove it") from error
    assert isinstance(document, dict)
    return document


def _rows_of(document: Mapping[str, Any]) -> Iterator[Row]:
    device = "cpu" if document["rehearsal"] else "cuda"
    for each in document["records"]:
        record = Record(**each)
        yield Row(record.metric, record.value, record.unit, record.conditions, record.p20, record.p80, device)


def _where(shop: Workshop, case: Case) -> dict[str, Condition]:
    _, name = shop.schedule(case)
    model = "tiny" if shop.tiny else "DiT-XL/2"
    return {"model": model, "steps": case.steps, "batch": case.batch, "dtype": case.dtype, "schedule": name}


def _one_evaluation(shop: Workshop, case: Case) -> Callable[[], object]:
    noise, labels = shop.inputs(case)
    doubled = torch.cat([noise, noise]), torch.cat([labels, torch.full_like(labels, 1000)])
    times = torch.full((len(doubled[0]),), 500, device=shop.device)
    compiled = shop.denoiser(case)
    return torch.no_grad()(lambda: compiled(doubled[0], times, doubled[1]))


def _relative(got: object, wanted: object) -> float:
    """Return max |got - wanted| / max |wanted|."""
    assert isinstance(got, Tensor)
    assert isinstance(wanted, Tensor)
    return float((got.double() - wanted.double()).abs().max() / wanted.double().abs().max())


@contextmanager
def _without_tf32() -> Iterator[None]:
    """Compute float32 in float32: torch lets convolutions on a GPU round their factors to TF32."""
    before = torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32 = before
