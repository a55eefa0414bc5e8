"""Compile whole loops with Inductor, and one flat evaluation with torch.compile; compare the times.

Options: ``--width N`` (default 384), ``--steps 20 50``. DiT of XL's depth 28 on 256 tokens, batch 1 with batched
guidance, published routers. Both sides start from an empty Inductor cache. Ours is timed from the model to a loop that
is ready to run: capture, passes, every region compiled. The other side is the first call of the compiled denoiser, less
the fastest of three more.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence

import torch
from rich.progress import Progress
from torch._inductor.utils import fresh_cache

from bench.report import Row
from bench.workloads import Workload, dit_workload
from l2c_compile import l2c_compile
from l2c_compile.backends.regions import num_regions

__all__ = ["run"]

_DEPTH = 28


def run(args: Sequence[str], progress: Progress) -> list[Row]:
    """Return the times, their ratios, the number of regions, and the nodes before and after every pass."""
    parser = argparse.ArgumentParser(prog="python -m bench compile-time")
    parser.add_argument("--width", type=int, default=384)
    parser.add_argument("--steps", type=int, nargs="+", default=[20, 50])
    options = parser.parse_args(list(args))
    task = progress.add_task("compile", total=len(options.steps) + 1)
    _warm_up()

    threads = torch.get_num_threads()
    where = {"depth": _DEPTH, "width": options.width, "batch": 1, "threads": threads}
    workload = dit_workload(width=options.width, depth=_DEPTH, steps=options.steps[0], batch=1)
    one = _seconds_to_compile(_one_evaluation(workload))
    progress.advance(task)
    rows = [Row("seconds_one_evaluation", one, "s", where)]
    loops: dict[int, float] = {}
    for steps in options.steps:
        workload = dit_workload(width=options.width, depth=_DEPTH, steps=steps, batch=1)
        conditions = {**where, "steps": steps}
        sampler = l2c_compile(workload.model, workload.schedule, workload.loop, backend="inductor")
        with fresh_cache():
            start = time.perf_counter()
            program = sampler.capture(workload.noise, y=workload.labels)
            loops[steps] = time.perf_counter() - start
        rows.append(Row("seconds_loop", loops[steps], "s", conditions))
        rows.append(Row("loop_over_one_evaluation", loops[steps] / one, "", conditions))
        rows.append(Row("regions", num_regions(program.run), "", conditions))
        for number, done in enumerate(program.passes):
            at = {**conditions, "pass": f"{number:02} {done.name}"}
            rows.append(Row("nodes", done.nodes_after, "", {**at, "before": done.nodes_before}))
        progress.advance(task)
    if len(loops) > 1:
        first, last = min(loops), max(loops)
        rows.append(Row("growth", loops[last] / loops[first], "", {**where, "steps": f"{first} to {last}"}))
    return rows


def _one_evaluation(workload: Workload) -> Callable[[], object]:
    compiled = torch.compile(workload.model, fullgraph=True)
    doubled = torch.cat([workload.noise, workload.noise])
    labels = torch.cat([workload.labels, torch.full_like(workload.labels, 1000)])
    times = torch.full((len(doubled),), 500)
    return lambda: compiled(doubled, times, labels)


def _seconds_to_compile(call: Callable[[], object]) -> float:
    """Return the seconds of the first call less those of the fastest of three more, from an empty cache."""
    torch._dynamo.reset()
    seconds = []
    with fresh_cache(), torch.no_grad():
        for _ in range(4):
            start = time.perf_counter()
            call()
            seconds.append(time.perf_counter() - start)
    return seconds[0] - min(seconds[1:])


def _warm_up() -> None:
    """Start what torch starts once a process: its compiler workers, its headers."""
    with fresh_cache(), torch.no_grad():
        torch.compile(lambda x: torch.relu(x) + 1)(torch.zeros(64))
