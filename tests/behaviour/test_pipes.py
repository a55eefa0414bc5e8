"""A pipe in the place of a file: whatever reads files refuses it instead of waiting for somebody to write into it."""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from l2c_compile import CacheSchedule, Router, load, load_schedule_file
from l2c_compile.errors import FileFormatError
from l2c_compile.files.archive import Archive
from l2c_compile.files.documents import open_regular, read_bytes
from l2c_compile.files.pickles import load_pickle
from l2c_compile.files.tensors import read_tensors
from l2c_compile.finders import Profile
from l2c_compile.methods import L2CSettings, RolloutSettings, learn_l2c, learn_rollout
from l2c_compile.schedules.importers import (
    import_harmonica,
    import_invardiff,
    import_l2c_dit,
    import_l2c_uvit,
    import_smoothcache,
)
from tests.command_line import l2c
from tests.tiny import residual, steps

pytestmark = pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no pipes here")

_HANG_S = 120
"""Somebody who waits for the pipe is set free after this time, and what is then read is nothing."""


@pytest.fixture
def pipe(tmp_path: Path) -> Iterator[Path]:
    path = tmp_path / "pipe"
    os.mkfifo(path)
    command = ["sh", "-c", f"sleep {_HANG_S}; : > '{path}'"]
    with subprocess.Popen(command, start_new_session=True) as savior:
        yield path
        os.killpg(savior.pid, signal.SIGKILL)


def draw_latents(count: int, generator: torch.Generator) -> tuple[Tensor, dict[str, object]]:
    return torch.randn(count, 4, generator=generator), {}


def learn_pairs(path: Path) -> Router:
    settings = L2CSettings(rounds=1, penalty=1.0)
    return learn_l2c(residual(), steps(2), draw_latents, ["a"], settings, pairs=[(0, 1)], checkpoint=path)


def learn_along(path: Path) -> Router:
    settings = RolloutSettings(rounds=1, penalty=1.0)
    return learn_rollout(residual(), steps(2), draw_latents, ["a"], settings, checkpoint=path)


READERS: list[Callable[[Path], object]] = [
    open_regular,
    lambda path: read_bytes(path, max_bytes=9),
    lambda path: read_tensors(path, "router"),
    load_pickle,
    Archive,
    CacheSchedule.load,
    Router.load,
    Profile.load,
    load,
    load_schedule_file,
    lambda path: load_schedule_file(path, num_evaluations=2),
    import_l2c_dit,
    import_l2c_uvit,
    import_harmonica,
    import_smoothcache,
    import_invardiff,
    learn_pairs,
    learn_along,
]


@pytest.mark.parametrize("read", READERS)
def test_a_reader_refuses_a_pipe(read: Callable[[Path], object], pipe: Path) -> None:
    with pytest.raises(FileFormatError, match="no regular file"):
        read(pipe)


COMMANDS = (
    "inspect PIPE",
    "predict PIPE",
    "verify PIPE",
    "eval PIPE",
    "schedule smooth-cache --profile PIPE --out OUT --alpha 0.1",
    "schedule block-caching --profile PIPE --out OUT --delta 0.1",
    "schedule invar-diff --profile PIPE --out OUT --strength 0.5",
    "schedule mag-cache --profile PIPE --out OUT --threshold 0.1",
    "schedule pairwise --profile PIPE --out OUT --budget 0.7",
    "schedule random --profile PIPE --out OUT --budget 0.7",
)


def refused(*arguments: str) -> None:
    done = l2c(*arguments)
    assert done.code == 2
    assert "no regular file" in done.err


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_refuses_a_pipe(command: str, pipe: Path) -> None:
    places = {"PIPE": str(pipe), "OUT": str(pipe.with_name("out.json"))}
    refused(*(places.get(word, word) for word in command.split()))
    assert not pipe.with_name("out.json").exists()


def test_verify_refuses_a_pipe_in_the_place_of_a_saved_sampler(pipe: Path) -> None:
    refused("verify", str(pipe.rename(pipe.with_suffix(".pt2"))))


def test_learning_that_is_resumed_refuses_a_pipe_in_the_place_of_its_checkpoint(pipe: Path) -> None:
    out = pipe.with_name("router.safetensors")
    pipe.rename(out.with_name(f"{out.name}.checkpoint"))
    few = ["--steps", "2", "--rounds", "1", "--batch", "1", "--site", "blocks.0.attn", "--penalty", "1"]
    refused("learn", "--out", str(out), "--resume", *few)
