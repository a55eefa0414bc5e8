"""Each distinct region is compiled once, and the loop calls it wherever it occurs."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch._inductor.async_compile import AsyncCompile

from l2c_compile import CacheSchedule
from l2c_compile.backends import regions
from l2c_compile.backends.cuda_graphs import RecordedLoop
from l2c_compile.backends.regions import compile_regions, num_regions
from l2c_compile.graphs.loop_graph import LoopGraph
from l2c_compile.passes.pipeline import BITWISE
from l2c_compile.progress import silent
from tests.tiny import draw, residual, same_bits, steps, unrolled


def graph_of(table: dict[str, list[int]]) -> LoopGraph:
    graph = unrolled(residual(), CacheSchedule.from_table(table), steps(3), draw(2, 4))
    BITWISE.run(graph)
    return graph


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch) -> list[fx.GraphModule]:
    """Let regions run as they are in place of Inductor; return those that would have been compiled."""
    bodies: list[fx.GraphModule] = []

    def keep(body: fx.GraphModule, example_inputs: list[Tensor]) -> fx.GraphModule:
        placeholders = body.graph.find_nodes(op="placeholder")
        for node, example in zip(placeholders, example_inputs, strict=True):
            assert example.stride() == node.meta["val"].stride()
            assert not example.any()
        bodies.append(body)
        return body

    monkeypatch.setattr(torch._inductor, "compile", keep)
    return bodies


def test_evaluations_that_are_alike_share_one_region(compiled: list[fx.GraphModule]) -> None:
    graph, said = graph_of({"a": [1, 1, 1], "b": [1, 1, 1]}), list[str]()
    with torch.no_grad():
        wanted = graph.copy().module()(draw(2, 4))
        lowered = compile_regions(graph, said.append)
        assert same_bits(lowered(draw(2, 4)), wanted)
    calls = [node for node in lowered.graph.nodes if node.op == "call_module"]
    assert num_regions(lowered) == len(compiled) == len(said) == len({node.target for node in calls})
    assert num_regions(lowered) < len(calls)
    assert said[-1] == f"compile region {len(compiled)} of {len(compiled)}"
    assert not lowered.graph.find_nodes(op="call_function", target=torch.ops.higher_order.invoke_subgraph)


def test_regions_are_counted_through_a_recording(compiled: list[fx.GraphModule]) -> None:
    lowered = compile_regions(graph_of({"a": [1, 1, 1]}), silent)
    recorded = RecordedLoop.__new__(RecordedLoop)
    recorded.run = lowered
    assert num_regions(recorded) == num_regions(lowered) > 0
    assert num_regions(nn.Linear(1, 1)) == num_regions(lambda: None) == 0


def test_kernels_are_awaited_together_by_the_thread_that_compiles_and_at_once_by_others() -> None:
    waited: list[str] = []

    @contextmanager
    def recorded() -> Iterator[None]:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(AsyncCompile, "wait", lambda self, scope: waited.append(scope["name"]))
            yield

    def wait(name: str) -> None:
        AsyncCompile().wait({"name": name})

    with recorded():
        with regions._kernels_compiled_together(True):
            wait("first")
            thread = threading.Thread(target=wait, args=("of another thread",))
            thread.start()
            thread.join()
            assert waited == ["of another thread"]
        assert waited == ["of another thread", "first"]
        with regions._kernels_compiled_together(False):
            wait("on a device")
            assert waited[-1] == "on a device"


def test_what_is_awaited_is_forgotten_if_compiling_fails() -> None:
    wait: Any = AsyncCompile.wait
    with pytest.raises(RuntimeError, match="no"), regions._kernels_compiled_together(True):
        raise RuntimeError("no")
    assert AsyncCompile.wait is wait
