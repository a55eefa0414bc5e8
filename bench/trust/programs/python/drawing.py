"""A program in Python: what is drawn of it, as JSON, and how it runs eagerly."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from bench.trust.programs.denoisers import Description, draw_denoiser
from bench.trust.programs.loops import draw_form, draw_inputs, draw_loop
from bench.trust.programs.python.changes import HOLDERS, MODULES, WEIGHTS, changes_of
from bench.trust.programs.python.features import FEATURES, VALUES
from bench.trust.programs.python.source import World, source_of
from bench.trust.programs.schedules import CalledModules, draw_schedule, draw_sites, schedule_from
from l2c_compile import CacheSchedule, run_reference

_PROGRAMS_PER_SEED = 4
_MAX_TRIES = 50


@dataclass(frozen=True)
class PythonProgram:
    """A denoiser, a loop, what both do in Python, and what happens to them from call to call, all of it JSON."""

    net: Description | None
    """The denoiser that the program's own wraps; None is two plain blocks."""
    steps: Description | None
    """The loop; None is three Euler steps."""
    features: list[str]
    num_evaluations: int
    sites: list[str]
    entries: list[Description]
    """The reuses of the schedule."""
    check: Literal["first", "structure"] | None
    """The argument of ``l2c_compile``."""
    backend: str
    packs: bool
    """Whether the network is in float32 and its weights are packed, which ``numerics="rounding"`` does in large
    batches."""
    history: list[Description]
    """Calls of the sampler (seed, batch, value, inference) and changes between them (change), in order."""

    def to_json(self) -> str:
        """Return the description on one line."""
        return json.dumps(asdict(self), sort_keys=True)

    @classmethod
    def from_json(cls, text: str) -> PythonProgram:
        """Read a description."""
        return cls(**json.loads(text))

    @property
    def key(self) -> str:
        """A text that is equal for equal programs."""
        return self.to_json()

    @property
    def source(self) -> str:
        """The source of the module that this describes."""
        return source_of(self.net, self.steps, self.features, self.dtype)

    @property
    def is_bitwise(self) -> bool:
        """Whether a result has to be equal bit for bit."""
        return self.backend == "eager" and not self.packs

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the latent."""
        return torch.float32 if self.packs else torch.float64

    @property
    def schedule(self) -> CacheSchedule:
        """The schedule that this describes."""
        return schedule_from(self.sites, self.entries, self.num_evaluations)

    @property
    def reads_values(self) -> bool:
        """Whether the program reads the condition ``value``."""
        return any(FEATURES[feature].values for feature in self.features)

    @property
    def things(self) -> set[str]:
        """What the program does, and what is done to it."""
        return {*self.features, *(event["change"] for event in self.history if "change" in event)}

    def inputs(self, world: World, call: Description) -> tuple[Tensor, dict[str, object]]:
        """Return noise and conditions of a call, which belong to the caller alone."""
        given: dict[str, Any] = {}
        if self.net is None:
            generator = torch.Generator().manual_seed(call["seed"])
            noise = torch.randn(call["batch"] * (16 if self.packs else 1), 4, generator=generator, dtype=self.dtype)
        else:
            form = {"layout": "contiguous", **(self.steps or {}), "batch": call["batch"]}
            noise, given = draw_inputs(self.net, form, call["seed"])
        if self.reads_values:
            given["value"] = world.value(call["value"])
        if any(FEATURES[feature].slot == "again" for feature in self.features):
            given["again"] = noise
        return noise, given

    def run_eagerly(self, world: World, call: Description) -> object:
        """Return what the loop gives in eager torch, where a schedule applies with its reference."""
        noise, given = self.inputs(world, call)
        seed_all(call)
        with torch.inference_mode(call.get("inference", False)), torch.no_grad():
            if self.entries and world.module.reuses:
                return run_reference(world.denoiser, world.loop, self.schedule, noise, given)
            return world.loop(world.denoiser, noise, **given)

    def runs_eagerly(self) -> bool:
        """Return whether all calls and changes are such that eager torch runs, with finite results."""
        try:
            with World(self.source) as world:
                for event in self.history:
                    if "change" in event:
                        world.change(event["change"], self.features)
                    elif not _is_finite(self.run_eagerly(world, event)):
                        return False
        # What users' Python raises: a hook is removed twice, a submodule is gone.
        except Exception:
            return False
        return True


def seed_all(call: Description) -> None:
    """Set all random states to those of a call; a loop that seeds torch with 7 seeds as the caller does, at times."""
    torch.manual_seed(7 + call["seed"])
    random.seed(call["seed"])
    np.random.seed(call["seed"])


def draw_python_programs(rng: random.Random) -> Iterator[PythonProgram]:
    """Draw some programs that eager torch runs."""
    for _ in range(_PROGRAMS_PER_SEED):
        yield next(program for program in (_draw(rng) for _ in range(_MAX_TRIES)) if program is not None)


def counted(program: PythonProgram) -> PythonProgram | None:
    """Return the program with as many evaluations as its loop performs; None where eager torch cannot run it."""
    try:
        with World(program.source) as world:
            forms = _forms_of_evaluations(program, world, _first_call(program))
        program = replace(program, num_evaluations=len(forms))
        return program if program.runs_eagerly() else None
    # What users' Python raises where features and changes do not go together.
    except Exception:
        return None


def _draw(rng: random.Random) -> PythonProgram | None:
    packs = rng.random() < 0.07
    net = _draw_net(rng) if rng.random() < 0.2 and not packs else None
    steps = None
    if rng.random() < 0.25:
        plain = {"label": False, "context": False}
        steps = {**draw_loop(rng, net or plain, draw_form(rng)), "returns": "last", "time_dtype": "latent"}
        steps["steps"] = steps["steps"][:2]
    features = _draw_features(rng)
    check: Literal["first", "structure"] = "first" if rng.random() < 0.5 else "structure"
    backend = "aot_eager" if rng.random() < 0.1 and not packs else "eager"
    history = _draw_history(rng, features)
    program = PythonProgram(net, steps, features, 1, [], [], check, backend, packs, history)
    try:
        with World(program.source) as world:
            forms = _forms_of_evaluations(program, world, _first_call(program))
            reuses = rng.random() < 0.5 and all(FEATURES[feature].reuses for feature in features)
            sites = [each for each in _draw_sites(rng, program, world) if each.startswith("net.")] if reuses else []
    # What users' Python raises where features do not go together.
    except Exception:
        return None
    entries = draw_schedule(rng, sites, forms, []) if sites else []
    program = replace(program, num_evaluations=len(forms), sites=sites, entries=entries)
    return program if program.runs_eagerly() else None


def _draw_net(rng: random.Random) -> Description:
    """Draw a small denoiser that returns a tensor."""
    net = draw_denoiser(rng)
    blocks = [{**block, "parts": block["parts"][:2]} for block in net["blocks"][:1]]
    return {**net, "blocks": blocks, "order": [0], "skip": "none", "result": "tensor", "dtype": "float64"}


def _draw_features(rng: random.Random) -> list[str]:
    chosen: list[str] = []
    slots: set[str] = set()
    # What may be refused mostly is, and then nothing is tried of what comes after the first call.
    known = [name for name, each in FEATURES.items() if each.works or rng.random() < 0.4]
    for feature in rng.sample(known, rng.choice((0, 1, 1, 1, 1, 1, 1, 2, 2, 2, 3))):
        if FEATURES[feature].slot not in slots:
            chosen.append(feature)
            slots |= {FEATURES[feature].slot} - {""}
    return chosen


def _draw_history(rng: random.Random, features: list[str]) -> list[Description]:
    """Draw calls, with changes between most of them."""
    own = [name for name in changes_of(features) if name not in WEIGHTS and name not in MODULES]
    history = [_draw_call(rng)]
    for _ in range(rng.choice((1, 1, 2, 2, 3))):
        for _ in range(rng.choice((0, 1, 1, 1, 2))):
            kinds: list[list[str]] = [
                list(WEIGHTS),
                list(MODULES),
                list(HOLDERS),
                own or list(MODULES),
                own or list(WEIGHTS),
            ]
            history.append({"change": rng.choice(rng.choice(kinds))})
        repeated = rng.random() < 0.6
        history.append(dict(history[0]) if repeated else _draw_call(rng))
    return history


def _draw_call(rng: random.Random) -> Description:
    call = {"seed": rng.randrange(3), "batch": rng.choice((1, 2, 2, 2, 3)), "value": rng.choice(VALUES)}
    return {**call, "inference": True} if rng.random() < 0.05 else call


def _draw_sites(rng: random.Random, program: PythonProgram, world: World) -> list[str]:
    noise, given = program.inputs(world, _first_call(program))
    tensors = {name: value for name, value in given.items() if isinstance(value, Tensor) and name != "again"}
    if any(FEATURES[feature].slot == "given" for feature in program.features):
        tensors["value"] = given["value"]  # type: ignore[assignment]
    times = torch.ones(noise.shape[0], dtype=noise.dtype)
    return draw_sites(rng, CalledModules.of(world.denoiser, noise, times, **tensors))


def _forms_of_evaluations(program: PythonProgram, world: World, call: Description) -> list[object]:
    forms: list[object] = []
    hook = world.denoiser.register_forward_pre_hook(lambda _, args: forms.append((args[0].shape, args[0].stride())))
    noise, given = program.inputs(world, call)
    with torch.no_grad():
        world.loop(world.denoiser, noise, **given)
    hook.remove()
    return forms


def _first_call(program: PythonProgram) -> Description:
    return next(event for event in program.history if "change" not in event)


def _is_finite(result: object) -> bool:
    return all(bool(leaf.isfinite().all()) for leaf in tree_leaves(result) if isinstance(leaf, Tensor))
