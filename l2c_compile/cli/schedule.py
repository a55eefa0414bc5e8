"""``l2c schedule METHOD``: from a profile, or by a formula, to a schedule file.

To add a method, write one line in ``METHODS``. Its options come from its function: each parameter that is a number, a
switch or one of a few words, with its default, and with what the docstring says of it as help. A function whose first
parameter is ``profile`` is given one; any other is a formula, of ``num_evaluations``, ``sites`` and ``branches``.
"""

from __future__ import annotations

import inspect
import math
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from inspect import Parameter
from pathlib import Path
from typing import Annotated, Any, Literal, get_origin

import typer

from l2c_compile.cli.files import output_path, read_profile
from l2c_compile.cli.options import Force
from l2c_compile.cli.terminal import say
from l2c_compile.errors import ScheduleError
from l2c_compile.finders import Profile, Work, alternate_evaluations, for_budget
from l2c_compile.finders.selecting import leaf_sites
from l2c_compile.methods import (
    block_caching,
    deep_cache,
    mag_cache,
    pairwise,
    random_reuse,
    smooth_cache,
    uniform_interval,
)
from l2c_compile.methods.invar_diff import invar_diff_scaled
from l2c_compile.methods.pairwise import ErrorOf
from l2c_compile.schedules.schedule import CacheSchedule

_Out = Annotated[Path, typer.Option(metavar="FILE", help="The schedule; ends in .json.")]
_SUBLAYERS = ("blocks.*.attn", "blocks.*.mlp")

_LOWEST_BUDGET = 1e-300
"""The smallest budget that is tried: budgets are above 0, and under this one a method keeps as little as it can."""


@dataclass(frozen=True)
class Method:
    """A method of making a schedule, and its parameters."""

    summary: str
    function: Callable[..., CacheSchedule]
    free: str = ""
    """The parameter that is searched for a given budget; "" where the method takes the budget itself, or none."""
    highest: float | None = None
    """The largest value of that parameter that makes sense, if there is one."""


def _pairwise(profile: Profile, budget: float, error: ErrorOf = "smooth-cache") -> CacheSchedule:
    """Reuse the smallest errors in alternate evaluations.

    Args:
        profile: the profile, of any model.
        budget: the share of the multiply-adds to keep.
        error: whose statistic is the error of a reuse.
    """
    return pairwise(profile, error, budget)


def _random(profile: Profile, budget: float, seed: int = 0, pairs: bool = False) -> CacheSchedule:
    """Reuse sites of a profile at random.

    Args:
        profile: the profile, of any model.
        budget: the share of the multiply-adds to keep.
        seed: seed of the draw.
        pairs: whether only alternate evaluations may reuse.
    """
    return random_reuse(
        profile.num_evaluations,
        leaf_sites(profile),
        budget,
        seed=seed,
        among=alternate_evaluations(profile.num_evaluations, branches=profile.branches) if pairs else None,
        work=profile.work,
        branches=profile.branches,
        loop=profile.loop,
    )


METHODS = {
    "smooth-cache": Method("SmoothCache: jump as far as the error at that lag allows.", smooth_cache, "alpha"),
    "block-caching": Method("Block Caching: keep a value until its changes add up.", block_caching, "delta"),
    "invar-diff": Method(
        "InvarDiff: reuse the whole stack, or its sites, where their change slows down most.",
        invar_diff_scaled,
        "strength",
        highest=1.0,
    ),
    "mag-cache": Method(
        "MagCache: reuse the change of the whole stack while its magnitude is predicted to stay.",
        mag_cache,
        "threshold",
    ),
    "pairwise": Method(
        "Reuse the smallest errors in alternate evaluations, the setting of Learning-to-Cache.", _pairwise
    ),
    "random": Method("Reuse sites at random: what any method should beat.", _random),
    "uniform": Method(
        "FORA and DeepCache's uniform setting: compute in every N-th evaluation, reuse in between.", uniform_interval
    ),
    "deep-cache": Method("DeepCache's non-uniform setting, as its authors coded it.", deep_cache),
}


def _from_profile(
    method: Method,
    profile: Annotated[
        Path, typer.Option(metavar="FILE", exists=True, dir_okay=False, help="What `l2c profile` wrote.")
    ],
    out: _Out,
    budget: Annotated[
        float | None, typer.Option(metavar="B", help="The share of the multiply-adds to keep, above 0.")
    ] = None,
    nearest: Annotated[
        bool, typer.Option("--nearest", help="Take the least that can be kept if that is more than the budget.")
    ] = False,
    force: Force = False,
    **settings: Any,  # noqa: ANN401 - of the method
) -> None:
    out = output_path(out, ".json", force=force, reads=profile)
    value = settings.pop(method.free, None)
    if method.free and (value is None) == (budget is None):
        raise ScheduleError(f"give either {_flag(method.free)} or --budget")
    measured = read_profile(profile)
    make = partial(method.function, measured, **settings)
    if budget is None:
        schedule = make(**{method.free: value})
    else:
        schedule = _within_budget(method, make, measured.work, budget, nearest)
    _write(schedule, out, f", about {measured.work.kept(schedule):.2%} of the multiply-adds kept")


