"""A compiled loop compared with the reference, site by site."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from l2c_compile import CacheSchedule, CompiledSampler, l2c_compile
from l2c_compile.loops import DDIM
from tests.tiny import draw, residual, steps

TABLE = {"a": [1, 0, 1], "b": [1, 1, 0]}


def sampler_of(model: nn.Module, table: Any = TABLE, loop: Any = None, **options: Any) -> CompiledSampler:  # noqa: ANN401
    schedule = CacheSchedule.from_table(table)
    return l2c_compile(model, schedule, loop or steps(schedule.num_evaluations), **options)


@pytest.fixture
def sampler() -> Any:  # noqa: ANN401
    return sampler_of(residual())


def test_verify_tells_that_all_is_well(sampler: CompiledSampler) -> None:
    report = sampler.verify(draw(3, 4))
    assert report.bitwise
    assert str(report) == "equal to the reference bit for bit"


@pytest.mark.parametrize("loop", [steps(3), DDIM(3, eta=1.0)], ids=["plain", "draws"])
def test_verify_names_the_first_site_that_a_spoiled_graph_computes_wrongly(loop: Any) -> None:  # noqa: ANN401
    sampler = sampler_of(residual(), {"a": [1, 0, 1], "b": [1, 1, 1]}, loop)
    x = draw(3, 4)
    assert sampler.verify(x).bitwise
    module = sampler.graph_module
    node = next(n for n in module.graph.nodes if (1, "b", 0) in n.meta.get("sites", ()))
    with module.graph.inserting_after(node.args[0]):
        spoiled = module.graph.call_function(torch.ops.aten.add.Tensor, (node.args[0], 1e-3))
    node.replace_input_with(node.args[0], spoiled)
    module.recompile()
    report = sampler.verify(x)
    assert not report.bitwise
    assert report.first_difference is not None
    assert (report.first_difference.evaluation, report.first_difference.site) == (1, "b")
    assert 0 < report.relative_error < 0.1
    assert "site 'b' of evaluation 1 differs by" in str(report)
