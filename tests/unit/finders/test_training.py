"""Learning round by round: what is left as it was, interruption, and checkpoints."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from l2c_compile import Router
from l2c_compile.errors import FileFormatError, ScheduleError
from l2c_compile.finders.training import RoundReport
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


def test_squared_errors_can_be_summed_over_a_sample(training_steps: list[Step]) -> None:
    for reduction in ("mean", "sum"):
        learn_l2c(residual(), DDIM(steps=2), draw_latents, SITES, settings(rounds=1, penalty=1e-9, reduction=reduction))
    assert float(training_steps[1][1]) == pytest.approx(4 * float(training_steps[0][1]), rel=1e-4)


def test_training_leaves_the_model_as_it_was() -> None:
    model = residual()
    model.a.bias.requires_grad_(False)
    before = {name: (p.clone(), p.requires_grad) for name, p in model.named_parameters()}
    state = torch.get_rng_state()
    learn_l2c(model, DDIM(steps=2), draw_latents, SITES, settings())
    assert torch.equal(state, torch.get_rng_state())
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name][0])
        assert parameter.requires_grad == before[name][1]
        assert parameter.grad is None


def learned(path: Path | None = None, stop_after: int | None = None, **changes: Any) -> Router:  # noqa: ANN401
    class Stop(Exception):
        pass

    def on_round(report: RoundReport) -> None:
        if report.round == stop_after:
            raise Stop

    chosen = settings(**{"rounds": 7, "budget": 0.7, "checkpoint_every": 2, **changes})
    try:
        return learn_l2c(
            residual(), DDIM(steps=4, eta=0.5), draw_latents, SITES, chosen, checkpoint=path, on_round=on_round
        )
    except Stop:
        return learned(path, **changes)


@pytest.mark.parametrize("stop_after", [1, 2, 5, 6])
def test_an_interrupted_run_ends_where_an_undisturbed_one_does(tmp_path: Path, stop_after: int) -> None:
    assert learned(tmp_path / "c", stop_after) == learned()


def test_more_rounds_go_on_from_a_finished_run(tmp_path: Path) -> None:
    learned(tmp_path / "c", rounds=3)
    assert learned(tmp_path / "c", rounds=7) == learned()


def test_a_checkpoint_of_something_else_is_refused_and_kept(tmp_path: Path) -> None:
    path = tmp_path / "c"
    learned(path)
    before = path.read_bytes()
    with pytest.raises(ScheduleError, match="was made with another learning_rate, seed"):
        learned(path, seed=3, learning_rate=0.5)
    assert path.read_bytes() == before
    path.write_bytes(before[: len(before) // 2])
    with pytest.raises(FileFormatError, match="no checkpoint"):
        learned(path)
    residual_router = learned()
    residual_router.save(path)
    with pytest.raises(FileFormatError, match="no checkpoint"):
        learned(path)


def test_a_budget_of_time_is_resumed_with_the_times_it_began_with(tmp_path: Path) -> None:
    """Measured again they would be others, so that two runs agree only if the resumed one keeps them."""
    path = tmp_path / "c"
    changes: dict[str, Any] = {"budget": 0.95, "budget_in": "time", "price_by": "time"}
    whole = learned(path, rounds=2, **changes)
    assert learned(path, rounds=2, **changes) == whole


def test_a_checkpoint_that_lacks_a_part_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "c"
    learned(path)
    with safetensors.safe_open(path, framework="pt") as file:
        metadata = file.metadata()
        tensors = {name: file.get_tensor(name) for name in file.keys() if name != "logits.3"}  # noqa: SIM118
    path.write_bytes(safetensors.torch.save(tensors, metadata))
    with pytest.raises(FileFormatError, match="parts of it are missing"):
        learned(path)
