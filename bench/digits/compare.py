"""Compare learned, calibrated and formula schedules of the digits model in quality, at equal multiply-adds.

There are two settings: "pairs", in which only every second evaluation may reuse, as in Learning-to-Cache, and "free".
All samples go through the compiled path, from the same noise, and are judged against those of the uncached loop.
Options:

    --routers DIR   the folder of learned routers: l2c-20-70.safetensors (pairs) and rollout-20-70.safetensors (free)
                    are for 20 evaluations and 70% of the multiply-adds; those that are absent are left out, and named
    --keep DIR      the folder for verdicts and references; a second call with equal settings continues from them
    --png FILE, --table FILE    the picture, and a table in Markdown with a line for each schedule
    --steps 20 50, --settings pairs free, --budgets B ... (in place of the usual ones)
    --samples 2000, --batch 10, --seeds 3, --runs 16
    --without METHOD ...    leave methods out, by their name in the table

A sample of 20 evaluations takes about 0.045 s of one core, half of that with half of the work: with everything, 2000
samples of all schedules take some three hours of one core. ``--keep`` makes that many short calls, also side by side.

Where a learned router is there, the others may keep as much as it keeps, not the budget in its name, so that each has
at least the work of the router. A method that cannot meet a budget (an interval, fewer steps) is shown at the work that
it has.
"""

from __future__ import annotations

import argparse
import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import safetensors
import safetensors.torch
from matplotlib.figure import Figure
from rich.progress import Progress

from bench.cases import BenchError
from bench.options import Options
from bench.report import Condition, Row
from l2c_compile import CacheSchedule, Router
from l2c_compile.files.documents import write_atomically
from l2c_compile.finders import Profile, alternate_evaluations, for_budget, take_profile
from l2c_compile.finders.selecting import leaf_sites
from l2c_compile.loops import BuiltInLoop, loop_from_dict
from l2c_compile.methods import (
    block_caching,
    fewer_steps,
    mag_cache,
    pairwise,
    random_reuse,
    smooth_cache,
    uniform_interval,
)
from l2c_compile.methods.invar_diff import invar_diff_scaled
from l2c_compile.methods.pairwise import ErrorOf
from l2c_compile.models.named import DIGITS, NamedModel, named_model
from l2c_compile.quality.judge import Judge
from l2c_compile.quality.measures import Estimate

_BUDGETS: Mapping[int, Mapping[str, tuple[float, ...]]] = {
    20: {"pairs": (0.55, 0.6, 0.7, 0.8, 0.9), "free": (0.4, 0.55, 0.7)},
    50: {"pairs": (0.55, 0.7), "free": (0.55,)},
}
_LEARNED = {"pairs": "l2c", "free": "rollout"}
_LEARNED_NAMES = {"l2c": "L2C (learned)", "rollout": "rollout (learned)"}
_PAIRWISE: Mapping[str, ErrorOf] = {
    "SmoothCache": "smooth-cache",
    "Block Caching": "block-caching",
    "InvarDiff": "invar-diff",
    "MagCache": "mag-cache",
}
_FREE: Mapping[str, tuple[Callable[[Profile, float], CacheSchedule], float | None]] = {
    "SmoothCache": (smooth_cache, None),
    "SmoothCache by site": (lambda profile, alpha: smooth_cache(profile, alpha, by="site"), None),
    "Block Caching": (block_caching, None),
    "InvarDiff": (invar_diff_scaled, 1.0),
    "MagCache": (mag_cache, None),
}
_INTERVALS = (2, 3, 4)
_CALIBRATION_SEED = 1_000_000
_SHOWN = ("relative_l2", "frechet")


@dataclass(frozen=True)
class Contender:
    """A schedule that is to be judged, with the loop that it is for."""

    steps: int
    setting: str
    method: str
    schedule: CacheSchedule
    loop: BuiltInLoop


@dataclass(frozen=True)
class Judged:
    """A schedule with the work that it keeps and its measures of quality."""

    contender: Contender
    kept: float
    measures: Mapping[str, Estimate]


