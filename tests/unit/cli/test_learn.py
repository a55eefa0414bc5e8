"""``l2c learn``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

import l2c_compile.cli.learn
import l2c_compile.files.tensors
from l2c_compile import Router, load_schedule_file
from l2c_compile.cli.main import app
from l2c_compile.errors import ScheduleError
from l2c_compile.files.documents import write_atomically

FEW = ["--steps", "2", "--rounds", "2", "--batch", "1", "--checkpoint-every", "1", "--site", "blocks.0.*"]


def learn(*options: object) -> Any:  # noqa: ANN401 - click's result
    return CliRunner().invoke(app, ["learn", *FEW, *map(str, options)])


@pytest.mark.parametrize("method", ["l2c", "rollout"])
def test_it_writes_a_router_that_everything_reads(tmp_path: Path, method: str) -> None:
    out, png = tmp_path / "r.safetensors", tmp_path / "r.png"
    result = learn("--out", out, "--method", method, "--penalty", "1e-4", "--png", png)
    assert result.exit_code == 0, result.output
    assert "router written to" in result.output
    router = load_schedule_file(out)
    assert isinstance(router, Router)
    assert router.cacheable == (1,)
    assert [str(site) for site in router.sites][:2] == ["blocks.0.norm1", "blocks.0.attn"]
    assert png.read_bytes().startswith(b"\x89PNG")
    assert not out.with_name("r.safetensors.checkpoint").exists()
    assert CliRunner().invoke(app, ["inspect", str(out)]).exit_code == 0


def test_an_interrupted_run_is_resumed_only_when_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out, other = tmp_path / "r", tmp_path / "other"

    class Stop(Exception):
        pass

    def write_and_stop(*arguments: Any) -> None:  # noqa: ANN401
        write_atomically(*arguments)
        raise Stop

    with monkeypatch.context() as patch:
        patch.setattr(l2c_compile.files.tensors, "write_atomically", write_and_stop)
        assert isinstance(learn("--out", out, "--budget", "0.98").exception, Stop)
    refused = learn("--out", out, "--budget", "0.98")
    assert isinstance(refused.exception, ScheduleError)
    assert "--resume" in str(refused.exception)
    assert learn("--out", out, "--budget", "0.98", "--resume").exit_code == 0
    assert learn("--out", other, "--budget", "0.98").exit_code == 0
    assert Router.load(out) == Router.load(other)


def test_nothing_is_overwritten_and_mistakes_are_named(tmp_path: Path) -> None:
    out = tmp_path / "r"
    out.write_text("precious")
    for options, message in (
        (("--out", out, "--budget", "0.9"), "exists already"),
        (("--out", tmp_path / "no" / "r", "--budget", "0.9"), "the folder .*no does not exist"),
        (("--out", tmp_path / "a"), "give a penalty, or a budget"),
        (("--out", tmp_path / "a", "--budget", "0.9", "--model", "dit-xl/2"), "has no weights here"),
        (("--out", tmp_path / "a", "--budget", "0.9", "--model", "digit"), "did you mean 'digits'"),
    ):
        result = learn(*options)
        assert isinstance(result.exception, ScheduleError)
        with pytest.raises(ScheduleError, match=message):
            raise result.exception
    assert out.read_text() == "precious"
    assert [path.name for path in tmp_path.iterdir()] == ["r"]
