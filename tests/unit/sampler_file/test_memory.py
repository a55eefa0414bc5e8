"""A file that would take more memory than there is, or than is allowed, is refused before anything is computed."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from l2c_compile import load
from l2c_compile.errors import FileFormatError
from tests.saved_samplers import refused, with_lines

MIB = 2**20


def zeros(*shape: int) -> dict[str, object]:
    return {"op": "aten::zeros", "args": [list(shape)]}


def neg() -> dict[str, object]:
    return {"op": "aten::neg", "args": ["%next-1"]}


def test_terabytes_are_refused(saved: Path, tmp_path: Path) -> None:
    refused(with_lines(saved, tmp_path / "x.pt2", zeros(2**44)), r"the graph takes 7\d{13} bytes at aten::zeros")


def test_a_view_counts_as_if_it_were_written_out(saved: Path, tmp_path: Path) -> None:
    expand = {"op": "aten::expand", "args": ["%next-1", [2**44]]}
    refused(with_lines(saved, tmp_path / "x.pt2", zeros(1), expand), r"max_bytes=\.\.\.")


def test_the_limit_is_the_callers(saved: Path, tmp_path: Path) -> None:
    path = with_lines(saved, tmp_path / "x.pt2", zeros(MIB // 4))
    load(path, max_bytes=2 * MIB)
    with pytest.raises(FileFormatError, match=f"and may take {MIB // 2}; if you trust the file"):
        load(path, max_bytes=MIB // 2)


def test_what_is_freed_is_not_counted(saved: Path, tmp_path: Path) -> None:
    path = with_lines(saved, tmp_path / "x.pt2", zeros(MIB // 4), *[neg()] * 20)
    load(path, max_bytes=3 * MIB)


def test_what_is_alive_together_is_counted(saved: Path, tmp_path: Path) -> None:
    cat = {"op": "aten::cat", "args": [[f"%next-{n}" for n in range(1, 7)]]}
    path = with_lines(saved, tmp_path / "x.pt2", zeros(MIB // 4), *[neg()] * 5, cat)
    load(path, max_bytes=13 * MIB)
    with pytest.raises(FileFormatError, match="takes"):
        load(path, max_bytes=11 * MIB)


def test_the_results_of_one_operator_are_counted_once(saved: Path, tmp_path: Path) -> None:
    sort, values = {"op": "aten::sort", "args": ["%next-1"]}, {"op": "getitem", "args": ["%next-1", 0]}
    path = with_lines(saved, tmp_path / "x.pt2", zeros(MIB // 4), sort, values)
    load(path, max_bytes=4 * MIB + 1000)
    with pytest.raises(FileFormatError, match="at aten::sort"):
        load(path, max_bytes=3 * MIB)


def test_a_system_that_does_not_say_has_a_limit_all_the_same(
    saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "sysconf_names", {})
    path = with_lines(saved, tmp_path / "x.pt2", zeros(2**35))
    with pytest.raises(FileFormatError, match=str(64 * 2**30)):
        load(path)
    assert load(path, max_bytes=2**40).inputs == load(saved).inputs
    assert torch.float32.itemsize * 2**35 > 64 * 2**30
