"""What a user may choose about how a loop graph is made and run, in one frozen object."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import torch

from l2c_compile.errors import BackendError, nearest
from l2c_compile.passes.base import Numerics, Pipeline
from l2c_compile.passes.pipeline import CACHE_FORMATS, KERNELS, LOOP, with_packed_caches
from l2c_compile.passes.read_reused_sites import ReadReusedSites

EAGER = "eager"
INDUCTOR = "inductor"
REDUCE_OVERHEAD = "reduce-overhead"

Backend = str | Callable[..., object]
"""A name that ``torch.compile`` knows, or a backend function of its form."""


@dataclass(frozen=True)
class Options:
    """How a loop graph is made and run; ``l2c_compile`` says what each option means.

    Raises:
        BackendError: if ``torch.compile`` knows no such backend, or there is no such mode.
        ValueError: if there are no such numerics, caches or passes, if a pass that stays needs one that is left out, or
            if the pass that applies the schedule is left out.
    """

    backend: Backend = EAGER
    numerics: Literal["bitwise", "rounding"] | None = None
    """None takes "bitwise" for backend "eager" and "rounding" for all others, which round in their own way anyway."""
    without: Collection[str] = ()
    caches: Literal["int8", "fp8"] | None = None
    mode: Literal["reduce-overhead"] | None = None

    def __post_init__(self) -> None:
        known = torch._dynamo.list_backends(exclude_tags=())
        if isinstance(self.backend, str) and self.backend not in known:
            hint = nearest(self.backend, known) or f"there are {', '.join(known)}"
            raise BackendError(f"torch.compile knows no backend '{self.backend}'; {hint}")
        if self.mode not in (None, REDUCE_OVERHEAD):
            raise BackendError(f"mode wants '{REDUCE_OVERHEAD}' or None, got {self.mode!r}")
        if self.caches is not None and self.caches not in CACHE_FORMATS:
            raise ValueError(f"caches wants one of {', '.join(CACHE_FORMATS)} or None, got {self.caches!r}")
        if ReadReusedSites.name in self.without:
            raise ValueError(
                f"without names '{ReadReusedSites.name}', the pass that applies the schedule; to reuse nothing, give a"
                " schedule that computes everything: CacheSchedule.all_compute(num_evaluations)"
            )
        _ = self.passes, self.kernels

    @cached_property
    def passes(self) -> Pipeline:
        """The passes over the loop graph."""
        passes = LOOP.within(self._allowed)
        if self.caches is not None:
            passes = with_packed_caches(passes, self.caches)
        return passes.without([name for name in self.without if name not in _names(KERNELS)])

    @cached_property
    def kernels(self) -> Pipeline:
        """The passes that put kernels for this processor into a copy of the graph, which the backend runs.

        They are for "eager" and "inductor" only: what other backends do with a custom op is not ours to guess.
        """
        kernels = KERNELS.within(self._allowed) if self.backend in (EAGER, INDUCTOR) else Pipeline(())
        return kernels.without([name for name in self.without if name in _names(kernels)])

    @property
    def is_bitwise(self) -> bool:
        """Whether the static graph returns the bits of the eager loop."""
        return self.passes.is_bitwise and self.backend == EAGER

    @property
    def _allowed(self) -> Numerics:
        words = {each.name.lower(): each for each in Numerics if each is not Numerics.APPROXIMATE}
        if self.numerics is not None and self.numerics not in words:
            raise ValueError(f"numerics wants one of {', '.join(words)}, got {self.numerics!r}")
        return words[self.numerics or ("bitwise" if self.backend == EAGER else "rounding")]


def _names(passes: Pipeline) -> list[str]:
    return [each.name for each in passes.passes]
