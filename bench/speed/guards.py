"""Time what checking costs: the guards before each call, and the comparison of the first call with the eager loop.

Options: ``--modules 100 1000 5000`` ``--rounds 50`` ``--device cpu``. The guarded model has one attribute of its own
for each two linear layers. "guards" compares its Python state and the memory of its weights, "guards_and_probes" also
the versions and eight elements of the weight of each linear layer, as if all of them were packed. The first call is
that of ``l2c demo``: digits, 20 evaluations with guidance.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

import torch
from rich.progress import Progress
from torch import Tensor, nn

from bench.cases import BenchError
from bench.measure import compare
from bench.options import Options
from bench.report import Row
from l2c_compile import CacheSchedule, l2c_compile
from l2c_compile.loops import DDIM, Guidance
from l2c_compile.models.digits import load_digits_dit
from l2c_compile.samplers.guards import Guards


class _Block(nn.Module):
    """Two linear layers, a norm and an attribute that the forward reads."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.second = nn.Linear(8, 8), nn.LayerNorm(8), nn.Linear(8, 8)
        self.scale = 0.5

    def forward(self, x: Tensor) -> Tensor:
        return x + self.scale * self.second(self.norm(self.first(x)))  # type: ignore[no-any-return]


def run(args: Sequence[str], progress: Progress) -> list[Row]:
    """Return the milliseconds of the guards for each number of modules, and the seconds of the first call's check."""
    parser = Options("guards")
    parser.add_argument("--modules", type=int, nargs="+", default=[100, 1000, 5000])
    parser.add_argument("--rounds", type=int, default=50)
    parser.add_device("cpu", "cuda")
    options = parser.read(args)
    if min(options.modules) < 4 or options.rounds < 1:
        raise BenchError("guards wants --modules from 4 and --rounds from 1")
    task = progress.add_task("guards", total=len(options.modules) + 1)
    rows: list[Row] = []
    for num_modules in options.modules:
        model = nn.Sequential(*(_Block() for _ in range(num_modules // 4))).to(options.device)
        sides = {
            "guards": _guards_of(model, []),
            "guards_and_probes": _guards_of(model, [w for w in model.parameters() if w.dim() == 2]),
        }
        timings = compare(sides, rounds=options.rounds, warmup=3)
        where = {"modules": sum(1 for _ in model.modules())}
        for name, timing in timings.items():
            rows.append(Row.timed(name, timing, where, device=options.device))
        progress.advance(task)
    rows += _first_call(options.device)
    progress.advance(task)
    return rows


def _guards_of(model: nn.Module, read: list[Tensor]) -> Callable[[], object]:
    guards = Guards({"denoiser": model, "loop": _first_call}, read, lambda: None, is_deep=True)
    return guards.why_not


def _first_call(device: str) -> list[Row]:
    loop = DDIM(steps=20, guidance=Guidance(scale=2.0, null={"y": 10}))
    sampler = l2c_compile(load_digits_dit().to(device), CacheSchedule.from_table({"blocks.*.attn": [1, 0] * 10}), loop)
    noise, labels = torch.randn(10, 1, 8, 8, device=device), torch.arange(10, device=device)
    start_s = time.perf_counter()
    sampler.capture(noise, y=labels)
    captured_s = time.perf_counter() - start_s
    sampler(noise, y=labels)
    start_s = time.perf_counter()
    sampler(noise, y=labels)
    call_s = time.perf_counter() - start_s
    check_s = sampler.summary().first_call_s
    where = {"loop": "digits, 20 evaluations, guidance"}
    return [
        Row("first_call_check", check_s, "s", where, device=device),
        Row("capture", captured_s, "s", where, device=device),
        Row("call", call_s, "s", where, device=device),
    ]
