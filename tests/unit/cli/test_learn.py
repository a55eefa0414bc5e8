"""``l2c learn``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import l2c_compile.files.tensors
from l2c_compile import Router, load_schedule_file
from l2c_compile.files.documents import write_atomically
from tests.command_line import Done, l2c

pytestmark = pytest.mark.usefixtures("two_blocks_each")

FEW = ("--steps", 2, "--rounds", 2, "--batch", 1, "--checkpoint-every", 1, "--site", "blocks.0.*")


def learn(*options: object) -> Done:
    return l2c("learn", *FEW, *options)


@pytest.mark.parametrize("method", ["l2c", "rollout"])
def test_it_writes_a_router_that_everything_reads(tmp_path: Path, method: str) -> None:
    out, png = tmp_path / "r.safetensors", tmp_path / "r.png"
    done = learn("--out", out, "--method", method, "--penalty", "1e-4", "--png", png)
    assert done.code == 0
    assert "router written to" in done.out
    router = load_schedule_file(out)
    assert isinstance(router, Router)
    assert router.cacheable == (1,)
    assert [str(site) for site in router.sites][:2] == ["blocks.0.norm1", "blocks.0.attn"]
    assert png.read_bytes().startswith(b"\x89PNG")
    assert not out.with_name("r.safetensors.checkpoint").exists()
    assert l2c("inspect", out).code == 0


def test_an_interrupted_run_is_resumed_only_when_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out, other, png = tmp_path / "r.safetensors", tmp_path / "other.safetensors", tmp_path / "r.png"

    class Stop(Exception):
        pass

    def write_and_stop(*arguments: Any) -> None:  # noqa: ANN401
        write_atomically(*arguments)
        raise Stop

    with monkeypatch.context() as patch:
        patch.setattr(l2c_compile.files.tensors, "write_atomically", write_and_stop)
        with pytest.raises(Stop):
            learn("--out", out, "--budget", "0.98")
    refused = learn("--out", out, "--budget", "0.98")
    assert refused.code == 2
    assert "--resume" in refused.err
    # The run may have drawn it.
    png.write_text("old")
    assert learn("--out", out, "--budget", "0.98", "--resume", "--png", png).code == 0
    assert png.read_bytes().startswith(b"\x89PNG")
    other.write_text("old")
    assert learn("--out", other, "--budget", "0.98", "--force").code == 0
    assert Router.load(out) == Router.load(other)


def test_nothing_is_overwritten_and_mistakes_are_named(tmp_path: Path) -> None:
    out, new = tmp_path / "r.safetensors", tmp_path / "a.safetensors"
    out.write_text("precious")
    for options, message in (
        (("--out", out, "--budget", "0.9"), "exists already"),
        (("--out", tmp_path / "no" / "r.safetensors", "--budget", "0.9"), "no does not exist"),
        (("--out", new), "give a penalty, or a budget"),
        (("--out", new, "--budget", "0.9", "--penalty", "0.1"), "give a penalty or a budget, not both"),
        (("--out", new, "--budget", "0.9", "--model", "dit-xl/2"), "has no weights here"),
        (("--out", new, "--budget", "0.9", "--model", "digit"), "did you mean 'digits'"),
    ):
        done = learn(*options)
        assert (done.code, done.out) == (2, "")
        assert message in done.err
    assert out.read_text() == "precious"
    assert list(tmp_path.iterdir()) == [out]
