"""The command ``l2c``. Each command's body lives in a module of its own; here are only names, options and errors."""

from __future__ import annotations

import sys
from enum import Enum
from pathlib import Path
from typing import Annotated

import typer

from l2c_compile.cli.schedule import schedule_app
from l2c_compile.errors import L2CError

__all__ = ["app", "main"]

app = typer.Typer(no_args_is_help=True, add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False)
app.add_typer(schedule_app, name="schedule")


class _Steps(str, Enum):
    few = "20"
    many = "50"


class _Family(str, Enum):
    dit = "dit"
    uvit = "uvit"
    harmonica = "harmonica"


class _Method(str, Enum):
    l2c = "l2c"
    rollout = "rollout"


class _Unit(str, Enum):
    multiply_adds = "multiply-adds"
    time = "time"


class _Price(str, Enum):
    sites = "sites"
    multiply_adds = "multiply-adds"
    time = "time"


class _Numerics(str, Enum):
    bitwise = "bitwise"
    rounding = "rounding"


class _Precision(str, Enum):
    no = "no"
    bf16 = "bf16"
    fp16 = "fp16"


@app.callback()
def _l2c() -> None:
    """Compile the sampling loop of a diffusion model, caches included, into one static graph."""


@app.command()
def inspect(
    file: Annotated[Path, typer.Argument(metavar="FILE", exists=True, dir_okay=False, help="A schedule or router.")],
    threshold: Annotated[
        float | None, typer.Option(metavar="T", help="For routers: compute where the score is above T.")
    ] = None,
    family: Annotated[_Family | None, typer.Option(help="For pickles: which project wrote it.")] = None,
    png: Annotated[Path | None, typer.Option(metavar="FILE", help="Write a picture as well.")] = None,
    evaluations: Annotated[bool, typer.Option("--evaluations", help="List the evaluations one by one.")] = False,
    passes: Annotated[
        bool,
        typer.Option("--passes", help="List what each pass does to the static graph of a model, and why not more."),
    ] = False,
    model: Annotated[
        str | None, typer.Option(metavar="NAME", help="With --passes: digits, or a published size: dit-xl/2, ...")
    ] = None,
    steps: Annotated[
        int | None, typer.Option(metavar="N", min=1, help="With --passes: sampler steps; by default those of FILE.")
    ] = None,
    batch: Annotated[int | None, typer.Option(metavar="B", min=1, help="With --passes: samples a call.")] = None,
) -> None:
    """Show what a schedule or router file computes and reuses."""
    of_passes = {"model": model, "steps": steps, "batch": batch}
    given = {name: value for name, value in of_passes.items() if value is not None}
    if given and not passes:
        raise typer.BadParameter("is for --passes only", param_hint=f"--{min(given)}")
    # Imported here: `l2c --help` should not wait for torch.
    from rich.console import Console

    from l2c_compile.cli.inspect import explain_file, inspect_file

    inspect_file(
        file,
        Console(),
        threshold=threshold,
        family=None if family is None else family.value,
        png=png,
        evaluations=evaluations,
    )
    if passes:
        explain_file(file, Console(), threshold=threshold, family=None if family is None else family.value, **given)  # type: ignore[arg-type]


@app.command()
def demo(
    out: Annotated[Path, typer.Option(metavar="DIR", file_okay=False, help="Where the picture goes.")] = Path(
        "out/demo"
    ),
    steps: Annotated[_Steps, typer.Option(help="DDIM steps; each is one evaluation of the model.")] = _Steps.few,
    per_class: Annotated[
        int, typer.Option(metavar="N", min=1, help="Samples of each digit, and timed runs of each side.")
    ] = 10,
    backend: Annotated[
        str,
        typer.Option(metavar="NAME", help="What runs the static graphs: eager, aot_eager, inductor (slow to compile)."),
    ] = "eager",
) -> None:
    """Draw digits with a trained model, with and without caching, eagerly and compiled; compare time and pictures.

    Exits with 1 if a static graph differs from the eager loop by more than rounding.
    """
    # Imported here: `l2c --help` should not wait for torch.
    from rich.console import Console

    from l2c_compile.cli.demo import run_demo

    if not run_demo(Console(), out=out, steps=int(steps.value), per_class=per_class, backend=backend):
        raise typer.Exit(1)


