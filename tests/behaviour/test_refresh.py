"""Constants made anew after weights changed."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from l2c_compile import CompiledSampler, load
from l2c_compile.errors import (
    StaleConstantsError,
)
from tests.saved_samplers import compiled, equal, flat, inputs


@pytest.fixture(scope="module")
def sampler() -> CompiledSampler:
    return compiled()


class TestRefresh:
    def test_a_saved_sampler_follows_weights_that_changed(self, tmp_path: Path) -> None:
        sampler = compiled("rounding")
        before = flat(sampler)
        with torch.no_grad():
            for weight in sampler.model.parameters():
                weight.add_(0.1)
        with pytest.raises(StaleConstantsError, match="changed since"):
            sampler.save(tmp_path / "x.pt2")
        sampler.refresh()
        sampler.save(tmp_path / "x.pt2")
        after = flat(sampler)
        assert equal(flat(load(tmp_path / "x.pt2")), after)
        assert not equal(before, after)

    @pytest.mark.parametrize("numerics", ["bitwise", "rounding"])
    @pytest.mark.parametrize("replace", [False, True])
    def test_each_weight_is_followed_or_found_stale(self, numerics: str, replace: bool) -> None:
        sampler = compiled(numerics)
        noise, y = inputs()
        sampler.capture(noise, y=y, scale=0.5)
        torch.manual_seed(3)
        stale = set()
        for name, weight in list(sampler.model.named_parameters()):
            changed = weight.detach() + torch.randn_like(weight)
            owner, _, attribute = name.rpartition(".")
            if replace:
                setattr(sampler.model.get_submodule(owner), attribute, nn.Parameter(changed))
            else:
                with torch.no_grad():
                    weight.copy_(changed)
            try:
                report = sampler.verify(noise, y=y, scale=0.5)
            except StaleConstantsError:
                stale.add(name)
                sampler.refresh()
                report = sampler.verify(noise, y=y, scale=0.5)
            # Rounding: a few operations in another order, at 3 evaluations of values around 1.
            limit = 0 if numerics == "bitwise" else 100 * torch.finfo(noise.dtype).eps
            assert report.relative_error <= limit, name
        # Only timesteps meet these two before they meet the input.
        assert stale == {"time.weight", "time.bias"}

    def test_a_program_of_weights_that_moved_is_not_saved(self, tmp_path: Path) -> None:
        sampler = compiled()
        noise, y = inputs()
        sampler.capture(noise, y=y, scale=0.5)
        sampler.model.double()
        with pytest.raises(StaleConstantsError, match="give save the inputs"):
            sampler.save(tmp_path / "x.pt2")
