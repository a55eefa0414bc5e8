"""Random programs in Python: each call of a sampler equals eager torch, or is refused with an error of ours.

A bounded slice, the same draws on every machine; ``python -m bench fuzz --python`` goes on from here.
"""

from __future__ import annotations

import random
import sys
from collections.abc import Callable
from dataclasses import replace
from typing import Any, Literal

import pytest
import torch

from bench.trust.programs.checking import Mismatch
from bench.trust.programs.denoisers import Description
from bench.trust.programs.python.changes import HOLDERS, MODULES, WEIGHTS
from bench.trust.programs.python.checking import PythonChecker
from bench.trust.programs.python.drawing import PythonProgram, counted, draw_python_programs
from bench.trust.programs.python.features import FEATURES, VALUES
from bench.trust.programs.python.source import World
from bench.trust.programs.shrinking import failure_of, minimise
from l2c_compile import CompiledSampler
from l2c_compile.errors import PassFailed, ScheduleError

CALL: Description = {"seed": 0, "batch": 2, "value": "1.0"}
NOTHING = PythonProgram(None, None, [], 3, [], [], "first", "eager", False, [CALL, CALL])

CHANGES = [
    *((feature, change) for feature, each in FEATURES.items() for change in each.changes),
    *(("", change) for change in (*WEIGHTS, *MODULES, *HOLDERS)),
]


def program_of(feature: str = "", change: str = "") -> PythonProgram:
    """Return the program of one feature and one change."""
    changes: list[Description] = [{"change": change}] if change else []
    history = [CALL, *changes, CALL]
    return replace(NOTHING, features=[feature] if feature else [], history=history)


@pytest.mark.parametrize("seed", range(12))
def test_a_random_program_in_python_equals_eager_torch_or_is_refused(seed: int) -> None:
    PythonChecker().check(next(draw_python_programs(random.Random(seed))))


@pytest.mark.parametrize("feature", FEATURES)
def test_each_feature_is_one_that_eager_torch_runs(feature: str) -> None:
    assert counted(program_of(feature)) is not None


@pytest.mark.parametrize(("feature", "change"), CHANGES)
def test_each_change_is_one_that_eager_torch_runs(feature: str, change: str) -> None:
    program = program_of(feature, change)
    # What is done to a sampler has another line for the twin, which has none.
    assert program.runs_eagerly()


@pytest.mark.parametrize("value", VALUES)
def test_each_value_of_a_condition_is_one_that_eager_torch_runs(value: str) -> None:
    program = program_of("value given to the denoiser")
    assert replace(program, history=[{**CALL, "value": value}]).runs_eagerly()


@pytest.mark.slow(reason="each of the features that have to compile is compiled alone")
@pytest.mark.parametrize("feature", [name for name, each in FEATURES.items() if each.works])
@pytest.mark.parametrize("check", ["first", "structure", None])
def test_what_has_to_compile_compiles(feature: str, check: Literal["first", "structure"] | None) -> None:
    assert PythonChecker().check(replace(program_of(feature), check=check)).refused == ""


def test_a_seed_draws_the_same_programs_each_time_and_each_comes_back_from_its_line() -> None:
    first, second = (list(draw_python_programs(random.Random(5))) for _ in range(2))
    assert first == second
    assert [PythonProgram.from_json(program.to_json()) for program in first] == first


def test_the_draws_cover_what_they_are_for() -> None:
    programs = [program for seed in range(40) for program in draw_python_programs(random.Random(seed))]
    assert {program.check for program in programs} == {"first", "structure"}
    assert {program.backend for program in programs} == {"eager", "aot_eager"}
    assert {bool(program.entries) for program in programs} == {True, False}
    assert any(program.net for program in programs)
    assert any(program.steps for program in programs)
    drawn = {thing for program in programs for thing in program.things}
    assert len(drawn & FEATURES.keys()) > len(FEATURES) / 2
    assert drawn & WEIGHTS.keys()
    assert drawn & MODULES.keys()
    assert drawn & HOLDERS.keys()


