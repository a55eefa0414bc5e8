from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from l2c_compile.passes.drop_dead import DropDead
from l2c_compile.passes.drop_no_ops import DropNoOps
from tests.tiny import draw, program, run, same_bits, targets

aten = torch.ops.aten


def copies(x: Tensor) -> list[Tensor]:
    y = aten.clone(x)
    y = aten.view(y, [3, 4])
    y = aten.expand(y, [3, 4])
    y = aten.slice(y, 0, 0, 3)
    return [aten.sin(y), aten.cos(y)]


def test_copies_and_views_of_the_same_are_seen_through_by_all_users_and_the_numbers_stay() -> None:
    graph, x = program(copies, draw(3, 4)), draw(3, 4)
    before = run(graph, x)
    assert DropNoOps().run(graph).rewrites == 4
    DropDead().run(graph)
    assert targets(graph) == ["sin.default", "cos.default"]
    assert same_bits(run(graph, x), before)
    assert DropNoOps().run(graph).rewrites == 0


@pytest.mark.parametrize(
    ("function", "reason"),
    [
        (lambda x: aten.sin(aten.view(x, [4, 3])), "changes shape, dtype or device"),
        (lambda x: aten.sin(aten._to_copy(x, dtype=torch.float64)), "changes shape, dtype or device"),
        (lambda x: aten.sin(aten.slice(x, 0, 1, 2)), "changes shape, dtype or device"),
        (lambda x: aten.sin(aten.clone(aten.t(x), memory_format=torch.contiguous_format)), "changes the memory layout"),
        (lambda x: aten.sin(aten.transpose(aten.slice(x, 1, 0, 3), 0, 1)), "changes the memory layout"),
        (lambda x: aten.clone(x), "keeps the result from sharing memory with an input or a weight"),
    ],
)
def test_what_changes_something_is_left_alone_for_a_reason(function: Callable[[Tensor], Tensor], reason: str) -> None:
    graph, x = program(lambda x: [function(x)], draw(3, 4)), draw(3, 4)
    before = run(graph, x)
    report = DropNoOps().run(graph)
    assert reason in report.reasons()
    DropDead().run(graph)
    assert same_bits(run(graph, x), before)


def test_an_exchange_of_dimensions_stays_where_another_value_may_take_its_place() -> None:
    """Over both of them the value repeats, so strides do not tell; what a rule makes of it need not repeat."""

    def function(x: Tensor) -> list[Tensor]:
        return [aten.sin(aten.transpose(aten.expand(x, [3, 3]), 0, 1))]

    report = DropNoOps().run(program(function, draw(1, 1)))
    assert (report.rewrites, {each.name for each in report.left_alone.values()}) == (0, {"expand", "transpose"})
    assert any("only look alike because the value repeats" in reason for reason in report.reasons())


def test_a_view_that_starts_elsewhere_is_left_alone() -> None:
    def function(x: Tensor) -> list[Tensor]:
        first, second = aten.slice(x, 0, 0, 1), aten.slice(x, 0, 1, 2)
        return [aten.sin(aten.slice(first, 0, 0, 1)), aten.cos(second)]

    graph, x = program(function, draw(2, 4)), draw(2, 4)
    before = run(graph, x)
    assert DropNoOps().run(graph).rewrites == 1
    assert same_bits(run(graph, x), before)


def test_a_returned_copy_of_an_input_may_go_inside_a_loop() -> None:
    graph = program(lambda x: [aten.clone(x)], draw(3))
    assert DropNoOps(keep_returned=False).run(graph).rewrites == 1


def test_dropout_outside_training_is_a_copy_and_inside_it_is_not() -> None:
    def dropouts(x: Tensor) -> list[Tensor]:
        return [aten.sin(aten.dropout(x, 0.5, False))]

    graph = program(dropouts, draw(3))
    DropNoOps().run(graph)
    DropDead().run(graph)
    assert targets(graph) == ["sin.default"]
