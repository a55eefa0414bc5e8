"""The random numbers of a process: torch's, numpy's and Python's own generator, saved, compared and put back."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch

_SEED = 0x5EED_1AC0
"""What the generators begin with while a loop is traced: no seed that a loop would choose itself."""


class RandomState:
    """The states of all generators of the process, as they were when this was made."""

    def __init__(self) -> None:
        self._python = random.getstate()
        self._numpy = np.random.get_state()
        self._torch = torch.default_generator.get_state()
        self._cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []

    def put_back(self) -> None:
        """Give every generator its state again."""
        random.setstate(self._python)
        np.random.set_state(self._numpy)
        torch.default_generator.set_state(self._torch)
        if self._cuda:
            torch.cuda.set_rng_state_all(self._cuda)


@contextmanager
def random_state_kept() -> Iterator[None]:
    """Put the state of every generator of the process back when the context ends."""
    state = RandomState()
    try:
        yield
    finally:
        state.put_back()


class GeneratorStates:
    """Tells which generators were drawn from or seeded since it was made."""

    def __init__(self) -> None:
        self._before = _states()

    def moved(self) -> list[str]:
        """Return the names of the generators that are not as they were."""
        return [name for name, state in _states().items() if state != self._before[name]]


def seed_unlike_any_loop() -> None:
    """Seed all generators, so that a loop which seeds them itself, with whatever number, moves them."""
    random.seed(_SEED)
    np.random.seed(_SEED & 0xFFFF_FFFF)
    torch.default_generator.manual_seed(_SEED)


def _states() -> dict[str, object]:
    kind, keys, *rest = np.random.get_state(legacy=True)
    return {
        "torch": torch.default_generator.get_state().numpy().tobytes(),
        "numpy.random": (kind, np.asarray(keys).tobytes(), tuple(rest)),
        "random": random.getstate(),
    }
