"""The body of ``l2c eval``, and the judge that it shares with ``python -m bench quality``.

Shapes: N samples, D features.
"""

from __future__ import annotations

import json
import math
import os

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

from l2c_compile.files.documents import write_atomically
from l2c_compile.models.named import DIGITS, named_model
from l2c_compile.quality.judge import Judge, Verdict
from l2c_compile.quality.measures import Estimate
from l2c_compile.schedules.importers import load_schedule_file
from l2c_compile.schedules.router import schedule_of

__all__ = ["evaluate_file"]

_HEADINGS = {
    "psnr_db": "PSNR, dB",
    "ssim": "SSIM",
    "relative_l1": "relative L1",
    "relative_l2": "relative L2",
    "frechet": "Frechet distance",
    "precision": "precision",
    "recall": "recall",
}


def evaluate_file(
    path: str | os.PathLike[str],
    console: Console,
    *,
    model: str = DIGITS,
    steps: int | None = None,
    threshold: float | None = None,
    num_samples: int = 2000,
    batch: int = 20,
    seed: int = 0,
    json_path: str | os.PathLike[str] | None = None,
) -> None:
    """Print what a schedule or router does to the samples of a model.

    Args:
        path: A file that ``load_schedule_file`` reads.
        console: Where to print; progress goes to stderr.
        model: "digits".
        steps: Sampler steps; None takes the loop in the file, or as many as the file is for.
        threshold: For routers, in place of the usual one.
        num_samples: Samples with and without caching.
        batch: Samples a call.
        seed: Of the noise.
        json_path: If given, also write the numbers there.

    Raises:
        L2CError: The file cannot be read, there is no such model, they do not fit together, or there are too few
            samples.
        OSError: A file cannot be read or written.
    """
    schedule = schedule_of(load_schedule_file(path, threshold=threshold))
    known = named_model(model, with_weights=True)
    loop = known.loop_of(schedule, steps)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("sample without caching", total=2 * math.ceil(num_samples / min(batch, num_samples)))
        judge = Judge(
            known,
            loop,
            num_samples=num_samples,
            batch=batch,
            seed=seed,
            on_batch=lambda: progress.advance(task),
        )
        progress.update(task, description="sample with caching")
        verdict = judge.judge(schedule, loop)
    where = f"{known.name}, {loop.name}, {loop.num_evaluations} evaluations, {num_samples} samples, seed {seed}"
    console.print(Text(where), soft_wrap=True)
    console.print(_table(verdict, judge.reference_as_asked))
    if json_path is not None:
        document = {
            "model": known.name,
            "loop": loop.to_dict(),
            "schedule": schedule.digest,
            "seed": seed,
            "multiply_adds_kept": verdict.multiply_adds_kept,
            "quality": verdict.quality.to_dict(),
            "as_asked": vars(verdict.as_asked),
            "as_asked_uncached": vars(judge.reference_as_asked),
        }
        write_atomically(json_path, (json.dumps(document, indent=2, allow_nan=False) + "\n").encode())
        console.print(Text(f"numbers written to {os.fspath(json_path)}"), soft_wrap=True)


def _table(verdict: Verdict, uncached_as_asked: Estimate) -> Table:
    table = Table(title="against the uncached model on equal noise", title_justify="left")
    for heading in ("measure", "value", "95% interval"):
        table.add_column(heading, justify="left" if heading == "measure" else "right", no_wrap=True)
    table.add_row("multiply-adds kept", f"{verdict.multiply_adds_kept:.1%}", "")
    for name, estimate in verdict.quality.estimates():
        if estimate is not None:
            table.add_row(_HEADINGS[name], *_numbers(estimate))
    table.add_row("drawn as asked", *_numbers(verdict.as_asked))
    table.add_row("  without caching", *_numbers(uncached_as_asked))
    return table


def _numbers(estimate: Estimate) -> tuple[str, str]:
    return f"{estimate.value:.4g}", f"{estimate.low:.4g} .. {estimate.high:.4g}"
