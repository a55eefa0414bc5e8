"""Learn a tiny router in one of several processes; ``tests/unit/finders/test_processes.py`` starts them.

python -m tests.two_processes FOLDER SECONDS_A_ROUND
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

from accelerate import Accelerator

from l2c_compile import Router
from l2c_compile.finders.training import RoundReport
from l2c_compile.loops import DDIM
from l2c_compile.methods import L2CSettings, RolloutSettings, learn_l2c, learn_rollout
from tests.tiny import residual
from tests.unit.methods.test_learning_to_cache import draw_latents

ROUNDS = 12


def learn(
    method: str, checkpoint: Path | None, accelerator: Accelerator | None = None, seconds_a_round: float = 0.0
) -> Router:
    """Return the learned router; every call with the same method learns the same one."""

    def pause(report: RoundReport) -> None:
        time.sleep(seconds_a_round)

    if method == "l2c":
        l2c = L2CSettings(rounds=ROUNDS, batch_size=4, budget=0.75, checkpoint_every=2)
        return learn_l2c(
            *(residual(), DDIM(steps=4), draw_latents, ("a", "b"), l2c),
            checkpoint=checkpoint,
            accelerator=accelerator,
            on_round=pause,
        )
    rollout = RolloutSettings(rounds=ROUNDS, batch_size=4, budget=0.6, checkpoint_every=2, weigh_every=3)
    return learn_rollout(
        *(residual(), DDIM(steps=4), draw_latents, ("a", "b"), rollout),
        checkpoint=checkpoint,
        accelerator=accelerator,
        on_round=pause,
    )


if __name__ == "__main__":
    accelerator = Accelerator(cpu=True)
    folder = Path(sys.argv[1])
    for method in ("l2c", "rollout"):
        router = learn(method, folder / f"{method}.checkpoint", accelerator, float(sys.argv[2]))
        if accelerator.is_main_process:
            router.save(folder / method)
    accelerator.end_training()
