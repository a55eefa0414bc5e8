"""The backend "l2c" of ``torch.compile``, which applies a schedule to a user's own sampling function.

It is called as ``torch.compile(sample, backend="l2c", options={"router": router})``.

Dynamo unrolls the function, ``dynamo_graph`` finds the evaluations and sites in its graph, the passes run on it, and an
inner backend runs the result. Nothing falls back silently: a function that the schedule does not fit is an error, which
Dynamo reports as a ``BackendCompilerFailed`` around ours.

Dynamo's graph shows what modules compute, not what they return. A module that returns one of its inputs beside what it
computes (``return h, context``) has that part reused by ``l2c_compile``, but not here: what uses it gets the value of
the current evaluation.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import fx, nn

from l2c_compile.backends.lower import lower_to_backend
from l2c_compile.backends.options import INDUCTOR, Options
from l2c_compile.errors import L2CError, ScheduleError, nearest
from l2c_compile.frontend.dynamo import loop_graph_of
from l2c_compile.schedules.importers import load_schedule_file
from l2c_compile.schedules.router import schedule_of
from l2c_compile.schedules.schedule import CacheSchedule

_OPTIONS = ("router", "threshold", "backend", "denoiser", "numerics", "without", "caches")


def l2c(
    gm: fx.GraphModule,
    example_inputs: Sequence[object],
    *,
    options: Mapping[str, Any] | None = None,
) -> Callable[..., Sequence[object]]:
    """Compile a sampling function with its cache schedule, as a backend for ``torch.compile``.

    Args:
        gm: the graph that Dynamo made of the function.
        example_inputs: the inputs of the graph. Each combination of shapes is compiled by itself.
        options: the ``options`` that ``torch.compile`` was given.
            ``router`` (required): a ``Router``, a ``CacheSchedule``, or the path of a file that holds one.
            ``threshold``: the score above which a site is computed; only for a router.
            ``backend``: what runs the graph; "inductor" unless given.
            ``denoiser``: the module whose calls are the evaluations, or its name in the function; needed only where
            several modules have the sites of the schedule.
            ``numerics``: "bitwise" or "rounding", as in ``l2c_compile``.
            ``without``: names of passes to leave out.
            ``caches``: "int8" or "fp8", as in ``l2c_compile``.

    Raises:
        L2CError: if an option is missing or makes no sense, or the schedule does not fit the function.
    """
    given = dict(options or {})
    for name in given:
        if name not in _OPTIONS:
            hint = nearest(name, _OPTIONS) or f"there are {', '.join(_OPTIONS)}"
            raise L2CError(f"backend 'l2c' has no option '{name}'; {hint}")
    schedule = _schedule(given.get("router"), given.get("threshold"))
    chosen = Options(
        given.get("backend", INDUCTOR), given.get("numerics"), given.get("without", ()), given.get("caches")
    )
    denoiser: nn.Module | str | None = given.get("denoiser")

    loop = loop_graph_of(gm, example_inputs, schedule, denoiser)
    # The folding and compiling done here is no part of Dynamo's own tracing.
    with torch._guards.tracing(None), torch.inference_mode(False):
        chosen.passes.run(loop.graph)
        run = lower_to_backend(loop.graph, chosen)
    positions = loop.positions

    @torch.no_grad()
    def sample(*inputs: object) -> Sequence[object]:
        return run(*(inputs[position] for position in positions))

    return sample


def _schedule(router: object, threshold: float | None) -> CacheSchedule:
    if router is None:
        raise ScheduleError(
            "backend 'l2c' needs a router: torch.compile(sample, backend='l2c', options={'router': router})"
        )
    if isinstance(router, (str, os.PathLike)):
        router = load_schedule_file(router)
    return schedule_of(router, threshold)
