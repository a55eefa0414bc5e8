"""``l2c profile``."""

from __future__ import annotations

from pathlib import Path

import pytest

from l2c_compile.finders import Profile
from tests.command_line import l2c

pytestmark = pytest.mark.usefixtures("two_blocks_each")


def test_a_profile_is_taken_written_and_drawn(tmp_path: Path) -> None:
    out, png = tmp_path / "p.safetensors", tmp_path / "p.png"
    done = l2c("profile", "--steps", 3, "--runs", 2, "--lags", 1, "--site", "blocks.*.attn", "--out", out, "--png", png)
    assert done.code == 0
    assert "2 runs, lags 1..1, 3 evaluations x 2 sites" in done.out
    assert "largest at lag 1" in done.out
    assert f"picture written to {png}" in done.out
    assert Profile.load(out).num_evaluations == 3
    assert png.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ("dit-xl/2", "DiT-XL/2 has no weights here and cannot be sampled; take digits"),
        ("digit", "no model is called 'digit'; did you mean 'digits'"),
    ],
)
def test_a_model_without_weights_is_refused(model: str, message: str, tmp_path: Path) -> None:
    done = l2c("profile", "--model", model, "--out", tmp_path / "p.safetensors")
    assert done.code == 2
    assert message in done.err
