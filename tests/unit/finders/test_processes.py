"""Learning in several processes, killed and resumed, and in mixed precision."""

from __future__ import annotations

import multiprocessing
import os
import socket
import subprocess
import sys
import time
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest
import torch

from l2c_compile import Router
from l2c_compile.errors import ScheduleError
from l2c_compile.finders.processes import Workers
from l2c_compile.loops import DDIM
from l2c_compile.methods import L2CSettings, learn_l2c
from tests.learning import DIT_SITES, draw_images, draw_latents
from tests.root import ROOT
from tests.tiny import residual, tiny_dit

pytest.importorskip(
    "accelerate", reason="learning in several processes wants accelerate: pip install l2c-compile[train]"
)

from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState, PartialState

from tests.two_processes import METHODS, learn, run

TIMEOUT_S = 300.0
"""Guards against a hang; nothing here takes nearly as long."""


def start(folder: Path, waits_in: str | None = None) -> list[BaseProcess]:
    """Start two processes that learn routers together."""
    # Torch and accelerate are imported once, in the process that all others are forked from.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.two_processes"])
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    processes = [context.Process(target=run, args=(rank, port, folder, waits_in), daemon=True) for rank in range(2)]
    for process in processes:
        process.start()
    return list(processes)


def finish(processes: list[BaseProcess], folder: Path) -> dict[str, Router]:
    for process in processes:
        process.join(TIMEOUT_S)
        assert process.exitcode == 0
    return {method: Router.load(folder / method) for method in METHODS}


def kill_once_there_is(checkpoint: Path, processes: list[BaseProcess]) -> None:
    deadline = time.monotonic() + TIMEOUT_S
    while not checkpoint.exists():
        assert time.monotonic() < deadline
        assert all(process.is_alive() for process in processes)
        time.sleep(0.02)
    for process in processes:
        process.kill()
        process.join()


@pytest.mark.slow(reason="two methods, each in two processes, once undisturbed and once killed and resumed")
def test_two_processes_killed_and_resumed_learn_what_one_learns(tmp_path: Path) -> None:
    undisturbed, killed = tmp_path / "undisturbed", tmp_path / "killed"
    undisturbed.mkdir()
    killed.mkdir()
    for method in METHODS:
        kill_once_there_is(killed / f"{method}.checkpoint", start(killed, waits_in=method))
        assert not (killed / method).exists()
    together = finish(start(undisturbed), undisturbed)
    assert finish(start(killed), killed) == together
    for method, router in together.items():
        alone = learn(method, None)
        # Halves of a batch are summed in another order than the whole: 1e-7 in a gradient, which AdamW divides by its
        # size.
        torch.testing.assert_close(router.scores, alone.scores, rtol=0, atol=1e-4)
        assert router.schedule().reuses.keys() == alone.schedule().reuses.keys()


def test_a_batch_must_split_evenly() -> None:
    workers = Workers()
    workers.count = 2
    with pytest.raises(ScheduleError, match="a batch of 3 samples cannot be split over 2 processes"):
        workers.share(torch.zeros(3, 1), 3, torch.device("cpu"))


def test_mixed_precision_learns_nearly_the_same() -> None:
    settings = L2CSettings(rounds=8, batch_size=4, penalty=1e-2)
    plain = learn_l2c(tiny_dit(), DDIM(steps=2), draw_images, DIT_SITES, settings)
    for state in (AcceleratorState, PartialState, GradientState):
        state._reset_state()
    accelerator = Accelerator(cpu=True, mixed_precision="bf16")
    try:
        mixed = learn_l2c(tiny_dit(), DDIM(steps=2), draw_images, DIT_SITES, settings, accelerator=accelerator)
    finally:
        for state in (AcceleratorState, PartialState, GradientState):
            state._reset_state()
    assert not torch.equal(mixed.scores, plain.scores)
    # bfloat16 is off by 2**-8 in each operation; a gradient near zero may change sign and cost two steps of 0.1.
    torch.testing.assert_close(mixed.scores, plain.scores, rtol=0, atol=0.1)


def test_a_process_alone_needs_no_accelerate() -> None:
    code = "import sys; sys.modules['accelerate'] = None; import l2c_compile.finders"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, env={**os.environ, "PYTHONPATH": str(ROOT)})
    assert learn_l2c(residual(), DDIM(steps=2), draw_latents, ["a"], L2CSettings(rounds=1, penalty=1.0)).sites
