"""The oracle: what it computes, skips, records and leaves behind."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from l2c_compile import CacheSchedule, Site, l2c_compile, run_reference
from l2c_compile.errors import ScheduleError
from tests.tiny import at, check_equals_reference, draw, residual, same_bits, steps


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


def hooked(site: str, hook: Any) -> nn.Module:  # noqa: ANN401
    model: nn.Module = residual()
    hook(model.get_submodule(site))
    return model


HOOKS = {
    "output": lambda module: module.register_forward_hook(lambda _, args, out: out * 1.5),
    "input": lambda module: module.register_forward_pre_hook(lambda _, args: (args[0] * 1.5,)),
    "always": lambda module: module.register_forward_hook(lambda _, args, out: out + args[0], always_call=True),
    "named": lambda module: module.register_forward_hook(lambda _, a, k, out: out * 2, with_kwargs=True),
}


@pytest.mark.parametrize("site", ["b", "delta(b)"])
@pytest.mark.parametrize("hook", HOOKS.values(), ids=HOOKS)
def test_a_site_is_what_a_call_returns_hooks_of_the_users_included(hook: Any, site: str) -> None:  # noqa: ANN401
    check_equals_reference(hooked("b", hook), CacheSchedule.from_table({site: [1, 0, 1]}), steps(3), draw(3, 4))


def test_where_a_site_is_reused_its_hooks_do_not_run() -> None:
    ran = list[int]()
    model = hooked("a", lambda module: module.register_forward_hook(lambda *_: ran.append(1)))
    run_reference(model, steps(4), CacheSchedule.from_table({"a": [1, 0, 0, 1]}), draw(3, 4), {})
    assert len(ran) == 2
    assert "_compiled_call_impl" not in vars(model.a)
    assert len(model.a._forward_hooks) == 1  # type: ignore[union-attr]


class Swapping(nn.Module):
    """Takes a tensor and returns one of another dtype, or two."""

    def __init__(self, made: Any) -> None:  # noqa: ANN401
        super().__init__()
        self.made = made

    def forward(self, x: Tensor) -> Any:  # noqa: ANN401
        return self.made(x)


@pytest.mark.parametrize("made", [lambda x: x > 0, lambda x: (x, x), lambda x: x[:1]])
def test_a_change_that_is_not_defined_is_refused_as_by_the_compiler(made: Any) -> None:  # noqa: ANN401
    model: Any = residual()
    model.norm = nn.Sequential(Swapping(made), Swapping(lambda y: y[0] * 1.0 if isinstance(y, tuple) else y * 1.0))
    schedule = CacheSchedule.from_table({"delta(norm.0)": [1, 0]})
    with pytest.raises(ScheduleError, match="reuse its output instead"):
        run_reference(model, steps(2), schedule, draw(3, 4), {})
    with pytest.raises(ScheduleError, match="reuse its output instead"):
        l2c_compile(model, schedule, steps(2))(draw(3, 4))


def test_a_denoiser_that_is_no_module_is_refused() -> None:
    with pytest.raises(ScheduleError, match=r"wants a denoiser that is an nn\.Module"):
        run_reference(len, steps(2), CacheSchedule.all_compute(2), draw(3, 4), {})  # type: ignore[arg-type]