def run(args: Sequence[str], progress: Progress) -> list[Row]:
    """Return the measures of every schedule, and for each learned router the number of methods it does not beat."""
    options = _options(args)
    known = named_model(DIGITS)
    judged: list[Judged] = []
    rows: list[Row] = []
    for steps in options.steps:
        loop = known.loop(steps)
        task = progress.add_task(f"{steps} evaluations: profile", total=options.runs)
        profile = _profile(known, loop, options.runs, on_run=lambda task=task: progress.advance(task))  # type: ignore[misc]
        plan, absent = contenders(known, profile, options)
        rows += [Row("absent_router", 1, "", {"steps": steps, "file": name}) for name in absent]
        task = progress.add_task(f"{steps} evaluations: reference", total=len(plan) + 1)
        verdicts = _VerdictStore(known, loop, options)
        progress.advance(task)
        for contender in plan:
            progress.update(task, description=f"{steps} evaluations: {contender.setting}, {contender.method}")
            judged.append(verdicts.judge(contender))
            progress.advance(task)
    for each in judged:
        rows += _rows(each, options.samples)
    rows += _comparisons(judged)
    if options.png is not None:
        _draw(judged, options.png, options.samples)
    if options.table is not None:
        write_atomically(options.table, _markdown(judged).encode())
    return rows


def contenders(known: NamedModel, profile: Profile, options: argparse.Namespace) -> tuple[list[Contender], list[str]]:
    """Return the schedules to be judged for one number of evaluations, and the routers that are not there."""
    steps = profile.num_evaluations
    loop = known.loop(steps)
    plan: list[Contender] = []
    absent: list[str] = []
    for setting in options.settings:
        usual = _BUDGETS.get(steps, _BUDGETS[20])[setting]
        for nominal in options.budgets or usual:
            name = f"{_LEARNED[setting]}-{steps}-{round(100 * nominal)}.safetensors"
            budget = nominal
            if options.routers is not None and (options.routers / name).is_file():
                schedule = _learned(options.routers / name, loop)
                budget = profile.work.kept(schedule)
                plan.append(Contender(steps, setting, _LEARNED_NAMES[_LEARNED[setting]], schedule, loop))
            else:
                absent.append(name)
            for method, schedule in _others(profile, setting, budget, options.seeds):
                plan.append(Contender(steps, setting, method, schedule, loop))
            shorter = fewer_steps(loop, budget)
            uncached = CacheSchedule.all_compute(shorter.num_evaluations)
            plan.append(Contender(steps, setting, "fewer steps", uncached, shorter))
        for interval in (2,) if setting == "pairs" else _INTERVALS:
            anchor = "start" if setting == "pairs" else "end"
            fora = uniform_interval(steps, leaf_sites(profile), interval, anchor=anchor)  # type: ignore[arg-type]
            plan.append(Contender(steps, setting, "FORA", fora, loop))
    plan = [each for each in plan if each.method not in options.without]
    # Two budgets may lead a method to one schedule.
    different = {(each.setting, each.method, each.schedule.digest, str(each.loop)): each for each in plan}
    return list(different.values()), absent


def _learned(path: Path, loop: BuiltInLoop) -> CacheSchedule:
    schedule = Router.load(path).schedule()
    if schedule.loop is None or loop_from_dict(schedule.loop) != loop:
        raise BenchError(f"{path.name} was learned for another loop than {loop}; learn it for this one")
    return schedule


def _others(profile: Profile, setting: str, budget: float, num_seeds: int) -> Iterator[tuple[str, CacheSchedule]]:
    """Yield each method that needs no learning, with its schedule for a budget."""
    among = alternate_evaluations(profile.num_evaluations) if setting == "pairs" else None
    if setting == "pairs":
        for method, error in _PAIRWISE.items():
            yield method, pairwise(profile, error, budget)
    else:
        for method, (select, highest) in _FREE.items():
            found = for_budget(lambda x, s=select: s(profile, x), profile.work, budget, highest=highest)  # type: ignore[misc]
            yield method, found.schedule
    for seed in range(num_seeds):
        sites = leaf_sites(profile)
        work = profile.work
        yield "random", random_reuse(profile.num_evaluations, sites, budget, seed=seed, among=among, work=work)


