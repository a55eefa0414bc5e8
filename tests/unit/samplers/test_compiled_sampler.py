"""Compiled samplers: what is captured when, what is stale, and what a copy holds."""

from __future__ import annotations

import copy
import pickle
import threading
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from l2c_compile import CacheSchedule, CompiledSampler, l2c_compile, run_reference
from l2c_compile.errors import StaleConstantsError
from l2c_compile.loops import DDIM
from tests.residual_graphs import TABLE, sampler_of
from tests.tiny import Residual, at, draw, residual, same_bits, steps


def forms_of(sampler: CompiledSampler) -> int:
    return len(sampler._forms)


def reference(sampler: CompiledSampler, noise: Tensor, **conditions: object) -> object:
    return run_reference(sampler.model, sampler.loop, sampler.schedule, noise, conditions)


@pytest.fixture
def sampler() -> Any:  # noqa: ANN401
    return sampler_of(residual())


def test_nothing_is_captured_before_the_first_call_and_once_a_form() -> None:
    said: list[str] = []
    sampler = sampler_of(residual(), progress=said.append)
    assert said == []
    x = draw(3, 4)
    sampler(x)
    first = list(said)
    assert "trace the loop" in first
    sampler(x + 1)
    assert said == first
    assert sampler.capture(x) is sampler.capture(x * 2)


def test_every_other_form_of_input_is_captured_anew() -> None:
    def loop(denoiser: Any, x: Tensor, y: Any = None, scale: float = 1.0) -> Any:  # noqa: ANN401
        for i in range(3):
            x = denoiser(x, at(x, i), y) * scale
        return x

    model, x = residual(), draw(3, 4)
    sampler = sampler_of(model, loop=loop)
    forms: list[tuple[Tensor, dict[str, Any]]] = [
        *((x, {}), (draw(2, 4), {}), (draw(4, 3).t(), {}), (x, {"scale": 0.0}), (x, {"scale": -0.0})),
        *((x, {"scale": 1.0}), (x, {"scale": 1}), (x, {"scale": True}), (x, {"y": draw(3, 4)}), (x, {"y": draw(4)})),
    ]
    for count, (noise, conditions) in enumerate(forms, start=1):
        assert same_bits(sampler(noise, **conditions), reference(sampler, noise, **conditions))
        assert forms_of(sampler) == count
    for noise, conditions in forms:
        assert same_bits(sampler(noise, **conditions), reference(sampler, noise, **conditions))
    assert forms_of(sampler) == len(forms)


def test_another_dtype_of_the_weights_is_another_form() -> None:
    model, x = residual(), draw(3, 4)
    sampler = sampler_of(model)
    sampler(x)
    sampler.double()
    assert same_bits(sampler(x.double()), reference(sampler, x.double()))
    assert forms_of(sampler) == 2


def test_the_order_of_keywords_does_not_matter() -> None:
    def loop(denoiser: Any, x: Tensor, *, a: Tensor, b: Tensor) -> Any:  # noqa: ANN401
        return denoiser(x, at(x, 1)) + a - 2 * b

    sampler = sampler_of(residual(), {"a": [1]}, loop)
    x, a, b = draw(3, 4), draw(3, 4, seed=2), draw(3, 4, seed=3)
    assert same_bits(sampler(x, a=a, b=b), sampler(x, b=b, a=a))


def test_no_state_is_kept_between_calls_and_inputs_are_not_written(sampler: CompiledSampler) -> None:
    def writes(denoiser: Any, x: Tensor) -> Any:  # noqa: ANN401
        x.mul_(2.0)
        return steps(3)(denoiser, x)

    x, other = draw(3, 4), draw(3, 4, seed=9)
    before = x.clone()
    first = sampler(x)
    sampler(other)
    assert same_bits(sampler(x), first)
    writing = l2c_compile(sampler.model, sampler.schedule, writes)
    writing(x)
    assert writing.verify(x).bitwise
    assert torch.equal(x, before)


def multiply(weight: Tensor) -> None:
    with torch.no_grad():
        weight.mul_(1.5)


def assign_data(weight: Tensor) -> None:
    weight.data = weight.data * 1.5


@pytest.mark.parametrize("change", [multiply, assign_data])
def test_a_changed_weight_behind_a_constant_needs_refresh(change: Any) -> None:  # noqa: ANN401
    model, x = residual(), draw(3, 4)
    sampler = sampler_of(model)
    sampler(x)
    change(model.time.weight)
    with pytest.raises(StaleConstantsError, match=r"weight 'time\.weight' changed .*call refresh\(\)"):
        sampler(x)
    with pytest.raises(StaleConstantsError):
        sampler.verify(x)
    sampler.refresh()
    assert same_bits(sampler(x), reference(sampler, x))
    assert forms_of(sampler) == 1