def _by_formula(
    method: Method,
    num_evaluations: Annotated[int, typer.Option("--evaluations", metavar="E", min=1, help="Evaluations of the loop.")],
    out: _Out,
    sites: Annotated[
        list[str] | None,
        typer.Option(
            "--site", metavar="SITE", help="What is reused; may be repeated. Attention and MLP of every block."
        ),
    ] = None,
    branches: Annotated[int, typer.Option(metavar="N", min=1, help="2 for guidance in two separate calls.")] = 1,
    force: Force = False,
    **settings: Any,  # noqa: ANN401 - of the method
) -> None:
    out = output_path(out, ".json", force=force)
    _write(method.function(num_evaluations, sites or _SUBLAYERS, branches=branches, **settings), out)


def _within_budget(
    method: Method, make: Callable[..., CacheSchedule], work: Work, budget: float, nearest: bool
) -> CacheSchedule:
    """Return the schedule that keeps least, but no less than the budget.

    Raises:
        ScheduleError: if the method keeps more whatever it is given, unless ``nearest`` takes that.
    """
    tried: list[float] = []

    def at(value: float) -> CacheSchedule:
        schedule = make(**{method.free or "budget": value})
        tried.append(work.kept(schedule))
        return schedule

    if method.free:
        found = for_budget(at, work, budget, highest=method.highest)
        schedule = found.schedule
    else:
        at(_LOWEST_BUDGET)
        schedule = at(budget)
    if min(tried) > budget and not nearest:
        # Rounded up, so that the method can meet the share that the message names.
        least = math.ceil(min(tried) * 1e4) / 1e4
        raise ScheduleError(
            f"a budget of {budget:.2%} cannot be met: with these options the method keeps at least {least:.2%} of the"
            f" multiply-adds; give a --budget of {least:.4f} or more, or take the least with --nearest"
        )
    if method.free:
        say(f"{method.free} {found.parameter:.6g} keeps {found.kept:.2%}, wanted {budget:.2%}")
    return schedule


def _write(schedule: CacheSchedule, out: Path, kept: str = "") -> None:
    schedule.save(out)
    say(f"{schedule.computed_share():.2%} of the entries computed{kept}; written to {out}")


def _command(method: Method) -> Callable[..., None]:
    """Return a function with the parameters that typer is to see: those of the method, and what all have."""
    is_formula = "profile" not in inspect.signature(method.function).parameters
    body: Callable[..., None] = _by_formula if is_formula else _from_profile
    shared = dict(inspect.signature(body, eval_str=True).parameters)
    del shared["method"], shared["settings"]
    if not is_formula and not method.free:
        shared["budget"] = shared["budget"].replace(default=Parameter.empty)
    own = [option for option in _options(method) if option.name not in shared]
    parameters = [each.replace(kind=Parameter.KEYWORD_ONLY) for each in (*own, *shared.values())]

    def run(**given: Any) -> None:  # noqa: ANN401
        body(method, **given)

    run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    return run


def _options(method: Method) -> Iterator[Parameter]:
    """Yield the parameters of a method that a command line can give."""
    # "    alpha: the largest relative error." and the lines that go on, further in.
    told = dict(re.findall(r"^ {4}(\w+): (.+(?:\n {8}.+)*)", inspect.getdoc(method.function) or "", re.MULTILINE))
    for name, parameter in inspect.signature(method.function, eval_str=True).parameters.items():
        kind, default = parameter.annotation, parameter.default
        if kind not in (bool, int, float) and get_origin(kind) is not Literal:
            continue
        if name == method.free:
            kind, default = kind | None, None
        text = " ".join(told.get(name, "").replace("``", "").split())
        option = typer.Option(
            ... if default is Parameter.empty else default, _flag(name), help=text[:1].upper() + text[1:]
        )
        yield parameter.replace(annotation=kind, default=option)


def _flag(name: str) -> str:
    return "--" + name.removeprefix("num_").replace("_", "-")


command = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    help="Make a schedule file, from a profile or by a formula.",
)
for _name, _method in METHODS.items():
    _either = f"\n\nGive either {_flag(_method.free)} or --budget." if _method.free else ""
    command.command(_name, help=_method.summary + _either)(_command(_method))
