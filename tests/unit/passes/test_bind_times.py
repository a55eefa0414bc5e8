"""Binding times."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from l2c_compile import CacheSchedule
from l2c_compile.graphs.loop_graph import Binding, LoopGraph
from l2c_compile.passes.bind_times import BindTimes
from tests.tiny import (
    at,
    draw,
    residual,
    steps,
    unrolled,
)

MODEL = residual()


def graph_of(table: dict[str, list[int]], loop: Any = None, **conditions: object) -> LoopGraph:  # noqa: ANN401
    schedule = CacheSchedule.from_table(table)
    return unrolled(MODEL, schedule, loop or steps(schedule.num_evaluations), draw(3, 4), conditions)


def test_binding_times_follow_what_the_loop_feeds() -> None:
    def loop(denoiser: Any, x: Tensor, y: Tensor) -> Any:  # noqa: ANN401
        for i in range(2):
            x = x - denoiser(x, at(x, i), y)
        return x

    graph = graph_of({"a": [1, 1]}, loop, y=draw(3, 4))
    form = graph.forms[0]
    bindings = {n.name: n.meta["binding"] for n in form.graph.nodes if n.op == "placeholder"}
    assert list(bindings.values()) == [Binding.LATENT, Binding.CONSTANT, Binding.CONDITION]
    by_target = {str(n.target): n.meta["binding"] for n in form.graph.nodes if n.op == "call_function"}
    assert by_target["aten.sin.default"] is Binding.CONSTANT
    assert by_target["aten.layer_norm.default"] is Binding.LATENT
    assert BindTimes().run(form).rewrites == 0


def test_a_timestep_with_a_condition_is_a_step() -> None:
    def loop(denoiser: Any, x: Tensor, y: Tensor) -> Any:  # noqa: ANN401
        for i in range(2):
            x = x - denoiser(x, at(x, i) * y)
        return x

    graph = graph_of({"a": [1, 1]}, loop, y=draw(3))
    by_target = {str(n.target): n.meta["binding"] for n in graph.forms[0].graph.nodes if n.op == "call_function"}
    assert by_target["aten.sin.default"] in (Binding.STEP, Binding.CONDITION)
