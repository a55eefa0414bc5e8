"""Graphs, their copies, and the modules made of them."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from l2c_compile import CacheSchedule, Site
from l2c_compile.graphs.loop_graph import LoopGraph, copy_of
from l2c_compile.passes.drop_dead import DropDead
from l2c_compile.passes.drop_site_marks import DropSiteMarks
from l2c_compile.passes.read_reused_sites import ReadReusedSites
from tests.tiny import at, draw, program, residual, same_bits, steps, targets, unrolled

aten = torch.ops.aten
TABLE = {"a": [1, 0, 0], "b": [1, 1, 0]}


def graph_of(table: dict[str, list[int]] = TABLE) -> LoopGraph:
    return unrolled(residual(), CacheSchedule.from_table(table), steps(3), draw(2, 4))


def drawing(denoiser: object, noise: Tensor, y: Tensor) -> Tensor:
    """Return a loop's result that depends on the noise, on a condition, on a draw and on times alone."""
    time = at(noise, 3).cos()
    return noise + denoiser(noise, time, y=y.exp()) + torch.randn_like(y).sin()  # type: ignore[operator, no-any-return]


def test_a_copy_is_rewritten_apart_from_the_original() -> None:
    graph = graph_of()
    before, buffers = str(graph.graph), list(graph.root._buffers)
    copy = graph.copy()
    ReadReusedSites().run(copy)
    DropDead().run(copy)
    DropSiteMarks().run(copy)
    copy.new_constant(torch.zeros(1))
    copy.new_region(copy.module())
    assert str(graph.graph) == before
    assert list(graph.root._buffers) == buffers
    assert list(graph.root._modules) == ["denoiser"]
    assert copy.root.denoiser is graph.root.denoiser
    assert len(copy.graph.nodes) < len(graph.graph.nodes)


def test_a_copied_graph_shares_what_its_nodes_note() -> None:
    graph = graph_of().graph
    for node, copied in zip(graph.nodes, copy_of(graph).nodes, strict=True):
        assert (copied.op, copied.target) == (node.op, node.target)
        assert copied.meta.get("val") is node.meta.get("val")


def test_a_module_follows_a_weight_that_is_assigned_anew() -> None:
    graph, noise = graph_of({"a": [1, 1, 1]}), draw(2, 4)
    module = graph.module()
    denoiser = graph.root.denoiser
    denoiser.a.weight = nn.Parameter(2 * denoiser.a.weight.detach())  # type: ignore[union-attr, operator]
    with torch.no_grad():
        (got,) = module(noise)
        assert same_bits(got, steps(3)(denoiser, noise))


def test_a_module_to_be_traced_again_insists_on_no_strides() -> None:
    graph = graph_of()
    traced = program(lambda x: [x.view(2, 2).t() + 1], draw(4))
    view = LoopGraph(traced.graph, traced.root, graph.schedule, 1, graph.out_spec)
    assert "reshape.default" in [str(n.target).removeprefix("aten.") for n in view.module_to_trace().graph.nodes]
    assert "view.default" in targets(view)
    assert "reshape.default" not in targets(view)


def test_what_is_known_before_the_loop_depends_on_no_noise_and_no_draw() -> None:
    schedule = CacheSchedule.from_table({"a": [1]})
    graph = unrolled(residual(), schedule, drawing, draw(2, 4), {"y": draw(2, 4, seed=3)})
    known = graph.known_before_the_loop()
    noise, y = graph.graph.find_nodes(op="placeholder")
    assert y in known
    assert noise not in known
    assert {node.target for node in known if node.op == "call_function"} >= {aten.exp.default}
    unknown = {node.target for node in graph.graph.nodes if node.op == "call_function" and node not in known}
    assert unknown >= {aten.layer_norm.default, aten.sin.default}


def test_reads_come_in_execution_order() -> None:
    graph = graph_of()
    assert graph.num_evaluations == 3
    assert [(evaluation, site) for evaluation, site, _ in graph.reads()] == [
        (1, Site("a")),
        (2, Site("a")),
        (2, Site("b")),
    ]


def test_constants_and_regions_get_fresh_names() -> None:
    graph = graph_of()
    names = [graph.new_constant(torch.full((1,), float(i))) for i in range(3)]
    assert len(set(names)) == 3
    assert [float(graph.root.get_buffer(name)) for name in names] == [0, 1, 2]
    assert graph.new_region(graph.module()) != graph.new_region(graph.module())


def test_the_price_of_an_evaluation_is_that_of_all_its_work() -> None:
    graph = graph_of()
    # Products of (2, 1) x (1, 4), then twice (2, 4) x (4, 4); each site holds 2 x 4 floats.
    assert [price.multiply_adds for price in graph.prices] == [2 * 4 + 2 * 2 * 4 * 4] * 3
    assert dict(graph.prices[0].site_bytes) == {"a": 32, "b": 32}
