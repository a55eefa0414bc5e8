"""The denoisers that commands know by name."""

from __future__ import annotations

import pytest
import torch

from l2c_compile import CacheSchedule
from l2c_compile.errors import ScheduleError
from l2c_compile.loops import DDIM, DPMSolver
from l2c_compile.models.named import named_model, tolerance


def test_the_digits_model_has_weights_and_published_sizes_have_none() -> None:
    digits, published = named_model("Digits", with_weights=True), named_model("dit-xl/2")
    assert digits.device.type == "cpu"
    assert published.device.type == "meta"
    with pytest.raises(ScheduleError, match="DiT-XL/2 has no weights here"):
        named_model("dit-xl/2", with_weights=True)
    with pytest.raises(ScheduleError, match=r"no model is called 'dit-xl/3'; did you mean .*'dit-xl/2'"):
        named_model("dit-xl/3")


@pytest.mark.parametrize(("name", "num_sites"), [("digits", 16), ("dit-s/2", 24), ("u-vit-m/2", 34)])
def test_its_sublayers_are_modules_that_it_has(name: str, num_sites: int) -> None:
    known = named_model(name)
    paths = [path for path, _ in known.denoiser.named_modules()]
    sites = CacheSchedule.all_compute(2, known.sublayers).resolve(paths).sites
    assert len(sites) == num_sites
    stacks = [site for each in known.stacks for site in CacheSchedule.all_compute(2, [each]).resolve(paths).sites]
    assert len(stacks) == (0 if name.startswith("u-vit") else 2)


def test_its_loop_is_that_of_its_authors() -> None:
    digits, uvit = named_model("digits"), named_model("u-vit-m/2")
    assert isinstance(digits.loop(4), DDIM)
    assert isinstance(uvit.loop(4), DPMSolver)
    assert digits.loop(4).num_evaluations == 4
    assert digits.loop(4, branches=2).num_evaluations == 8


def test_a_schedule_says_which_loop_it_is_for() -> None:
    digits = named_model("digits")
    plain = CacheSchedule.all_compute(6, ["blocks.0.attn"])
    assert digits.loop_of(plain) == digits.loop(6)
    named = CacheSchedule.from_table({"blocks.0.attn": [1] * 6}, loop=DDIM(6).to_dict())
    assert digits.loop_of(named) == DDIM(6)
    with pytest.raises(ScheduleError, match="for 6 evaluations, ddim makes 4"):
        digits.loop_of(plain, steps=4)


def test_inputs_are_those_of_the_seed() -> None:
    digits = named_model("digits")
    noise, labels = digits.inputs(12, seed=3)
    assert (noise.shape, labels.tolist()) == ((12, 1, 8, 8), [*range(10), 0, 1])
    assert torch.equal(noise, digits.inputs(12, seed=3)[0])
    assert not torch.equal(noise, digits.inputs(12, seed=4)[0])


def test_the_tolerance_grows_with_the_evaluations() -> None:
    assert tolerance(50) == 50 * tolerance(1)
    assert 0 < tolerance(50) < 1e-3
