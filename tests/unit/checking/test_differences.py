"""Where what a graph computes parts from what its loop means, and how that is said."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from l2c_compile.checking.differences import Comparison
from l2c_compile.checking.finding import Finding
from l2c_compile.checking.values import ValueTable
from l2c_compile.graphs.nodes import output_list
from tests.tiny import at
from tests.traced_loops import Traced, traced

aten = torch.ops.aten


def draws(denoiser: object, noise: Tensor) -> Tensor:
    x = noise
    for i in range(3):
        x = x - denoiser(x, at(x, i)) + torch.randn_like(x)  # type: ignore[operator]
    return x


def findings(case: Traced, *, dead_allowed: bool = False) -> list[Finding]:
    # A table counts what is made, so each comparison has one of its own.
    case = replace(case, table=ValueTable(exact=True))
    comparison = Comparison(case.graph, case.expected(), case.found(), case.table, dead_allowed)
    return list(comparison.findings())


def another_operand(case: Traced) -> None:
    node = case.first(aten.tanh.default, 1)
    earlier = case.first(aten.tanh.default, 0)
    node.args = earlier.args


def another_literal(case: Traced) -> None:
    node = case.first(aten.layer_norm.default)
    node.args = (*node.args[:4], 1e-3)


def an_operation_of_nobody(case: Traced) -> None:
    node = case.first(aten.tanh.default, 1)
    node.target = aten.sigmoid.default


def the_same_again(case: Traced) -> None:
    """Compute the argument of a nonlinearity a second time, for it alone."""
    node = case.first(aten.tanh.default, 1)
    (argument,) = node.all_input_nodes
    with case.graph.graph.inserting_before(node):
        node.replace_input_with(argument, case.graph.graph.node_copy(argument))


def work_for_nobody(case: Traced) -> None:
    node = case.first(aten.layer_norm.default)
    with case.graph.graph.inserting_after(node):
        dead = case.graph.graph.call_function(aten.neg.default, (node,))
    dead.meta = dict(node.meta)


def one_draw_less(case: Traced) -> None:
    first, second, *_ = [n for n in case.graph.graph.nodes if "randn" in str(n.target)]
    second.replace_all_uses_with(first)
    case.graph.graph.erase_node(second)


def one_result_more(case: Traced) -> None:
    output = case.graph.graph.output_node()
    output.args = (output_list(case.graph.graph) * 2,)


def a_wrong_note(case: Traced) -> None:
    case.first(aten.tanh.default, 1).meta["sites"] = [(0, "a", 0)]


@pytest.mark.parametrize(
    ("change", "check", "message"),
    [
        (another_operand, "values", "where the loop has"),
        (another_literal, "values", "0.001.* where the loop has .*1e-05"),
        (an_operation_of_nobody, "values", "computes sigmoid.*which the loop does not do there"),
        (one_result_more, "values", "returns 2 results, the loop 1"),
        (the_same_again, "work", "computes .* again"),
        (work_for_nobody, "work", "for nobody"),
        (one_draw_less, "draws", "draws 2 random tensors, the loop 3"),
        (a_wrong_note, "sites", "is noted as site 'a' of evaluation 0, and is not"),
    ],
)
def test_a_wrong_graph_is_found(change: Callable[[Traced], None], check: str, message: str) -> None:
    case = traced(loop=draws)
    assert findings(case) == []
    change(case)
    found = [finding for finding in findings(case) if finding.check == check]
    assert found
    assert re.search(message, found[0].message), found[0].message


def test_work_for_nobody_may_be_allowed() -> None:
    case = traced()
    work_for_nobody(case)
    assert {finding.check for finding in findings(case)} == {"work"}
    assert any("for nobody" in finding.message for finding in findings(case))
    assert not any("for nobody" in finding.message for finding in findings(case, dead_allowed=True))


def test_the_first_node_that_is_wrong_is_named() -> None:
    case = traced()
    another_literal(case)
    first, *_ = findings(case)
    assert (first.node, first.evaluation) == (case.first(aten.layer_norm.default).name, 0)
