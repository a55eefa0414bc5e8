"""Data with noise as the loop holds it."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from l2c_compile.errors import ScheduleError
from l2c_compile.finders import LatentData
from l2c_compile.loops import DDIM, DPMSolver, FlowEuler, Guidance
from tests.tiny import draw


def test_data_are_noised_as_the_loop_holds_them_and_some_labels_dropped() -> None:
    data = LatentData(torch.ones(50, 4), {"y": torch.arange(50)}, null={"y": 99}, dropout=0.3)
    clean, conditions = data.draw_clean(1000, torch.Generator().manual_seed(0))
    labels = conditions["y"]
    assert isinstance(labels, Tensor)
    assert clean.shape == (1000, 4)
    assert 0.2 < float((labels == 99).float().mean()) < 0.4
    loop = DDIM(steps=5)
    for (signal, sigma), t in zip(loop.noise_levels, loop.timesteps, strict=True):
        assert signal**2 == pytest.approx(float(loop.betas.alphas_bar()[int(t)]))
        assert signal**2 + sigma**2 == pytest.approx(1)
    solver = DPMSolver(evaluations=4, guidance=Guidance(1.5, null={"y": 5}, batched=False))
    assert len(solver.noise_levels) == 8
    assert solver.noise_levels[0] == solver.noise_levels[1] != solver.noise_levels[2]
    assert FlowEuler(steps=2).noise_levels == ((0.0, 1.0), (0.5, 0.5))


def test_data_of_unequal_length_are_refused() -> None:
    with pytest.raises(ScheduleError, match="3 latents, but 2 of condition 'y'"):
        LatentData(draw(3, 4), {"y": torch.zeros(2)})
