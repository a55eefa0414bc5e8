"""Random states are saved, compared and put back, those of torch, numpy and Python."""

from __future__ import annotations

import random
from collections.abc import Callable

import numpy as np
import pytest
import torch

from l2c_compile.state.random_state import GeneratorStates, RandomState, random_state_kept, seed_unlike_any_loop

DRAWS: dict[str, Callable[[], object]] = {
    "torch": lambda: float(torch.rand(())),
    "numpy.random": lambda: float(np.random.rand()),
    "random": lambda: random.random(),
}


@pytest.mark.parametrize("name", DRAWS)
def test_a_draw_is_seen_and_undone(name: str) -> None:
    states, state = GeneratorStates(), RandomState()
    first = DRAWS[name]()
    assert states.moved() == [name]
    state.put_back()
    assert states.moved() == []
    with random_state_kept():
        assert DRAWS[name]() == first
    assert DRAWS[name]() == first


def test_a_seed_that_the_caller_has_set_himself_moves_the_generators() -> None:
    with random_state_kept():
        torch.manual_seed(0)
        seed_unlike_any_loop()
        states = GeneratorStates()
        torch.manual_seed(0)
        np.random.seed(0)
        random.seed(0)
        assert states.moved() == ["torch", "numpy.random", "random"]
