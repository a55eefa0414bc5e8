"""Loop graphs of one small denoiser before any pass, and the samplers of a schedule of its two sites."""

from __future__ import annotations

from typing import Any

from torch import nn

from l2c_compile import CacheSchedule, CompiledSampler, l2c_compile
from l2c_compile.graphs.loop_graph import LoopGraph
from l2c_compile.passes.base import Pass
from tests.tiny import draw, residual, steps, unrolled

MODEL = residual()

TABLE = {"a": [1, 0, 1], "b": [1, 1, 0]}


def graph_of(table: dict[str, list[int]], loop: Any = None, **conditions: object) -> LoopGraph:  # noqa: ANN401
    schedule = CacheSchedule.from_table(table)
    return unrolled(MODEL, schedule, loop or steps(schedule.num_evaluations), draw(3, 4), conditions)


def run_all(graph: LoopGraph, *passes: Pass) -> None:
    for each in passes:
        each.run(graph)


def sampler_of(model: nn.Module, table: Any = TABLE, loop: Any = None, **options: Any) -> CompiledSampler:  # noqa: ANN401
    schedule = CacheSchedule.from_table(table)
    return l2c_compile(model, schedule, loop or steps(schedule.num_evaluations), **options)
