"""Learn routers for the digits model: Learning-to-Cache and rollout at several budgets.

    python -m bench.digits.learn --out runs/routers

It writes a file for each router, named ``<method>-<evaluations>-<budget in percent>.safetensors``. A second call with
the same folder leaves finished routers alone and continues with the one that was interrupted. Seeds are fixed: on one
machine, with one number of threads, two runs agree bit for bit. The files in ``bench/routers`` were made so.

Shapes: B batch.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor

from l2c_compile import Router
from l2c_compile.finders.training import RoundReport
from l2c_compile.loops import DDIM, Guidance
from l2c_compile.methods import L2CSettings, RolloutSettings, learn_l2c, learn_rollout
from l2c_compile.models.digits import GUIDANCE_SCALE, load_digits_dit

SITES = ("blocks.*.attn", "blocks.*.mlp")
_NUM_CLASSES = 10


@dataclass(frozen=True)
class Job:
    """The settings of a router to learn."""

    method: str
    """The method of learning, "l2c" or "rollout"."""
    evaluations: int
    budget: float
    """The share of the multiply-adds that may be left."""
    rounds: int
    batch_size: int = 4
    seed: int = 0

    @property
    def name(self) -> str:
        """The name of the router and of its file."""
        return f"{self.method}-{self.evaluations}-{round(100 * self.budget)}"


PLAN: tuple[Job, ...] = (
    *(Job("l2c", 20, budget, rounds=80) for budget in (0.7, 0.6, 0.8, 0.55, 0.9)),
    *(Job("l2c", 50, budget, rounds=60) for budget in (0.7, 0.55)),
    *(Job("rollout", 20, budget, rounds=70) for budget in (0.7, 0.55, 0.4)),
    Job("rollout", 50, 0.55, rounds=50),
)
"""The routers to learn, the most wanted first. Alternating pairs cannot leave less than half of the multiply-adds."""


def draw_digits(count: int, generator: torch.Generator) -> tuple[Tensor, dict[str, object]]:
    """Return noise, shape (B, 1, 8, 8), and labels 0..9, shape (B,)."""
    noise = torch.randn(count, 1, 8, 8, generator=generator)
    return noise, {"y": torch.randint(0, _NUM_CLASSES, (count,), generator=generator)}


def learn(job: Job, out: Path, on_round: Callable[[RoundReport], None] | None = None) -> Path:
    """Learn one router and return its file.

    Args:
        job: the router to learn.
        out: the folder for the router and, until it is finished, its checkpoint.
        on_round: a function that is given a report after every round.
    """
    out.mkdir(parents=True, exist_ok=True)
    path, checkpoint = out / f"{job.name}.safetensors", out / f"{job.name}.checkpoint"
    if path.exists():
        return path
    model = load_digits_dit()
    loop = DDIM(steps=job.evaluations, guidance=Guidance(GUIDANCE_SCALE, null={"y": _NUM_CLASSES}))
    shared = {"rounds": job.rounds, "batch_size": job.batch_size, "seed": job.seed, "checkpoint_every": 5}
    start_s = time.perf_counter()
    router: Router
    if job.method == "l2c":
        l2c = L2CSettings(budget=job.budget, **shared)  # type: ignore[arg-type]
        router = learn_l2c(model, loop, draw_digits, SITES, l2c, checkpoint=checkpoint, on_round=on_round)
    else:
        rollout = RolloutSettings(budget=job.budget, weigh_every=10, **shared)  # type: ignore[arg-type]
        router = learn_rollout(model, loop, draw_digits, SITES, rollout, checkpoint=checkpoint, on_round=on_round)
    command = f"python -m bench.digits.learn --out DIR --only {job.name}"
    seconds = round(time.perf_counter() - start_s, 1)
    replace(router, info={**router.info, "command": command, "seconds": seconds}).save(path)
    checkpoint.unlink()
    return path


def main() -> None:
    """Read the command line and learn the routers."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder for the routers")
    parser.add_argument("--only", nargs="*", metavar="NAME", help="learn these routers, such as l2c-20-70")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads")
    arguments = parser.parse_args()
    known = {job.name: job for job in PLAN}
    unknown = [name for name in arguments.only or () if name not in known]
    if unknown:
        parser.error(f"there is no router {unknown[0]!r}; there are {', '.join(known)}")
    torch.set_num_threads(arguments.threads)
    jobs = [known[name] for name in arguments.only or known]
    for job, path in _learn_all(jobs, arguments.out):
        print(f"{job.name}: {path}, {Router.load(path).info}", flush=True)


def _learn_all(jobs: list[Job], out: Path) -> Iterator[tuple[Job, Path]]:
    columns = (TextColumn("{task.description}"), BarColumn(), TimeRemainingColumn())
    for job in jobs:
        with Progress(*columns, refresh_per_second=0.2) as progress:
            bar = progress.add_task(job.name, total=job.rounds)

            def show(report: RoundReport) -> None:
                what = f"{job.name}: distance {report.distance:.4f}, {report.kept:.1%} kept"  # noqa: B023
                progress.update(bar, completed=report.round, description=what)  # noqa: B023

            path = learn(job, out, show)
        yield job, path


if __name__ == "__main__":
    main()