@app.command()
def predict(
    file: Annotated[Path, typer.Argument(metavar="FILE", exists=True, dir_okay=False, help="A schedule or router.")],
    model: Annotated[
        str, typer.Option(metavar="NAME", help="digits, or a published size: dit-xl/2, u-vit-h/2, ...")
    ] = "digits",
    steps: Annotated[
        int | None, typer.Option(metavar="N", min=1, help="Sampler steps; by default those that FILE is for.")
    ] = None,
    threshold: Annotated[
        float | None, typer.Option(metavar="T", help="For routers: compute where the score is above T.")
    ] = None,
    batch: Annotated[int, typer.Option(metavar="B", min=1, help="Samples a call.")] = 1,
) -> None:
    """Say what a schedule will save, before anything is compiled.

    Time is measured for digits only; the published sizes are counted without their weights.
    """
    # Imported here: `l2c --help` should not wait for torch.
    from rich.console import Console

    from l2c_compile.cli.predict import preview

    preview(file, Console(), model=model, steps=steps, threshold=threshold, batch=batch)


@app.command()
def verify(
    file: Annotated[
        Path, typer.Argument(metavar="FILE", exists=True, dir_okay=False, help="A schedule, router or saved sampler.")
    ],
    model: Annotated[
        str, typer.Option(metavar="NAME", help="digits, or a published size: dit-xl/2, u-vit-h/2, ...")
    ] = "digits",
    steps: Annotated[
        int | None, typer.Option(metavar="N", min=1, help="Sampler steps; by default those that FILE is for.")
    ] = None,
    threshold: Annotated[
        float | None, typer.Option(metavar="T", help="For routers: compute where the score is above T.")
    ] = None,
    batch: Annotated[
        int | None, typer.Option(metavar="B", min=1, help="Samples a call; by default 1, or as saved.")
    ] = None,
    backend: Annotated[str, typer.Option(metavar="NAME", help="What runs the static graph.")] = "eager",
    numerics: Annotated[_Numerics | None, typer.Option(help="By default what suits the backend.")] = None,
    json: Annotated[Path | None, typer.Option(metavar="FILE", help="Write the report here as well.")] = None,
) -> None:
    """Prove that the static graph made of a schedule is right, and compare it with the eager loop.

    Exits with 0 if it is right, 1 if it is wrong, 2 if that cannot be told. The published sizes are proven without
    their weights.
    """
    # Imported here: `l2c --help` should not wait for torch.
    from rich.console import Console

    from l2c_compile.cli.verify import verify_file

    is_right = verify_file(
        file,
        Console(),
        model=model,
        steps=steps,
        threshold=threshold,
        batch=batch,
        backend=backend,
        numerics=None if numerics is None else numerics.value,
        json_path=json,
    )
    if not is_right:
        raise typer.Exit(1)


@app.command()
def profile(
    out: Annotated[Path, typer.Option(metavar="FILE", dir_okay=False, help="Where to; safetensors.")],
    model: Annotated[str, typer.Option(metavar="NAME", help="digits")] = "digits",
    steps: Annotated[int, typer.Option(metavar="N", min=1, help="Sampler steps.")] = 20,
    runs: Annotated[int, typer.Option(metavar="N", min=1, help="Runs of the loop, without caching.")] = 16,
    batch: Annotated[int, typer.Option(metavar="B", min=1, help="Samples a run.")] = 1,
    lags: Annotated[
        int | None, typer.Option(metavar="K", min=1, help="The most evaluations to look back; by default all.")
    ] = None,
    site: Annotated[
        list[str] | None,
        typer.Option(metavar="SITE", help="What to measure; may be repeated. Sublayers of every block, whole stack."),
    ] = None,
    seed: Annotated[int, typer.Option(metavar="N", help="Of the noise.")] = 0,
    png: Annotated[Path | None, typer.Option(metavar="FILE", help="Write a picture as well.")] = None,
) -> None:
    """Measure once how the sites of a model change from evaluation to evaluation; `l2c schedule` decides from that."""
    # Imported here: `l2c --help` should not wait for torch.
    from rich.console import Console

    from l2c_compile.cli.profile import profile_model

    profile_model(
        out,
        Console(),
        model=model,
        steps=steps,
        num_runs=runs,
        batch=batch,
        lags=lags,
        sites=site or (),
        seed=seed,
        png=png,
    )


