"""Backends: which change bits and which do not."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from l2c_compile import CacheSchedule, CompiledSampler, l2c_compile, run_reference
from tests.tiny import draw, residual, same_bits, steps

TABLE = {"a": [1, 0, 1], "b": [1, 1, 0]}


def sampler_of(model: nn.Module, table: Any = TABLE, loop: Any = None, **options: Any) -> CompiledSampler:  # noqa: ANN401
    schedule = CacheSchedule.from_table(table)
    return l2c_compile(model, schedule, loop or steps(schedule.num_evaluations), **options)


def reference(sampler: CompiledSampler, noise: Tensor, **conditions: object) -> object:
    return run_reference(sampler.model, sampler.loop, sampler.schedule, noise, conditions)


@pytest.fixture
def sampler() -> Any:  # noqa: ANN401
    return sampler_of(residual())


def compare_backend(backend: str) -> tuple[Any, Any]:
    sampler = sampler_of(residual(), backend=backend, numerics="bitwise")
    torch.manual_seed(0)
    got = sampler(draw(3, 4))
    return got, reference(sampler, draw(3, 4))


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_backends_that_run_op_by_op_change_no_bit(backend: str) -> None:
    got, wanted = compare_backend(backend)
    assert same_bits(got, wanted)


def test_inductor_agrees_up_to_its_own_rounding() -> None:
    got, wanted = compare_backend("inductor")
    # Fused kernels sum a layer norm in another order and contract a * b + c: measured, a few eps an evaluation.
    k = 8 * 3
    eps = torch.finfo(torch.float32).eps
    torch.testing.assert_close(got, wanted, rtol=0, atol=k * eps * float(wanted.abs().max()))
