"""Replay records of the authors' implementation through l2c_compile and print the relative errors.

``FILE...``: the records. ``--device cpu``: where to compute; in float32, without TF32.
"""

from __future__ import annotations

import pickle
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.progress import Progress
from torch import Tensor, nn

from bench.cases import BenchError
from bench.options import Options
from bench.report import Condition, Row
from bench.workloads import relative_error, without_tf32
from l2c_compile import CacheSchedule, CompiledSampler, l2c_compile
from l2c_compile.loops import DDIM, STABLE_DIFFUSION_BETAS, BuiltInLoop, DPMSolver, Guidance
from l2c_compile.loops.noise_schedules import Spacing
from l2c_compile.models import DiT, UViT
from l2c_compile.schedules.importers import import_l2c_dit, import_l2c_uvit


def run(args: Sequence[str], progress: Progress) -> list[Row]:
    """Replay every file; one row for ``cached`` and one for ``full`` each."""
    parser = Options("golden")
    parser.add_argument("files", type=Path, nargs="*", metavar="FILE")
    parser.add_device("cpu", "cuda")
    options = parser.read(args)
    if not options.files:
        raise BenchError("golden wants the files to replay: python -m bench golden FILE...")
    task = progress.add_task("replay", total=2 * len(options.files))
    rows = []
    for path in options.files:
        with without_tf32():
            errors = replay(path, options.device)
        for result, error in errors.items():
            where: dict[str, Condition] = {"file": path.name, "result": result}
            rows.append(Row("relative_error", error, "", where, device=options.device))
            progress.advance(task)
    return rows


def replay(path: Path, device: str = "cpu") -> dict[str, float]:
    """Return max |ours - theirs| / max |theirs| of the results ``cached`` and ``full`` of one record.

    ``device`` is where to compute.
    """
    record = _read(path)
    try:
        model, loop, cached = _dit(record) if "x_embedder.proj.weight" in record["state_dict"] else _uvit(record)
        model.to(device)
        noise, conditions = record["noise"].to(device), {"y": record["labels"].to(device)}
        full = CacheSchedule.all_compute(loop.num_evaluations, cached.sites)
        samplers = {"cached": l2c_compile(model, cached, loop), "full": l2c_compile(model, full, loop)}
        return {name: _error(sampler, noise, conditions, record[name]) for name, sampler in samplers.items()}
    except KeyError as error:
        raise BenchError(f"{path} is no record of the documented form: it lacks {error}") from error


def _dit(record: Mapping[str, Any]) -> tuple[nn.Module, BuiltInLoop, CacheSchedule]:
    config = dict(record["config"])
    model = DiT(**{"in_channels": 4, "learn_sigma": True, **config}).eval()
    model.load_state_dict(record["state_dict"])
    guidance = Guidance(scale=record["cfg_scale"], null={"y": config["num_classes"]}, channels=3)
    spacings: tuple[Spacing, ...] = ("linspace", "leading", "trailing")
    loops = [DDIM(steps=record["steps"], spacing=spacing, guidance=guidance) for spacing in spacings]
    wanted = list(record["timestep_map"])
    loop = next((each for each in loops if list(each.network_timesteps[::-1]) == wanted), loops[0])
    _check_timesteps("timestep_map", loop.network_timesteps[::-1], wanted)
    return model, loop, import_l2c_dit(record["routers"], record["threshold"]).schedule()


def _uvit(record: Mapping[str, Any]) -> tuple[nn.Module, BuiltInLoop, CacheSchedule]:
    model = UViT(**record["config"]).eval()
    model.load_state_dict(record["state_dict"])
    guidance = Guidance(scale=record["cfg_scale"], null={"y": record["null_label"]}, batched=False, base="cond")
    loop = DPMSolver(
        evaluations=record["nfe"], order=2, betas=STABLE_DIFFUSION_BETAS, first_timestep=1, guidance=guidance
    )
    _check_timesteps("eval_timesteps", loop.network_timesteps, record["eval_timesteps"])
    return model, loop, import_l2c_uvit(record["routers"], record["threshold"], branches=2).schedule()


def _read(path: Path) -> dict[str, Any]:
    try:
        record = torch.load(path, weights_only=True, map_location="cpu")
    except (OSError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
        raise BenchError(f"cannot read {path}: {error}") from error
    if not isinstance(record, dict) or "state_dict" not in record:
        raise BenchError(f"{path} is no record of the documented form: it is not a dict with a state_dict")
    return record


def _check_timesteps(name: str, ours: Sequence[float], theirs: Sequence[float]) -> None:
    if len(ours) != len(theirs) or any(abs(a - b) > 1e-2 for a, b in zip(ours, theirs, strict=True)):
        raise BenchError(f"the record's {name} is {list(theirs)}, the loop that we know visits {list(ours)}")


def _error(sampler: CompiledSampler, noise: Tensor, conditions: Mapping[str, Tensor], expected: Tensor) -> float:
    result = sampler(noise, **conditions)
    assert isinstance(result, Tensor)
    return relative_error(result, expected)