def test_two_worlds_of_a_program_share_nothing() -> None:
    program = program_of("counter of the class")
    with World(program.source) as one, World(program.source) as other:
        program.run_eagerly(one, CALL)
        assert (one.module.Denoiser.total, other.module.Denoiser.total) == (3, 0)
        names = {one.module.__name__, other.module.__name__}
        assert names <= sys.modules.keys()
    assert not names & sys.modules.keys()


# What is wrong is found.


def sampling(monkeypatch: pytest.MonkeyPatch, forward: Callable[..., object]) -> None:
    """Replace what a sampler does in a call."""
    monkeypatch.setattr(CompiledSampler, "forward", forward)


def fails(program: PythonProgram, match: str) -> None:
    with pytest.raises(Mismatch, match=match):
        PythonChecker().check(program)


def test_a_result_that_is_slightly_wrong_is_found_and_made_small(monkeypatch: pytest.MonkeyPatch) -> None:
    forward: Callable[..., Any] = CompiledSampler.forward
    sampling(monkeypatch, lambda self, noise, **given: forward(self, noise, **given) * (1 + 1e-15))
    program = replace(program_of("number attribute", "weight written in place"), backend="aot_eager")
    assert failure_of(program, PythonChecker.check) == ""
    program = replace(program, backend="eager")
    fails(program, "another result without a change")
    smaller = minimise(program, check=PythonChecker.check)
    assert (smaller.features, smaller.history) == ([], [CALL])


def test_a_stale_result_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    forward: Callable[..., Any] = CompiledSampler.forward
    known: dict[int, object] = {}

    def first_result(self: CompiledSampler, noise: torch.Tensor, **given: object) -> object:
        if id(self) not in known:
            known[id(self)] = forward(self, noise, **given).clone()
        return known[id(self)]

    sampling(monkeypatch, first_result)
    fails(program_of("number attribute", "number attribute"), "another result after number attribute")


def test_a_raw_error_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    def raises(self: CompiledSampler, noise: torch.Tensor) -> object:
        raise TypeError("planted")

    sampling(monkeypatch, raises)
    fails(NOTHING, "raw TypeError without a change: planted")


def test_a_bug_of_ours_is_no_refusal(monkeypatch: pytest.MonkeyPatch) -> None:
    def raises(self: CompiledSampler, noise: torch.Tensor) -> object:
        raise PassFailed("planted")

    sampling(monkeypatch, raises)
    fails(NOTHING, "PassFailed: planted")


def test_a_false_alarm_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuses(self: CompiledSampler, noise: torch.Tensor) -> object:
        raise ScheduleError("planted")

    sampling(monkeypatch, refuses)
    fails(program_of("number attribute"), "false alarm: ScheduleError: planted")
    assert PythonChecker().check(program_of("counter")).refused == "ScheduleError: planted"


def test_a_refusal_that_does_not_last_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[object] = []

    def refuses_once(self: CompiledSampler, noise: torch.Tensor) -> object:
        calls.append(noise)
        if len(calls) == 1:
            raise ScheduleError("planted")
        return 2 * noise

    sampling(monkeypatch, refuses_once)
    fails(program_of("counter"), "not refused again without a change")


def test_another_random_state_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    forward: Callable[..., Any] = CompiledSampler.forward

    def draws(self: CompiledSampler, noise: torch.Tensor) -> object:
        random.random()
        return forward(self, noise)

    sampling(monkeypatch, draws)
    fails(NOTHING, "another random state than eager torch's without a change")


def test_what_is_left_without_values_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    def leaves_a_fake(self: CompiledSampler, noise: torch.Tensor) -> object:
        with torch._subclasses.FakeTensorMode():
            self.model.table = {"kept": [torch.ones(2)]}  # type: ignore[assignment]
        raise ScheduleError("planted")

    sampling(monkeypatch, leaves_a_fake)
    fails(program_of("counter"), "a FakeTensor is left in the program")


def test_a_model_that_is_left_changed_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    def leaves_a_hook(self: CompiledSampler, noise: torch.Tensor) -> object:
        self.model.register_forward_hook(lambda module, args, output: output * 2)
        raise ScheduleError("planted")

    sampling(monkeypatch, leaves_a_hook)
    fails(program_of("result kept for nobody"), "eager loop gives another result")