def test_a_changed_weight_behind_nothing_folded_is_simply_used() -> None:
    model, x = residual(), draw(3, 4)
    sampler = sampler_of(model)
    before = sampler(x)
    multiply(model.a.weight)
    assert same_bits(sampler(x), reference(sampler, x))
    assert not same_bits(sampler(x), before)


@pytest.mark.parametrize("assign", [False, True])
def test_loaded_weights_are_used_after_refresh(assign: bool) -> None:
    model, x = residual(), draw(3, 4)
    sampler = sampler_of(model)
    sampler(x)
    state = {name: value * 1.1 for name, value in model.state_dict().items()}
    model.load_state_dict(state, assign=assign)
    with pytest.raises(StaleConstantsError):
        sampler(x)
    sampler.refresh()
    assert same_bits(sampler(x), reference(sampler, x))


def test_a_replaced_module_is_followed() -> None:
    model, x = residual(), draw(3, 4)
    sampler = sampler_of(model)
    sampler(x)
    model.a = nn.Linear(4, 4)
    assert same_bits(sampler(x), reference(sampler, x))


def test_refresh_forgets_forms_that_the_weights_no_longer_have() -> None:
    sampler, x = sampler_of(residual()), draw(3, 4)
    sampler(x)
    sampler.double()
    sampler(x.double())
    sampler.refresh()
    assert forms_of(sampler) == 1
    assert same_bits(sampler(x.double()), reference(sampler, x.double()))


def test_what_is_captured_under_inference_mode_can_be_refreshed_outside() -> None:
    model, x = residual(), draw(3, 4)
    sampler = sampler_of(model)
    with torch.inference_mode():
        inside = sampler(x.clone())
    assert same_bits(inside, reference(sampler, x))
    multiply(model.time.weight)
    sampler.refresh()
    assert same_bits(sampler(x), reference(sampler, x))


def test_copies_share_nothing_with_the_original(sampler: CompiledSampler) -> None:
    x = draw(3, 4)
    wanted = sampler(x)
    twin = copy.deepcopy(sampler)
    assert same_bits(twin(x), wanted)
    multiply(sampler.model.get_parameter("a.weight"))
    assert same_bits(twin(x), wanted)
    assert not same_bits(sampler(x), wanted)


def test_a_sampler_survives_pickle() -> None:
    sampler = sampler_of(residual(), {"a": [1, 0, 1]}, DDIM(3))
    x = draw(3, 4)
    wanted = sampler(x)
    twin = pickle.loads(pickle.dumps(sampler))
    assert same_bits(twin(x), wanted)


def test_two_threads_capture_one_form_once(sampler: CompiledSampler) -> None:
    results: dict[int, object] = {}
    inputs = {i: draw(3, 4, seed=i) for i in range(4)}

    def work(i: int) -> None:
        results[i] = sampler(inputs[i])

    threads = [threading.Thread(target=work, args=(i,)) for i in inputs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert forms_of(sampler) == 1
    assert all(same_bits(results[i], reference(sampler, inputs[i])) for i in inputs)


def test_the_sampler_is_a_module_over_the_models_weights(sampler: CompiledSampler) -> None:
    model = sampler.model
    assert isinstance(model, Residual)
    assert {name for name, _ in sampler.named_parameters()} == {f"model.{name}" for name, _ in model.named_parameters()}
    sampler(draw(3, 4))
    assert set(sampler.state_dict()) == {f"model.{name}" for name in model.state_dict()}
    assert "def forward" in sampler.graph_module.code


def test_forms_are_bounded_and_the_least_recently_used_one_is_forgotten() -> None:
    sampler = l2c_compile(residual(), CacheSchedule.from_table(TABLE), steps(3), max_forms=2)
    inputs = [draw(batch, 4) for batch in (1, 2, 3)]
    wanted = [sampler(inputs[0]), sampler(inputs[1])]
    kept = sampler.capture(inputs[0])
    with pytest.warns(UserWarning, match="more than 2 forms of input.*max_forms=4"):
        sampler(inputs[2])
    assert forms_of(sampler) == 2
    assert sampler.capture(inputs[0]) is kept
    with pytest.warns(UserWarning, match="used least recently"):
        assert same_bits(sampler(inputs[1]), wanted[1])


@pytest.mark.parametrize("max_forms", [0, 1.5, True])
def test_a_bound_on_forms_is_a_whole_number(max_forms: Any) -> None:  # noqa: ANN401
    with pytest.raises(ValueError, match="max_forms wants a whole number from 1"):
        sampler_of(residual(), max_forms=max_forms)
