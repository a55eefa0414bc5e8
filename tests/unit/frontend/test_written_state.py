"""A denoiser may write what does not change its later calls; whatever does is refused, and all is put back."""

from __future__ import annotations

import functools
import itertools
import random
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from l2c_compile import CacheSchedule, CompiledSampler, l2c_compile
from l2c_compile.errors import CaptureError
from tests.tiny import draw, same_bits, steps

Effect = Callable[[Any, Any], Any]
TOTALS = {"calls": 0}
TABLES: dict[int, Tensor] = {}


class Writes(nn.Module):
    """A linear layer with a state of its own, which ``effect`` reads and writes in each call."""

    def __init__(self, effect: Effect) -> None:
        super().__init__()
        self.a = nn.Linear(4, 4)
        self.effect = effect
        self.count, self.is_ready, self.latest, self.table = 0, False, None, None
        self.history: list[object] = []
        self.by_size: dict[int, Tensor] = {}
        self.ticks, self.array = itertools.count(), np.zeros(1)

    def forward(self, x: Tensor, t: Tensor) -> Any:  # noqa: ANN401
        return self.effect(self, self.a(x)) + t[:, None]

    @functools.cached_property
    def ramp(self) -> Tensor:
        return torch.linspace(0.5, 1.0, 4)


def counts(m: Any, h: Any) -> Any:  # noqa: ANN401
    m.count += 1
    return h


def notes_the_size(m: Any, h: Any) -> Any:  # noqa: ANN401
    m.count = h.shape[0]
    return h * m.count


def keeps_the_latest(m: Any, h: Any) -> Any:  # noqa: ANN401
    m.latest = h
    m.history = [h, m.latest]
    return h


def makes_a_table(m: Any, h: Any) -> Any:  # noqa: ANN401
    if not m.is_ready:
        m.table, m.is_ready = torch.arange(4.0).sin(), True
    if 4 not in m.by_size:
        m.by_size[4] = torch.arange(4.0)
    table = TABLES.setdefault(4, torch.ones(4))
    return h + m.table + m.by_size[4] + table + m.ramp


def multiplies_by_its_count(m: Any, h: Any) -> Any:  # noqa: ANN401
    m.count += 1
    return h * m.count


def branches_on_its_count(m: Any, h: Any) -> Any:  # noqa: ANN401
    m.count += 1
    return h if m.count % 3 else h * 2


def is_different_at_first(m: Any, h: Any) -> Any:  # noqa: ANN401
    first, m.is_ready = not m.is_ready, True
    return h if first else h * 2


def carries_the_latest(m: Any, h: Any) -> Any:  # noqa: ANN401
    if m.latest is not None:
        h = h + m.latest
    m.latest = h
    return h


def appends(m: Any, h: Any) -> Any:  # noqa: ANN401
    m.history.append(1)
    return h


def counts_globally(m: Any, h: Any) -> Any:  # noqa: ANN401
    TOTALS["calls"] += 1
    return h * TOTALS["calls"]


def asks_an_iterator(m: Any, h: Any) -> Any:  # noqa: ANN401
    return h * next(m.ticks)


def counts_in_an_array(m: Any, h: Any) -> Any:  # noqa: ANN401
    m.array += 1
    return h * float(m.array[0])


def catches_what_has_no_value(m: Any, h: Any) -> Any:  # noqa: ANN401
    try:
        return h * 0.9 if h.sum() > -1e9 else h * 0.8
    except Exception:
        return h * 0.7


def draws(m: Any, h: Any) -> Any:  # noqa: ANN401
    return h * random.random()


def sampler_of(effect: Effect) -> CompiledSampler:
    torch.manual_seed(0)
    model = Writes(effect).eval()
    return l2c_compile(model, CacheSchedule.all_compute(3, ["a"]), steps(3), check="structure")


def state_of(model: nn.Module) -> dict[str, str]:
    return {name: repr(value) for name, value in vars(model).items() if name not in ("a", "effect")}


@pytest.mark.parametrize("effect", [counts, notes_the_size, keeps_the_latest, makes_a_table])
def test_what_changes_no_later_call_is_taken(effect: Effect) -> None:
    sampler, noise = sampler_of(effect), draw(2, 4)
    before = state_of(sampler.model)
    got = sampler(noise)
    assert state_of(sampler.model) == before
    assert TABLES == {}
    with torch.no_grad():
        assert same_bits(got, sampler.loop(sampler.model, noise.clone()))
    TABLES.clear()


REFUSED: dict[Effect, str] = {
    multiplies_by_its_count: r"'denoiser\.count' was 1 and is 2",
    branches_on_its_count: r"changes its own state \('denoiser\.count'.*asks for a number that every call changes",
    is_different_at_first: r"'denoiser\.is_ready' was False and is True",
    carries_the_latest: r"reads 'denoiser\.latest', which an earlier run left there",
    appends: r"'denoiser\.history\[1\]' is new",
    counts_globally: r"'global TOTALS\['calls'\]' was 1 and is 2",
    asks_an_iterator: r"'denoiser\.ticks\.position'",
    counts_in_an_array: r"'denoiser\.array\.elements'",
    catches_what_has_no_value: r"catches the error that it gets while it is captured.*use torch\.where",
    draws: r"draws from the random number generator of random, or seeds it, in a call",
}


@pytest.mark.parametrize("effect", REFUSED)
def test_what_changes_a_later_call_is_refused_and_put_back(effect: Effect) -> None:
    sampler = sampler_of(effect)
    before = state_of(sampler.model)
    state = random.getstate()
    with pytest.raises(CaptureError, match=REFUSED[effect]):
        sampler(draw(2, 4))
    assert random.getstate() == state
    # An iterator and an array cannot be put back.
    for name in state_of(sampler.model):
        assert name in ("ticks", "array") or state_of(sampler.model)[name] == before[name]
    assert TOTALS == {"calls": 0}


def test_a_weight_that_a_hook_makes_anew_in_every_call_is_taken() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        layer = torch.nn.utils.weight_norm(nn.Linear(4, 4))
    model, noise = Writes(lambda module, h: module.layer(h)), draw(2, 4)
    model.layer = layer
    loop = steps(3)
    got = l2c_compile(model, CacheSchedule.all_compute(3, ["layer"]), loop)(noise)
    with torch.no_grad():
        assert same_bits(got, loop(model, noise))


def test_a_python_number_that_is_counted_and_returned_is_refused() -> None:
    class Pair(nn.Module):
        count = 0

        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Linear(4, 4)

        def forward(self, x: Tensor, t: Tensor) -> tuple[Tensor, int]:
            self.count += 1
            return self.a(x), self.count

    def loop(denoiser: Any, x: Tensor) -> Tensor:  # noqa: ANN401
        for _ in range(2):
            h, count = denoiser(x, torch.zeros(2))
            x = x + h * count
        return x

    with pytest.raises(CaptureError, match=r"Pair changes its own state in every call"):
        l2c_compile(Pair(), CacheSchedule.all_compute(2, ["a"]), loop, check="structure")(draw(2, 4))
