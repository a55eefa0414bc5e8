"""Count the cache bytes of the published routers at their true sizes, or measure the peak of a loop on a GPU.

For each of the four routers: the peak and the mean over evaluations of what is kept for later evaluations, as a share
of "keep every layer's output" (every attn and mlp output of the last evaluation of each branch, all the time, as caches
in hooks do). ``plan`` says whose bytes: ``schedule`` (what is read later, from its source to its last reader),
``bitwise`` (the graph without passes that round elsewhere), ``rounding`` (the graph with them), ``fp8`` and ``int8``
(the latter with packed caches: a byte an element and four a token). The models are on the meta device; batch 1; DiT
with batched guidance, U-ViT with guidance in two calls. Nothing runs. ``ARGS``: names of routers, all four by default.

``--device cuda`` samples instead: the peak that torch measures in eager mode, which frees a tensor after its last use,
beside the cache bytes that the plan counts. Options: ``--model dit-xl`` ``--steps 20`` ``--batch 1``
``--dtype float32`` ``--schedule published`` (or ``every-second``) ``--sides uncached cached fp8 int8 hooks``.
``--device cpu`` tries the script: torch measures memory on a GPU only.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from functools import partial

import torch
from rich.progress import Progress
from torch import nn

from bench.cases import BenchError
from bench.options import Options
from bench.report import Condition, Row
from bench.workloads import MODELS, published_router, workload
from l2c_compile.analyses.memory_plan import (
    CacheLiveness,
    cache_liveness,
    keep_everything_bytes,
    plan_memory,
    site_bytes,
)
from l2c_compile.compile import build_loop_graph
from l2c_compile.errors import nearest
from l2c_compile.graphs.loop_graph import LoopGraph
from l2c_compile.loops import DDIM, STABLE_DIFFUSION_BETAS, BuiltInLoop, DPMSolver, Guidance
from l2c_compile.models import DiT, UViT
from l2c_compile.passes.pipeline import BITWISE, CACHE_FORMATS, LOOP, with_packed_caches

_ROUTERS = ("l2c_DDIM20_router", "l2c_DDIM50_router", "l2c_dpm20_router", "l2c_dpm50_router")
_PLANS = {
    "bitwise": BITWISE,
    "rounding": LOOP,
    **{cache_format: with_packed_caches(LOOP, cache_format) for cache_format in CACHE_FORMATS},
}

SIDES = ("uncached", "cached", *CACHE_FORMATS, "hooks")


def run(args: Sequence[str], progress: Progress) -> list[Row]:
    """Return shares of keeping everything, and bytes, for every router and plan; or what was measured.

    Raises:
        BenchError: if there is no such router, or its file is missing.
    """
    parser = Options("memory")
    parser.add_argument("routers", nargs="*", metavar="ROUTER")
    parser.add_argument("--model", default="dit-xl", choices=MODELS)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--sides", nargs="+", default=list(SIDES), choices=SIDES)
    parser.add_device("meta", "cpu", "cuda")
    parser.add_loop()
    options = parser.read(args)
    if options.device != "meta":
        return _measured(options, progress)
    for name in options.routers:
        if name not in _ROUTERS:
            raise BenchError(f"memory knows no router {name!r}; {nearest(name, _ROUTERS) or ', '.join(_ROUTERS)}")
    names = options.routers or _ROUTERS
    task = progress.add_task("memory", total=len(names) * len(_PLANS))
    rows: list[Row] = []
    for name in names:
        for plan, passes in _PLANS.items():
            progress.update(task, description=f"{name}, {plan}")
            model, loop = _setting(name)
            schedule = published_router(name + (".pth" if "dpm" in name else ".pt")).schedule()
            schedule = schedule.resolve([path for path, _ in model.named_modules()])
            noise = torch.empty(1, 4, 32, 32, device="meta")
            labels = torch.empty(1, dtype=torch.int64, device="meta")
            graph, _ = build_loop_graph(model, loop, schedule, noise, {"y": labels}, passes)
            if plan == "bitwise":
                rows += _rows(name, "schedule", graph, cache_liveness(graph.schedule, site_bytes(graph)))
            planned = plan_memory(graph)
            rows += _rows(name, plan, graph, planned.cache)
            rows.append(Row("buffers", len(planned.slot_bytes), "", {"router": name, "plan": plan}, device="meta"))
            progress.advance(task)
    return rows


def _measured(options: argparse.Namespace, progress: Progress) -> list[Row]:
    work = workload(options.model, options)
    task = progress.add_task("memory", total=len(options.sides))
    rows: list[Row] = []
    for side in options.sides:
        where: dict[str, Condition] = {**work.conditions, "side": side}
        sample = work.sample_with_hooks
        if side != "hooks":
            caches = side if side in CACHE_FORMATS else None
            schedule = work.uncached if side == "uncached" else work.schedule
            sampler = work.sampler(schedule, backend="eager", numerics="rounding", caches=caches)
            sampler.capture(work.noise, y=work.labels)
            planned = sampler.summary().cache.peak_bytes / 2**20
            rows.append(Row("planned_cache_peak_MiB", planned, "MiB", where, device=options.device))
            sample = partial(work.sample, sampler)
        sample()
        if options.device == "cuda":
            rows.append(Row("measured_peak_MiB", _peak_bytes(sample) / 2**20, "MiB", where, device=options.device))
        else:
            what = f"peak of {side}: torch measures memory on a GPU only"
            rows.append(Row("skipped", 1, "", {"what": what}, device=options.device))
        progress.advance(task)
    return rows


def _peak_bytes(sample: Callable[[], object]) -> int:
    """Return the most memory that a call takes, beyond what was taken before it."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    sample()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def _setting(name: str) -> tuple[nn.Module, BuiltInLoop]:
    count = 20 if "20" in name else 50
    with torch.device("meta"):
        if "DDIM" in name:
            guidance = Guidance(scale=1.5, null={"y": 1000}, channels=3)
            return DiT.from_preset("DiT-XL/2").eval(), DDIM(steps=count, guidance=guidance)
        guidance = Guidance(scale=0.4, null={"y": 1000}, batched=False, base="cond")
        loop = DPMSolver(evaluations=count, betas=STABLE_DIFFUSION_BETAS, first_timestep=1, guidance=guidance)
        return UViT.from_preset("U-ViT-H/2").eval(), loop


def _rows(name: str, plan: str, graph: LoopGraph, cache: CacheLiveness) -> list[Row]:
    everything = keep_everything_bytes(graph)
    where: dict[str, Condition] = {"router": name, "plan": plan, "dtype": "float32", "batch": 1}
    return [
        Row("peak_share", cache.peak_bytes / everything, "", where, device="meta"),
        Row("mean_share", cache.mean_bytes / everything, "", where, device="meta"),
        Row("peak_MiB", cache.peak_bytes / 2**20, "MiB", where, device="meta"),
        Row("mean_MiB", cache.mean_bytes / 2**20, "MiB", where, device="meta"),
    ]
