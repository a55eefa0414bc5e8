"""Compiled loops over a stack of residual branches, and functions that return what they keep."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from l2c_compile import CacheSchedule, CompiledSampler, Rule, l2c_compile, run_reference
from l2c_compile.analyses.memory_plan import MemoryPlan, plan_memory
from l2c_compile.schedules.rules import HOLD

DIM = 4


VALUE_BYTES = 2 * DIM * 8


class Residuals(nn.Module):
    """A denoiser of ``depth`` residual sublayers, gated by timestep and condition or not at all."""

    def __init__(self, depth: int, *, gated: bool) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(DIM, DIM) for _ in range(depth))
        self.gates = nn.ModuleList(nn.Linear(1, DIM) for _ in range(depth)) if gated else None

    def forward(self, x_BD: Tensor, t_B: Tensor, y_B: Tensor) -> Tensor:
        for index, layer in enumerate(self.layers):
            change = layer(torch.tanh(x_BD))
            if self.gates is not None:
                change = self.gates[index]((t_B * y_B)[:, None]) * change
            x_BD = x_BD + change
        return x_BD


def loop_of(count: int) -> Callable[..., Tensor]:
    def loop(denoiser: Callable[..., Tensor], noise: Tensor, y: Tensor) -> Tensor:
        x = noise
        for i in range(count):
            t_B = torch.full((x.shape[0],), float(count - i), dtype=x.dtype)
            x = x - 0.25 * denoiser(x, t_B, y)
        return x

    return loop


def compiled(
    model: nn.Module, rows: dict[str, list[int]], numerics: str = "rounding", rule: Rule = HOLD, **options: object
) -> CompiledSampler:
    generator = torch.Generator().manual_seed(0)
    model = model.double().eval()
    with torch.no_grad():
        for weight in model.parameters():
            weight.normal_(std=0.5, generator=generator)
    schedule = CacheSchedule.from_table(rows, rule=rule)
    loop = loop_of(schedule.num_evaluations)
    sampler = l2c_compile(model, schedule, loop, numerics=numerics, **options)  # type: ignore[arg-type]
    noise = torch.randn(2, DIM, generator=generator, dtype=torch.float64)
    y = torch.tensor([0.5, 0.25], dtype=torch.float64)
    got = sampler(noise, y=y)
    wanted = run_reference(model, loop, sampler.schedule, noise, {"y": y})
    assert isinstance(got, Tensor)
    assert isinstance(wanted, Tensor)
    if numerics == "bitwise":
        assert torch.equal(got, wanted)
    # A dozen values are summed in another order, each of them rounded once.
    torch.testing.assert_close(got, wanted, rtol=64 * torch.finfo(torch.float64).eps, atol=0)
    return sampler


def plan_of(sampler: CompiledSampler) -> MemoryPlan:
    assert sampler._latest is not None
    return plan_memory(sampler._latest.graph)


def kept_per_evaluation(sampler: CompiledSampler) -> list[float]:
    return [size / VALUE_BYTES for size in plan_of(sampler).cache.bytes_per_evaluation]


def report(sampler: CompiledSampler, name: str) -> tuple[int, str]:
    assert sampler._latest is not None
    (run,) = [run for run in sampler._latest.passes if run.name == name]
    return run.report.rewrites, "; ".join(run.report.reasons())


def every_layer(depth: int, row: list[int]) -> dict[str, list[int]]:
    return {f"layers.{i}": row for i in range(depth)}
