"""The body of ``l2c verify``: is what a schedule file, or a saved sampler, makes of a known model right?"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Literal

import torch
from rich.console import Console
from rich.text import Text
from torch import Tensor
from torch.utils._pytree import tree_unflatten

from l2c_compile.api import l2c_compile
from l2c_compile.backends.options import EAGER, Options
from l2c_compile.checking.comparison import finite, largest_errors
from l2c_compile.checking.proof import examine
from l2c_compile.checking.reference import run_reference
from l2c_compile.errors import InputFormError, LoopError, ScheduleError, VerificationError
from l2c_compile.files.documents import write_atomically
from l2c_compile.graphs.forms import TensorForm
from l2c_compile.loops import loop_from_dict
from l2c_compile.models.named import DIGITS, NamedModel, named_model, tolerance
from l2c_compile.samplers.loaded_sampler import LoadedSampler, load
from l2c_compile.schedules.importers import load_schedule_file
from l2c_compile.schedules.router import schedule_of

__all__ = ["verify_file"]

_SEED = 0

_Numerics = Literal["bitwise", "rounding"]
_Verdict = tuple[bool, dict[str, object]]
"""Whether all is right, and the report in JSON types."""


def verify_file(
    path: str | os.PathLike[str],
    console: Console,
    *,
    model: str = DIGITS,
    steps: int | None = None,
    threshold: float | None = None,
    batch: int | None = None,
    backend: str = EAGER,
    numerics: _Numerics | None = None,
    json_path: str | os.PathLike[str] | None = None,
) -> bool:
    """Print whether a file makes a right sampler of a model, and return it.

    A schedule or router is compiled for the model; the static graph is proven, and run once against the reference. A
    published size has no weights here, so its structure is proven and nothing is run. A saved sampler (``.pt2``) is
    held against the model that it is said to be of: its form, notes and memory plan are examined, and it is run once
    against the reference. That every read is of the right site cannot be proven of a file: it holds folded constants
    without their recipes, and copies of the weights.

    Args:
        path: A schedule or router that ``load_schedule_file`` reads, or what ``CompiledSampler.save`` wrote.
        console: Where to print.
        model: "digits", or a published size.
        steps: Sampler steps; None takes the loop in the file, or as many as the file is for.
        threshold: For routers, in place of the usual one.
        batch: Samples a call; None takes 1, or what a saved sampler is for.
        backend: What runs the graph.
        numerics: "bitwise" or "rounding"; None takes what suits the backend.
        json_path: If given, also write the report there.

    Raises:
        L2CError: The file cannot be read, there is no such model, they do not fit together, or a saved sampler is given
            options that are for schedules.
        OSError: A file cannot be read or written.
    """
    if Path(path).suffix == ".pt2":
        _refuse({"steps": steps, "threshold": threshold, "batch": batch, "numerics": numerics})
        holds, report = _verify_saved(path, console, model, backend)
    else:
        holds, report = _verify_schedule(path, console, model, steps, threshold, batch or 1, backend, numerics)
    if json_path is not None:
        write_atomically(json_path, (json.dumps(report, indent=2, allow_nan=False) + "\n").encode())
        console.print(Text(f"report written to {os.fspath(json_path)}"), soft_wrap=True)
    console.print(Text("right" if holds else "WRONG", style="bold green" if holds else "bold red"))
    return holds


def _refuse(options: dict[str, object]) -> None:
    given = [f"--{name}" for name, value in options.items() if value is not None]
    if given:
        raise ScheduleError(f"a saved sampler has its own steps, schedule, form and passes; leave {given[0]} out")


def _verify_schedule(
    path: str | os.PathLike[str],
    console: Console,
    model: str,
    steps: int | None,
    threshold: float | None,
    batch: int,
    backend: str,
    numerics: _Numerics | None,
) -> _Verdict:
    schedule = schedule_of(load_schedule_file(path, threshold=threshold))
    known = named_model(model)
    loop = known.loop_of(schedule, steps)
    sampler = l2c_compile(known.denoiser, replace(schedule, loop=None), loop, backend=backend, numerics=numerics)
    noise, labels = (tensor.to(known.device) for tensor in known.inputs(batch, _SEED))
    _say(console, f"{known.name}, {loop.name}, {loop.num_evaluations} evaluations, batch {batch}, {known.device.type}")
    if known.device.type == "meta":
        with console.status("prove the structure"):
            proof = sampler.prove(noise, y=labels)
        console.print(proof)
        _say(console, "not compared: results and constants, which have no values without weights")
        return proof.holds, {"holds": proof.holds, "proof": proof.to_dict()}
    with console.status("prove and compare"):
        report = sampler.verify(noise, y=labels)
    console.print(report)
    is_near = _judge_error(console, report.relative_error, tolerance(loop.num_evaluations))
    holds = report.holds and is_near
    return holds, {**report.to_dict(), "holds": holds}


def _verify_saved(path: str | os.PathLike[str], console: Console, model: str, backend: str) -> _Verdict:
    known = named_model(model, with_weights=True)
    sampler = load(path, backend=backend, map_location="cpu")
    if sampler.loop is None:
        raise LoopError(
            "the file does not describe its loop, which is a function of the user's; verify the sampler before it is"
            " saved: sampler.verify(noise, **conditions)"
        )
    allowed = _allowed_error(sampler, backend)
    noise, labels = _inputs(sampler, known)
    findings = examine(sampler.loop_graph)
    got = _seeded(lambda: sampler(noise, y=labels))
    loop = loop_from_dict(sampler.loop)
    wanted = _seeded(lambda: run_reference(known.denoiser, loop, sampler.schedule, noise, {"y": labels}))
    _, error = largest_errors([got], [wanted])
    num_evaluations = sampler.schedule.num_evaluations
    made_by = ", ".join(f"{name} {version}" for name, version in sampler.versions.items())
    _say(console, f"{sampler.denoiser}, {loop.name}, {num_evaluations} evaluations, batch {len(noise)}; by {made_by}")
    for finding in findings:
        _say(console, str(finding))
    if not findings:
        _say(console, "form, notes and memory plan are right; reads and operations cannot be proven of a file")
    _say(console, "equal to the reference bit for bit" if error == 0.0 else f"relative error {error:.3g}")
    holds = _judge_error(console, error, allowed) and not findings
    return holds, {"holds": holds, "relative_error": finite(error), "findings": [str(each) for each in findings]}


def _inputs(sampler: LoadedSampler, known: NamedModel) -> tuple[Tensor, Tensor]:
    """Return noise and labels of the form that the sampler was saved for."""
    noise, conditions = tree_unflatten(list(sampler.inputs.leaves), sampler.inputs.spec)
    y = conditions.get("y")
    is_noise = isinstance(noise, TensorForm) and noise.shape[1:] == known.latent_shape and noise.dtype == torch.float32
    if not is_noise or conditions.keys() != {"y"} or not isinstance(y, TensorForm):
        shape = ", ".join(map(str, known.latent_shape))
        raise InputFormError(
            f"{known.name} is sampled from float32 noise (B, {shape}) with labels y, and the file is for other inputs;"
            " is it of another model?"
        )
    drawn, labels = known.inputs(noise.shape[0], _SEED)
    return drawn, labels.to(y.dtype)


_NUMERICS: tuple[Literal["bitwise", "rounding"], ...] = ("bitwise", "rounding")


def _allowed_error(sampler: LoadedSampler, backend: str) -> float:
    bitwise, rounding = ({each.name for each in Options(numerics=numerics).passes.passes} for numerics in _NUMERICS)
    if not rounding.issuperset(sampler.passes):
        raise VerificationError(
            f"the file was made with {', '.join(set(sampler.passes) - rounding)}, which"
            " gives another result on purpose; no bound says how far off it may be"
        )
    if backend == EAGER and bitwise.issuperset(sampler.passes):
        return 0.0
    return tolerance(sampler.schedule.num_evaluations)


def _judge_error(console: Console, error: float, allowed: float) -> bool:
    # Not `error > allowed`: an infinite error is never right.
    is_near = math.isfinite(error) and error <= allowed
    if not is_near:
        _say(console, f"relative error {error:.3g} is above {allowed:.3g}")
    return is_near


def _seeded(sample: Callable[[], object]) -> Tensor:
    """Return what is sampled, with equal random numbers for all."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(_SEED)
        latent = sample()
    assert isinstance(latent, Tensor)
    return latent


def _say(console: Console, line: str) -> None:
    console.print(Text(line), soft_wrap=True)
