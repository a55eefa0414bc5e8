"""Logits: where they begin, how far they go, and what they are mixed with."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from l2c_compile.loops import DDIM
from l2c_compile.methods import learn_l2c
from tests.learning import (
    SITES,
    Step,
    draw_latents,
    settings,
    training_steps,
)
from tests.tiny import residual

__all__ = ["training_steps"]


def test_logits_begin_standard_normal_and_are_clamped() -> None:
    seen: list[Tensor] = []
    chosen = settings(rounds=10, penalty=100.0, learning_rate=1.0)
    learn_l2c(residual(), DDIM(steps=4), draw_latents, SITES, chosen, on_round=lambda r: seen.append(r.router().scores))
    assert seen[-1][1].tolist() == pytest.approx([torch.sigmoid(torch.tensor(-5.0)).item()] * 2)
    assert len(set(seen[0][[1, 3]].flatten().tolist())) == 4


def test_straight_through_mixes_with_rounded_scores(training_steps: list[Step]) -> None:
    chosen = settings(rounds=1, penalty=1e-9, straight_through=True, threshold=0.01)
    learn_l2c(residual(), DDIM(steps=2), draw_latents, SITES, chosen)
    # All scores are above the threshold: the student computes everything, so it is the teacher.
    assert float(training_steps[0][1]) < 1e-8
    chosen = settings(rounds=10, budget=0.9, straight_through=True)
    router = learn_l2c(residual(), DDIM(steps=4), draw_latents, SITES, chosen)
    assert router.info["kept_multiply-adds"] <= 0.9  # type: ignore[operator]
