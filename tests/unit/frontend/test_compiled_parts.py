"""Compiled parts of a denoiser run as the Python that they were made of."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import Tensor, nn

from l2c_compile.frontend.compiled_parts import run_eagerly, taken_apart
from tests.tiny import at, draw, residual


def no_backend(module: object, inputs: object) -> object:
    raise AssertionError("it was compiled")


@torch.compile(backend=no_backend)
def doubled(x: Tensor) -> Tensor:
    return torch.add(x, x)


def compiled_module() -> nn.Module:
    model = residual()
    model.b.compile(backend=no_backend)
    return model


def test_nothing_is_compiled_where_compiled_parts_run_eagerly() -> None:
    with run_eagerly():
        with run_eagerly():
            assert doubled(torch.ones(1)) == 2
        assert doubled(torch.ones(1)) == 2
    with pytest.raises(Exception, match="it was compiled"):
        doubled(torch.ones(1))


def test_each_part_that_runs_is_named_once() -> None:
    model = compiled_module()
    wanted = r"code of module 'b', function .*\.doubled; .*may differ in the last bits"
    with pytest.warns(UserWarning, match=wanted), taken_apart(model):
        doubled(doubled(model(draw(3, 4), at(draw(3, 4), 1))))


def test_a_module_that_is_compiled_whole_is_named() -> None:
    model = residual()
    model.compile(backend=no_backend)
    with pytest.warns(UserWarning, match="code of the module Residual"), taken_apart(model):
        pass


def test_parts_that_do_not_run_are_not_named() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with taken_apart(compiled_module()):
            torch.ones(1).add(1)
