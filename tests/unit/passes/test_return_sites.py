"""return-sites: an evaluation returns what its sites hold."""

from __future__ import annotations

import torch

from l2c_compile.finders.open_evaluations import OpenDenoiser
from l2c_compile.graphs.loop_graph import EvaluationGraph
from l2c_compile.graphs.nodes import output_list
from l2c_compile.passes.return_sites import ReturnSites
from tests.tiny import draw, residual, targets


def captured(*sites: str) -> EvaluationGraph:
    evaluation, _ = OpenDenoiser(residual(), sites).call((draw(2, 4), torch.ones(2)), {})
    return evaluation.captured.copy()


def test_what_was_computed_is_returned_not_the_mixture() -> None:
    evaluation, tensors = OpenDenoiser(residual(), ["a"]).call((draw(2, 4), torch.ones(2)), {})
    _, values = evaluation.observe(tensors)
    _, computed = evaluation.mix(tensors, torch.zeros(1), [torch.zeros_like(values[0])])
    assert torch.equal(computed[0], values[0])


def test_return_sites_appends_a_value_for_each_site_and_rewrites_nothing_else() -> None:
    program = captured("a", "delta(b)")
    before = targets(program)
    report = ReturnSites().run(program)
    assert report.rewrites == 2
    assert len(output_list(program.graph)) == 3
    assert sorted(targets(program)) == sorted([*before, "sub.Tensor"])
