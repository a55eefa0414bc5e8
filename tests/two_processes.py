"""Learn tiny routers in one of two processes; ``tests/unit/finders/test_processes.py`` starts them."""

from __future__ import annotations

import os
import time
from pathlib import Path

import torch
from accelerate import Accelerator

from l2c_compile import Router
from l2c_compile.finders.training import RoundReport
from l2c_compile.loops import DDIM
from l2c_compile.methods import L2CSettings, RolloutSettings, learn_l2c, learn_rollout
from tests.learning import draw_latents
from tests.tiny import residual

METHODS = ("l2c", "rollout")
_ROUNDS = 7
_WAITS_IN = 3
"""The round, past the first checkpoint, in which a process that is to be killed waits for it."""


def learn(
    method: str, checkpoint: Path | None, accelerator: Accelerator | None = None, *, waits: bool = False
) -> Router:
    """Return the learned router; every call with the same method learns the same one, or waits to be killed."""

    def on_round(report: RoundReport) -> None:
        while waits and report.round == _WAITS_IN:
            time.sleep(1)

    given = (residual(), DDIM(steps=4), draw_latents, ("a", "b"))
    if method == "l2c":
        l2c = L2CSettings(rounds=_ROUNDS, batch_size=4, budget=0.75, checkpoint_every=2)
        return learn_l2c(*given, l2c, checkpoint=checkpoint, accelerator=accelerator, on_round=on_round)
    rollout = RolloutSettings(rounds=_ROUNDS, batch_size=4, budget=0.6, checkpoint_every=2, weigh_every=3)
    return learn_rollout(*given, rollout, checkpoint=checkpoint, accelerator=accelerator, on_round=on_round)


def run(rank: int, port: int, folder: Path, waits_in: str | None) -> None:
    """Learn both routers with the other process and write them; in the method ``waits_in`` wait to be killed."""
    # A forked process has none of the threads that torch believes to have.
    torch.set_num_threads(1)
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": 2, "RANK": rank, "LOCAL_RANK": rank}
    os.environ.update({name: str(value) for name, value in shared.items()})
    accelerator = Accelerator(cpu=True)
    for method in METHODS:
        router = learn(method, folder / f"{method}.checkpoint", accelerator, waits=method == waits_in)
        if accelerator.is_main_process:
            router.save(folder / method)
    accelerator.end_training()
