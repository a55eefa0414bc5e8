"""Compile whole loops with Inductor, and one flat evaluation with torch.compile; compare the times.

Options: ``--model dit-xl-depth`` (or ``dit-xl``, which is DiT-XL/2) ``--width N`` ``--batch 1`` ``--steps 20 50``
``--device cpu`` ``--dtype float32`` ``--schedule published`` (or ``every-second``) ``--backend inductor``. Batched
guidance on 256 tokens. Both sides start from an empty Inductor cache. Ours is timed from the model to a loop that is
ready to run: capture, passes, every region compiled. The other side is the first call of the compiled denoiser, less
the fastest of three more.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

import torch
from rich.progress import Progress
from torch._inductor.utils import fresh_cache

from bench.measure import synchronizer
from bench.options import Options
from bench.report import Row
from bench.workloads import MODELS, Workload, workload
from l2c_compile.backends.regions import num_regions


def run(args: Sequence[str], progress: Progress) -> list[Row]:
    """Return the times, their ratios, the number of regions, and the nodes before and after every pass."""
    parser = Options("compile-time")
    parser.add_argument("--model", default="dit-xl-depth", choices=[name for name in MODELS if name != "uvit"])
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--steps", type=int, nargs="+", default=[20, 50])
    parser.add_device("cpu", "cuda")
    parser.add_loop()
    options = parser.read(args)
    task = progress.add_task("compile", total=len(options.steps) + 1)

    def work_of(steps: int) -> Workload:
        return workload(options.model, options, steps=steps)

    _warm_up(options.device, options.backend)
    one = _seconds_to_compile(_one_evaluation(work_of(options.steps[0])), synchronizer(options.device))
    progress.advance(task)
    where = {name: value for name, value in work_of(options.steps[0]).conditions.items() if name != "steps"}
    rows = [Row("seconds_one_evaluation", one, "s", where, device=options.device)]
    loops: dict[int, float] = {}
    for steps in options.steps:
        work = work_of(steps)
        sampler = work.sampler(work.schedule)
        with fresh_cache():
            start = time.perf_counter()
            program = sampler.capture(work.noise, y=work.labels)
            loops[steps] = time.perf_counter() - start
        rows.append(Row("seconds_loop", loops[steps], "s", work.conditions, device=options.device))
        rows.append(Row("loop_over_one_evaluation", loops[steps] / one, "", work.conditions, device=options.device))
        rows.append(Row("regions", num_regions(program.run), "", work.conditions, device=options.device))
        for number, done in enumerate(program.passes):
            at = {**work.conditions, "pass": f"{number:02} {done.name}", "before": done.nodes_before}
            rows.append(Row("nodes", done.nodes_after, "", at, device=options.device))
        progress.advance(task)
    if len(loops) > 1:
        first, last = min(loops), max(loops)
        at = {**where, "steps": f"{first} to {last}"}
        rows.append(Row("growth", loops[last] / loops[first], "", at, device=options.device))
    return rows


def _one_evaluation(work: Workload) -> Callable[[], object]:
    compiled = torch.compile(work.model, fullgraph=True, backend=work.backend)
    doubled = torch.cat([work.noise, work.noise])
    labels = torch.cat([work.labels, torch.full_like(work.labels, 1000)])
    times = torch.full((len(doubled),), 500, device=doubled.device)
    return lambda: compiled(doubled, times, labels)


def _seconds_to_compile(call: Callable[[], object], sync: Callable[[], None]) -> float:
    """Return the seconds of the first call less those of the fastest of three more, from an empty cache."""
    torch._dynamo.reset()
    seconds = []
    with fresh_cache(), torch.no_grad():
        for _ in range(4):
            start = time.perf_counter()
            call()
            sync()
            seconds.append(time.perf_counter() - start)
    return seconds[0] - min(seconds[1:])


def _warm_up(device: str, backend: str) -> None:
    """Make torch start its compiler workers and build its headers, which it does once a process."""
    with fresh_cache(), torch.no_grad():
        torch.compile(lambda x: torch.relu(x) + 1, backend=backend)(torch.zeros(64, device=device))
