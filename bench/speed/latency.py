"""Time whole sampling loops: ours against plain torch.compile, hooks and the eager loop, in turn in one process.

Options: ``--models dit-s dit-xl-depth uvit nothing-gained`` (also ``dit-xl``, which is DiT-XL/2, and ``tiny``)
``--batches 1 8`` ``--rounds N`` (default 3) ``--steps 20`` ``--width N`` (of DiTs) ``--device cpu`` ``--dtype float32``
``--schedule published`` (or ``every-second``, ``nothing``) ``--backend inductor`` ``--sides SIDE ...``: beside ours
time only these. ``--cuda-graph`` times our loops as one CUDA graph as well and says how far off it is; on a CPU they
run again in its place, to try the script.

Weights are random. The published routers are used as they are at depth 28; for DiT-S (depth 12) block i takes the
scores of block floor((i + 0.5) * 28 / 12). "nothing-gained" reuses nothing. "freezing" is Inductor's own way of
arranging weights once; who knows of it gets it without us. "weights not packed" shows what is left on a CPU without our
faster linear layers.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator, Sequence

import torch
from rich.progress import Progress

from bench.cases import BenchError
from bench.measure import compare, ratio, synchronizer
from bench.options import Options
from bench.report import Condition, Row
from bench.workloads import MODELS, Workload, relative_error, workload
from l2c_compile import CompiledSampler
from l2c_compile.backends.cuda_graphs import CudaRecorder, RecordedLoop, Recorder, check_capturable

OURS, UNCACHED = "compiled cached", "compiled uncached"
_UNPACKED = "compiled cached, weights not packed"
COMPILE, _FROZEN = "torch.compile in the eager loop", "torch.compile with freezing in the eager loop"
HOOKS, EAGER = "eager cached by hooks", "eager uncached"

Side = Callable[[], object]


def _unpacked(work: Workload) -> Side:
    sampler = work.sampler(work.schedule, without=["pack-weights"])
    return lambda: work.sample(sampler)


def _compiled(work: Workload, **options: object) -> Side:
    denoiser = torch.compile(work.model, fullgraph=True, dynamic=False, backend=work.backend, **options)  # type: ignore[call-overload]
    return lambda: work.sample_plainly(denoiser)


_SIDES: dict[str, Callable[[Workload], Side]] = {
    OURS: lambda work: lambda: work.sample(work.ours),
    _UNPACKED: _unpacked,
    UNCACHED: lambda work: lambda: work.sample(work.ours_uncached),
    COMPILE: _compiled,
    _FROZEN: lambda work: _compiled(work, options={"freezing": True}),
    HOOKS: lambda work: work.sample_with_hooks,
    EAGER: lambda work: lambda: work.sample_plainly(work.model),
}
_MODELS = ["dit-s", "dit-xl-depth", "uvit", "nothing-gained"]
_OTHERS = tuple(name for name in _SIDES if name != OURS)


def run(args: Sequence[str], progress: Progress) -> list[Row]:
    """Return medians, ratios and skip efficiencies (time ratio over multiply-adds kept) for every model and batch."""
    parser = Options("latency")
    parser.add_argument(
        "--models", nargs="+", default=["dit-s", "dit-xl-depth", "uvit", "nothing-gained"], choices=MODELS
    )
    parser.add_argument("--batch", "--batches", dest="batches", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--sides", nargs="+", default=list(_OTHERS), choices=_OTHERS)
    parser.add_argument("--cuda-graph", action="store_true")
    parser.add_device("cpu", "cuda")
    parser.add_loop()
    options = parser.read(args)
    if _FROZEN in options.sides and options.backend != "inductor":
        raise BenchError(f"latency times {_FROZEN!r} with Inductor only; name the --sides without it")
    rows: list[Row] = []
    task = progress.add_task("latency", total=len(options.models) * len(options.batches) * options.rounds)
    for name in options.models:
        for batch in options.batches:
            progress.update(task, description=f"{name}, batch {batch}")
            work = workload(name, options, batch=batch)
            rows += _measure(work, options, lambda: progress.advance(task))
    return rows


def _measure(work: Workload, options: argparse.Namespace, on_round: Callable[[], None]) -> Iterator[Row]:
    torch._dynamo.reset()
    sides = {name: make(work) for name, make in _SIDES.items() if name == OURS or name in options.sides}
    sync, device = synchronizer(options.device), options.device
    recorded = {}
    if options.cuda_graph:
        for name in (each for each in (OURS, UNCACHED) if each in sides):
            sampler = work.ours if name == OURS else work.ours_uncached
            replay, seconds, error = _record(work, sampler, sync)
            where = {**work.conditions, "side": name}
            yield Row("seconds_to_record", seconds, "s", where, device=device)
            yield Row("graph_relative_error", error, "", where, device=device)
            recorded[name] = f"{name}, CUDA graph"
            sides[recorded[name]] = replay
    timings = compare(sides, rounds=options.rounds, warmup=1, sync=sync, on_round=on_round)
    for side, timing in timings.items():
        yield Row.timed("sampling", timing, {**work.conditions, "side": side}, device=device)
    kept = work.ours.summary().multiply_adds_kept
    yield Row("multiply_adds_kept", kept, "", work.conditions, device=device)
    for side in (each for each in _OTHERS if each in sides):
        at: dict[str, Condition] = {**work.conditions, "against": side}
        time_ratio = ratio(timings[OURS], timings[side])
        yield Row.ratio("time_ratio", time_ratio, at, device=device)
        if side in (UNCACHED, COMPILE, _FROZEN) and kept < 1.0:
            yield Row("skip_efficiency", time_ratio.value / kept, "", at, device=device)
    for name, graph in recorded.items():
        gain = ratio(timings[graph], timings[name])
        yield Row.ratio("graph_time_ratio", gain, {**work.conditions, "side": name}, device=device)
    if HOOKS in sides:
        error = relative_error(work.sample(work.ours), work.sample_with_hooks())
        yield Row("relative_error", error, "", work.conditions, device=device)


def _record(work: Workload, sampler: CompiledSampler, sync: Callable[[], None]) -> tuple[Side, float, float]:
    """Return the loop of a sampler as one CUDA graph, not compiled again, the seconds of recording, and its error."""
    program = sampler.capture(work.noise, y=work.labels)
    on_gpu = work.noise.device.type == "cuda"
    recorder: Recorder = CudaRecorder(check_capturable(program.graph)) if on_gpu else _RerunInPlaceOfGraph()
    loop = RecordedLoop(program.run, program.graph, recorder)

    @torch.no_grad()
    def replay() -> object:
        return loop(work.noise, work.labels)[0]

    start = time.perf_counter()
    got = replay()
    sync()
    seconds = time.perf_counter() - start
    assert isinstance(got, torch.Tensor)
    return replay, seconds, relative_error(got, work.sample(sampler))


class _RerunInPlaceOfGraph:
    """Takes the place of a CUDA graph where there is no CUDA: runs the loop again."""

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
