"""What a loop is given in place of its denoiser."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from l2c_compile.frontend.stand_in import StandIn
from tests.tiny import Residual, residual


def stand_in() -> tuple[Residual, Any, list[object]]:
    model, calls = residual(), list[object]()

    def evaluate(args: tuple[object, ...], kwargs: dict[str, object]) -> str:
        calls.append((args, kwargs))
        return "prediction"

    return model, StandIn(model, evaluate), calls


def test_calls_are_made_by_the_function_and_not_by_the_denoiser() -> None:
    _, denoiser, calls = stand_in()
    assert denoiser(1, t=2) == denoiser.forward(1, t=2) == "prediction"
    assert calls == [((1,), {"t": 2})] * 2


def test_it_is_taken_for_the_denoiser() -> None:
    model, denoiser, calls = stand_in()
    assert isinstance(denoiser, Residual)
    assert isinstance(denoiser, nn.Module)
    assert denoiser.a is model.a
    assert list(denoiser.parameters()) == list(model.parameters())
    with pytest.raises(AttributeError, match="nothing"):
        _ = denoiser.nothing
    assert calls == []


def test_methods_that_return_the_denoiser_return_the_stand_in() -> None:
    model, denoiser, _ = stand_in()
    assert denoiser.eval() is denoiser
    assert denoiser.to(torch.float32) is denoiser
    assert denoiser.train().training
    assert model.training
    assert denoiser.get_submodule("a") is model.a
