"""``l2c eval``."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from l2c_compile import CacheSchedule
from tests.command_line import l2c


@pytest.mark.filterwarnings("ignore:a Frechet distance")
def test_a_schedule_is_evaluated(tmp_path: Path) -> None:
    path = tmp_path / "s.json"
    row = [1, 1, 0]
    CacheSchedule.from_table({"blocks.*.attn": row, "blocks.*.mlp": row}).save(path)
    done = l2c("eval", path, "--samples", 70, "--batch", 35, "--json", tmp_path / "q.json")
    assert done.code == 0
    assert "digits, ddim, 3 evaluations, 70 samples, seed 0" in done.out
    assert "drawn as asked" in done.out
    document = json.loads((tmp_path / "q.json").read_text())
    assert document["schedule"] == CacheSchedule.load(path).digest
    assert 0.66 < document["multiply_adds_kept"] < 0.68
    found = document["quality"]
    assert found["num_samples"] == 70
    assert 5 < found["psnr_db"]["low"] < found["psnr_db"]["value"] < found["psnr_db"]["high"] < 60
    assert 0 < found["relative_l2"]["value"] < 1
    assert found["frechet"]["value"] > 0
    assert set(found) == {
        *("num_samples", "psnr_db", "ssim", "relative_l1", "relative_l2", "frechet", "precision", "recall")
    }


@pytest.mark.usefixtures("two_blocks_each")
def test_nothing_reused_is_nothing_lost(tmp_path: Path) -> None:
    path = tmp_path / "s.json"
    CacheSchedule.all_compute(2, ["blocks.0.attn"]).save(path)
    with pytest.warns(UserWarning, match="is mostly bias"):
        assert l2c("eval", path, "--samples", 66, "--batch", 33, "--json", tmp_path / "q.json").code == 0
    document = json.loads((tmp_path / "q.json").read_text())
    assert document["multiply_adds_kept"] == 1.0
    assert document["quality"]["psnr_db"]["value"] is None
    assert document["quality"]["relative_l2"] == {"value": 0.0, "low": 0.0, "high": 0.0}
    assert document["quality"]["precision"]["value"] == 1.0


def test_too_few_samples_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "s.json"
    CacheSchedule.from_table({"blocks.0.attn": [1, 0]}).save(path)
    done = l2c("eval", path, "--samples", 20)
    assert done.code == 2
    assert "a Frechet distance of 64 features wants more than 64 samples" in done.err
