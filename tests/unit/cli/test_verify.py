"""``l2c verify``."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from l2c_compile import CacheSchedule, CompiledSampler, l2c_compile
from l2c_compile.compile import graph_of
from l2c_compile.graphs.loop_graph import LoopGraph
from l2c_compile.loops import DDIM, Guidance
from tests.command_line import Done, l2c, two_blocks
from tests.tiny import draw, residual, steps

pytestmark = pytest.mark.usefixtures("two_blocks_each")

LOOP = DDIM(steps=2, guidance=Guidance(scale=2.0, null={"y": 10}))
TABLE = {"blocks.*.attn": [1, 0], "blocks.*.mlp": [1, 0]}


@pytest.fixture
def schedule(tmp_path: Path) -> Path:
    path = tmp_path / "s.json"
    CacheSchedule.from_table(TABLE, loop=LOOP.to_dict()).save(path)
    return path


def verify(*arguments: object) -> Done:
    return l2c("verify", *arguments, columns=200)


def test_a_schedule_is_proven_and_compared(schedule: Path, tmp_path: Path) -> None:
    done = verify(schedule, "--json", tmp_path / "r.json")
    assert done.code == 0
    assert "structure proven bit for bit" in done.out
    assert "4 site values computed, 4 read from the cache" in done.out
    assert "equal to the reference bit for bit" in done.out
    assert "relative error" not in done.out
    report = json.loads((tmp_path / "r.json").read_text())
    assert (report["holds"], report["bitwise"], report["proof"]["num_reads"]) == (True, True, 4)


def test_what_rounds_is_right_within_a_bound_that_is_shown(schedule: Path) -> None:
    done = verify(schedule, "--numerics", "rounding", "--batch", 2)
    assert done.code == 0
    assert "structure proven up to rounding" in done.out
    assert "max error" in done.out
    _, _, after = done.out.partition("sites that differ from the reference")
    assert " ".join(after.split()).startswith("in some bit, as they may where passes or the backend round otherwise")
    (said, right) = after.splitlines()[-2:]
    assert re.fullmatch(r"relative error \S+e-\d+ is within 3\.05e-05, which rounding explains", said)
    assert right == "right"


def test_a_wrong_graph_ends_with_1_and_says_where(schedule: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def build_wrong(*args: object, **kwargs: object) -> tuple[LoopGraph, object]:
        graph, runs = graph_of(*args, **kwargs)  # type: ignore[arg-type]
        spoil(graph, "blocks.0.attn", "blocks.1.attn")
        return graph, runs

    monkeypatch.setattr("l2c_compile.samplers.compiled_sampler.graph_of", build_wrong)
    done = verify(schedule)
    assert done.code == 1
    assert "structure not proven bit for bit" in done.out
    assert "WRONG" in done.out
    assert "site 'blocks.1.attn' of evaluation 0" in " ".join(done.out.replace("│", " ").split())


def spoil(graph: LoopGraph, site: str, other: str) -> None:
    """Let evaluation 1 read another site."""
    held = {key: node for node in graph.graph.nodes for key in node.meta.get("sites", ())}
    value = held[0, site, 0]
    reader = next(user for user in value.users if user.meta["evaluation"] == 1)
    reader.replace_input_with(value, held[0, other, 0])


def save_digits(path: Path, **options: Any) -> CompiledSampler:  # noqa: ANN401 - of l2c_compile
    sampler = l2c_compile(two_blocks(), CacheSchedule.from_table(TABLE), LOOP, **options)
    sampler.save(path, torch.zeros(1, 1, 8, 8), y=torch.tensor([3]))
    return sampler


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("saved") / "s.pt2"
    save_digits(path)
    return path


@pytest.mark.parametrize("numerics", ["bitwise", "rounding"])
def test_a_saved_sampler_is_held_against_its_model(numerics: str, tmp_path: Path) -> None:
    sampler = save_digits(tmp_path / "right.pt2", numerics=numerics)
    done = verify(tmp_path / "right.pt2")
    assert done.code == 0
    assert "DiT, ddim, 2 evaluations, batch 1" in done.out
    assert "cannot be proven of a file" in done.out
    assert ("bit for bit" in done.out) == (numerics == "bitwise")
    assert ("which rounding explains" in done.out) == (numerics == "rounding")
    with torch.no_grad():
        sampler.model.get_parameter("blocks.0.attn.proj.weight").mul_(1.01)
    # A sampler is known by what the file holds, whatever its name.
    sampler.save(tmp_path / "other.pt2")
    (tmp_path / "other.pt2").rename(tmp_path / "other")
    done = verify(tmp_path / "other", "--json", tmp_path / "r.json")
    assert done.code == 1
    assert "is above" in done.out
    report = json.loads((tmp_path / "r.json").read_text())
    assert not report["holds"]
    assert report["findings"] == []
    assert report["relative_error"] > 1e-4


def test_packed_caches_are_neither_right_nor_wrong(tmp_path: Path) -> None:
    save_digits(tmp_path / "s.pt2", caches="int8")
    done = verify(tmp_path / "s.pt2")
    assert done.code == 2
    assert "made with pack-caches" in done.err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--model", "dit-s/2"), "has no weights here"),
        (("--steps", "2"), "leave --steps out"),
        (("--batch", "1"), "leave --batch out"),
        (("--backend", "inductr"), "did you mean 'inductor'"),
        (("--backend", "nope"), "knows no backend 'nope'; there are "),
    ],
)
def test_what_does_not_suit_a_saved_sampler_is_neither_right_nor_wrong(
    options: tuple[str, ...], message: str, saved: Path
) -> None:
    done = verify(saved, *options)
    assert (done.code, done.out) == (2, "")
    assert message in done.err


def test_a_saved_sampler_of_another_model_or_loop_is_refused(tmp_path: Path) -> None:
    table = CacheSchedule.from_table({"a": [1, 0]})
    l2c_compile(residual(), table, DDIM(steps=2)).save(tmp_path / "other.pt2", draw(3, 4))
    l2c_compile(residual(), table, steps(2)).save(tmp_path / "own.pt2", draw(3, 4))
    for name, message in (("other.pt2", "is it of another model?"), ("own.pt2", "does not describe its loop")):
        done = verify(tmp_path / name)
        assert done.code == 2
        assert message in done.err


def test_a_file_that_cannot_be_read_ends_with_2(tmp_path: Path) -> None:
    for name in ("s.json", "s.pt2"):
        (tmp_path / name).write_text("neither")
        done = verify(tmp_path / name)
        assert done.code == 2
        assert done.err.startswith("l2c: error: ")
    assert verify(tmp_path / "missing.json").code == 2


def test_a_published_size_is_proven_without_weights(tmp_path: Path) -> None:
    CacheSchedule.from_table({"blocks.*.mlp": [1, 0]}).save(tmp_path / "s.json")
    done = verify(tmp_path / "s.json", "--model", "dit-s/8", "--numerics", "rounding")
    assert done.code == 0
    assert "2 site values computed, 2 read from the cache" in done.out
    assert "not compared: results and constants" in done.out


def test_the_exit_codes_are_in_the_help() -> None:
    done = verify("--help")
    assert done.code == 0
    assert "1 if it is wrong" in done.out
