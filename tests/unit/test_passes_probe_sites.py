"""Probing: what the sites hold is returned beside the outputs."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten

from l2c_compile.capture import CallSignature, TensorSpec, capture
from l2c_compile.graph import EvaluationGraph, output_list
from l2c_compile.passes.base import Pipeline
from l2c_compile.passes.drop_dead import DropDead
from l2c_compile.passes.probe_sites import ProbeSites, probed_marks
from l2c_compile.sites import Site
from l2c_compile.verify import Fact
from tests.tiny import at, draw, residual, run

PROBE = Pipeline((ProbeSites(),), assumes=frozenset({Fact.SITES_MARKED}))


def captured(model: nn.Module, *sites: str) -> EvaluationGraph:
    leaves, spec = tree_flatten(((draw(2, 4), at(draw(2, 4), 3)), {}))
    return capture(model, CallSignature(spec, tuple(map(TensorSpec.of, leaves))), tuple(map(Site.parse, sites)))


class Twice(nn.Module):
    """Uses what one module returns several times, returns a pair from another."""

    def __init__(self) -> None:
        super().__init__()
        self.pair = Pair()
        self.a = nn.Linear(4, 4)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        f = self.a(x)
        g, h = self.pair(f)
        result: Tensor = f * g + f * h + t[:, None]
        return result


class Pair(nn.Module):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return x.sin(), x.cos()


def test_outputs_and_change_are_returned_with_the_numbers_that_hooks_see() -> None:
    model, x = residual(), draw(2, 4)
    graph = captured(model, "a", "delta(b)")
    (report,) = PROBE.run(graph)
    assert report.report.rewrites == 2
    assert [mark.site for mark in probed_marks(graph)] == ["a", "delta(b)"]
    seen: dict[str, tuple[Tensor, Tensor]] = {}
    for name, module in (("a", model.a), ("b", model.b)):
        module.register_forward_hook(lambda _, args, out, name=name: seen.update({name: (args[0], out)}))
    with torch.no_grad():
        wanted = model(x, at(x, 3))
    got, a, change = run(graph, x, at(x, 3))
    assert torch.equal(got, wanted)
    assert torch.equal(a, seen["a"][1])
    assert torch.equal(change, seen["b"][1] - seen["b"][0])


def test_values_with_several_users_and_several_ports_are_returned_once() -> None:
    model, x = Twice().eval(), draw(2, 4)
    graph = captured(model, "a", "pair")
    PROBE.run(graph)
    got, *values = run(graph, x, at(x, 3))
    with torch.no_grad():
        f = model.a(x)
        assert torch.equal(got, model(x, at(x, 3)))
    assert [(mark.site, mark.port) for mark in probed_marks(graph)] == [("a", 0), ("pair", 0), ("pair", 1)]
    assert all(map(torch.equal, values, (f, f.sin(), f.cos())))


def test_without_sites_nothing_is_returned() -> None:
    graph = captured(residual())
    (report,) = PROBE.run(graph)
    assert report.report.rewrites == 0
    assert len(output_list(graph.graph)) == 1


def test_inputs_of_sites_are_not_returned_and_nothing_dies() -> None:
    graph = captured(residual(), "delta(a)")
    before = len(graph.graph.nodes)
    PROBE.run(graph)
    assert len(output_list(graph.graph)) == 2
    # One subtraction more; what is returned is in use.
    (report,) = Pipeline((DropDead(),), assumes=frozenset({Fact.SITES_MARKED})).run(graph)
    assert len(graph.graph.nodes) + report.report.rewrites == before + 1
