"""The executable specification: each violation is caught, and the message names the node."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import fx
from torch.fx.node import Target

from l2c_compile import CacheSchedule
from l2c_compile.errors import VerificationError
from l2c_compile.graphs.facts import Fact, check
from l2c_compile.graphs.loop_graph import LoopGraph
from l2c_compile.graphs.marks import CACHE_READ, SITE, site_marks
from l2c_compile.passes.drop_dead import DropDead
from l2c_compile.passes.read_reused_sites import ReadReusedSites
from tests.tiny import draw, residual, steps, unrolled

aten = torch.ops.aten


def graph_of() -> LoopGraph:
    return unrolled(residual(), CacheSchedule.from_table({"a": [1, 0]}), steps(2), draw(3, 4))


def first(graph: LoopGraph, target: Target) -> fx.Node:
    node: fx.Node = graph.graph.find_nodes(op="call_function", target=target)[0]
    return node


def reversed_order(graph: LoopGraph) -> str:
    node = first(graph, aten.layer_norm.default)
    user = next(iter(node.users))
    user.append(node)
    return user.name


def an_in_place_op(graph: LoopGraph) -> str:
    node = first(graph, aten.tanh.default)
    node.target = aten.tanh_.default
    return node.name


def a_module_call(graph: LoopGraph) -> str:
    node = first(graph, aten.tanh.default)
    with graph.graph.inserting_after(node):
        return graph.graph.call_module("denoiser", (node,)).name


def a_missing_weight(graph: LoopGraph) -> str:
    node: fx.Node = graph.graph.find_nodes(op="get_attr")[0]
    node.target = "denoiser.gone"
    return node.name


def a_missing_module(graph: LoopGraph) -> str:
    node: fx.Node = graph.graph.find_nodes(op="get_attr")[0]
    node.target = "denoiser.gone.weight"
    return node.name


def a_site_marked_twice(graph: LoopGraph) -> str:
    mark = site_marks(graph.graph)[0]
    with graph.graph.inserting_after(mark.node):
        return graph.graph.call_function(SITE, mark.node.args).name


def a_site_unmarked(graph: LoopGraph) -> str:
    mark = next(m for m in site_marks(graph.graph) if m.evaluation == 1)
    mark.node.replace_all_uses_with(mark.value)
    graph.graph.erase_node(mark.node)
    return "site 'a' is not marked in evaluation 1"


def a_site_read_nowhere(graph: LoopGraph) -> str:
    return next(m.node.name for m in site_marks(graph.graph) if m.evaluation == 1)


def another_source(graph: LoopGraph) -> str:
    ReadReusedSites().run(graph)
    read = first(graph, CACHE_READ)
    read.update_arg(6, [1])
    return read.name


def a_dead_node(graph: LoopGraph) -> str:
    node = first(graph, aten.tanh.default)
    with graph.graph.inserting_after(node):
        return graph.graph.call_function(aten.sin.default, (node,)).name


def a_read_left(graph: LoopGraph) -> str:
    ReadReusedSites().run(graph)
    return first(graph, CACHE_READ).name


def a_site_left(graph: LoopGraph) -> str:
    return site_marks(graph.graph)[0].node.name


@pytest.mark.parametrize(
    ("spoil", "fact", "message"),
    [
        (reversed_order, None, "nodes are in topological order, .* which comes later"),
        (an_in_place_op, None, r"graphs are functional ATen, .*aten\.tanh_\.default writes into an argument"),
        (a_module_call, None, "graphs are functional ATen, .*is a call_module"),
        (a_missing_weight, None, "the root has no 'denoiser.gone'"),
        (a_missing_module, None, "the root has no 'denoiser.gone.weight'"),
        (a_site_marked_twice, Fact.SITES_MARKED, r"\('a', 0, 0\) is marked twice"),
        (a_site_unmarked, Fact.SITES_MARKED, "site 'a' is not marked in evaluation 1"),
        (a_site_read_nowhere, Fact.READS_CACHE, "of evaluation 1 is still used by"),
        (another_source, Fact.READS_CACHE, r"reads \(1,\), the schedule says Reuse\(sources=\(0,\)"),
        (a_dead_node, Fact.NO_DEAD_NODES, "has no user"),
        (a_read_left, Fact.READS_LOWERED, r"no l2c::cache_read is left"),
        (a_site_left, Fact.SITES_LOWERED, r"no l2c::site is left"),
    ],
)
def test_a_violation_is_caught_and_its_node_named(
    spoil: Callable[[LoopGraph], str], fact: Fact | None, message: str
) -> None:
    graph = graph_of()
    DropDead().run(graph)
    check(graph, {Fact.SITES_MARKED, Fact.NO_DEAD_NODES})
    name = spoil(graph)
    with pytest.raises(VerificationError, match=message) as caught:
        check(graph, [fact] if fact else [])
    assert name in str(caught.value)
