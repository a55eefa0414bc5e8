"""Time DiT-XL/2 from a module and a loop to one static graph, stage by stage, at 50 and at 250 evaluations.

    python -m bench trace-time [--router FILE] [--evaluations 50 250] [--weights meta|random] [--rounds N]

Batch 1 with batched guidance, DDIM, the published DDIM-50 router, all passes. For more evaluations the rows of the
router are repeated: 250 are five times its 50, which keeps the share of what is reused.
"""

from __future__ import annotations

import argparse
import dataclasses
import gc
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import torch
from rich.progress import Progress
from torch import nn

from bench.cases import BenchError
from bench.measure import Timing, ratio
from bench.options import Options
from bench.report import Condition, Row
from bench.workloads import routers_folder
from l2c_compile import compile as compile_module
from l2c_compile.frontend.capture import capture
from l2c_compile.graphs.forms import CallSignature
from l2c_compile.graphs.loop_graph import EvaluationGraph
from l2c_compile.loops import DDIM, Guidance
from l2c_compile.models import DiT
from l2c_compile.passes.base import PassRun
from l2c_compile.passes.pipeline import LOOP
from l2c_compile.schedules.importers import load_schedule_file
from l2c_compile.schedules.router import Router
from l2c_compile.schedules.schedule import CacheSchedule
from l2c_compile.schedules.sites import Site

MODEL = "DiT-XL/2"


@dataclass(frozen=True)
class Build:
    """The times of one build."""

    stages_s: Mapping[str, float]
    """The times of capture, trace, simplify, unroll and passes, in ``build_loop_graph``, and then of graph module."""
    passes: tuple[PassRun, ...]
    cpu_s: float
    """Processor time of ``build_loop_graph``, which other work on the machine hardly changes."""

    @property
    def total_s(self) -> float:
        """The time of ``build_loop_graph``."""
        return sum(seconds for stage, seconds in self.stages_s.items() if stage != "graph module")


