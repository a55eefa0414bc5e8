"""What computing costs, and budgets that are met."""

from __future__ import annotations

import pytest
import torch

from l2c_compile import l2c_compile
from l2c_compile.finders.training import RoundReport
from l2c_compile.loops import DDIM
from l2c_compile.methods import learn_l2c
from tests.learning import (
    DIT_SITES,
    Step,
    draw_images,
    draw_large_images,
    many_tokens,
    settings,
    training_steps,
)
from tests.tiny import tiny_dit

__all__ = ["training_steps"]


@pytest.mark.parametrize("budget", [0.65, 0.8])
def test_a_budget_of_multiply_adds_is_met(budget: float) -> None:
    model, loop = many_tokens(), DDIM(steps=6)
    router = learn_l2c(model, loop, draw_large_images, DIT_SITES, settings(rounds=8, batch_size=1, budget=budget))
    noted = router.info["kept_multiply-adds"]
    assert isinstance(noted, float)
    # The smallest site is an attention, 1 of 6 * (1 + 2) parts.
    assert budget - 1 / 18 < noted <= budget
    sampler = l2c_compile(model, router, loop)
    sampler.capture(*draw_large_images(1, torch.Generator())[:1], y=torch.zeros(1, dtype=torch.int64))
    # Conditioning is shared, folded and pruned in the static graph, but whole in the estimate: 1% of this model.
    assert sampler.summary().multiply_adds_kept == pytest.approx(noted, abs=0.02)


def test_a_budget_of_time_is_met() -> None:
    chosen = settings(rounds=8, batch_size=1, budget=0.9, budget_in="time", price_by="time")
    router = learn_l2c(many_tokens(), DDIM(steps=2), draw_large_images, DIT_SITES, chosen)
    assert 0.5 < router.info["kept_time"] <= 0.9  # type: ignore[operator]
    assert router.schedule().reuses


def test_prices_follow_what_a_site_takes(training_steps: list[Step]) -> None:
    model = tiny_dit(depth=1)
    for price_by in ("sites", "multiply-adds"):
        chosen = settings(rounds=1, penalty=1e3, price_by=price_by)
        learn_l2c(model, DDIM(steps=2), draw_images, DIT_SITES, chosen)
    shares = []
    for before, _, gradients in training_steps:
        r = before[1].sigmoid()
        weights = gradients[1] / (1e3 * r * (1 - r))
        shares.append(float(weights[1] / weights[0]))
    # Four matrices of D x D against two of D x 4 D; torch counts no multiply-adds for fused attention itself.
    assert shares == pytest.approx([1.0, 2.0], rel=1e-3)


def test_nested_sites_share_their_price() -> None:
    reports: list[RoundReport] = []
    chosen = settings(rounds=8, penalty=1e4, learning_rate=1.0, budget_in="multiply-adds")
    sites = ["blocks.0", "blocks.0.mlp", "blocks.0.attn"]
    learn_l2c(tiny_dit(), DDIM(steps=2), draw_images, sites, chosen, on_round=reports.append)
    whole = learn_l2c(tiny_dit(), DDIM(steps=2), draw_images, ["blocks.0"], chosen, on_round=reports.append)
    assert whole.cacheable == (1,)
    assert reports[7].kept == pytest.approx(reports[-1].kept)
