"""Compare the predicted time ratio of a schedule with the measured one, on the digits model, in eager mode.

Three schedules of DDIM evaluations: every second evaluation reuses all sites, two of three reuse all MLPs, one
evaluation reuses one site (no gain). Options: ``--rounds N`` (default 5), ``--batch N`` (default 4),
``--steps N`` (default 20).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from rich.progress import Progress

from bench.measure import compare, ratio
from bench.options import Options
from bench.report import Condition, Row
from l2c_compile import CacheSchedule, l2c_compile
from l2c_compile.loops import DDIM, Guidance
from l2c_compile.models import load_digits_dit


def run(args: Sequence[str], progress: Progress) -> list[Row]:
    """Return predicted and measured time ratio and the error of the one against the other, in percent."""
    parser = Options("predict")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--steps", type=int, default=20)
    options = parser.read(args)
    model = load_digits_dit()
    paths = [path for path, _ in model.named_modules()]
    loop = DDIM(steps=options.steps, guidance=Guidance(scale=2.0, null={"y": 10}))
    noise = torch.randn(options.batch, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    y = torch.arange(options.batch) % 10
    schedules = {name: schedule.resolve(paths) for name, schedule in _schedules(options.steps).items()}
    task = progress.add_task("predict", total=len(schedules) * (options.rounds + 1))
    rows: list[Row] = []
    for name, schedule in schedules.items():
        cached = l2c_compile(model, schedule, loop)
        uncached = l2c_compile(model, CacheSchedule.all_compute(options.steps, schedule.sites), loop)
        prediction = cached.predict(noise, y=y)
        progress.advance(task)
        timings = compare(
            {"cached": lambda c=cached: c(noise, y=y), "uncached": lambda u=uncached: u(noise, y=y)},  # type: ignore[misc]
            rounds=options.rounds,
            warmup=2,
            on_round=lambda: progress.advance(task),
        )
        measured = ratio(timings["cached"], timings["uncached"])
        assert prediction.time_ratio is not None
        where: dict[str, Condition] = {"schedule": name, "batch": options.batch, "threads": torch.get_num_threads()}
        rows.append(Row("predicted_time_ratio", prediction.time_ratio, "x", where))
        rows.append(Row.ratio("measured_time_ratio", measured, where))
        error = 100 * abs(prediction.time_ratio / measured.value - 1)
        rows.append(Row("error_percent", error, "%", where))
        rows.append(Row("multiply_adds_kept", prediction.multiply_adds_kept, "", where))
        rows.append(Row("warned", int(prediction.warning is not None), "", where))
    return rows


def _schedules(steps: int) -> dict[str, CacheSchedule]:
    every_second = [1 - e % 2 for e in range(steps)]
    two_of_three = [int(e % 3 == 0) for e in range(steps)]
    once = [int(e != steps // 2) for e in range(steps)]
    return {
        "every second, all": CacheSchedule.from_table({"blocks.*.attn": every_second, "blocks.*.mlp": every_second}),
        "two of three, mlp": CacheSchedule.from_table({"blocks.*.mlp": two_of_three}),
        "one site once": CacheSchedule.from_table({"blocks.0.attn": once}),
    }
