"""Marks of sites become notes on their values."""

from __future__ import annotations

import torch
from torch import Tensor

from l2c_compile.graphs.facts import check
from l2c_compile.graphs.marks import SITE
from l2c_compile.passes.drop_site_marks import DropSiteMarks
from tests.residual_graphs import graph_of
from tests.tiny import (
    draw,
    program,
    run,
    same_bits,
    targets,
)


def test_marks_become_notes_on_their_values() -> None:
    x, graph = draw(3, 4), graph_of({"a": [1, 1], "b": [1, 1]})
    marked = run(graph, x)
    assert DropSiteMarks().run(graph).rewrites == 4
    noted = [site for n in graph.graph.nodes for site in n.meta.get("sites", ())]
    assert sorted(noted) == [(0, "a", 0), (0, "b", 0), (1, "a", 0), (1, "b", 0)]
    assert SITE not in {n.target for n in graph.graph.nodes}
    assert same_bits(run(graph, x), marked)


def test_marks_of_marks_are_all_removed() -> None:
    def nested(x: Tensor) -> list[Tensor]:
        inner = SITE(x.sin(), "outer.inner", 0, 0)
        outer = SITE(inner, "outer", 0, 0)
        return [outer + 1, outer * 2]

    graph = program(nested, draw(3))
    assert DropSiteMarks().run(graph).rewrites == 2
    check(graph, DropSiteMarks.gives)
    assert targets(graph) == ["sin.default", "add.Tensor", "mul.Tensor"]
    (sine,) = graph.graph.find_nodes(op="call_function", target=torch.ops.aten.sin.default)
    assert sorted(sine.meta["sites"]) == [(0, "outer", 0), (0, "outer.inner", 0)]


def test_a_mark_of_an_expanded_value_runs() -> None:
    value = draw(3, 1).expand(3, 4)
    mark = SITE(value, "a", 0, 0)
    assert mark.stride() == value.stride() == (1, 0)
    assert torch.equal(mark, value)
    assert mark.untyped_storage().data_ptr() != value.untyped_storage().data_ptr()
