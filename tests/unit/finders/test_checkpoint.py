"""Checkpoints of learning as files: what comes back, and what could not be one of the run at hand."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from torch import Tensor

from l2c_compile.errors import FileFormatError, ScheduleError
from l2c_compile.files.tensors import write_tensors
from l2c_compile.finders.checkpoint import Checkpoint

RUN = {"sites": ["a", "b"], "seed": 0, "budget": None}
NEEDED = {"logits.1": torch.tensor([0.5, -0.5]), "penalty": torch.tensor(1.0, dtype=torch.float64)}
OPTIONAL = {"weights": torch.ones(3)}
KEY = "l2c_compile.training"


def test_a_checkpoint_comes_back(tmp_path: Path) -> None:
    Checkpoint(RUN, 7, NEEDED).save(tmp_path / "c")
    read = Checkpoint.load(tmp_path / "c", RUN)
    assert (read.run, read.round) == (RUN, 7)
    assert read.tensors.keys() == NEEDED.keys()
    assert all(torch.equal(tensor, NEEDED[name]) for name, tensor in read.tensors.items())
    read.check_forms(NEEDED, OPTIONAL)
    Checkpoint(RUN, 7, {**NEEDED, **OPTIONAL}).check_forms(NEEDED, OPTIONAL)


def test_one_of_another_run_says_in_what_it_differs(tmp_path: Path) -> None:
    Checkpoint(RUN, 7, NEEDED).save(tmp_path / "c")
    with pytest.raises(ScheduleError, match="was made with another budget, seed; choose another file, or the same"):
        Checkpoint.load(tmp_path / "c", {**RUN, "seed": 1, "budget": 0.5})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"version": 2}, "the checkpoint is of version 2, this l2c_compile reads up to 1"),
        ({"version": None}, "wants a version number"),
        ({"surprise": 1}, "unknown keys"),
        ({"round": -1}, "round wants a number from 0, got -1"),
        ({"round": "7"}, "round wants a number from 0, got '7'"),
    ],
)
def test_a_document_that_was_changed_is_refused(changes: dict[str, object], message: str, tmp_path: Path) -> None:
    write_tensors(tmp_path / "c", {"version": 1, **RUN, "round": 7, **changes}, NEEDED, key=KEY)
    with pytest.raises(FileFormatError, match=message):
        Checkpoint.load(tmp_path / "c", RUN)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"logits.1": torch.ones(3)}, r"its part logits.1 has another form: torch.float32 \(3,\)"),
        ({"logits.1": torch.ones(2, dtype=torch.int32)}, "its part logits.1 has another form"),
        ({"weights": torch.ones(3).half()}, "its part weights has another form"),
        ({"surprise": torch.ones(2)}, "its part surprise has another form"),
        ({"logits.1": torch.tensor([0.0, float("nan")])}, "its part logits.1 holds numbers that cannot be"),
        ({"penalty": torch.tensor(-1.0, dtype=torch.float64)}, "its part penalty holds numbers that cannot be"),
    ],
)
def test_tensors_that_cannot_be_are_refused(changes: Mapping[str, Tensor], message: str) -> None:
    with pytest.raises(FileFormatError, match=message):
        Checkpoint(RUN, 7, {**NEEDED, **changes}).check_forms(NEEDED, OPTIONAL)


def test_a_part_that_is_missing_is_named() -> None:
    with pytest.raises(FileFormatError, match=r"parts of it are missing: \['logits.1'\]"):
        Checkpoint(RUN, 7, {"penalty": NEEDED["penalty"]}).check_forms(NEEDED, OPTIONAL)
