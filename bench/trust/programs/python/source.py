"""From a drawn description to the source of a program, and from that to a module that runs: a world.

Everything that a program may change lives in its module: classes, globals, the denoiser, the loop. Two worlds of one
source share nothing, so one is compiled and the other, its twin, says what is right.
"""

from __future__ import annotations

import itertools
import linecache
import sys
import textwrap
from collections.abc import Iterator, Sequence
from types import ModuleType, TracebackType
from typing import Any

import torch
from torch import nn

from bench.trust.programs.denoisers import Description
from bench.trust.programs.python.changes import HOLDERS, changes_of
from bench.trust.programs.python.features import FEATURES

_HEAD = """
import contextlib, contextvars, copy, dataclasses, enum, functools, inspect, itertools, pickle, random, threading
import weakref, zlib
from collections import Counter, OrderedDict, deque, namedtuple
from decimal import Decimal
from fractions import Fraction
from types import SimpleNamespace

import numpy as np
import torch
from torch import nn

from l2c_compile import CacheSchedule

HANDLES = []
sampler, reuses = None, True
Point = namedtuple("Point", ["x", "y"])
Color = enum.Enum("Color", ["RED"])
Level = enum.IntEnum("Level", ["LOW"])


class Mutable:
    def __init__(self):
        self.scale = 1.0

    def __repr__(self):
        return f"Mutable({self.scale})"


MUTABLE = Mutable()


def number_of(value):
    return 1 + zlib.crc32(repr(value).encode()) % 16 / 32


def with_weights(module, seed):
    module = module.to(torch.float64)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(0.5 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
    return module


def fused_step(parameters, fused=True):
    parameters = list(parameters)
    for parameter in parameters:
        parameter.grad = torch.full_like(parameter, 0.5)
    torch.optim.SGD(parameters, lr=0.1, fused=fused).step()
    for parameter in parameters:
        parameter.grad = None


def all_compute(schedule):
    return CacheSchedule.all_compute(schedule.num_evaluations, schedule.sites)


class Gain(nn.Module):
    def forward(self, x, by=0.9):
        return x * (by + 0.1 * self.training)


class Louder(nn.Linear):
    def forward(self, x):
        return super().forward(x) * 1.2


class Adapter(nn.Module):
    def __init__(self, base):
        super().__init__()
        self.base = base
        self.down = nn.Parameter(torch.full((1, 4), 0.3, dtype=base.weight.dtype))
        self.up = nn.Parameter(torch.full((4, 1), 0.2, dtype=base.weight.dtype))

    def forward(self, x):
        return self.base(x) + x @ self.down.mT @ self.up.mT
"""

_PLAIN_NET = """
class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x, c):
        return self.linear(torch.tanh(x + c))


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.time = nn.Linear(1, 4)
        self.blocks = nn.ModuleList([Block(), Block()])

    def forward(self, x, t, y=None, context=None):
        c = self.time(t.to(x.dtype).reshape(-1, 1))
        for block in self.blocks:
            x = x + block(x, c)
        return x


def build_net():
    return with_weights(Net(), 1).to({dtype})
"""

_DRAWN_NET = """
from bench.trust.programs.denoisers import build_denoiser


def build_net():
    return build_denoiser({net!r})
"""

_DENOISER = """
class Denoiser(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = build_net()
        self.head, self.foot = with_weights(nn.Linear(4, 4), 2), with_weights(nn.Linear(4, 4, bias=False), 4)
        self.norm, self.act = nn.LayerNorm(4, elementwise_affine=False), nn.LeakyReLU(0.1)
        self.dropout, self.tail = nn.Dropout(0.0), nn.Sequential(nn.Tanh())
        {init}

    {methods}

    def forward(self, x, t, y=None, context=None, value=None):
        {enter}
        h = self.finish(self.net(x, t, y, context))
        {leave}
        return h

    def finish(self, h):
        folded = self.act(self.norm(self.tail(self.foot(self.head(self.foot.weight)))))
        return h + self.dropout(folded.mean(0).to(h.dtype))
"""

_PLAIN_SAMPLE = """
def sample(predict, noise, **given):
    x = noise
    for t in (3.0, 2.0, 1.0):
        x = x - 0.3 * predict(x, torch.full((x.shape[0],), t, dtype=x.dtype), **given)
    return x
"""

