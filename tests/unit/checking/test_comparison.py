"""A compiled loop compared with the reference, site by site."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from l2c_compile import CompiledSampler
from l2c_compile.checking.comparison import largest_errors, own_copy, same_bits
from l2c_compile.errors import LoopTraceError
from l2c_compile.loops import DDIM
from tests.residual_graphs import sampler_of
from tests.tiny import draw, residual, steps


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


ONES, NAN = torch.ones(2), float("nan")


@pytest.mark.parametrize(
    ("got", "wanted", "same", "error"),
    [
        (ONES, ONES.clone(), True, 0.0),
        (torch.tensor([1.0, NAN]), torch.tensor([1.0, NAN]), True, 0.0),
        (torch.tensor([NAN, 1.0]), torch.tensor([1.0, NAN]), False, math.inf),
        (torch.tensor([math.inf]), torch.tensor([math.inf]), True, 0.0),
        (torch.tensor([0.0]), torch.tensor([-0.0]), False, 0.0),
        (ONES, ONES.double(), False, math.inf),
        (ONES, torch.ones(3), False, math.inf),
        (ONES, torch.ones(1), False, math.inf),
        (torch.tensor([1 + 2j]), torch.tensor([1 - 2j]), False, 4.0),
        (torch.tensor([1 + 2j]), torch.tensor([1 + 2j]), True, 0.0),
        (torch.tensor([1 + 2j]).conj(), torch.tensor([1 - 2j]), True, 0.0),
        (torch.tensor([3]), torch.tensor([1]), False, 2.0),
        (1, 1.0, False, math.inf),
        (2, 2, True, 0.0),
        (ONES[:0], ONES[:0], True, 0.0),
    ],
)
def test_every_kind_of_difference_counts(got: object, wanted: object, same: bool, error: float) -> None:
    assert same_bits([got], [wanted]) is same
    assert largest_errors([got], [wanted])[0] == error


def test_results_of_another_number_differ() -> None:
    assert not same_bits([ONES], [ONES, ONES])
    assert largest_errors([ONES], [ONES, ONES]) == (math.inf, math.inf)


def test_a_tensor_given_twice_is_one_tensor_for_the_reference_too() -> None:
    def loop(denoiser: Any, x: Tensor, y: Tensor) -> Tensor:  # noqa: ANN401
        x.mul_(2.0)
        result: Tensor = denoiser(x, torch.zeros(3)) + y
        return result

    noise = draw(3, 4)
    sampler = sampler_of(residual(), {"a": [1]}, loop)
    assert sampler.verify(noise, y=noise.clone()).bitwise
    # Written in place, the noise changes the condition.
    with pytest.raises(LoopTraceError, match="writes into the latent, which shares its memory with another input"):
        sampler.verify(noise, y=noise)


def test_a_copy_of_a_tensor_that_is_given_twice_is_one_tensor_too() -> None:
    x = draw(2, 2)
    first, second = own_copy({"noise": x, "again": [x]}).values()
    assert first is second[0]
    assert first is not x
