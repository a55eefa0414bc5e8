"""What caching an evaluation changes in the result of a loop."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from l2c_compile import CacheSchedule, run_reference
from l2c_compile.finders.effects import Cached, effect_of_caching
from l2c_compile.finders.open_evaluations import OpenDenoiser, OpenEvaluation
from l2c_compile.finders.processes import Workers
from tests.tiny import at, draw, residual, steps

SITES = ("a", "b")
MODEL, NOISE, SEED = residual(), draw(3, 4), 3
Loop = Callable[..., Tensor]


def noisy(denoiser: Any, x: Tensor) -> Tensor:  # noqa: ANN401
    for i in range(4):
        x = x - 0.25 * denoiser(x, at(x, 4.0 - i)) + torch.randn(x.shape)
    return x


def in_place(denoiser: Any, x: Tensor) -> Tensor:  # noqa: ANN401
    x = x.clone()
    for i in range(4):
        x -= denoiser(x, at(x, 4.0 - i)).mul_(0.25)
    return x


def each_alone(cached: range) -> Cached:
    """Return what caches all sites of one evaluation, while the loop goes on with full ones."""
    held: list[Tensor] = []

    def evaluate(e: int, evaluation: OpenEvaluation, tensors: list[Tensor]) -> tuple[list[Tensor], list[Tensor] | None]:
        outputs, values = evaluation.observe(tensors)
        student = evaluation.mix(tensors, torch.zeros(2), held)[0] if e in cached else None
        held[:] = values
        return outputs, student

    return evaluate


def effects_of(loop: Loop, evaluate: Cached) -> dict[int, float]:
    with torch.random.fork_rng():
        torch.manual_seed(SEED)
        return effect_of_caching(OpenDenoiser(MODEL, SITES), loop, NOISE, {}, evaluate, Workers())


def result(loop: Loop, cached: list[int]) -> Tensor:
    row = tuple(int(e not in cached) for e in range(4))
    table = dict.fromkeys(SITES, row)
    with torch.random.fork_rng():
        torch.manual_seed(SEED)
        made = run_reference(MODEL, loop, CacheSchedule.from_table(table), NOISE, {})
    assert isinstance(made, Tensor)
    return made.double()


@pytest.mark.parametrize("loop", [steps(4), noisy, in_place])
def test_an_evaluation_that_is_cached_alone_is_compared_with_the_full_loop(loop: Loop) -> None:
    effects = effects_of(loop, each_alone(range(1, 4)))
    for e, effect in effects.items():
        expected = float((result(loop, [e]) - result(loop, [])).square().mean())
        assert effect == pytest.approx(expected, rel=1e-4)
    assert list(effects) == [1, 2, 3]


@pytest.mark.parametrize("loop", [steps(4), noisy, in_place])
def test_evaluations_that_are_cached_one_after_another_are_compared_with_one_less(loop: Loop) -> None:
    held: list[Tensor] = []

    def evaluate(e: int, evaluation: OpenEvaluation, tensors: list[Tensor]) -> tuple[list[Tensor], list[Tensor] | None]:
        if e == 0:
            outputs, held[:] = evaluation.observe(tensors)
            return outputs, None
        outputs = evaluation.mix(tensors, torch.zeros(2), held)[0]
        return outputs, outputs

    effects = effects_of(loop, evaluate)
    for e, effect in effects.items():
        before = list(range(1, e))
        expected = float((result(loop, [*before, e]) - result(loop, before)).square().mean())
        assert effect == pytest.approx(expected, rel=1e-4)
    assert list(effects) == [1, 2, 3]


def test_what_changes_nothing_has_no_effect_also_if_the_loop_draws_noise() -> None:
    model = residual()
    with torch.no_grad():
        model.b.weight.zero_()
    state = torch.get_rng_state()
    held: list[Tensor] = []

    def evaluate(e: int, evaluation: OpenEvaluation, tensors: list[Tensor]) -> tuple[list[Tensor], list[Tensor] | None]:
        outputs, values = evaluation.observe(tensors)
        student = evaluation.mix(tensors, torch.zeros(1), held)[0] if e else None
        held[:] = values
        return outputs, student

    effects = effect_of_caching(OpenDenoiser(model, ["b"]), noisy, NOISE, {}, evaluate, Workers())
    assert effects == {1: 0.0, 2: 0.0, 3: 0.0}
    assert torch.equal(torch.get_rng_state(), state)


def test_the_loop_runs_once_more_than_there_are_cached_evaluations() -> None:
    num_runs = 0

    def counted(denoiser: Any, x: Tensor) -> Tensor:  # noqa: ANN401
        nonlocal num_runs
        num_runs += 1
        return in_place(denoiser, x)

    effects_of(counted, each_alone(range(1, 4)))
    assert num_runs == 4
