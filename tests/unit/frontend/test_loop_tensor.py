"""Tensors without values."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, fx

from l2c_compile.errors import LoopTraceError
from l2c_compile.frontend.loop_tensor import (
    LATENT,
    RANDOM,
    WEIGHTS,
    LoopTensor,
    loop_tensors_in,
    made_from,
    without_values,
)


class Recorder:
    """Notes the names of the calls and returns the word "recorded"."""

    def __init__(self) -> None:
        self.names: list[str] = []

    def call(self, func: Callable[..., object], args: tuple[object, ...], kwargs: dict[str, object]) -> object:
        self.names.append(str(getattr(func, "__name__", func)))
        return args[0]

    def untraceable(self, what: str, instead: str) -> LoopTraceError:
        return LoopTraceError(f"{what}; {instead}")


def tensor_of(*origins: str) -> tuple[LoopTensor, Recorder]:
    recorder = Recorder()
    node = fx.Graph().placeholder("x")
    return LoopTensor.wrap(recorder, node, torch.empty(2, 3, device="meta"), set(origins)), recorder


def test_every_call_arrives_in_one_place() -> None:
    x, recorder = tensor_of(LATENT)
    torch.add(x, 1)
    x.mul_(2)
    _ = x[0]
    assert recorder.names == ["add", "mul_", "__getitem__"]


def test_what_works_below_torchs_functions_arrives_there_too() -> None:
    x, recorder = tensor_of(LATENT)

    @torch.jit.script
    def doubled(x: Tensor) -> Tensor:
        return torch.add(x, x)

    doubled(x)
    assert recorder.names == ["add.Tensor"]


def test_numpy_is_refused_with_its_name() -> None:
    import numpy as np

    x, _ = tensor_of(LATENT, "condition 'y'")
    with pytest.raises(LoopTraceError, match=r"the values of the latent and condition 'y' to numpy \(sin\)"):
        np.sin(x)


def test_a_copy_is_the_tensor_and_each_has_its_own_hash() -> None:
    (x, _), (y, _) = tensor_of(LATENT), tensor_of(LATENT)
    assert copy.copy(x) is x
    assert hash(x) != hash(y)
    assert [id(each) for each in loop_tensors_in([x, {"a": (y, 1)}])] == [id(x), id(y)]


@pytest.mark.parametrize(
    ("origins", "words", "instead"),
    [
        ([LATENT], "the latent", "or compute it from the timesteps"),
        (["condition 'b'", LATENT, RANDOM, "condition 'a'"], None, "compute it from the timesteps"),
        (["condition 'b'"], "condition 'b'", "give the condition as Python numbers"),
        ([RANDOM], "random numbers", "draws others in each call"),
        ([WEIGHTS], "the denoiser's weights", "weights may change"),
    ],
)
def test_messages_say_what_values_are_made_from(origins: list[Any], words: str | None, instead: str) -> None:
    x, _ = tensor_of(*origins)
    words = words or "the latent and condition 'a' and condition 'b' and random numbers"
    assert made_from([x]) == words
    assert instead in without_values([x])
