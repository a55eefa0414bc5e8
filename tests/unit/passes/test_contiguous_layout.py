from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from l2c_compile import CacheSchedule
from l2c_compile.graphs.facts import Fact, check
from l2c_compile.graphs.loop_graph import LoopGraph
from l2c_compile.passes.base import PassReport
from l2c_compile.passes.contiguous_layout import ContiguousLayout
from l2c_compile.passes.pipeline import BITWISE
from tests.tiny import assert_strides_as_noted, draw, run, seeded, unrolled


class Embed(nn.Module):
    """Tokens from an image as every vision transformer makes them: the channels end up far apart."""

    def __init__(self, back: Callable[[Tensor], Tensor] = lambda x: x) -> None:
        super().__init__()
        self.proj = nn.Conv2d(4, 6, kernel_size=2, stride=2)
        self.norm = nn.LayerNorm(6)
        self.mlp = nn.Linear(6, 6)
        self.back = back

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        tokens = self.proj(x).flatten(2).transpose(1, 2) + t[:, None, None]
        return self.back(tokens + self.mlp(self.norm(tokens)))


def once(denoiser: Callable[..., Tensor], noise: Tensor) -> Tensor:
    return denoiser(noise, noise[:, 0, 0, 0])


def compiled(model: nn.Module) -> tuple[LoopGraph, LoopGraph, PassReport]:
    flat = unrolled(seeded(model), CacheSchedule.from_table({"mlp": [1]}), once, draw(2, 4, 4, 4))
    BITWISE.run(flat)
    graph = flat.copy()
    report = ContiguousLayout().run(graph)
    check(graph, ())
    return flat, graph, report


def permuted(graph: LoopGraph, name: str) -> list[bool]:
    values = [n.meta["val"] for n in graph.graph.nodes if name in str(n.target)]
    return [not value.is_contiguous() for value in values]


def test_the_residual_stream_lies_in_memory_order() -> None:
    flat, graph, report = compiled(Embed())
    assert all(permuted(flat, "add.Tensor"))
    assert not any(permuted(graph, "add.Tensor"))
    assert report.rewrites == 1  # the embedded tokens; the sum follows
    assert_strides_as_noted(graph, draw(2, 4, 4, 4))
    torch.testing.assert_close(run(graph, draw(2, 4, 4, 4))[0], run(flat, draw(2, 4, 4, 4))[0])


def test_a_value_that_is_returned_twice_is_restored_once() -> None:
    def twice(denoiser: Callable[..., Tensor], noise: Tensor) -> tuple[Tensor, Tensor]:
        tokens = denoiser(noise, noise[:, 0, 0, 0])
        return tokens, tokens

    flat = unrolled(seeded(Embed()), CacheSchedule.from_table({"mlp": [1]}), twice, draw(2, 4, 4, 4))
    BITWISE.run(flat)
    graph = flat.copy()
    ContiguousLayout().run(graph)
    check(graph, {Fact.NO_DEAD_NODES})
    first, second = run(graph, draw(2, 4, 4, 4))
    assert first.stride() == second.stride() == run(flat, draw(2, 4, 4, 4))[0].stride()


def test_what_the_loop_returns_keeps_its_strides() -> None:
    flat, graph, _ = compiled(Embed())
    (before,), (after,) = run(flat, draw(2, 4, 4, 4)), run(graph, draw(2, 4, 4, 4))
    assert not before.is_contiguous()
    assert after.stride() == before.stride()


def test_a_view_that_the_new_strides_do_not_allow_becomes_a_reshape() -> None:
    flat, graph, _ = compiled(Embed(lambda x: x.transpose(1, 2).view(2, 24)))
    assert any("view" in str(n.target) for n in flat.graph.nodes)
    assert_strides_as_noted(graph, draw(2, 4, 4, 4))
    torch.testing.assert_close(run(graph, draw(2, 4, 4, 4))[0], run(flat, draw(2, 4, 4, 4))[0])


def test_channels_last_convolutions_are_left_alone() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Conv2d(4, 4, 1)

        def forward(self, x: Tensor, t: Tensor) -> Tensor:
            result: Tensor = self.first(x) + 1
            return result

    model = seeded(Net())
    model.first.weight.data = model.first.weight.data.to(memory_format=torch.channels_last)
    noise = draw(2, 4, 4, 4).to(memory_format=torch.channels_last)
    flat = unrolled(model, CacheSchedule.from_table({"first": [1]}), once, noise)
    BITWISE.run(flat)
    nodes = len(flat.graph.nodes)
    assert ContiguousLayout().run(flat).rewrites == 0
    assert len(flat.graph.nodes) == nodes


def test_a_graph_that_addresses_memory_by_strides_is_left_alone() -> None:
    _, graph, report = compiled(Embed(lambda x: x.as_strided((2, 3), (1, 2))))
    assert report.rewrites == 0
    assert "strides" in next(iter(report.reasons()))
    assert all(permuted(graph, "add.Tensor"))
