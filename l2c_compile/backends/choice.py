"""Which passes and kernels a backend gets, and which backends and modes there are."""

from __future__ import annotations

from collections.abc import Callable, Collection

import torch

from l2c_compile.errors import BackendError, nearest
from l2c_compile.passes.base import Numerics, Pipeline
from l2c_compile.passes.pipeline import CACHE_FORMATS, KERNELS, LOOP, with_packed_caches
from l2c_compile.passes.read_reused_sites import ReadReusedSites

__all__ = [
    "EAGER",
    "INDUCTOR",
    "REDUCE_OVERHEAD",
    "Backend",
    "check_backend",
    "check_mode",
    "kernels_for",
    "passes_for",
]

EAGER = "eager"
INDUCTOR = "inductor"
REDUCE_OVERHEAD = "reduce-overhead"

Backend = str | Callable[..., object]
"""A name that ``torch.compile`` knows, or a backend function of its form."""


def check_backend(backend: Backend) -> None:
    """Raise ``BackendError`` for the name of a backend that torch.compile does not know."""
    known = torch._dynamo.list_backends(exclude_tags=())
    if isinstance(backend, str) and backend not in known:
        hint = nearest(backend, known) or f"there are {', '.join(known)}"
        raise BackendError(f"torch.compile knows no backend '{backend}'; {hint}")


def passes_for(backend: Backend, numerics: str | None, without: Collection[str], caches: str | None = None) -> Pipeline:
    """Return the loop passes for a backend.

    Args:
        backend: "eager" changes no bit unless ``numerics`` allows it; all others round in their own way anyway.
        numerics: "bitwise", "rounding", or None for what suits the backend.
        without: names of passes to leave out; those of ``kernels_for`` are not meant here.
        caches: "int8" or "fp8" packs what is kept for later evaluations; None keeps it as it is.

    Raises:
        ValueError: no such numerics, format of caches or pass, a pass that another one needs, or the one that applies
            the schedule.
    """
    if caches is not None and caches not in CACHE_FORMATS:
        raise ValueError(f"caches wants one of {', '.join(CACHE_FORMATS)} or None, got {caches!r}")
    if ReadReusedSites.name in without:
        raise ValueError(
            f"without names '{ReadReusedSites.name}', the pass that applies the schedule; to reuse nothing, give a"
            " schedule that computes everything: CacheSchedule.all_compute(num_evaluations)"
        )
    passes = LOOP.within(_allowed(backend, numerics))
    mine = [name for name in without if name not in _names(KERNELS)]
    return (passes if caches is None else with_packed_caches(passes, caches)).without(mine)


def kernels_for(backend: Backend, numerics: str | None, without: Collection[str]) -> Pipeline:
    """Return the passes that put kernels for the processor into the graph; arguments and errors as ``passes_for``.

    "eager" and "inductor" take them; what other backends do with a custom op is not ours to guess.
    """
    kernels = KERNELS.within(_allowed(backend, numerics)) if backend in (EAGER, INDUCTOR) else Pipeline(())
    return kernels.without([name for name in without if name in _names(kernels)])


def _allowed(backend: Backend, numerics: str | None) -> Numerics:
    words = {each.name.lower(): each for each in Numerics if each is not Numerics.APPROXIMATE}
    if numerics is not None and numerics not in words:
        raise ValueError(f"numerics wants one of {', '.join(words)}, got {numerics!r}")
    return words[numerics or ("bitwise" if backend == EAGER else "rounding")]


def _names(passes: Pipeline) -> list[str]:
    return [each.name for each in passes.passes]


def check_mode(mode: str | None) -> None:
    """Raise ``BackendError`` for a mode that there is not."""
    if mode not in (None, REDUCE_OVERHEAD):
        raise BackendError(f"mode wants '{REDUCE_OVERHEAD}' or None, got {mode!r}")
