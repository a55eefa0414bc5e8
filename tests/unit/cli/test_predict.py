"""``l2c predict``."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from l2c_compile import CacheSchedule
from tests.command_line import l2c

pytestmark = pytest.mark.usefixtures("two_blocks_each")


def written(tmp_path: Path, rows: dict[str, list[int]]) -> str:
    path = tmp_path / "schedule.json"
    CacheSchedule.from_table(rows).save(path)
    assert json.loads(path.read_text())
    return str(path)


def test_l2c_predict_prices_a_file_on_the_digits_model(tmp_path: Path) -> None:
    file = written(tmp_path, {"blocks.*.attn": [1, 0], "blocks.*.mlp": [1, 0]})
    done = l2c("predict", file)
    assert done.code == 0
    assert "digits, ddim, 2 evaluations" in done.out
    assert "of the time without caching" in done.out


def test_l2c_predict_counts_on_a_published_size(tmp_path: Path) -> None:
    file = written(tmp_path, {"blocks.*.attn": [1, 0]})
    done = l2c("predict", file, "--model", "dit-s/8")
    assert done.code == 0
    assert "multiply-adds" in done.out
    assert "time, eager" not in done.out


@pytest.mark.parametrize(
    ("options", "message"), [(["--model", "dit-xxl/2"], "no model is called"), (["--steps", "7"], "2 evaluations")]
)
def test_l2c_predict_says_what_does_not_fit(tmp_path: Path, options: list[str], message: str) -> None:
    file = written(tmp_path, {"blocks.*.attn": [1, 0]})
    done = l2c("predict", file, *options)
    assert done.code == 2
    assert message in done.err
