"""Sites and schedules drawn at random for a denoiser and a loop that are there already."""

from __future__ import annotations

import json
import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from bench.trust.programs.denoisers import Description
from bench.trust.programs.rules import Combination, Decay, FollowInput
from l2c_compile import CacheSchedule, Reuse, Rule, Site
from l2c_compile.errors import ScheduleError
from l2c_compile.schedules.rules import HOLD, rule_from_dict

_RULES: tuple[Rule, ...] = (Combination((1.5, -0.5)), Decay(), FollowInput())


@dataclass
class CalledModules:
    """Which modules one evaluation calls, how often, and whether their change (out - in) is defined."""

    calls: Counter[str] = field(default_factory=Counter)
    inputs: dict[str, object] = field(default_factory=dict)
    outputs: dict[str, object] = field(default_factory=dict)
    """The shapes, where there is a single tensor."""
    pass_on: set[str] = field(default_factory=set)
    """The sites that return a tensor which they were given."""

    @classmethod
    def of(cls, denoiser: nn.Module, *args: Tensor, **kwargs: Tensor) -> CalledModules:
        """Run one evaluation and note what it calls."""
        called = cls()

        def note(path: str) -> object:
            def hook(module: nn.Module, args: tuple[object, ...], output: object) -> None:
                called.calls[path] += 1
                given = {id(leaf) for leaf in tree_leaves(args) if isinstance(leaf, Tensor)}
                if not given.isdisjoint(map(id, tree_leaves(output))):
                    called.pass_on.add(path)
                if args and isinstance(args[0], Tensor) and isinstance(output, Tensor):
                    called.inputs[path], called.outputs[path] = args[0].shape, output.shape

            return hook

        hooks = [module.register_forward_hook(note(path)) for path, module in denoiser.named_modules() if path]
        with torch.no_grad():
            denoiser(*args, **kwargs)
        for hook in hooks:
            hook.remove()
        return called

    def change_is_defined(self, site: Site) -> bool:
        """Return whether the output of the site has the shape of its input."""
        last = site.last or site.path
        return {site.path, last} <= self.inputs.keys() and self.inputs[site.path] == self.outputs[last]

    def runs(self) -> list[tuple[str, str]]:
        """Return the runs of neighbouring numbered modules that are all called."""
        found = []
        for first in self.calls:
            parent, _, number = first.rpartition(".")
            last = int(number) + 1 if number.isdigit() else -1
            while last >= 0 and f"{parent}.{last}" in self.calls:
                found.append((first, f"{parent}.{last}"))
                last += 1
        return found


def draw_sites(rng: random.Random, called: CalledModules) -> list[str]:
    """Draw up to six cuts: modules of any depth, runs, changes, and later calls of shared modules."""
    paths = sorted(called.calls)
    upper = [path for path in paths if path.count(".") in (1, 3)]
    runs = sorted(called.runs())
    sites: dict[str, None] = {}
    for _ in range(rng.choice((1, 2, 3, 4, 6))):
        if runs and rng.random() < 0.15:
            first, last = rng.choice(runs)
        else:
            first = last = rng.choice(upper if upper and rng.random() < 0.6 else paths)
        kind = "delta" if called.change_is_defined(Site(first, last)) and rng.random() < 0.3 else "out"
        call = rng.randrange(min(called.calls[first], called.calls[last]))
        sites[str(Site(first, last, kind, call))] = None  # type: ignore[arg-type]
    return list(sites)


def draw_schedule(
    rng: random.Random, sites: Sequence[str], forms: Sequence[object], read_inputs: Sequence[str]
) -> list[Description]:
    """Draw entries of a schedule, each valid with those before it: any sources of any age.

    Sources are evaluations of equal form, but for a few: those are refused. Rules that read the input of a site are
    drawn for ``read_inputs`` only.
    """
    num_evaluations = len(forms)
    density = rng.choice((0.3, 0.6, 0.9))
    columns = tuple(map(Site.parse, sites))
    reuses: dict[tuple[int, Site], Reuse] = {}
    for e in range(1, num_evaluations):
        for site in rng.sample(columns, len(columns)):
            if rng.random() > density:
                continue
            rule = HOLD if rng.random() < 0.8 else rng.choice(_RULES)
            past = [source for source in range(e) if forms[source] == forms[e]]
            if rng.random() < 0.01:
                past = list(range(e))
            if rule.num_sources > len(past) or (rule.needs_input and str(site) not in read_inputs):
                continue
            newest = rng.random() < 0.4
            sources = past[: -rule.num_sources - 1 : -1] if newest else rng.sample(past, rule.num_sources)
            candidate = {**reuses, (e, site): Reuse(tuple(sources), rule)}
            if _is_valid(num_evaluations, columns, candidate):
                reuses = candidate
    return [
        {
            "evaluation": e,
            "site": str(site),
            "sources": list(reuse.sources),
            "rule": json.loads(json.dumps(reuse.rule.to_dict())),
        }
        for (e, site), reuse in reuses.items()
    ]


def _is_valid(num_evaluations: int, sites: tuple[Site, ...], reuses: dict[tuple[int, Site], Reuse]) -> bool:
    try:
        CacheSchedule(num_evaluations, sites, reuses)
    except ScheduleError:
        return False
    return True


def schedule_from(sites: Sequence[str], entries: Sequence[Description], num_evaluations: int) -> CacheSchedule:
    """Return the schedule of drawn sites and entries."""
    reuses = {
        (entry["evaluation"], Site.parse(entry["site"])): Reuse(tuple(entry["sources"]), rule_from_dict(entry["rule"]))
        for entry in entries
    }
    return CacheSchedule(num_evaluations, tuple(map(Site.parse, sites)), reuses)