@app.command("eval")
def evaluate(
    file: Annotated[Path, typer.Argument(metavar="FILE", exists=True, dir_okay=False, help="A schedule or router.")],
    model: Annotated[str, typer.Option(metavar="NAME", help="digits")] = "digits",
    samples: Annotated[int, typer.Option(metavar="N", min=1, help="Samples with and without caching.")] = 2000,
    batch: Annotated[int, typer.Option(metavar="B", min=1, help="Samples a call.")] = 20,
    steps: Annotated[
        int | None, typer.Option(metavar="N", min=1, help="Sampler steps; by default those that FILE is for.")
    ] = None,
    threshold: Annotated[
        float | None, typer.Option(metavar="T", help="For routers: compute where the score is above T.")
    ] = None,
    seed: Annotated[int, typer.Option(metavar="N", help="Of the noise.")] = 0,
    json: Annotated[Path | None, typer.Option(metavar="FILE", help="Write the numbers here as well.")] = None,
) -> None:
    """Say what a schedule costs in quality, against the uncached model on equal noise."""
    # Imported here: `l2c --help` should not wait for torch.
    from rich.console import Console

    from l2c_compile.cli.eval import evaluate_file

    evaluate_file(
        file,
        Console(),
        model=model,
        steps=steps,
        threshold=threshold,
        num_samples=samples,
        batch=batch,
        seed=seed,
        json_path=json,
    )


@app.command()
def learn(
    out: Annotated[Path, typer.Option(metavar="FILE", dir_okay=False, help="The router; must not exist yet.")],
    budget: Annotated[
        float | None, typer.Option(metavar="SHARE", help="How much of the work may be left, between 0 and 1.")
    ] = None,
    penalty: Annotated[
        float | None, typer.Option(metavar="LAMBDA", help="In place of a budget: the price of a computed site.")
    ] = None,
    method: Annotated[
        _Method, typer.Option(help="l2c: every second evaluation is cached. rollout: any may reuse values of any age.")
    ] = _Method.l2c,
    model: Annotated[str, typer.Option(metavar="NAME", help="digits")] = "digits",
    steps: Annotated[int, typer.Option(metavar="N", min=1, help="Sampler steps.")] = 20,
    rounds: Annotated[int, typer.Option(metavar="N", min=1, help="Updates of every evaluation.")] = 80,
    batch: Annotated[int, typer.Option(metavar="B", min=1, help="Samples of an update, over all processes.")] = 4,
    learning_rate: Annotated[float, typer.Option(metavar="RATE", help="Of AdamW on the logits.")] = 0.1,
    site: Annotated[
        list[str] | None,
        typer.Option(metavar="SITE", help="What may be reused; may be repeated. Attention and MLP of every block."),
    ] = None,
    budget_in: Annotated[_Unit, typer.Option(help="The work that the budget is a share of.")] = _Unit.multiply_adds,
    price_by: Annotated[_Price, typer.Option(help="What a site costs relative to others.")] = _Price.sites,
    straight_through: Annotated[
        bool, typer.Option("--straight-through", help="Learn with scores rounded to 0 or 1.")
    ] = False,
    seed: Annotated[int, typer.Option(metavar="N", help="Of all that is drawn.")] = 0,
    checkpoint_every: Annotated[int, typer.Option(metavar="N", min=1, help="Rounds between checkpoints.")] = 10,
    resume: Annotated[bool, typer.Option("--resume", help="Go on where an interrupted run stopped.")] = False,
    png: Annotated[Path | None, typer.Option(metavar="FILE", help="Draw the router there while it learns.")] = None,
    mixed_precision: Annotated[_Precision, typer.Option(help="Of the model's evaluations.")] = _Precision.no,
) -> None:
    """Learn a router on samples that the model draws itself; give a budget or a penalty.

    Several processes share the work with `accelerate launch -m l2c_compile learn ...`.
    """
    # Imported here: `l2c --help` should not wait for torch.
    from rich.console import Console

    from l2c_compile.cli.learn import learn_router

    learn_router(
        out,
        Console(),
        model=model,
        method=method.value,
        steps=steps,
        sites=tuple(site or ()),
        resume=resume,
        png=png,
        mixed_precision=mixed_precision.value,
        budget=budget,
        penalty=penalty,
        rounds=rounds,
        batch_size=batch,
        learning_rate=learning_rate,
        budget_in=budget_in.value,
        price_by=price_by.value,
        straight_through=straight_through,
        seed=seed,
        checkpoint_every=checkpoint_every,
    )


def main() -> None:
    """Run ``l2c``. An error of ours is one line on stderr and exit code 2, as bad usage is, without a traceback."""
    try:
        app()
    except (L2CError, OSError) as error:
        message = " ".join(str(error).split())
        print(f"l2c: error: {message}", file=sys.stderr)
        sys.exit(2)