class _VerdictStore:
    """Judges each schedule against one loop only once, and reads earlier verdicts from a folder."""

    def __init__(self, known: NamedModel, loop: BuiltInLoop, options: argparse.Namespace) -> None:
        self.folder: Path | None = options.keep
        self.settings = (loop.to_dict(), options.samples, options.batch)
        self._judged: dict[str, Judged] = {}
        reference = None
        path = None if self.folder is None else self.folder / f"reference-{_key(*self.settings)}.safetensors"
        if path is not None and path.exists():
            with safetensors.safe_open(path, framework="pt") as file:
                reference = file.get_tensor("samples"), int(file.metadata()["multiply_adds"])
        self.judge_of = Judge(known, loop, num_samples=options.samples, batch=options.batch, reference=reference)
        if path is not None and reference is None:
            path.parent.mkdir(parents=True, exist_ok=True)
            metadata = {"multiply_adds": str(self.judge_of.multiply_adds)}
            write_atomically(path, safetensors.torch.save({"samples": self.judge_of.reference}, metadata))

    def judge(self, contender: Contender) -> Judged:
        """Return the measures of a contender, which are read from the folder or taken anew."""
        key = _key(contender.schedule.digest, contender.loop.to_dict(), *self.settings)
        if key not in self._judged:
            path = None if self.folder is None else self.folder / f"verdict-{key}.json"
            if path is None or not path.exists():
                self._judged[key] = self._judge_anew(contender)
                if path is not None:
                    write_atomically(path, _to_json(self._judged[key]).encode())
            else:
                self._judged[key] = _from_json(path.read_text(encoding="utf-8"), contender)
        return replace(self._judged[key], contender=contender)

    def _judge_anew(self, contender: Contender) -> Judged:
        verdict = self.judge_of.judge(contender.schedule, contender.loop)
        found = {**dict(verdict.quality.estimates()), "as_asked": verdict.as_asked}
        measures = {name: estimate for name, estimate in found.items() if estimate is not None}
        return Judged(contender, verdict.multiply_adds_kept, measures)


def _to_json(judged: Judged) -> str:
    measures = {name: vars(estimate) for name, estimate in judged.measures.items()}
    return json.dumps({"kept": judged.kept, "measures": measures})


def _from_json(text: str, contender: Contender) -> Judged:
    document = json.loads(text)
    measures = {name: Estimate(**numbers) for name, numbers in document["measures"].items()}
    return Judged(contender, document["kept"], measures)


def _key(*settings: object) -> str:
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:24]


def not_beaten(learned: Judged, others: Sequence[Judged], measure: str) -> list[str]:
    """Return the methods that are as good as a learned router at equal work.

    The schedule of a method that counts is the one with the least work, but no less than the router's; of several with
    equal work (seeds) it is the best.
    """
    nearest: dict[str, list[Judged]] = {}
    for other in others:
        if other.kept >= learned.kept * (1 - 1e-9):
            nearest.setdefault(other.contender.method, []).append(other)
    better = []
    for method, candidates in nearest.items():
        least = min(candidate.kept for candidate in candidates)
        # The work of random schedules for one budget differs by less than an entry.
        values = [each.measures[measure].value for each in candidates if each.kept < least + 0.005]
        if min(values) <= learned.measures[measure].value:
            better.append(method)
    return better


def _comparisons(judged: Sequence[Judged]) -> list[Row]:
    rows = []
    learned = [each for each in judged if each.contender.method in _LEARNED_NAMES.values()]
    for each in learned:
        here = (each.contender.steps, each.contender.setting)
        others = [o for o in judged if (o.contender.steps, o.contender.setting) == here and o not in learned]
        for measure in _SHOWN:
            methods = not_beaten(each, others, measure)
            where = {**_where(each), "measure": measure, "methods": ", ".join(methods)}
            rows.append(Row("methods_not_beaten", len(methods), "", where))
    return rows


def _rows(judged: Judged, num_samples: int) -> list[Row]:
    return [
        Row(name, each.value, "", {**_where(judged), "low": each.low, "high": each.high, "samples": num_samples})
        for name, each in judged.measures.items()
    ]


def _where(judged: Judged) -> dict[str, Condition]:
    contender = judged.contender
    return {
        "steps": contender.steps,
        "setting": contender.setting,
        "method": contender.method,
        "kept": round(judged.kept, 4),
    }


