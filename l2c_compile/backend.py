"""Hand the static graph to whatever runs it."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import fx

from l2c_compile.errors import L2CError, nearest

__all__ = ["BackendError", "check_backend", "lower_to_backend"]

EAGER = "eager"
"""Run the graph's own code, operation by operation: nothing rounds differently from the plain loop."""


class BackendError(L2CError, ValueError):
    """The backend does not exist, or cannot take the graph."""


def check_backend(backend: str | Callable[..., object]) -> None:
    """Raise ``BackendError`` for the name of a backend that torch.compile does not know."""
    known = torch._dynamo.list_backends(exclude_tags=())
    if isinstance(backend, str) and backend not in known:
        hint = nearest(backend, known) or f"there are {', '.join(known)}"
        raise BackendError(f"torch.compile knows no backend '{backend}'; {hint}")


def lower_to_backend(module: fx.GraphModule, backend: str | Callable[..., object]) -> Callable[..., object]:
    """Return a callable that computes what ``module`` computes, through ``backend``.

    Args:
        module: a static graph.
        backend: a name that ``torch.compile`` knows, or a backend function of its own form.
    """
    if backend == EAGER:
        return module
    # Dynamo keeps compiled code by the code object of forward, and every GraphModule has one of its own.
    return torch.compile(module, backend=backend, fullgraph=True, dynamic=False)
