"""``l2c eval``: what a schedule file does to the samples of a known model."""

from __future__ import annotations

import math
from typing import Annotated

import typer
from rich.table import Table

from l2c_compile.cli.files import load_case, output_path, write_report
from l2c_compile.cli.options import Batch, Digits, Force, Json, ScheduleFile, Seed, StepsOfFile, Threshold
from l2c_compile.cli.terminal import bar, say, show
from l2c_compile.models.named import DIGITS
from l2c_compile.quality.judge import Judge, Verdict
from l2c_compile.quality.measures import Estimate

_HEADINGS = {
    "psnr_db": "PSNR, dB",
    "ssim": "SSIM",
    "relative_l1": "relative L1",
    "relative_l2": "relative L2",
    "frechet": "Frechet distance",
    "precision": "precision",
    "recall": "recall",
}


def command(
    file: ScheduleFile,
    model: Digits = DIGITS,
    samples: Annotated[int, typer.Option(metavar="N", min=1, help="Samples with and without caching.")] = 2000,
    batch: Batch = 20,
    steps: StepsOfFile = None,
    threshold: Threshold = None,
    seed: Seed = 0,
    json: Json = None,
    force: Force = False,
) -> None:
    """Measure what a schedule costs in quality, against the uncached model on equal noise."""
    json = json and output_path(json, ".json", force=force, reads=file)
    case = load_case(file, model, steps, threshold, with_weights=True)
    with bar("sample without caching", 2 * math.ceil(samples / min(batch, samples))) as update:
        judge = Judge(
            case.model,
            case.loop,
            num_samples=samples,
            batch=batch,
            seed=seed,
            on_batch=lambda: update(advance=1),
        )
        update(description="sample with caching")
        verdict = judge.judge(case.schedule, case.loop)
    say(f"{case}, {samples} samples, seed {seed}")
    show(_table(verdict, judge.reference_as_asked))
    if json is not None:
        document = {
            "model": case.model.name,
            "loop": case.loop.to_dict(),
            "schedule": case.schedule.digest,
            "seed": seed,
            "multiply_adds_kept": verdict.multiply_adds_kept,
            "quality": verdict.quality.to_dict(),
            "as_asked": vars(verdict.as_asked),
            "as_asked_uncached": vars(judge.reference_as_asked),
        }
        write_report(json, "numbers", document)


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
