"""Loops drawn at random: a description that can be written as JSON, and the function that it describes.

A loop is a list of steps; each makes one or two evaluations, twice as many with guidance in separate calls.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from bench.trust.programs.denoisers import Description, latent_shape, num_classes

_STEPS = ("euler", "euler", "heun", "multistep", "noise", "ancestral", "unused", "same time")
_STEPS_OF_OTHER_BATCHES = ("first samples", "doubled")
_MAX_EVALUATIONS = 6


def draw_form(rng: random.Random) -> Description:
    """Draw the form of inputs and timesteps; loops that share it share most captures."""
    return {
        "time": rng.choice(("full", "full", "expand", "scalar", "strided", "list")),
        "time_dtype": rng.choice(("latent", "latent", "float32", "int64")),
        "batch": rng.choice((1, 2, 2, 3)),
        "layout": rng.choice(("contiguous", "contiguous", "contiguous", "permuted")),
        "guidance": rng.choice(("none", "none", "batched", "separate")),
        "one_batch": rng.random() < 0.6,
    }


def draw_loop(rng: random.Random, denoiser: Description, form: Description) -> Description:
    """Draw a description of a loop for a denoiser."""
    steps = _STEPS if form["one_batch"] else _STEPS + _STEPS_OF_OTHER_BATCHES
    kinds = [rng.choice(steps) for _ in range(rng.choice((2, 2, 3, 3, 4)))]
    description = {
        **form,
        "steps": [{"kind": kind, "t": rng.randrange(1, 5), "in_place": rng.random() < 0.15} for kind in kinds],
        "guidance": form["guidance"] if denoiser["label"] or denoiser["context"] else "none",
        "returns": rng.choice(("last", "last", "all", "dict")),
    }
    while _num_evaluations(description) > _MAX_EVALUATIONS:
        description["steps"].pop()
    return description


def _num_evaluations(loop: Description) -> int:
    calls = sum(2 if step["kind"] in ("heun", "unused", "same time") else 1 for step in loop["steps"])
    return calls * (2 if loop["guidance"] == "separate" else 1)


def draw_inputs(denoiser: Description, loop: Description, seed: int) -> tuple[Tensor, dict[str, Tensor]]:
    """Return noise and conditions from a seed."""
    generator = torch.Generator().manual_seed(seed)
    dtype = getattr(torch, denoiser["dtype"])
    batch = loop["batch"]

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)

    noise = normal(batch, *latent_shape(denoiser["form"]))
    if loop["layout"] == "permuted":
        noise = noise.transpose(-1, -2).contiguous().transpose(-1, -2)
    conditions: dict[str, Tensor] = {}
    if denoiser["label"]:
        conditions["y"] = torch.randint(num_classes, (batch,), generator=generator)
    if denoiser["context"]:
        conditions["context"] = normal(batch, 2, 4)
    return noise, conditions


@dataclass
class DrawnLoop:
    """What a description describes: ``loop(denoiser, noise, **conditions)``."""

    how: Description

    def __call__(self, denoiser: Callable[..., Any], noise: Tensor, **conditions: Tensor) -> object:
        """Sample as the description says."""
        x = noise
        history: list[Tensor] = []
        for step in self.how["steps"]:
            predict = _Predictor(self.how, denoiser, step["t"], conditions)
            change = self._change(step["kind"], predict, x, history)
            if step["in_place"]:
                x = x.clone()
                x += change
            else:
                x = x + change
            history.append(change)
        match self.how["returns"]:
            case "all":
                return x, history
            case "dict":
                return {"latent": x, "steps": len(history), "first": history[0]}
        return x

    def _change(self, kind: str, predict: _Predictor, x: Tensor, history: list[Tensor]) -> Tensor:
        match kind:
            case "heun":
                first = predict(x)
                return -0.15 * (first + predict(x - 0.3 * first, later=1))
            case "multistep":
                older = history[-1] if history else torch.zeros_like(x)
                return -0.3 * predict(x) + 0.1 * older
            case "noise":
                return -0.3 * predict(x) + 0.1 * torch.randn_like(x)
            case "ancestral":
                drawn = torch.randn(x.shape, dtype=x.dtype)
                return 0.1 * drawn - 0.3 * predict(x + 0.05 * drawn)
            case "first samples":
                some = predict(x[:1], samples=slice(0, 1))
                return -0.3 * some.expand_as(x)
            case "doubled":
                both = predict(torch.cat([x, -x]), copies=2)
                return -0.15 * (both[: x.shape[0]] - both[x.shape[0] :])
            case "unused":
                predict(0.5 * x, later=1)
                return -0.3 * predict(x)
            case "same time":
                return -0.15 * (predict(x) + predict(0.9 * x))
        return -0.3 * predict(x)


@dataclass
class _Predictor:
    """Calls the denoiser at one time, with guidance or without."""

    how: Description
    denoiser: Callable[..., Any]
    t: int
    conditions: dict[str, Tensor]

    def __call__(self, x: Tensor, later: int = 0, samples: slice | None = None, copies: int = 1) -> Tensor:
        time = self.t + later
        given = {name: torch.cat([value[samples or slice(None)]] * copies) for name, value in self.conditions.items()}
        match self.how["guidance"]:
            case "separate":
                null = self._evaluate(x, time, _null(given))
                return null + 1.5 * (self._evaluate(x, time, given) - null)
            case "batched":
                both = {name: torch.cat([null, given[name]]) for name, null in _null(given).items()}
                null, conditioned = self._evaluate(torch.cat([x, x]), time, both).chunk(2)
                return null + 1.5 * (conditioned - null)
        return self._evaluate(x, time, given)

    def _evaluate(self, x: Tensor, time: int, conditions: dict[str, Tensor]) -> Tensor:
        result = self.denoiser(x, self._timestep(time, x), **conditions)
        if isinstance(result, dict):
            result = result["sample"]
        return result[0] if isinstance(result, tuple) else result  # type: ignore[no-any-return]

    def _timestep(self, time: int, x: Tensor) -> Tensor:
        name, batch = self.how["time_dtype"], x.shape[0]
        dtype = x.dtype if name == "latent" else getattr(torch, name)
        value = time if dtype == torch.int64 else time / 4
        match self.how["time"]:
            case "expand":
                return torch.tensor(value, dtype=dtype).expand(batch)
            case "scalar":
                return torch.tensor(value, dtype=dtype)
            case "strided":
                return torch.full((2 * batch,), value, dtype=dtype)[::2]
            case "list":
                return torch.tensor([value] * batch, dtype=dtype)
        return torch.full((batch,), value, dtype=dtype)


def _null(conditions: dict[str, Tensor]) -> dict[str, Tensor]:
    nulls = {}
    for name, value in conditions.items():
        nulls[name] = torch.full_like(value, num_classes) if name == "y" else torch.zeros_like(value)
    return nulls
