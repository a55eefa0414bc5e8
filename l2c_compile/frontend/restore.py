"""Give a denoiser back as it was: ``torch.export`` runs its Python on fake tensors, and what that stores would stay.

A table that is made in the first call and kept in an attribute, in a list, in a global or in an ``lru_cache`` would be
fake in every later eager run.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import cast

from torch import nn

from l2c_compile.errors import CaptureError
from l2c_compile.state.caches import clear_caches_of_fakes
from l2c_compile.state.python_state import PythonState


@contextmanager
def left_as_it_was(roots: Mapping[str, object]) -> Iterator[None]:
    """Restore all that some objects can reach, wherever the capture ends.

    Caches of functions that hold fake tensors afterwards are cleared.

    Args:
        roots: the objects by name, that of the denoiser is "denoiser".
    """
    state = PythonState(roots)
    try:
        yield
    finally:
        state.restore()
        clear_caches_of_fakes(cast(nn.Module, roots["denoiser"]))


@contextmanager
def no_part_is_made(denoiser: nn.Module) -> Iterator[None]:
    """Raise CaptureError if the denoiser makes a submodule, a weight or a buffer, which its graph would refer to."""
    parts = _parts(denoiser)
    yield
    for name, kind in _parts(denoiser).items():
        if name not in parts:
            raise CaptureError(
                f"{type(denoiser).__name__} makes its {kind} '{name}' in a call; call it once, eagerly, before it is"
                " compiled"
            )


def _parts(denoiser: nn.Module) -> dict[str, str]:
    """Return the paths of all modules, weights and buffers, each with the word for what it is."""
    modules = dict.fromkeys((path for path, _ in denoiser.named_modules()), "submodule")
    weights = dict.fromkeys((path for path, _ in denoiser.named_parameters()), "weight")
    return modules | weights | dict.fromkeys((path for path, _ in denoiser.named_buffers()), "buffer")
