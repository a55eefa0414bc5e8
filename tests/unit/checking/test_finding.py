"""A finding says where it is, in words and in fields."""

from __future__ import annotations

import torch
from torch import fx

from l2c_compile.checking.finding import Finding, finding_at


def node_of_evaluation(evaluation: int | None, path: str = "") -> fx.Node:
    graph = fx.Graph()
    node = graph.call_function(torch.ops.aten.neg.default, (graph.placeholder("x"),))
    node.meta["evaluation"] = evaluation
    node.meta["nn_module_stack"] = {"key": (path, object)} if path else {}
    return node


def test_a_finding_names_node_evaluation_and_module() -> None:
    finding = finding_at(node_of_evaluation(2, "denoiser.blocks.0"), "work", "is wrong", "a")
    assert finding == Finding(
        "work", "node 'neg_default' of evaluation 2 in 'blocks.0' is wrong", "neg_default", 2, "a"
    )
    assert str(finding) == "work: node 'neg_default' of evaluation 2 in 'blocks.0' is wrong"


def test_what_is_unknown_is_not_named() -> None:
    assert finding_at(node_of_evaluation(None), "form", "is wrong").message == "node 'neg_default' is wrong"
