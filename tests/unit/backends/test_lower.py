"""Backends: which change bits and which do not."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor, fx

from l2c_compile import CompiledSampler, run_reference
from tests.residual_graphs import sampler_of
from tests.tiny import draw, residual, same_bits


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


def test_what_torch_compiled_runs_in_one_thread_at_a_time() -> None:
    inside, overlaps = threading.Semaphore(1), list[int]()

    def backend(module: fx.GraphModule, inputs: Sequence[object]) -> Callable[..., Sequence[object]]:
        def run(*given: object) -> Sequence[object]:
            alone = inside.acquire(blocking=False)
            overlaps.append(not alone)
            results: Sequence[object] = module(*given)
            if alone:
                inside.release()
            return results

        return run

    sampler, noise = sampler_of(residual(), backend=backend), draw(3, 4)
    wanted = sampler(noise)
    with ThreadPoolExecutor(4) as pool:
        assert all(same_bits(got, wanted) for got in pool.map(sampler, [noise] * 20))
    assert overlaps == [False] * 21
