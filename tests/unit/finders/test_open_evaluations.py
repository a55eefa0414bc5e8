"""Evaluations that can be looked into: memory, structure and when what is made."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from l2c_compile.errors import LoopError, ScheduleError, UnknownSiteError
from l2c_compile.finders.open_evaluations import OpenDenoiser, OpenEvaluation
from tests.tiny import draw, residual


class Returns(nn.Module):
    """Returns what its parts hold, in a structure; the first of them holds the input itself."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Identity()
        self.last = nn.Tanh()

    def forward(self, x: Tensor) -> dict[str, Any]:
        y = self.last(2 * self.first(x))
        return {"y": y, "scale": 2, "both": (y + 1, y)}


def test_values_have_memory_of_their_own() -> None:
    evaluation, (x,) = OpenDenoiser(Returns(), ["first", "last"]).call((draw(2, 4),), {})
    before, wanted = x.clone(), torch.tanh(2 * x)
    for outputs, values in (
        evaluation.observe([x]),
        evaluation.mix([x], torch.ones(2), [torch.zeros(2, 4), torch.zeros(2, 4)]),
    ):
        for output in outputs:
            output.fill_(7.0)
        x.fill_(5.0)
        assert torch.equal(values[0], before)
        assert torch.equal(values[1], wanted)
        x.copy_(before)


def test_outputs_come_back_in_the_structure_of_the_denoiser() -> None:
    evaluation, tensors = OpenDenoiser(Returns(), ["last"]).call((draw(2, 4),), {})
    outputs, _ = evaluation.observe(tensors)
    result = evaluation.result(outputs)
    assert isinstance(result, dict)
    assert result["scale"] == 2
    assert torch.equal(result["both"][0], result["y"] + 1)


def test_calls_of_one_form_are_one_evaluation_and_nothing_is_made_before_it_is_asked_for() -> None:
    denoiser = OpenDenoiser(residual(), ["a"])
    one, _ = denoiser.call((draw(2, 4), torch.ones(2)), {})
    assert denoiser.call((draw(2, 4, seed=1), torch.zeros(2)), {})[0] is one
    assert denoiser.call((draw(3, 4), torch.ones(3)), {})[0] is not one
    assert not {"observed", "mixed"} & vars(one).keys()
    one.observe([draw(2, 4), torch.ones(2)])
    assert "mixed" not in vars(one)


def test_the_evaluations_of_a_loop_are_found_in_order() -> None:
    def loop(denoiser: Any, x: Tensor) -> Tensor:  # noqa: ANN401
        first: Tensor = denoiser(x, torch.ones(2))
        return torch.cat([first, denoiser(first[:1], torch.ones(1))])

    one, other = OpenDenoiser(residual(), ["a"]).evaluations_of(loop, draw(2, 4), {})
    assert one is not other
    assert not {"observed", "mixed"} & {*vars(one), *vars(other)}


def test_a_mixture_refreshes_what_was_computed() -> None:
    evaluation = OpenDenoiser(residual(), ["a", "b"]).call((draw(2, 4), torch.ones(2)), {})[0]
    assert isinstance(evaluation, OpenEvaluation)
    new, old = [torch.ones(1), torch.ones(2)], [torch.zeros(1), torch.zeros(2)]
    kept = evaluation.refreshed(torch.tensor([False, True]), new, old)
    assert kept[0] is old[0]
    assert kept[1] is new[1]


def test_what_cannot_be_opened_is_named() -> None:
    with pytest.raises(UnknownSiteError, match="no module 'c'"):
        OpenDenoiser(residual(), ["c"])
    with pytest.raises(ScheduleError, match="without sites"):
        OpenDenoiser(residual(), [])
    with pytest.raises(LoopError, match="the loop never calls the denoiser"):
        OpenDenoiser(residual(), ["a"]).evaluations_of(lambda denoiser, x: x, draw(2, 4), {})
