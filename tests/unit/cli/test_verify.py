"""``l2c verify``."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from l2c_compile import CacheSchedule, CompiledSampler, l2c_compile
from l2c_compile.cli import main as cli
from l2c_compile.compile import graph_of
from l2c_compile.graphs.loop_graph import LoopGraph
from l2c_compile.loops import DDIM, Guidance
from l2c_compile.models.digits import load_digits_dit
from tests.tiny import draw, residual, steps

LOOP = DDIM(steps=2, guidance=Guidance(scale=2.0, null={"y": 10}))


TABLE = {"blocks.*.attn": [1, 0], "blocks.*.mlp": [1, 0]}


@pytest.fixture
def schedule(tmp_path: Path) -> Path:
    path = tmp_path / "s.json"
    CacheSchedule.from_table(TABLE, loop=LOOP.to_dict()).save(path)
    return path


def l2c(monkeypatch: pytest.MonkeyPatch, *arguments: str | Path) -> int:
    monkeypatch.setattr(sys, "argv", ["l2c", "verify", *map(str, arguments)])
    monkeypatch.setenv("COLUMNS", "200")
    with pytest.raises(SystemExit) as exit_info:
        cli.main()
    assert isinstance(exit_info.value.code, int)
    return exit_info.value.code


def test_a_schedule_is_proven_and_compared(
    schedule: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert l2c(monkeypatch, schedule, "--json", tmp_path / "r.json") == 0
    out = capsys.readouterr().out
    assert "structure proven bit for bit" in out
    assert "16 site values computed, 16 read from the cache" in out
    assert "equal to the reference bit for bit" in out
    report = json.loads((tmp_path / "r.json").read_text())
    assert (report["holds"], report["bitwise"], report["proof"]["num_reads"]) == (True, True, 16)


def test_what_rounds_is_proven_up_to_rounding_and_its_error_shown(
    schedule: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert l2c(monkeypatch, schedule, "--numerics", "rounding") == 0
    out = capsys.readouterr().out
    assert "structure proven up to rounding" in out
    assert "max error" in out


def test_a_wrong_graph_ends_with_1_and_says_where(
    schedule: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def build_wrong(*args: object, **kwargs: object) -> tuple[LoopGraph, object]:
        graph, runs = graph_of(*args, **kwargs)  # type: ignore[arg-type]
        spoil(graph, "blocks.3.attn", "blocks.4.attn")
        return graph, runs

    monkeypatch.setattr("l2c_compile.samplers.compiled_sampler.graph_of", build_wrong)
    assert l2c(monkeypatch, schedule) == 1
    out = capsys.readouterr().out
    assert "structure not proven bit for bit" in out
    assert "WRONG" in out
    assert "site 'blocks.4.attn' of evaluation 0" in " ".join(out.replace("│", " ").split())


def spoil(graph: LoopGraph, site: str, other: str) -> None:
    """Let evaluation 1 read another site."""
    held = {key: node for node in graph.graph.nodes for key in node.meta.get("sites", ())}
    value = held[0, site, 0]
    reader = next(user for user in value.users if user.meta["evaluation"] == 1)
    reader.replace_input_with(value, held[0, other, 0])


def save_digits(path: Path, **options: Any) -> CompiledSampler:  # noqa: ANN401 - of l2c_compile
    sampler = l2c_compile(load_digits_dit(), CacheSchedule.from_table(TABLE), LOOP, **options)
    sampler.save(path, torch.zeros(1, 1, 8, 8), y=torch.tensor([3]))
    return sampler


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("saved") / "s.pt2"
    save_digits(path)
    return path


@pytest.mark.parametrize("numerics", ["bitwise", "rounding"])
def test_a_saved_sampler_is_held_against_its_model(
    numerics: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    sampler = save_digits(tmp_path / "right.pt2", numerics=numerics)
    assert l2c(monkeypatch, tmp_path / "right.pt2") == 0
    out = capsys.readouterr().out
    assert "DiT, ddim, 2 evaluations, batch 1" in out
    assert "cannot be proven of a file" in out
    assert ("bit for bit" in out) == (numerics == "bitwise")
    with torch.no_grad():
        sampler.model.get_parameter("blocks.0.attn.proj.weight").mul_(1.01)
    sampler.save(tmp_path / "other.pt2")
    assert l2c(monkeypatch, tmp_path / "other.pt2", "--json", tmp_path / "r.json") == 1
    assert "is above" in capsys.readouterr().out
    report = json.loads((tmp_path / "r.json").read_text())
    assert not report["holds"]
    assert report["findings"] == []
    assert report["relative_error"] > 1e-4


def test_packed_caches_are_neither_right_nor_wrong(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    save_digits(tmp_path / "s.pt2", caches="int8")
    assert l2c(monkeypatch, tmp_path / "s.pt2") == 2
    assert "made with pack-caches" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--model", "dit-s/2"), "has no weights here"),
        (("--steps", "2"), "leave --steps out"),
        (("--batch", "1"), "leave --batch out"),
        (("--backend", "inductr"), "did you mean 'inductor'"),
    ],
)
def test_what_does_not_suit_a_saved_sampler_is_neither_right_nor_wrong(
    options: tuple[str, ...],
    message: str,
    saved: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert l2c(monkeypatch, saved, *options) == 2
    captured = capsys.readouterr()
    assert message in captured.err
    assert captured.out == ""


def test_a_saved_sampler_of_another_model_or_loop_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    table = CacheSchedule.from_table({"a": [1, 0]})
    l2c_compile(residual(), table, DDIM(steps=2)).save(tmp_path / "other.pt2", draw(3, 4))
    l2c_compile(residual(), table, steps(2)).save(tmp_path / "own.pt2", draw(3, 4))
    assert l2c(monkeypatch, tmp_path / "other.pt2") == 2
    assert "is it of another model?" in capsys.readouterr().err
    assert l2c(monkeypatch, tmp_path / "own.pt2") == 2
    assert "does not describe its loop" in capsys.readouterr().err


def test_a_file_that_cannot_be_read_ends_with_2(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("s.json", "s.pt2"):
        (tmp_path / name).write_text("neither")
        assert l2c(monkeypatch, tmp_path / name) == 2
        assert capsys.readouterr().err.startswith("l2c: error: ")
    assert l2c(monkeypatch, tmp_path / "missing.json") == 2


def test_a_published_size_is_proven_without_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    CacheSchedule.from_table({"blocks.*.mlp": [1, 0]}).save(tmp_path / "s.json")
    assert l2c(monkeypatch, tmp_path / "s.json", "--model", "dit-s/8", "--numerics", "rounding") == 0
    out = capsys.readouterr().out
    assert "12 site values computed, 12 read from the cache" in out
    assert "not compared: results and constants" in out


def test_the_exit_codes_are_in_the_help(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    assert l2c(monkeypatch, "--help") == 0
    assert "1 if it is wrong" in capsys.readouterr().out
