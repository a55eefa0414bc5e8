"""What waits for a later evaluation, on a graph made by hand."""

from __future__ import annotations

import pytest
import torch
from torch import fx
from torch.fx.node import Node

from l2c_compile.analyses.kept import (
    cache_work,
    is_kept,
    is_light,
    kept_runs,
    later_readers,
    made_of_kept_values,
)
from l2c_compile.graphs.nodes import emit
from tests.tiny import draw

aten = torch.ops.aten


@pytest.fixture
def nodes() -> dict[str, Node]:
    """Return a graph in which evaluation 0 makes f and a sum, and evaluation 1 adds both to its own x."""
    graph = fx.Graph()
    found = {"noise": graph.placeholder("noise")}
    found["noise"].meta["val"] = draw(2, 4)
    calls = (
        ("f", aten.tanh.default, ("noise",), 0),
        ("g", aten.mm.default, ("f", "f_t"), 0),
        ("total", aten.add.Tensor, ("f", "f"), 0),
        ("x", aten.sin.default, ("noise",), 1),
        ("first", aten.add.Tensor, ("x", "f"), 1),
        ("second", aten.add.Tensor, ("f", "first"), 1),
        ("third", aten.add.Tensor, ("second", "total"), 1),
        ("doubled", aten.mul.Tensor, ("f", "f"), 1),
        ("loops", aten.neg.default, ("f",), None),
    )
    for name, target, arguments, evaluation in calls:
        if name == "g":
            found["f_t"] = emit(graph, aten.t.default, (found["f"],), 0)
        found[name] = emit(graph, target, tuple(found[each] for each in arguments), evaluation)
    graph.output([found[name] for name in ("third", "doubled", "loops", "g")])
    return found


def named(found: dict[str, Node], some: object) -> set[str]:
    assert isinstance(some, (set, list, tuple))
    return {name for name, node in found.items() if node in some}


def test_a_value_is_kept_for_a_later_evaluation_and_for_nothing_else(nodes: dict[str, Node]) -> None:
    assert is_kept(nodes["f"], nodes["first"])
    assert not is_kept(nodes["f"], nodes["total"])
    assert not is_kept(nodes["f"], nodes["loops"])
    assert not is_kept(nodes["noise"], nodes["first"])
    assert later_readers(nodes["f"]) == [nodes["first"], nodes["second"], nodes["doubled"]]
    assert later_readers(nodes["noise"]) == []


def test_work_for_later_evaluations_and_work_on_kept_values_alone_are_told_apart(nodes: dict[str, Node]) -> None:
    graph = nodes["f"].graph
    assert named(nodes, cache_work(graph.nodes)) == {"total"}
    assert named(nodes, made_of_kept_values(graph.nodes, set())) == {"doubled"}
    # What is known before the loop may be read as well, and is itself not kept.
    assert named(nodes, made_of_kept_values(graph.nodes, {nodes["x"]})) == {"first", "second", "third", "doubled"}
    assert named(nodes, made_of_kept_values(graph.nodes, {nodes["f"]})) >= {"total", "f_t"}
    assert "g" not in named(nodes, made_of_kept_values(graph.nodes, {nodes["f"]}))
    assert "g" in named(nodes, made_of_kept_values(graph.nodes, {nodes["f"]}, [aten.mm.default]))


def test_arithmetic_element_by_element_and_views_are_light(nodes: dict[str, Node]) -> None:
    assert named(nodes, [node for node in nodes.values() if is_light(node)]) == set(nodes) - {"noise", "g"}


def test_the_longest_run_of_kept_terms_is_found_whichever_side_they_are_added_on(nodes: dict[str, Node]) -> None:
    graph = nodes["f"].graph

    def kept(added: Node, addition: Node) -> Node | None:
        return added if is_kept(added, addition) else None

    (run,) = kept_runs(graph.nodes, kept)
    assert run.base is nodes["x"]
    assert run.terms == (nodes["f"], nodes["f"], nodes["total"])
    assert run.adds == (nodes["first"], nodes["second"], nodes["third"])
    assert run.last is nodes["third"]
    # A sum that somebody else reads is where a run begins.
    with graph.inserting_before(graph.output_node()):
        emit(graph, aten.neg.default, (nodes["first"],), 1)
    (run,) = kept_runs(graph.nodes, kept)
    assert (run.base, run.adds) == (nodes["first"], (nodes["second"], nodes["third"]))


def test_a_single_addition_is_no_run(nodes: dict[str, Node]) -> None:
    assert list(kept_runs(nodes["f"].graph.nodes, lambda added, _: added if added is nodes["total"] else None)) == []
