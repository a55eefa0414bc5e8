"""Draw digits with packed caches and with plain ones, from equal noise, and say how far apart they are.

The trained digits model, DDIM with guidance, the demo's schedule (odd evaluations reuse every attn and mlp output).
``plan`` says what is kept: every output (``bitwise``), or one sum for a run of skipped sublayers (``rounding``; its
peak is where the sum is made, before it is packed). Options: ``--per-class N`` samples of each digit (default 20),
``--evaluations N`` (default 20).

``relative_l2`` is ||packed - plain|| / ||plain|| over all samples, ``pixel_error`` the mean of |packed - plain| on the
scale from -1 to 1, ``pixel_error_max`` the largest. ``schedule_pixel_error`` is what the schedule itself changes, plain
against uncached, to compare with. ``drawn_as_asked`` is judged by the classifier of the package, of ``samples``.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence

import torch
from rich.progress import Progress
from torch import Tensor

from bench.options import Options
from bench.report import Condition, Row
from l2c_compile import CacheSchedule, CompiledSampler, l2c_compile
from l2c_compile.loops import DDIM, Guidance
from l2c_compile.methods import uniform_interval
from l2c_compile.models.digits import GUIDANCE_SCALE, load_digit_classifier, load_digits_dit

_FORMATS = ("fp8", "int8")
_PLANS = ("bitwise", "rounding")
_CLASSES = torch.arange(10)


def run(args: Sequence[str], progress: Progress) -> list[Row]:
    """Return errors, counts and bytes for both formats and plans."""
    parser = Options("packed-caches")
    parser.add_argument("--per-class", type=int, default=20)
    parser.add_argument("--evaluations", type=int, default=20)
    options = parser.read(args)
    num_sides = 1 + len(_PLANS) * (1 + len(_FORMATS))
    task = progress.add_task("packed caches", total=num_sides * options.per_class)

    def draw(sampler: CompiledSampler) -> Tensor:
        return _draw(sampler, options.per_class, lambda: progress.advance(task))

    model = load_digits_dit()
    loop = DDIM(steps=options.evaluations, guidance=Guidance(GUIDANCE_SCALE, null={"y": len(_CLASSES)}))
    schedule = uniform_interval(options.evaluations, ("blocks.*.attn", "blocks.*.mlp"), 2)
    nothing_reused = CacheSchedule.all_compute(options.evaluations, ("blocks.0.attn",))
    uncached = draw(l2c_compile(model, nothing_reused, loop))
    rows = [_drawn(uncached, _conditions(options, "uncached", "none"))]
    for plan in _PLANS:
        plain = l2c_compile(model, schedule, loop, numerics=plan)  # type: ignore[arg-type]
        wanted = draw(plain)
        where = _conditions(options, plan, "none")
        rows += [_drawn(wanted, where), *_kept(plain, where)]
        rows.append(Row("schedule_pixel_error", float((wanted - uncached).abs().mean()), "", where))
        for cache_format in _FORMATS:
            sampler = l2c_compile(model, schedule, loop, numerics=plan, caches=cache_format)  # type: ignore[arg-type]
            got, where = draw(sampler), _conditions(options, plan, cache_format)
            error = (got - wanted).abs()
            rows += [
                Row("relative_l2", float((got - wanted).norm() / wanted.norm()), "", where),
                Row("pixel_error", float(error.mean()), "", where),
                Row("pixel_error_max", float(error.max()), "", where),
                _drawn(got, where),
                *_kept(sampler, where),
            ]
    return rows


def _conditions(options: argparse.Namespace, plan: str, cache_format: str) -> dict[str, Condition]:
    samples = options.per_class * len(_CLASSES)
    where = {"model": "digits", "evaluations": options.evaluations, "samples": samples}
    return {**where, "plan": plan, "caches": cache_format}


def _draw(sampler: CompiledSampler, per_class: int, on_run: Callable[[], None]) -> Tensor:
    """Return samples of each digit, ten a run; equal noise for equal runs."""
    images = []
    for run_index in range(per_class):
        noise = torch.randn(len(_CLASSES), 1, 8, 8, generator=torch.Generator().manual_seed(run_index))
        result = sampler(noise, y=_CLASSES)
        assert isinstance(result, Tensor)
        images.append(result)
        on_run()
    return torch.cat(images)


@torch.no_grad()
def _drawn(images: Tensor, where: dict[str, Condition]) -> Row:
    found = load_digit_classifier()(images).argmax(dim=1)
    asked = _CLASSES.repeat(len(images) // len(_CLASSES))
    return Row("drawn_as_asked", int((found == asked).sum()), "", where)


def _kept(sampler: CompiledSampler, where: dict[str, Condition]) -> list[Row]:
    cache = sampler.summary().cache
    sizes = {"peak_KiB": cache.peak_bytes, "mean_KiB": cache.mean_bytes}
    return [Row(metric, size / 2**10, "KiB", where) for metric, size in sizes.items()]
