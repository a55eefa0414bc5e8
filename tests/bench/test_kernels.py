"""The bench of the kernels runs from end to end where there is no GPU, and does not pretend to have measured one."""

from __future__ import annotations

import pytest
import torch
from rich.progress import Progress

from bench.cases import BenchError, load
from bench.speed.kernels import DIT, VIDEO, run


def test_the_smoke_run_has_a_row_for_every_side_of_every_kernel() -> None:
    rows = run(["--device", "cpu"], Progress(disable=True))
    found = {(row.conditions["kernel"], row.metric) for row in rows}
    metrics = ("kernel", "aot_eager", "eager", "copy", "kernel_gigabytes_a_second", "share_of_copy", "over_eager")
    kernels = ("cached_residual", "cached_residual_norm", "packed")
    assert found >= {(kernel, metric) for kernel in kernels for metric in metrics}
    assert all(row.value > 0 and row.device == "cpu" for row in rows)
    # What a target asks for is measured on CUDA only.
    assert "over_inductor" not in {row.metric for row in rows}


@pytest.mark.parametrize("args", [[], ["--device"], ["--device", "tpu"], ["cuda"]])
def test_it_wants_a_device(args: list[str]) -> None:
    with pytest.raises(BenchError, match="wants --device cuda or --device cpu"):
        run(args, Progress(disable=True))


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_it_refuses_a_machine_without_cuda() -> None:
    with pytest.raises(BenchError, match="wants a CUDA device, got a machine without one"):
        run(["--device", "cuda"], Progress(disable=True))


def test_both_benches_are_registered_and_the_shapes_are_those_promised() -> None:
    assert all(callable(load(name)) for name in ("kernels", "kernel-compile"))
    assert {case.shape for case in DIT} == {(batch, 256, 1152) for batch in (2, 16, 64)}
    assert {case.shape for case in VIDEO} == {(1, 75_000, 5120)}
    assert {case.terms for case in DIT} >= {1, 56}
