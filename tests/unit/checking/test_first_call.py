"""The comparison of a first call with the eager loop: what it finds, names, allows and puts back."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from l2c_compile import CacheSchedule, CompiledSampler, l2c_compile
from l2c_compile.checking.first_call import FirstCall
from l2c_compile.errors import FirstCallError
from l2c_compile.state.random_state import RandomState
from tests.tiny import Residual, at, draw, residual, steps

SCHEDULE = CacheSchedule.from_table({"a": [1, 0, 1]})


def call_of(
    change: Callable[[Sequence[object]], Sequence[object]],
    is_bitwise: bool = True,
    loop: Any = None,  # noqa: ANN401
) -> FirstCall:
    """Return a first call whose results are those of the static graph after ``change``."""
    model, noise = residual(), draw(2, 4)
    sampler = l2c_compile(model, SCHEDULE, loop or steps(3), check=None)
    state = RandomState()
    form = sampler.capture(noise)
    with torch.no_grad():
        results = form.run(noise)
    return FirstCall(
        denoiser=model,
        loop=sampler.loop,
        schedule=sampler.schedule,
        roots=form.guards.roots,
        inputs=(noise, {}),
        results=change(results),
        drawn_from=state,
        graph=lambda: form.module,
        is_bitwise=is_bitwise,
    )


def plus(epsilon: float) -> Callable[[Sequence[Any]], Sequence[object]]:
    return lambda results: [result + epsilon for result in results]


def test_equal_results_pass() -> None:
    call_of(lambda results: results).check()


def test_any_bit_counts_where_no_bit_may_change() -> None:
    with pytest.raises(FirstCallError, match=r"relative error .*no site differs.*check='structure' leaves"):
        call_of(plus(1e-6)).check()


def test_rounding_is_allowed_where_it_is_expected_and_more_is_not() -> None:
    call_of(plus(1e-6), is_bitwise=False).check()
    with pytest.raises(FirstCallError, match=r"allowed 0\.0004"):
        call_of(plus(0.1), is_bitwise=False).check()


def test_a_result_of_another_form_or_without_a_value_is_an_error() -> None:
    for change in (
        lambda results: [result[:1] for result in results],
        lambda results: [result.double() for result in results],
        lambda results: [result * float("nan") for result in results],
        lambda results: [],
    ):
        with pytest.raises(FirstCallError):
            call_of(change, is_bitwise=False).check()


def hidden_state(module: object, args: object, output: Tensor) -> Tensor:
    calls = random.__dict__.setdefault("_calls_of_a_test", [0])
    calls[0] += 1
    return output * 0.5 if calls[0] > 2 else output


def test_the_first_evaluation_and_site_that_differ_are_named() -> None:
    model = residual()
    model.a.register_forward_hook(hidden_state)
    sampler = l2c_compile(model, CacheSchedule.all_compute(3, ["a", "b"]), steps(3))
    try:
        with pytest.raises(FirstCallError, match=r"first, site '[ab]' of evaluation \d differs by"):
            sampler(draw(2, 4))
    finally:
        del random.__dict__["_calls_of_a_test"]


def test_a_lack_of_memory_for_the_comparison_names_the_way_out() -> None:
    def runs_out(denoiser: Any, x: Tensor) -> Tensor:  # noqa: ANN401
        raise torch.OutOfMemoryError("no memory")

    call = replace(call_of(lambda results: results), loop=runs_out)
    with pytest.raises(FirstCallError, match=r"not enough memory .* check='structure' leaves"):
        call.check()


def test_what_no_guard_sees_is_found_by_its_numbers_and_nothing_of_ours_is_blamed() -> None:
    ticks = iter(range(1, 1000)).__next__

    def ticking(denoiser: Any, x: Tensor) -> Tensor:  # noqa: ANN401
        for i in range(3):
            x = x - 0.01 * ticks() * denoiser(x, at(x, i))
        return x

    sampler = l2c_compile(residual(), CacheSchedule.all_compute(3, ["a", "b"]), ticking)
    with pytest.raises(FirstCallError, match=r"first, site 'a' of evaluation 1 .*no Python state that can be seen"):
        sampler(draw(2, 4))


def test_random_numbers_are_those_of_the_call_and_the_callers_go_on_as_after_it() -> None:
    def draws(denoiser: Any, x: Tensor) -> Tensor:  # noqa: ANN401
        for i in range(3):
            x = x - 0.1 * denoiser(x, at(x, i)) + 0.1 * torch.randn_like(x)
        return x

    def drawn(check: Any) -> tuple[Tensor, Tensor]:  # noqa: ANN401
        torch.manual_seed(0)
        result = l2c_compile(residual(), SCHEDULE, draws, check=check)(draw(2, 4))
        return result, torch.randn(3)

    assert all(torch.equal(a, b) for a, b in zip(drawn("first"), drawn(None), strict=True))


def test_the_eager_run_leaves_no_trace() -> None:
    class Notes(Residual):
        latest: Any = None

        def forward(self, *args: Any, **kwargs: Any) -> Any:  # noqa: ANN401
            self.latest = super().forward(*args, **kwargs)
            return self.latest

    model, noise = Notes(), draw(2, 4)
    before = noise.clone()
    sampler = l2c_compile(model, SCHEDULE, steps(3))
    sampler(noise)
    assert model.latest is None
    assert "latest" not in vars(model)
    assert torch.equal(noise, before)
    assert "forward" not in vars(model)


def test_tensors_without_values_are_not_compared() -> None:
    sampler: CompiledSampler = l2c_compile(residual().to("meta"), SCHEDULE, steps(3))
    assert sampler(torch.empty(2, 4, device="meta")).is_meta
    assert sampler.summary().first_call_s == 0
