"""``l2c verify``: whether the static graph of a schedule file, or a saved sampler, is right for a known model."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Literal, get_args

import torch
import typer
from torch import Tensor
from torch.utils._pytree import tree_unflatten

from l2c_compile.api import l2c_compile
from l2c_compile.backends.options import EAGER, Options
from l2c_compile.checking.comparison import finite, largest_errors, same_bits
from l2c_compile.checking.proof import examine
from l2c_compile.checking.reference import run_reference
from l2c_compile.cli.files import Case, is_sampler, load_case, output_path, write_report
from l2c_compile.cli.options import Force, Json, Model, StepsOfFile, Threshold
from l2c_compile.cli.terminal import bar, say, show
from l2c_compile.errors import InputFormError, LoopError, ScheduleError, VerificationError
from l2c_compile.graphs.forms import TensorForm
from l2c_compile.loops import loop_from_dict
from l2c_compile.models.named import DIGITS, NamedModel, named_model, tolerance
from l2c_compile.samplers.loaded_sampler import LoadedSampler, load

_SEED = 0

_Numerics = Literal["bitwise", "rounding"]
_Verdict = tuple[bool, dict[str, object]]
"""Whether all is right, and the report in JSON types."""


def command(
    file: Annotated[
        Path, typer.Argument(metavar="FILE", exists=True, dir_okay=False, help="A schedule, router or saved sampler.")
    ],
    model: Model = DIGITS,
    steps: StepsOfFile = None,
    threshold: Threshold = None,
    batch: Annotated[
        int | None, typer.Option(metavar="B", min=1, help="Samples a call; by default 1, or as saved.")
    ] = None,
    backend: Annotated[str, typer.Option(metavar="NAME", help="What runs the static graph.")] = EAGER,
    numerics: Annotated[_Numerics | None, typer.Option(help="By default what suits the backend.")] = None,
    json: Json = None,
    force: Force = False,
) -> None:
    """Prove that the static graph made of a schedule is right, and compare it with the eager loop.

    Exits with 0 if it is right, 1 if it is wrong, 2 if that cannot be told. The published sizes are proven without
    their weights. Of a saved sampler form, notes and memory plan are examined, and it is run once: that every read is
    of the right site cannot be proven of a file, which holds folded constants without their recipes.
    """
    json = json and output_path(json, ".json", force=force, reads=file)
    if file.suffix == ".pt2" or is_sampler(file):
        given = {"steps": steps, "threshold": threshold, "batch": batch, "numerics": numerics}
        if refused := [name for name, value in given.items() if value is not None]:
            raise ScheduleError(
                f"a saved sampler has its own steps, schedule, form and passes; leave --{refused[0]} out"
            )
        holds, report = _verify_saved(file, model, backend)
    else:
        holds, report = _verify_case(load_case(file, model, steps, threshold), batch or 1, backend, numerics)
    if json is not None:
        write_report(json, "report", report)
    say("right" if holds else "WRONG", style="bold green" if holds else "bold red")
    if not holds:
        raise typer.Exit(1)


def _verify_case(case: Case, batch: int, backend: str, numerics: _Numerics | None) -> _Verdict:
    device = case.model.device
    sampler = l2c_compile(case.model.denoiser, case.schedule, case.loop, backend=backend, numerics=numerics)
    noise, labels = (tensor.to(device) for tensor in case.model.inputs(batch, _SEED))
    say(f"{case}, batch {batch}, {device.type}")
    if device.type == "meta":
        with bar("prove the structure"):
            proof = sampler.prove(noise, y=labels)
        show(proof)
        say("not compared: results and constants, which have no values without weights")
        return proof.holds, {"holds": proof.holds, "proof": proof.to_dict()}
    with bar("prove and compare"):
        report = sampler.verify(noise, y=labels)
    show(report)
    allowed = 0.0 if report.wants_bitwise else tolerance(case.loop.num_evaluations)
    holds = _judge_error(report.relative_error, allowed) and report.holds
    return holds, {**report.to_dict(), "holds": holds}


def _verify_saved(path: Path, model: str, backend: str) -> _Verdict:
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
    say(f"{sampler.denoiser}, {loop.name}, {num_evaluations} evaluations, batch {len(noise)}; by {made_by}")
    for finding in findings:
        say(str(finding))
    if not findings:
        say("form, notes and memory plan are right; reads and operations cannot be proven of a file")
    bitwise = same_bits([got], [wanted])
    if bitwise:
        say("equal to the reference bit for bit")
    elif error == 0.0:
        say("differs from the reference in the signs of zeros only")
    holds = _judge_error(error, allowed) and not findings and (bitwise or allowed > 0.0)
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


def _allowed_error(sampler: LoadedSampler, backend: str) -> float:
    made_of = (Options(numerics=numerics).passes.passes for numerics in get_args(_Numerics))
    bitwise, rounding = ({each.name for each in passes} for passes in made_of)
    if not rounding.issuperset(sampler.passes):
        raise VerificationError(
            f"the file was made with {', '.join(set(sampler.passes) - rounding)}, which"
            " gives another result on purpose; no bound says how far off it may be"
        )
    if backend == EAGER and bitwise.issuperset(sampler.passes):
        return 0.0
    return tolerance(sampler.schedule.num_evaluations)


def _judge_error(error: float, allowed: float) -> bool:
    """Return whether an error is no larger than allowed; print the error, unless it is 0."""
    # Not `error > allowed`: an infinite error is never right.
    is_near = math.isfinite(error) and error <= allowed
    if not is_near:
        say(f"relative error {error:.3g} is above {allowed:.3g}")
    elif error > 0.0:
        say(f"relative error {error:.3g} is within {allowed:.3g}, which rounding explains")
    return is_near


def _seeded(sample: Callable[[], object]) -> Tensor:
    """Return the sample that is drawn with the random numbers of one fixed seed."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(_SEED)
        latent = sample()
    assert isinstance(latent, Tensor)
    return latent
