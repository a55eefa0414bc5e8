"""``l2c predict``."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from l2c_compile import CacheSchedule, L2CError
from l2c_compile.cli.main import app


def written(tmp_path: Path, rows: dict[str, list[int]]) -> str:
    path = tmp_path / "schedule.json"
    CacheSchedule.from_table(rows).save(path)
    assert json.loads(path.read_text())
    return str(path)


def test_l2c_predict_prices_a_file_on_the_digits_model(tmp_path: Path) -> None:
    file = written(tmp_path, {"blocks.*.attn": [1, 0], "blocks.*.mlp": [1, 0]})
    result = CliRunner().invoke(app, ["predict", file])
    assert result.exit_code == 0, result.output
    assert "digits, ddim, 2 evaluations" in result.output
    assert "of the time without caching" in result.output


def test_l2c_predict_counts_on_a_published_size(tmp_path: Path) -> None:
    file = written(tmp_path, {"blocks.*.attn": [1, 0]})
    result = CliRunner().invoke(app, ["predict", file, "--model", "dit-s/8"])
    assert result.exit_code == 0, result.output
    assert "multiply-adds" in result.output
    assert "time, eager" not in result.output


@pytest.mark.parametrize(
    ("options", "message"), [(["--model", "dit-xxl/2"], "no model is called"), (["--steps", "7"], "2 evaluations")]
)
def test_l2c_predict_says_what_does_not_fit(tmp_path: Path, options: list[str], message: str) -> None:
    file = written(tmp_path, {"blocks.*.attn": [1, 0]})
    result = CliRunner().invoke(app, ["predict", file, *options])
    assert isinstance(result.exception, L2CError)
    assert message in str(result.exception)