def _markdown(judged: Sequence[Judged]) -> str:
    names = list(judged[0].measures)
    lines = [f"| steps | setting | kept | method | {' | '.join(names)} |", "|" + "---|" * (4 + len(names))]
    ranked = sorted(judged, key=lambda each: (each.contender.steps, each.contender.setting, each.kept))
    for each in ranked:
        contender = each.contender
        cells = " | ".join(str(each.measures[name]) for name in names)
        lines.append(f"| {contender.steps} | {contender.setting} | {each.kept:.1%} | {contender.method} | {cells} |")
    return "\n".join(lines) + "\n"


def _draw(judged: Sequence[Judged], path: Path, num_samples: int) -> None:
    """Write a PNG: a row of panels for each measure, a column for each number of evaluations and setting."""
    columns = list(dict.fromkeys((each.contender.steps, each.contender.setting) for each in judged))
    methods = list(dict.fromkeys(each.contender.method for each in judged))
    figure = Figure(figsize=(5.0 * len(columns), 4.5 * len(_SHOWN)), layout="constrained")
    panels = figure.subplots(len(_SHOWN), len(columns), squeeze=False)
    for axes_row, measure in zip(panels, _SHOWN, strict=True):
        for axes, column in zip(axes_row, columns, strict=True):
            for number, method in enumerate(methods):
                mine = [
                    each
                    for each in judged
                    if (each.contender.steps, each.contender.setting, each.contender.method) == (*column, method)
                ]
                points = [(each.kept, each.measures[measure]) for each in sorted(mine, key=lambda each: each.kept)]
                if points:
                    _draw_method(axes, method, points, f"C{number % 10}")
            axes.set_yscale("log")
            axes.set_xlabel("multiply-adds kept")
            axes.set_ylabel(f"{measure}, 95% interval")
            axes.set_title(f"{column[0]} evaluations, {column[1]}")
    panels[0][0].legend(fontsize=7)
    panels[0][-1].legend(fontsize=7)
    figure.suptitle(f"digits model against its uncached samples, equal noise, {num_samples} samples")
    figure.savefig(path, format="png", dpi=120)


def _draw_method(axes, method: str, points: Sequence[tuple[float, Estimate]], color: str) -> None:  # type: ignore[no-untyped-def]  # noqa: ANN001
    values = [estimate.value for _, estimate in points]
    below = [max(0.0, estimate.value - estimate.low) for _, estimate in points]
    above = [max(0.0, estimate.high - estimate.value) for _, estimate in points]
    learned = method in _LEARNED_NAMES.values()
    axes.errorbar(
        [kept for kept, _ in points],
        values,
        yerr=[below, above],
        label=method,
        color=color,
        marker="*" if learned else "o",
        markersize=9 if learned else 4,
        linewidth=2 if learned else 1,
        linestyle={"random": "none", "fewer steps": "--"}.get(method, "-"),
        capsize=2,
    )


def _profile(known: NamedModel, loop: BuiltInLoop, num_runs: int, on_run: Callable[[], None]) -> Profile:
    noise, labels = known.inputs(num_runs, _CALIBRATION_SEED)
    runs = [(noise[i : i + 1], {"y": labels[i : i + 1]}) for i in range(num_runs)]
    sites = (*known.sublayers, *known.stacks)
    return take_profile(known.denoiser, loop, sites, runs, lags=loop.num_evaluations - 1, on_run=on_run)


def _options(args: Sequence[str]) -> argparse.Namespace:
    parser = Options("quality")
    for name in ("routers", "keep", "png", "table"):
        parser.add_argument(f"--{name}", type=Path)
    parser.add_argument("--steps", type=int, nargs="+", default=[20, 50])
    parser.add_argument("--settings", nargs="+", default=list(_LEARNED), choices=list(_LEARNED))
    parser.add_argument("--budgets", type=float, nargs="+")
    parser.add_argument("--without", nargs="+", default=[])
    for name, default in (("samples", 2000), ("batch", 10), ("seeds", 3), ("runs", 16)):
        parser.add_argument(f"--{name}", type=int, default=default)
    return parser.read(args)
