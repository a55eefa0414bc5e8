"""Whether folded constants are still those of the weights, and which module shows a form."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn

from l2c_compile import CacheSchedule, l2c_compile
from l2c_compile.errors import StaleConstantsError
from l2c_compile.samplers.compiled_form import CompiledForm, check_fresh, weight_versions
from tests.tiny import Residual, draw, residual, steps


def form_of(model: Residual, backend: str = "eager") -> CompiledForm:
    sampler = l2c_compile(model, CacheSchedule.from_table({"a": [1, 0]}), steps(2), backend=backend)
    return sampler.capture(draw(2, 4))


def in_place(layer: nn.Linear) -> None:
    with torch.no_grad():
        layer.weight.add_(1)


def assigned(layer: nn.Linear) -> None:
    layer.weight = nn.Parameter(layer.weight.detach().clone())


def moved(layer: nn.Linear) -> None:
    layer.weight.data = layer.weight.data.clone()


def ask(form: CompiledForm) -> None:
    assert form.guards.why_not() is None
    check_fresh(form)


@pytest.mark.parametrize("change", [in_place, assigned, moved])
def test_constants_are_stale_once_a_weight_they_were_made_from_changed(change: Callable[[nn.Linear], None]) -> None:
    model = residual()
    form = form_of(model)
    ask(form)
    change(model.time)
    with pytest.raises(StaleConstantsError, match=r"weight 'time\.weight' changed .*; call refresh\(\)"):
        ask(form)
    form.note_weights()
    ask(form)


@pytest.mark.parametrize("change", [in_place, assigned, moved])
def test_other_weights_may_change(change: Callable[[nn.Linear], None]) -> None:
    model = residual()
    form = form_of(model)
    change(model.a)
    ask(form)


def test_weights_that_constants_are_made_from_are_those_that_only_times_meet() -> None:
    model = residual()
    assert weight_versions(form_of(model).graph).keys() == {"denoiser.time.weight", "denoiser.time.bias"}


def test_the_module_is_what_runs_where_the_backend_runs_the_flat_graph() -> None:
    form = form_of(residual())
    assert form.module is form.run
    other = form_of(residual(), "aot_eager")
    assert other.module is not other.run
    assert other.module is other.module
    with torch.no_grad():
        assert torch.equal(other.module(draw(2, 4))[0], form.module(draw(2, 4))[0])
