"""``python -m bench golden``: records of the authors' implementation, and records of the same form from elsewhere."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from bench.__main__ import app
from bench.trust.golden import replay
from l2c_compile import run_reference
from l2c_compile.loops import DDIM, STABLE_DIFFUSION_BETAS, DPMSolver, Guidance
from l2c_compile.models import DiT, UViT
from l2c_compile.schedules.importers import import_l2c_dit, import_l2c_uvit
from tests.tiny import draw, seeded

LABELS = torch.tensor([1, 4])


def dit_record() -> dict[str, Any]:
    """Return a record of another depth, width, number of steps and threshold, made by the reference."""
    config = {"input_size": 4, "patch_size": 2, "hidden_size": 24, "depth": 3, "num_heads": 3, "num_classes": 6}
    model = seeded(DiT(in_channels=4, learn_sigma=True, **config), std=0.1)
    loop = DDIM(steps=6, guidance=Guidance(scale=2.5, null={"y": 6}, channels=3))
    routers = {f"{index}.prob": draw(6, seed=index) for index in range(6)}
    schedule = import_l2c_dit(routers, 0.4).schedule()
    noise = draw(2, 4, 4, 4)
    return {
        "config": config,
        "state_dict": model.state_dict(),
        "routers": routers,
        "threshold": 0.4,
        "steps": 6,
        "timestep_map": list(loop.network_timesteps[::-1]),
        "noise": noise,
        "labels": LABELS,
        "cfg_scale": 2.5,
        "cached": run_reference(model, loop, schedule, noise, {"y": LABELS}),
        "full": loop(model, noise, y=LABELS).detach(),
    }


def uvit_record() -> dict[str, Any]:
    config: dict[str, Any] = {
        "img_size": 4,
        "patch_size": 2,
        "in_chans": 4,
        "embed_dim": 16,
        "depth": 2,
        "num_heads": 2,
    }
    config |= {"num_classes": 8, "conv": False, "mlp_time_embed": False, "qkv_bias": False}
    model = seeded(UViT(**config), std=0.1)
    guidance = Guidance(scale=0.7, null={"y": 7}, batched=False, base="cond")
    loop = DPMSolver(evaluations=6, order=2, betas=STABLE_DIFFUSION_BETAS, first_timestep=1, guidance=guidance)
    routers = {f"{k}.prob": draw(6, seed=k) for k in range(6)}
    schedule = import_l2c_uvit(routers, 0.6, branches=2).schedule()
    noise = draw(2, 4, 4, 4)
    return {
        "config": config,
        "state_dict": model.state_dict(),
        "routers": routers,
        "threshold": 0.6,
        "nfe": 6,
        "eval_timesteps": list(loop.network_timesteps),
        "noise": noise,
        "labels": LABELS,
        "null_label": 7,
        "cfg_scale": 0.7,
        "cached": run_reference(model, loop, schedule, noise, {"y": LABELS}),
        "full": loop(model, noise, y=LABELS).detach(),
    }


@pytest.mark.parametrize("name", ["dit.pt", "uvit.pt"])
def test_the_records_of_the_authors_are_reproduced(shared: Callable[[str], Path], name: str) -> None:
    errors = replay(shared(f"golden/{name}"))
    assert set(errors) == {"cached", "full"}
    # The bound of bench/targets.toml: fp32 on another machine's CPU.
    assert max(errors.values()) <= 1e-4


@pytest.mark.parametrize("record", [dit_record, uvit_record])
def test_records_of_other_sizes_steps_and_thresholds_replay(record: Callable[[], Any], tmp_path: Path) -> None:
    torch.save(record(), tmp_path / "record.pt")
    assert replay(tmp_path / "record.pt") == {"cached": 0.0, "full": 0.0}


def test_a_result_that_is_not_reproduced_exits_with_one(tmp_path: Path) -> None:
    record = dit_record()
    record["cached"] = record["cached"] * 1.001
    torch.save(record, tmp_path / "record.pt")
    done = CliRunner().invoke(app, ["golden", str(tmp_path / "record.pt")])
    assert done.exit_code == 1
    assert "relative_error" in done.output


@pytest.mark.parametrize(
    ("content", "message"),
    [(b"", "cannot read"), (b"PK\x03\x04 cut off", "cannot read")],
)
def test_a_file_that_is_no_record_is_a_clear_error(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "record.pt").write_bytes(content)
    done = CliRunner().invoke(app, ["golden", str(tmp_path / "record.pt")])
    assert done.exit_code == 2
    assert message in done.output


def test_a_record_without_a_field_is_a_clear_error(tmp_path: Path) -> None:
    record = dit_record()
    del record["labels"]
    torch.save(record, tmp_path / "record.pt")
    done = CliRunner().invoke(app, ["golden", str(tmp_path / "record.pt")])
    assert done.exit_code == 2
    assert "lacks 'labels'" in done.output
