"""What a loop changes beyond itself is put back."""

from __future__ import annotations

import functools
import pickle
from collections import deque
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from l2c_compile import CacheSchedule, l2c_compile
from l2c_compile.errors import LoopTraceError
from l2c_compile.frontend.loop_state import left_as_found, restoring
from tests.tiny import at, draw, residual

MODEL = residual()


class Scheduler:
    """A multistep scheduler, which keeps predictions and counts its steps from one call to the next."""

    def __init__(self) -> None:
        self.outputs: list[Tensor] = []
        self.counts = {"steps": 0}
        self.recent: deque[Tensor] = deque(maxlen=1)
        self.last: Tensor | None = None

    def step(self, prediction: Tensor, x: Tensor) -> Tensor:
        self.outputs.append(prediction)
        self.counts["steps"] += 1
        self.recent.append(x)
        x = x - 0.1 * self.counts["steps"] * prediction
        x = x if self.last is None else x + 0.1 * self.last
        self.last = prediction
        self.new = x
        return x

    def loop(self, denoiser: Callable[..., Tensor], x: Tensor) -> Tensor:
        for i in range(2):
            x = self.step(denoiser(x, at(x, i)), x)
        return x


def state_of(scheduler: Scheduler) -> bytes:
    return pickle.dumps(vars(scheduler))


def by_method(scheduler: Scheduler) -> tuple[Callable[..., object], dict[str, object]]:
    return scheduler.loop, {}


def by_variable(scheduler: Scheduler) -> tuple[Callable[..., object], dict[str, object]]:
    return lambda denoiser, x: scheduler.loop(denoiser, x), {}


def by_condition(scheduler: Scheduler) -> tuple[Callable[..., object], dict[str, object]]:
    return lambda denoiser, x, given: given.loop(denoiser, x), {"given": scheduler}


def by_partial(scheduler: Scheduler) -> tuple[Callable[..., object], dict[str, object]]:
    return functools.partial(lambda given, denoiser, x: given.loop(denoiser, x), scheduler), {}


WAYS = [by_method, by_variable, by_condition, by_partial]


@pytest.mark.parametrize("way", WAYS)
def test_each_form_is_traced_from_the_state_that_the_user_left(way: Callable[..., Any]) -> None:
    scheduler = Scheduler()
    before = state_of(scheduler)
    loop, conditions = way(scheduler)
    sampler = l2c_compile(MODEL, CacheSchedule.all_compute(2), loop)
    for noise in (draw(3, 4), draw(2, 4), draw(3, 4)):
        with torch.no_grad():
            wanted = Scheduler().loop(MODEL, noise)
        assert torch.equal(sampler(noise, **conditions), wanted)
        assert state_of(scheduler) == before
    assert sampler.verify(draw(2, 4), **conditions).holds
    assert state_of(scheduler) == before


def test_what_a_failed_loop_left_is_put_back_too() -> None:
    scheduler = Scheduler()
    before = state_of(scheduler)

    def loop(denoiser: Callable[..., Tensor], x: Tensor) -> Tensor:
        scheduler.loop(denoiser, x)
        raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        l2c_compile(MODEL, CacheSchedule.all_compute(2), loop)(draw(3, 4))
    assert state_of(scheduler) == before


LAST: Tensor | None = None


def test_variables_that_outlive_the_loop_may_not_hold_its_tensors() -> None:
    kept: list[Tensor] = []
    last: Tensor | None = None

    def in_a_list(denoiser: Callable[..., Tensor], x: Tensor) -> Tensor:
        kept.append(x)
        return denoiser(x, at(x, 0))

    def in_a_variable(denoiser: Callable[..., Tensor], x: Tensor) -> Tensor:
        nonlocal last
        last = x
        return denoiser(x, at(x, 0))

    def in_a_global(denoiser: Callable[..., Tensor], x: Tensor) -> Tensor:
        global LAST
        LAST = x
        return denoiser(x, at(x, 0))

    for loop, name in ((in_a_list, "'kept'"), (in_a_variable, "'last'"), (in_a_global, "global variable 'LAST'")):
        with pytest.raises(LoopTraceError, match=rf"keeps tensors in .*{name}, which outlives it .*; return them"):
            l2c_compile(MODEL, CacheSchedule.all_compute(1), loop)(draw(3, 4))
    assert (kept, last, LAST) == ([], None, None)


def test_containers_of_all_kinds_are_put_back() -> None:
    a, b, c, d, e = [1], {1}, {"x": 1, "y": 2}, deque([1], maxlen=1), 1

    def loop(number: int) -> None:
        a.append(number)
        b.add(number)
        c["new"] = c.pop("x")
        d.appendleft(number)
        nonlocal e
        e = number

    with left_as_found(loop, {}, MODEL):
        loop(7)
        assert (a, b, e) == ([1, 7], {1, 7}, 7)
    assert (a, b, c, d, e) == ([1], {1}, {"x": 1, "y": 2}, deque([1]), 1)
    assert list(c) == ["x", "y"]


def test_the_denoiser_is_left_to_the_loop() -> None:
    model = residual()

    def loop() -> None:
        vars(model)["note"] = 1

    with left_as_found(loop, {}, model):
        loop()
    assert model.note == 1


def test_a_restoring_loop_returns_the_same_and_keeps_nothing() -> None:
    scheduler = Scheduler()
    before = state_of(scheduler)
    run = restoring(scheduler.loop, MODEL)
    with torch.no_grad():
        assert torch.equal(run(MODEL, draw(3, 4)), Scheduler().loop(MODEL, draw(3, 4)))  # type: ignore[arg-type]
    assert state_of(scheduler) == before