def run(args: Sequence[str], progress: Progress) -> list[Row]:
    """Build once for each number of evaluations, or as often as ``--rounds`` says, in turn."""
    options = _options(args)
    router = _read_router(options.router)
    schedules = {number: repeated(router, number).schedule() for number in options.evaluations}
    model = _model(options.weights)
    task = progress.add_task("build", total=options.rounds * len(schedules))
    builds: dict[int, list[Build]] = {number: [] for number in schedules}
    for round_index in range(options.rounds):
        first = round_index % len(schedules)
        numbers = list(schedules)
        for number in numbers[first:] + numbers[:first]:

            def say(stage: str, number: int = number) -> None:
                progress.update(task, description=f"{number} evaluations: {stage}")

            builds[number].append(build(model, schedules[number], say))
            progress.advance(task)

    rows = []
    shared: dict[str, Condition] = {"model": MODEL, "weights": options.weights, "router": options.router.stem}
    for number, done in builds.items():
        rows += _rows(done, number, {**shared, "evaluations": number, "repeats": number // router.num_evaluations})
    if {50, 250} <= builds.keys():
        growth = ratio(_timing(builds[250], "total"), _timing(builds[50], "total"))
        rows.append(
            Row("growth_250_over_50", growth.value, "x", shared, *_spread(growth.p20, growth.p80, options.rounds))
        )
    return rows


def build(model: nn.Module, schedule: CacheSchedule, say: Callable[[str], None] = lambda stage: None) -> Build:
    """Build the static graph of one DDIM loop with the guidance of DiT and time its stages.

    Args:
        model: a DiT for 1000 classes, on any device.
        schedule: the schedule, whose number of evaluations is the number of steps.
        say: a function that is told each stage before it begins.
    """
    loop = DDIM(steps=schedule.num_evaluations, guidance=Guidance(1.5, null={"y": 1000}, channels=3))
    device = next(model.parameters()).device
    noise = torch.empty(1, 4, 32, 32, device=device).zero_()
    labels = torch.zeros(1, dtype=torch.int64, device=device)
    schedule = schedule.resolve([path for path, _ in model.named_modules()])
    begun: list[tuple[str, float]] = []
    captured_s = 0.0

    def on_stage(what: str) -> None:
        say(what)
        begun.append((what.split()[0], time.perf_counter()))

    def timed_capture(
        denoiser: nn.Module, signature: CallSignature, sites: Sequence[Site], read_inputs_of: Collection[Site]
    ) -> EvaluationGraph:
        nonlocal captured_s
        start_s = time.perf_counter()
        evaluation = capture(denoiser, signature, sites, read_inputs_of)
        captured_s += time.perf_counter() - start_s
        return evaluation

    gc.collect()
    # Capture happens while the loop is traced and tells only when it begins.
    cpu_start_s = time.process_time()
    with mock.patch.object(compile_module, "capture", timed_capture):
        graph, passes = compile_module.build_loop_graph(model, loop, schedule, noise, {"y": labels}, LOOP, on_stage)
    built_s, cpu_s = time.perf_counter(), time.process_time() - cpu_start_s
    say("graph module")
    graph.module()
    module_s = time.perf_counter() - built_s

    # The first of each: there are many passes.
    starts = dict(reversed(begun))
    stages_s = {
        "capture": captured_s,
        "trace": starts["simplify"] - starts["trace"] - captured_s,
        "simplify": starts["unroll"] - starts["simplify"],
        "unroll": starts["pass"] - starts["unroll"],
        "passes": built_s - starts["pass"],
        "graph module": module_s,
    }
    return Build(stages_s, tuple(passes), cpu_s)


def repeated(router: Router, num_evaluations: int) -> Router:
    """Return the router with its rows repeated until there are ``num_evaluations``.

    Raises:
        BenchError: if that is no multiple of the number of its rows.
    """
    times, rest = divmod(num_evaluations, router.num_evaluations)
    if rest or times < 1:
        raise BenchError(
            f"--evaluations wants multiples of the router's {router.num_evaluations}, got {num_evaluations}"
        )
    cacheable = tuple(e + copy * router.num_evaluations for copy in range(times) for e in router.cacheable)
    return dataclasses.replace(router, scores=router.scores.repeat(times, 1), cacheable=cacheable, loop=None)


def _options(args: Sequence[str]) -> argparse.Namespace:
    parser = Options("trace-time")
    parser.add_argument("--router", type=Path, default=routers_folder() / "l2c_DDIM50_router.pt")
    parser.add_argument("--evaluations", type=int, nargs="+", default=[50, 250])
    parser.add_argument("--weights", choices=["meta", "random"], default="meta")
    parser.add_argument("--rounds", type=int, default=1)
    options = parser.read(args)
    if options.rounds < 1:
        raise BenchError(f"--rounds wants at least 1, got {options.rounds}")
    return options


def _read_router(path: Path) -> Router:
    if not path.is_file():
        raise BenchError(
            "trace-time wants the DiT-XL/2 router for 50 DDIM steps that Learning-to-Cache published, but there is no"
            f" {path}; name it with --router FILE"
        )
    router = load_schedule_file(path)
    if not isinstance(router, Router):
        raise BenchError(f"trace-time wants a router, but {path.name} is a schedule")
    return router


def _model(weights: str) -> DiT:
    with torch.device("meta" if weights == "meta" else "cpu"):
        return DiT.from_preset(MODEL).eval()


def _rows(builds: Sequence[Build], number: int, conditions: Mapping[str, Condition]) -> list[Row]:
    rows = [_seconds(f"seconds_{number}", _timing(builds, "total"), conditions)]
    rows.append(_seconds(f"cpu_seconds_{number}", Timing(tuple(1e3 * each.cpu_s for each in builds)), conditions))
    rows += [
        _seconds("stage_seconds", _timing(builds, stage), {"evaluations": number, "stage": stage})
        for stage in builds[0].stages_s
    ]
    passes = builds[0].passes
    rows.append(Row("nodes", passes[0].nodes_before, "", {"evaluations": number, "after": "unroll"}))
    for position, each in enumerate(passes, start=1):
        where: dict[str, Condition] = {"evaluations": number, "after": f"pass {position}, {each.name}"}
        rows.append(Row("nodes", each.nodes_after, "", where))
    return rows


def _timing(builds: Sequence[Build], stage: str) -> Timing:
    return Timing(tuple(1e3 * (each.total_s if stage == "total" else each.stages_s[stage]) for each in builds))


def _seconds(metric: str, timing: Timing, conditions: Mapping[str, Condition]) -> Row:
    spread = _spread(timing.p20_ms / 1e3, timing.p80_ms / 1e3, len(timing.samples_ms))
    return Row(metric, timing.median_ms / 1e3, "s", conditions, *spread)


def _spread(p20: float, p80: float, rounds: int) -> tuple[float, float] | tuple[None, None]:
    """Return the spread, or nothing if there was one round."""
    return (p20, p80) if rounds > 1 else (None, None)