_DRAWN_SAMPLE = """
from bench.trust.programs.loops import DrawnLoop

sample = DrawnLoop({steps!r})
"""

_LOOP = """
def loop(denoiser, noise, value=None, again=None, **given):
    times = []
    {begin}

    def predict(x, t, **conditions):
        i = len(times)
        times.append(t)
        {each}
        h = denoiser(x, t, **conditions{value})
        {then}
        return h

    latent = sample(predict, noise, **given)
    {end}
    return latent


def other_loop(denoiser, noise, **given):
    return loop_at_first(denoiser, noise * 0.8, **given)


loop_at_first = loop
denoiser = Denoiser().eval()
{built}
"""


def source_of(
    net: Description | None, steps: Description | None, features: Sequence[str], dtype: torch.dtype = torch.float64
) -> str:
    """Return the source of a module with ``denoiser`` and ``loop``.

    Args:
        net: the description of a denoiser, which becomes a part of the program's; None takes two plain blocks.
        steps: the description of a loop; None takes three Euler steps.
        features: what the denoiser and the loop do besides.
        dtype: the dtype of two plain blocks.
    """
    places = {place: "\n".join(_lines_of(features, place)) for place in _PLACES}
    if any(FEATURES[feature].slot == "given" for feature in features):
        places["value"] = ", value=value"
    texts = [
        _HEAD,
        places["top"],
        _PLAIN_NET.replace("{dtype}", str(dtype)) if net is None else _DRAWN_NET.format(net=net),
        _filled(_DENOISER, places),
        _PLAIN_SAMPLE if steps is None else _DRAWN_SAMPLE.format(steps=steps),
        _filled(_LOOP, places),
    ]
    return "\n\n".join(texts)


_PLACES = ("top", "init", "methods", "enter", "leave", "built", "begin", "each", "then", "end")


def _lines_of(features: Sequence[str], place: str) -> Iterator[str]:
    for feature in features:
        yield textwrap.dedent(getattr(FEATURES[feature], place)).strip()


def _filled(template: str, places: dict[str, str]) -> str:
    """Put the lines into their places, as deep as the places are."""
    lines: list[str] = []
    for line in template.splitlines():
        inner = line.strip()
        if inner.startswith("{") and inner.endswith("}"):
            lines.append(textwrap.indent(places[inner[1:-1]], line[: -len(inner)]))
        else:
            lines.append(line.replace("{value}", places.get("value", "")))
    return "\n".join(line for line in lines if line.strip()) + "\n"


_numbers = itertools.count()


class World:
    """A module that was made of a source, with its denoiser and its loop."""

    def __init__(self, source: str) -> None:
        self.source = source
        self.module = ModuleType(f"drawn_program_{next(_numbers)}")
        sys.modules[self.module.__name__] = self.module
        self._run(source)

    def __enter__(self) -> World:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for handle in self.module.HANDLES:
            handle.remove()
        torch.set_default_dtype(torch.float32)
        del sys.modules[self.module.__name__]
        for name in [each for each in linecache.cache if each.startswith(f"<{self.module.__name__}")]:
            del linecache.cache[name]

    def _run(self, source: str) -> None:
        name = f"<{self.module.__name__} {next(_numbers)}>"
        # Who reads the source of a function, or quotes a line of it, finds it here.
        linecache.cache[name] = (len(source), None, source.splitlines(keepends=True), name)
        exec(compile(source, name, "exec"), vars(self.module))

    def change(self, name: str, features: Sequence[str]) -> None:
        """Change what the name says."""
        both = HOLDERS[name] if name in HOLDERS else (changes_of(features)[name],) * 2
        text = both[self.module.sampler is None]
        self._run(textwrap.dedent(text).strip())

    def value(self, source: str) -> object:
        """Return the value that this source describes, in the names of the module."""
        return eval(source, vars(self.module))

    @property
    def denoiser(self) -> nn.Module:
        """The denoiser, as it is now."""
        return self.module.denoiser  # type: ignore[no-any-return]

    @property
    def loop(self) -> Any:  # noqa: ANN401 - any function
        """The loop, as it is now."""
        return self.module.loop
