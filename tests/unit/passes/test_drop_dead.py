from __future__ import annotations

import torch
from torch import Tensor

from l2c_compile.passes.drop_dead import DropDead
from tests.tiny import draw, program, run, same_bits, targets


def with_dead_ends(x: Tensor) -> list[Tensor]:
    used = x.sin()
    unused = used.cos()
    unused.tanh()
    return [used + x]


def test_a_chain_that_nobody_uses_goes_as_a_whole_and_the_numbers_stay() -> None:
    graph, x = program(with_dead_ends, draw(3)), draw(3)
    before = run(graph, x)
    assert DropDead().run(graph).rewrites == 2
    assert targets(graph) == ["sin.default", "add.Tensor"]
    assert same_bits(run(graph, x), before)
    assert DropDead().run(graph).rewrites == 0


def test_a_value_with_several_users_stays_until_the_last_is_gone() -> None:
    def function(x: Tensor) -> list[Tensor]:
        shared = x.sin()
        shared.cos()
        return [shared.exp()]

    graph = program(function, draw(3))
    assert DropDead().run(graph).rewrites == 1
    assert targets(graph) == ["sin.default", "exp.default"]


def test_inputs_stay() -> None:
    graph = program(lambda x, y: [x + 1], draw(3), draw(3))
    DropDead().run(graph)
    assert len(graph.graph.find_nodes(op="placeholder")) == 2


def test_an_unused_draw_stays_because_later_draws_depend_on_it() -> None:
    def function(x: Tensor) -> list[Tensor]:
        torch.randn_like(x)
        return [x + torch.randn_like(x)]

    graph = program(function, draw(3))
    report = DropDead().run(graph)
    assert report.rewrites == 0
    assert list(report.reasons()) == ["draws random numbers: later draws depend on it"]
