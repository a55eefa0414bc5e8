"""What must hold of a program in Python: each call of its sampler is equal to eager torch, or an error of ours.

The program is built twice. One world is compiled; its twin runs eagerly, undergoes the same changes, and says what is
right, so that whatever the compiler does to the first one cannot change the answer.
"""

from __future__ import annotations

import functools
import gc
import random
from collections.abc import Iterator
from types import CellType, MethodType, ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._pytree import tree_leaves

from bench.trust.bits import own, same_bits
from bench.trust.programs.checking import Mismatch, Outcome, are_close
from bench.trust.programs.denoisers import Description
from bench.trust.programs.python.drawing import PythonProgram, seed_all
from bench.trust.programs.python.features import FEATURES
from bench.trust.programs.python.source import World
from l2c_compile import CompiledSampler, l2c_compile
from l2c_compile.errors import L2CError, PassFailed, StaleConstantsError
from l2c_compile.frontend.loop_tensor import LoopTensor
from l2c_compile.frontend.stand_in import StandIn


class PythonChecker:
    """Judges programs in Python; nothing is shared between them."""

    def check(self, program: PythonProgram) -> Outcome:
        """Build the program twice, compile one, and compare them call by call.

        Raises:
            Mismatch: if a result is neither equal nor refused, if a program is refused that has to compile, or if what
                is left of the compiled one is not what eager torch leaves.
        """
        with World(program.source) as ours, World(program.source) as twin:
            run = _Run(program, ours, twin)
            return run.judge()


class _Run:
    """One program, its two worlds, and what the compiler refused so far."""

    def __init__(self, program: PythonProgram, ours: World, twin: World) -> None:
        self.program, self.ours, self.twin = program, ours, twin
        self.changed: list[str] = []

    def judge(self) -> Outcome:
        program = self.program
        refused = ""
        try:
            vars(self.ours.module)["sampler"] = _compiled(program, self.ours)
        except L2CError as error:
            refused = self._refusal(error)
        for event in program.history:
            if refused:
                break
            refused = self._change(event["change"]) if "change" in event else self._call(event)
        _check_nothing_is_fake(self.ours)
        self._check_eager_run()
        return Outcome(refused=refused)

    def _change(self, name: str) -> str:
        """Change both worlds, and return how that is refused: only what is done to a sampler is ours to refuse."""
        self.changed.append(name)
        self.twin.change(name, self.program.features)
        try:
            self.ours.change(name, self.program.features)
        except L2CError as error:
            return self._refusal(error)
        return ""

    def _call(self, call: Description) -> str:
        """Call the sampler, refresh it where it asks for that, and return how it refuses; equal results are none."""
        try:
            got, states = self._sampled(call)
        except StaleConstantsError:
            self.ours.module.sampler.refresh()
            try:
                got, states = self._sampled(call)
            except L2CError as error:
                return self._refused_twice(call, error)
        except L2CError as error:
            return self._refused_twice(call, error)
        wanted = self.program.run_eagerly(self.twin, call)
        if not self._is_right(got, wanted):
            raise Mismatch(f"another result {self._when()}: got {got}, wanted {wanted}")
        if states != _random_states():
            raise Mismatch(f"another random state than eager torch's {self._when()}")
        _write_into(got)
        return ""

    def _refused_twice(self, call: Description, error: L2CError) -> str:
        """Return the refusal, after the same call has been refused again or has given what is right."""
        refused = self._refusal(error)
        try:
            got, _ = self._sampled(call)
        except L2CError as again:
            self._refusal(again)
        else:
            # The refused call may have run, or not.
            if not any(self._is_right(got, self.program.run_eagerly(self.twin, call)) for _ in range(2)):
                raise Mismatch(f"not refused again {self._when()}, but {got} after {refused[:200]}")
        return refused

    def _sampled(self, call: Description) -> tuple[object, list[object]]:
        """Return what the sampler gives, and the random states that it leaves."""
        noise, given = self.program.inputs(self.ours, call)
        seed_all(call)
        try:
            with torch.inference_mode(call.get("inference", False)):
                return self.ours.module.sampler(noise, **given), _random_states()
        except L2CError:
            raise
        # A raw error is right where eager torch raises it as well.
        except Exception as error:
            raise Mismatch(f"raw {type(error).__name__} {self._when()}: {error}") from error

    def _refusal(self, error: L2CError) -> str:
        """Return the refusal in words, if it is one that a user may be given."""
        text = f"{type(error).__name__}: {error}"
        if isinstance(error, PassFailed):
            raise Mismatch(f"{text} {self._when()}") from error
        # A drawn network may write into what a site holds, which is refused.
        if (
            self.program.net is None
            and not self.changed
            and all(FEATURES[each].works for each in self.program.features)
        ):
            raise Mismatch(f"false alarm: {text}") from error
        return text

    def _is_right(self, got: object, wanted: object) -> bool:
        if any(type(leaf) in (FakeTensor, LoopTensor) for leaf in tree_leaves(got)):
            return False
        # A copy of a tensor that repeats its elements does not: a sampler may return one in place of a constant.
        got, wanted = own(got), own(wanted)
        if self.program.is_bitwise:
            return same_bits(got, wanted)
        relative = 1e-4 if self.program.packs else 1e-9
        return are_close(tree_leaves(got), tree_leaves(wanted), relative)

    def _check_eager_run(self) -> None:
        """Run the loop that was compiled in eager torch: it has to be as usable as its twin's."""
        call = self.program.history[0]
        wanted = self.program.run_eagerly(self.twin, call)
        vars(self.ours.module)["reuses"] = self.twin.module.reuses
        try:
            got = self.program.run_eagerly(self.ours, call)
        except Exception as error:
            raise Mismatch(f"eager loop: {type(error).__name__} {self._when()}: {error}") from error
        # What a run moves may have been moved more often, or less.
        if not any(FEATURES[each].moves for each in self.program.features) and not same_bits(got, wanted):
            raise Mismatch(f"eager loop gives another result {self._when()}: got {got}, wanted {wanted}")

    def _when(self) -> str:
        return f"after {', '.join(self.changed)}" if self.changed else "without a change"


