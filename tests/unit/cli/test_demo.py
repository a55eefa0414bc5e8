"""``l2c demo``, with few evaluations and samples."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

import l2c_compile.cli.demo
from l2c_compile.cli.demo import Side, command, learned_router, save_digit_grid
from l2c_compile.loops import DDIM, Guidance, loop_from_dict
from l2c_compile.methods import uniform_interval
from l2c_compile.models.digits import GUIDANCE_SCALE, load_digits_dit
from l2c_compile.models.named import tolerance
from tests.command_line import l2c

PNG = b"\x89PNG"


def test_odd_evaluations_reuse_everything() -> None:
    schedule = uniform_interval(4, ("blocks.*.attn", "blocks.*.mlp"), 2)
    assert schedule.row("blocks.*.attn") == schedule.row("blocks.*.mlp") == [1, 0, 1, 0]


def test_the_router_of_the_demo_was_learned_for_its_loop() -> None:
    router = learned_router(20)
    assert router is not None
    assert router.cacheable == tuple(range(1, 20, 2))
    assert router.loop is not None
    assert loop_from_dict(router.loop) == DDIM(steps=20, guidance=Guidance(GUIDANCE_SCALE, null={"y": 10}))
    assert str(router.info["command"]).startswith("python -m bench.digits.learn")
    assert len(router.sites) == 16
    assert 0.55 < router.info["kept_multiply-adds"] <= 0.7  # type: ignore[operator]
    assert router.schedule().resolve([path for path, _ in load_digits_dit().named_modules()]).sites == router.sites
    assert learned_router(4) is None


@pytest.mark.usefixtures("two_blocks_each")
def test_the_demo_prints_its_table_and_writes_its_picture(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    # On a command line --steps is 20 or 50; fewer are quick.
    command(tmp_path / "new", "2", 1)  # type: ignore[arg-type]
    printed = capsys.readouterr().out
    assert "no learned router" in printed
    rows = re.findall(r"^(?:un)?cached .*ms .*$", printed, re.MULTILINE)
    assert [row.split()[0] for row in rows] == ["uncached", "uncached", "cached", "cached"]
    # The eager backend rounds nothing differently.
    assert all(re.search(r" 0 +0 +\d+/10$", row.rstrip()) for row in (rows[1], rows[3]))
    assert "50." in rows[2]
    assert "agree" in printed
    assert max(map(len, printed.splitlines())) < 120
    assert (tmp_path / "new" / "digits.png").read_bytes().startswith(PNG)


@pytest.mark.usefixtures("two_blocks_each")
def test_a_backend_that_rounds_elsewhere_is_within_the_tolerance(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command(tmp_path, "2", 1, "aot_eager")  # type: ignore[arg-type]
    assert "backend aot_eager" in capsys.readouterr().out


@pytest.mark.usefixtures("two_blocks_each")
def test_a_difference_beyond_the_tolerance_is_reported_and_ends_with_1(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Of the router's sites the small model has only some.
    monkeypatch.setattr(l2c_compile.cli.demo, "learned_router", lambda num_evaluations: None)
    monkeypatch.setattr(l2c_compile.cli.demo, "tolerance", lambda num_evaluations: -1.0)
    monkeypatch.setattr(l2c_compile.cli.demo, "DDIM", lambda steps, guidance: DDIM(steps // 10, guidance=guidance))
    done = l2c("demo", "--out", tmp_path, "--steps", "20", "--per-class", 2)
    assert done.code == 1
    assert "DDIM, 20 evaluations" in done.out
    assert "median of 2 runs" in done.out
    assert "uncached static graph: relative error 0.0e+00 is above -1.0e+00" in done.out


def test_a_picture_that_exists_is_overwritten_only_with_force(tmp_path: Path) -> None:
    (tmp_path / "digits.png").write_text("precious")
    done = l2c("demo", "--out", tmp_path)
    assert (done.code, done.out) == (2, "")
    assert "exists already; overwrite it with --force" in done.err
    done = l2c("demo", "--out", tmp_path, "--force", "--backend", "nope")
    assert done.code == 2
    assert "torch.compile knows no backend 'nope'; there are " in done.err
    assert (tmp_path / "digits.png").read_text() == "precious"


def test_the_tolerance_is_a_few_units_an_evaluation() -> None:
    assert tolerance(20) == pytest.approx(128 * 20 * 2.0**-23)


def test_the_median_of_a_side_ignores_one_slow_run() -> None:
    assert Side("cached", "compiled", torch.zeros_like, times_s=[1.0, 9.0, 2.0]).median_s == 2.0


def test_the_grid_takes_a_single_run(tmp_path: Path) -> None:
    images = [torch.zeros(10, 1, 8, 8)]
    path = tmp_path / "digits.png"
    save_digit_grid(path, images, images, uniform_interval(20, ("blocks.*.attn", "blocks.*.mlp"), 2))
    assert path.read_bytes().startswith(PNG)
