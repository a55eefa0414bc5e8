"""Time whole sampling loops: ours against plain torch.compile, hooks and the eager loop, in turn in one process.

Options: ``--models dit-s dit-xl-depth uvit nothing-gained`` ``--batches 1 8`` ``--rounds N`` (default 3)
``--device cpu`` ``--steps 20`` ``--sides SIDE ...``: beside ours time only these. Weights are random. The published
routers are used as they are at depth 28; for DiT-S (depth 12) block i takes the scores of block
floor((i + 0.5) * 28 / 12). "nothing-gained" reuses nothing. "freezing" is Inductor's own way of arranging weights once;
who knows of it gets it without us. "weights not packed" shows what is left on a CPU without our faster linear layers.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence

import torch
from rich.progress import Progress

from bench.cases import BenchError
from bench.measure import Timing, compare, ratio, synchronizer
from bench.report import Row
from bench.workloads import Workload, dit_workload, uvit_workload
from l2c_compile import CacheSchedule, l2c_compile, run_reference

__all__ = ["run"]

_OURS, _OURS_UNCACHED = "compiled cached", "compiled uncached"
_UNPACKED = "compiled cached, weights not packed"
_COMPILE, _FROZEN = "torch.compile in the eager loop", "torch.compile with freezing in the eager loop"
_HOOKS, _EAGER = "eager cached by hooks", "eager uncached"
_OTHERS = (_UNPACKED, _OURS_UNCACHED, _COMPILE, _FROZEN, _HOOKS, _EAGER)
_MODELS = ("dit-s", "dit-xl-depth", "uvit", "nothing-gained")


def run(args: Sequence[str], progress: Progress) -> list[Row]:
    """Return medians, ratios and skip efficiencies (time ratio over multiply-adds kept) for every model and batch."""
    parser = argparse.ArgumentParser(prog="python -m bench latency")
    parser.add_argument("--models", nargs="+", default=list(_MODELS), choices=_MODELS)
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=20, choices=(20, 50))
    parser.add_argument("--width", type=int, default=384, help="of the model of XL's depth")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--sides", nargs="+", default=list(_OTHERS), choices=_OTHERS)
    options = parser.parse_args(list(args))
    if options.device == "cuda" and not torch.cuda.is_available():
        raise BenchError("there is no CUDA device; use --device cpu")
    rows: list[Row] = []
    task = progress.add_task("latency", total=len(options.models) * len(options.batches) * options.rounds)
    for name in options.models:
        for batch in options.batches:
            progress.update(task, description=f"{name}, batch {batch}")
            workload = _workload(name, batch, options)
            rows += _measure(name, workload, options, lambda: progress.advance(task))
    return rows


def _workload(name: str, batch: int, options: argparse.Namespace) -> Workload:
    if name == "uvit":
        return uvit_workload(width=192, evaluations=options.steps, batch=batch, device=options.device)
    if name == "dit-xl-depth":
        return dit_workload(width=options.width, depth=28, steps=options.steps, batch=batch, device=options.device)
    return dit_workload(width=384, depth=12, steps=options.steps, batch=batch, device=options.device)


def _measure(name: str, work: Workload, options: argparse.Namespace, on_round: Callable[[], None]) -> list[Row]:
    schedule: CacheSchedule = work.uncached if name == "nothing-gained" else work.schedule
    ours = l2c_compile(work.model, schedule, work.loop, backend="inductor")
    unpacked = l2c_compile(work.model, schedule, work.loop, backend="inductor", without=["pack-weights"])
    uncached = l2c_compile(work.model, work.uncached, work.loop, backend="inductor")
    ours.capture(work.noise, y=work.labels)
    kept = ours.summary().multiply_adds_kept
    torch._dynamo.reset()
    compiled = torch.compile(work.model, fullgraph=True, dynamic=False)
    frozen = torch.compile(work.model, fullgraph=True, dynamic=False, options={"freezing": True})

    def plain(denoiser: Callable[..., object]) -> Callable[[], object]:
        return torch.no_grad()(lambda: work.loop(denoiser, work.noise, y=work.labels))  # type: ignore[arg-type]

    sides: dict[str, Callable[[], object]] = {
        _OURS: lambda: ours(work.noise, y=work.labels),
        _UNPACKED: lambda: unpacked(work.noise, y=work.labels),
        _OURS_UNCACHED: lambda: uncached(work.noise, y=work.labels),
        _COMPILE: plain(compiled),
        _FROZEN: plain(frozen),
        _HOOKS: lambda: run_reference(work.model, work.loop, schedule, work.noise, {"y": work.labels}),
        _EAGER: plain(work.model),
    }
    timings = compare(
        {name: side for name, side in sides.items() if name == _OURS or name in options.sides},
        rounds=options.rounds,
        warmup=1,
        sync=synchronizer(options.device),
        on_round=on_round,
    )
    return _rows(name, work, timings, kept, options)


def _rows(name: str, work: Workload, timings: dict[str, Timing], kept: float, options: argparse.Namespace) -> list[Row]:
    batch, device = len(work.noise), options.device
    where = {"case": name, "model": work.name, "batch": batch, "steps": options.steps, "dtype": "float32"}
    if device == "cpu":
        where["threads"] = torch.get_num_threads()
    rows = [Row.timed("sampling", timing, {**where, "side": side}, device=device) for side, timing in timings.items()]
    rows.append(Row("multiply_adds_kept", kept, "", where, device=device))
    for side in options.sides:
        at = {**where, "against": side}
        time_ratio = ratio(timings[_OURS], timings[side])
        rows.append(Row.ratio("time_ratio", time_ratio, at, device=device))
        if side in (_OURS_UNCACHED, _COMPILE, _FROZEN) and kept < 1.0:
            rows.append(Row("skip_efficiency", time_ratio.value / kept, "", at, device=device))
    return rows