def _compiled(program: PythonProgram, world: World) -> CompiledSampler:
    return l2c_compile(
        world.denoiser,
        program.schedule,
        world.loop,
        backend=program.backend,
        numerics="rounding" if program.packs else None,
        check=program.check,
    )


def _random_states() -> list[object]:
    name, keys, *rest = np.random.get_state()
    return [torch.get_rng_state().tolist(), random.getstate(), (name, list(keys), *rest)]


def _write_into(result: object) -> None:
    """Write into one element of each result, as a caller may."""
    with torch.no_grad():
        for leaf in tree_leaves(result):
            if not leaf.is_inference():
                leaf[(0,) * leaf.ndim].fill_(0.5)


def _check_nothing_is_fake(world: World) -> None:
    """Raise Mismatch if a tensor without values is left anywhere in the program's own objects."""
    for found in _reachable(world):
        if type(found) in (FakeTensor, LoopTensor, StandIn):
            raise Mismatch(f"a {type(found).__name__} is left in the program")


_HOLDERS = (
    dict,
    list,
    tuple,
    set,
    SimpleNamespace,
    MethodType,
    CellType,
    functools.partial,
    functools._lru_cache_wrapper,
    nn.Module,
)


def _reachable(world: World) -> Iterator[object]:
    """Yield what the module of the program leads to, its classes and modules included, but not its sampler."""
    own = vars(world.module)
    waiting: list[Any] = [value for name, value in own.items() if name != "sampler"]
    seen = {id(own), id(own["sampler"])}
    while waiting:
        each = waiting.pop()
        if id(each) in seen or isinstance(each, ModuleType):
            continue
        seen.add(id(each))
        yield each
        own_code = getattr(each, "__module__", None) == world.module.__name__
        if type(each) is not Tensor and (own_code or isinstance(each, _HOLDERS)):
            waiting += gc.get_referents(each)
