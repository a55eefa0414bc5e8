"""Autocast is refused in every call, not only in the first."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from l2c_compile import CacheSchedule, l2c_compile, load
from l2c_compile.errors import LoopTraceError
from l2c_compile.frontend.autocast import check_no_autocast, is_autocast_on
from tests.tiny import draw, residual, steps


def test_it_is_on_where_it_was_entered() -> None:
    assert not is_autocast_on()
    check_no_autocast()
    with torch.autocast("cpu"):
        assert is_autocast_on()


def test_every_call_is_refused(tmp_path: Path) -> None:
    sampler = l2c_compile(residual(), CacheSchedule.from_table({"a": [1, 0]}), steps(2))
    sampler(draw(3, 4))
    sampler.save(tmp_path / "s.pt2")
    loaded = load(tmp_path / "s.pt2")
    with torch.autocast("cpu"):
        for call in (sampler, sampler.verify, loaded):
            with pytest.raises(LoopTraceError, match=r"autocast is on .*call the sampler outside of it"):
                call(draw(3, 4))
