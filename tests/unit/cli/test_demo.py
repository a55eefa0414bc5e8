"""``l2c demo``, with few evaluations and samples."""

from __future__ import annotations

import io
import re
from pathlib import Path

import pytest
import torch
from rich.console import Console
from typer.testing import CliRunner

import l2c_compile.cli.demo
from l2c_compile.cli.demo import Side, learned_router, run_demo, save_digit_grid
from l2c_compile.cli.main import app
from l2c_compile.loops import DDIM, Guidance, loop_from_dict
from l2c_compile.methods import uniform_interval
from l2c_compile.models.digits import GUIDANCE_SCALE
from l2c_compile.models.named import tolerance

PNG = b"\x89PNG"


def text_console() -> tuple[Console, io.StringIO]:
    text = io.StringIO()
    return Console(file=text, width=80), text


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
    assert learned_router(4) is None


def test_the_demo_prints_its_table_and_writes_its_picture(tmp_path: Path) -> None:
    console, text = text_console()
    assert run_demo(console, out=tmp_path, steps=4, per_class=1)
    printed = text.getvalue()
    assert "no learned router" in printed
    rows = re.findall(r"^(?:un)?cached .*ms .*$", printed, re.MULTILINE)
    assert [row.split()[0] for row in rows] == ["uncached", "uncached", "cached", "cached"]
    # The eager backend rounds nothing differently.
    assert all(re.search(r" 0 +0 +\d+/10$", row.rstrip()) for row in (rows[1], rows[3]))
    assert "50." in rows[2]
    assert "agree" in printed
    assert max(map(len, printed.splitlines())) < 120
    assert (tmp_path / "digits.png").read_bytes().startswith(PNG)


def test_a_backend_that_rounds_elsewhere_is_within_the_tolerance(tmp_path: Path) -> None:
    console, text = text_console()
    assert run_demo(console, out=tmp_path, steps=2, per_class=1, backend="aot_eager")
    assert "backend aot_eager" in text.getvalue()


def test_a_difference_beyond_the_tolerance_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(l2c_compile.cli.demo, "tolerance", lambda num_evaluations: -1.0)
    console, text = text_console()
    assert not run_demo(console, out=tmp_path, steps=2, per_class=1)
    assert "uncached static graph: relative error 0.0e+00 is above -1.0e+00" in text.getvalue()


def test_the_command_exits_with_1_if_the_graphs_differ(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: dict[str, object] = {}

    def fake(console: Console, **options: object) -> bool:
        asked.update(options)
        return False

    monkeypatch.setattr(l2c_compile.cli.demo, "run_demo", fake)
    result = CliRunner().invoke(app, ["demo", "--out", str(tmp_path), "--steps", "50", "--per-class", "3"])
    assert result.exit_code == 1
    assert asked == {"out": tmp_path, "steps": 50, "per_class": 3, "backend": "eager"}


def test_the_tolerance_is_a_few_units_an_evaluation() -> None:
    assert tolerance(20) == pytest.approx(128 * 20 * 2.0**-23)


def test_the_median_of_a_side_ignores_one_slow_run() -> None:
    assert Side("cached", "compiled", torch.zeros_like, times_s=[1.0, 9.0, 2.0]).median_s == 2.0


def test_the_grid_takes_a_single_run(tmp_path: Path) -> None:
    images = [torch.zeros(10, 1, 8, 8)]
    path = tmp_path / "folder" / "digits.png"
    save_digit_grid(path, images, images, uniform_interval(20, ("blocks.*.attn", "blocks.*.mlp"), 2))
    assert path.read_bytes().startswith(PNG)
