"""``l2c_compile``: what is given decides which sampler is made."""

from __future__ import annotations

import pytest
from torch import Tensor, nn

from l2c_compile import CacheSchedule, l2c_compile
from l2c_compile.errors import CaptureError, LoopError, ScheduleError
from l2c_compile.loops import DDIM
from l2c_compile.passes.pipeline import LOOP
from tests.tiny import check_equals_reference, draw, residual, same_bits, seeded, steps


def test_the_loop_of_the_schedule_is_taken_where_none_is_given() -> None:
    table = {"a": [1, 0]}
    model, x = residual(), draw(3, 4)
    described = CacheSchedule.from_table(table, loop=DDIM(2).to_dict())
    given = check_equals_reference(model, CacheSchedule.from_table(table), DDIM(2), x)
    assert same_bits(l2c_compile(model, described)(x), given(x))


@pytest.mark.parametrize("without", [["read-reused-sites"], [each.name for each in LOOP.passes]], ids=["alone", "all"])
def test_the_pass_that_applies_the_schedule_cannot_be_left_out(without: list[str]) -> None:
    schedule = CacheSchedule.from_table({"a": [1, 0, 1]})
    with pytest.raises(ValueError, match=r"the pass that applies the schedule; .* CacheSchedule\.all_compute"):
        l2c_compile(residual(), schedule, steps(3), without=without)


def test_what_is_no_module_or_no_loop_is_refused_before_it_is_called() -> None:
    schedule = CacheSchedule.from_table({"a": [1, 0]})
    for model in (len, None, nn.Linear):
        with pytest.raises(CaptureError, match=r"wants a denoiser that is an nn\.Module, got"):
            l2c_compile(model, schedule, steps(2))  # type: ignore[arg-type]
    with pytest.raises(LoopError, match=r"wants a loop .*got 3"):
        l2c_compile(residual(), schedule, 3)  # type: ignore[arg-type]


class Named(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.parts = nn.ModuleDict({"conv 1": nn.Linear(4, 4), "conv(3x3)": nn.Linear(4, 4)})

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        for part in self.parts.values():
            x = x + part(x)
        return x


@pytest.mark.parametrize("site", ["parts.conv 1", "parts.*", "delta(parts.conv(3x3))"])
def test_module_names_may_have_spaces_and_parentheses(site: str) -> None:
    check_equals_reference(seeded(Named()), CacheSchedule.from_table({site: [1, 0]}), steps(2), draw(3, 4))


@pytest.mark.parametrize("site", ["parts.a@1", "parts.*"])
def test_a_module_whose_name_no_site_can_spell_is_named(site: str) -> None:
    model = Named()
    model.parts["a@1"] = nn.Linear(4, 4)
    with pytest.raises(ScheduleError, match=r"module 'parts\.a@1', whose name a site cannot spell .*; rename it"):
        l2c_compile(model, CacheSchedule.from_table({site: [1, 0]}), steps(2))
