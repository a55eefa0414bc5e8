"""What is wrong with a graph by itself: its form, notes, constants and memory plan."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from l2c_compile.analyses.memory_plan import plan_memory
from l2c_compile.checking.finding import Finding
from l2c_compile.checking.notes import NodeForms, constant_findings, form_findings, memory_findings
from l2c_compile.graphs.facts import Fact
from l2c_compile.passes.base import Pipeline
from l2c_compile.passes.pipeline import LOOP
from tests.traced_loops import Traced, traced

aten = torch.ops.aten


def form_of(case: Traced) -> list[Finding]:
    return list(form_findings(case.graph, list(case.graph.graph.nodes), [Fact.NO_DEAD_NODES]))


def test_a_right_graph_has_nothing_wrong_with_it() -> None:
    case = traced()
    forms = NodeForms(case.graph)
    assert form_of(case) == []
    assert list(constant_findings(case.graph)) == []
    assert list(forms.findings()) == []
    assert list(memory_findings(forms, plan_memory(case.graph))) == []


def test_nodes_that_wait_for_each_other_are_found() -> None:
    case = traced()
    node = case.first(aten.tanh.default, 1)
    user = next(iter(node.users))
    node.args = (user,)
    (finding,) = form_of(case)
    assert "wait for each other" in finding.message


def test_an_argument_outside_the_graph_is_found() -> None:
    case, other = traced(), traced()
    case.first(aten.tanh.default, 1).args = (other.first(aten.tanh.default, 1),)
    (finding,) = form_of(case)
    assert "is no node of the graph" in finding.message


def test_a_constant_that_is_not_what_its_recipe_gives_is_found() -> None:
    case = traced()
    (folded,) = case.graph.folded
    case.graph.root.get_buffer(folded.names[0]).add_(1)
    (finding,) = constant_findings(case.graph)
    assert folded.names[0] in finding.message
    assert "refresh()" in finding.message


@pytest.mark.parametrize(
    ("note", "message"),
    [
        ({"val": torch.empty(3, 5)}, "its note says"),
        ({"val": torch.empty(4, 3).t()}, "its note says"),
        ({"val": torch.empty(3, 4, dtype=torch.float64)}, "its note says"),
        ({"val": None}, "its note says"),
        ({"evaluation": 0}, "reads a value of evaluation 1, which comes later"),
    ],
)
def test_a_note_that_is_not_true_is_found(note: dict[str, object], message: str) -> None:
    case = traced()
    node = case.first(aten.tanh.default, 1)
    node.meta.update(note)
    (finding,) = NodeForms(case.graph).findings()
    assert (finding.check, finding.node) == ("notes", node.name)
    assert message in finding.message


def test_a_stride_of_a_dimension_of_one_says_nothing() -> None:
    case = traced(passes=Pipeline((), LOOP.assumes))
    forms = NodeForms(case.graph)
    node = next(n for n, form in forms.forms.items() if n.op == "get_attr" and getattr(form, "shape", ()) == (4, 1))
    node.meta["val"] = torch.empty_strided((4, 1), (1, 99))
    assert list(forms.findings()) == []


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"end": 1}, "is freed at 1 and read by"),
        ({"end": 10**6}, "is kept until 1000000"),
        ({"begin": 0}, "and the plan begins at 0"),
        ({"num_bytes": 1}, "does not fit into its slot"),
        ({"name": "nothing"}, "that the graph does not have"),
    ],
)
def test_a_plan_that_is_not_what_the_graph_needs_is_found(change: dict[str, object], message: str) -> None:
    case = traced()
    plan = plan_memory(case.graph)
    first, *others = plan.kept
    wrong = replace(plan, kept=(replace(first, **change), *others))  # type: ignore[arg-type]
    found = list(memory_findings(NodeForms(case.graph), wrong))
    assert any(message in finding.message for finding in found), found


def test_two_values_in_one_buffer_at_once_are_found() -> None:
    case = traced({"a": [1, 0, 1], "b": [1, 0, 1]})
    plan = plan_memory(case.graph)
    first = plan.kept[0]
    doubled = replace(plan, kept=(*plan.kept, replace(first, name="other")))
    found = list(memory_findings(NodeForms(case.graph), doubled))
    assert any("are alive together in slot" in finding.message for finding in found)


def test_a_value_that_is_read_later_must_be_kept() -> None:
    case = traced()
    plan = plan_memory(case.graph)
    found = list(memory_findings(NodeForms(case.graph), replace(plan, kept=())))
    assert any("the plan does not keep it" in finding.message for finding in found)
