"""Segments of a loop against the eager loop."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from l2c_compile.finders import LatentData
from l2c_compile.finders.open_evaluations import OpenEvaluation
from l2c_compile.loops import DDIM, BuiltInLoop, DPMSolver, Guidance
from l2c_compile.methods import learn_l2c, published_pairs
from tests.learning import (
    DIT_SITES,
    settings,
)
from tests.tiny import draw, tiny_dit

LOOPS_FROM_DATA: list[tuple[BuiltInLoop, int]] = [
    (DDIM(steps=4), 2),
    (DDIM(steps=4, guidance=Guidance(1.5, null={"y": 5}, channels=3)), 2),
    (DDIM(steps=4, guidance=Guidance(1.5, null={"y": 5}, batched=False)), 4),
    (DPMSolver(evaluations=6), 2),
    (DPMSolver(evaluations=4, method="multistep"), 0),
]


@pytest.mark.parametrize(
    ("loop", "start"), LOOPS_FROM_DATA, ids=["DDIM", "guided", "in two calls", "DPM-Solver-2", "multistep"]
)
def test_data_go_through_the_loops_own_update(loop: BuiltInLoop, start: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Noised to what the eager loop holds somewhere, the data arrive where the eager loop arrives."""
    model, noise, labels = tiny_dit(), draw(1, 4, 4, 4), torch.tensor([3])
    eager: list[Tensor] = []
    hook = model.register_forward_pre_hook(lambda module, args: eager.append(args[0].clone()))
    with torch.no_grad():
        loop(model, noise, y=labels)
    hook.remove()
    asked: list[int] = []

    def noised(clean: Tensor, noise: Tensor, e: int) -> Tensor:
        asked.append(e)
        return eager[e][:1]

    seen: list[Tensor] = []
    original = OpenEvaluation.observe

    def observe(self: OpenEvaluation, tensors: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        seen.append(tensors[0].clone())
        return original(self, tensors)

    monkeypatch.setattr(OpenEvaluation, "observe", observe)
    data = LatentData(torch.zeros(1, 4, 4, 4), {"y": labels}, dropout=0.0, noised=noised)
    pair = published_pairs(loop)[-1]
    learn_l2c(model, loop, data, DIT_SITES, settings(rounds=1, batch_size=1), pairs=[pair])
    assert asked == [start]
    assert len(seen) == pair[1] - start + 1
    for got, expected in zip(seen, eager[start:], strict=False):
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)
