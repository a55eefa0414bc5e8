"""gate-at-source: gates known before the loop are applied where a value is made."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from tests.residual_loops import (
    DIM,
    Residuals,
    compiled,
    every_layer,
    kept_per_evaluation,
    report,
)


def test_gates_known_before_the_loop_let_a_run_be_kept_as_one_sum() -> None:
    rows = every_layer(5, [1, 0, 1, 0])
    apart = compiled(Residuals(5, gated=True), rows, without=["gate-at-source"])
    one = compiled(Residuals(5, gated=True), rows)
    assert max(kept_per_evaluation(apart)) == 5
    assert kept_per_evaluation(one) == [3, 1, 3, 1]
    assert report(one, "gate-at-source")[0] == 2


def test_a_run_that_two_evaluations_read_becomes_two_sums_if_it_has_three_terms() -> None:
    two_sums = compiled(Residuals(3, gated=True), every_layer(3, [1, 0, 0]))
    assert kept_per_evaluation(two_sums)[1:] == [2, 1]
    two_values = compiled(Residuals(2, gated=True), every_layer(2, [1, 0, 0]))
    rewrites, reasons = report(two_values, "gate-at-source")
    assert rewrites == 0
    assert "as many sums as values" in reasons


def test_gates_stay_where_a_value_is_read_alone_as_well() -> None:
    rows = {"layers.0": [1, 0, 0], "layers.1": [1, 0, 1]}
    rewrites, reasons = report(compiled(Residuals(2, gated=True), rows), "gate-at-source")
    assert rewrites == 0
    assert "is also read by" in reasons


class GatedByLatent(nn.Module):
    """The gate looks at the latent, so it does not exist before its evaluation."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(DIM, DIM) for _ in range(2))

    def forward(self, x_BD: Tensor, t_B: Tensor, y_B: Tensor) -> Tensor:
        gate = torch.sigmoid(x_BD)
        for layer in self.layers:
            x_BD = x_BD + gate * layer(x_BD)
        return x_BD


def test_a_gate_made_from_the_latent_stays_in_its_evaluation() -> None:
    sampler = compiled(GatedByLatent(), every_layer(2, [1, 0, 1, 0]))
    assert report(sampler, "gate-at-source")[0] == 0
    assert max(kept_per_evaluation(sampler)) == 2
