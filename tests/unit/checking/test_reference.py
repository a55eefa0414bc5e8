"""The oracle: what it computes, skips, records and leaves behind."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from l2c_compile import CacheSchedule, Site, run_reference
from l2c_compile.errors import ScheduleError
from tests.tiny import at, draw, residual, same_bits, steps


def test_without_reuse_it_is_the_plain_loop() -> None:
    model, x = residual(), draw(3, 4)
    with torch.no_grad():
        wanted = steps(3)(model, x)
    assert same_bits(run_reference(model, steps(3), CacheSchedule.all_compute(3, ["a"]), x, {}), wanted)


def test_a_reused_value_is_the_one_of_its_source() -> None:
    model, x = residual(), draw(3, 4)
    got = run_reference(model, steps(2), CacheSchedule.from_table({"a": [1, 0]}), x, {})
    kept: list[Tensor] = []

    def by_hand(x: Tensor, t: Tensor) -> Tensor:
        c = torch.sin(model.time(t[:, None]))
        if not kept:
            kept.append(model.a(model.norm(x)))
        x = x + kept[0]
        return x + c * model.b(torch.tanh(x))  # type: ignore[no-any-return]

    with torch.no_grad():
        assert same_bits(got, steps(2)(by_hand, x))


def test_a_reused_change_is_added_to_the_current_input() -> None:
    model, x = residual(), draw(3, 4)
    got = run_reference(model, steps(2), CacheSchedule.from_table({"delta(b)": [1, 0]}), x, {})
    kept: list[Tensor] = []

    def by_hand(x: Tensor, t: Tensor) -> Tensor:
        c = torch.sin(model.time(t[:, None]))
        x = x + model.a(model.norm(x))
        into = torch.tanh(x)
        if not kept:
            kept.append(model.b(into) - into)
            return x + c * model.b(into)  # type: ignore[no-any-return]
        return x + c * (into + kept[0])

    with torch.no_grad():
        assert same_bits(got, steps(2)(by_hand, x))


def test_a_reused_module_does_not_run(monkeypatch: pytest.MonkeyPatch) -> None:
    model = residual()
    original, ran = model.a.forward, list[int]()

    def forward(x: Tensor) -> Tensor:
        ran.append(1)
        return original(x)

    monkeypatch.setattr(model.a, "forward", forward)
    run_reference(model, steps(4), CacheSchedule.from_table({"a": [1, 0, 0, 1]}), draw(3, 4), {})
    assert len(ran) == 2
    assert model.a.forward is forward


@pytest.mark.parametrize("fails", [False, True])
def test_the_denoiser_is_restored(fails: bool) -> None:
    model = residual()

    def loop(denoiser: Any, x: Tensor) -> Any:  # noqa: ANN401
        x = denoiser(x, at(x, 1))
        if fails:
            raise KeyError("mine")
        return x

    try:
        run_reference(model, loop, CacheSchedule.all_compute(1, ["a", "norm"]), draw(3, 4), {})
    except KeyError:
        assert fails
    assert not any("forward" in module.__dict__ for module in model.modules())


@pytest.mark.parametrize("performed", [1, 3])
def test_another_number_of_evaluations_is_refused(performed: int) -> None:
    with pytest.raises(ScheduleError, match="is for 2 evaluations, the loop perform"):
        run_reference(residual(), steps(performed), CacheSchedule.all_compute(2, ["a"]), draw(3, 4), {})


def test_computed_values_are_told_and_reused_ones_are_not() -> None:
    told: list[tuple[int, str, int]] = []

    def record(evaluation: int, site: Site, port: int, value: Tensor) -> None:
        told.append((evaluation, str(site), port))

    schedule = CacheSchedule.from_table({"a": [1, 0, 1], "b": [1, 1, 0]})
    run_reference(residual(), steps(3), schedule, draw(3, 4), {}, record=record)
    assert told == [(0, "a", 0), (0, "b", 0), (1, "b", 0), (2, "a", 0)]
