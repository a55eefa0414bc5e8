"""Tiny denoisers, loops and graphs for tests, and a comparison bit for bit."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from dataclasses import replace
from types import FrameType
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx.experimental.proxy_tensor import make_fx

from bench.trust.bits import own as own
from bench.trust.bits import same_bits as same_bits
from l2c_compile import CacheSchedule, CompiledSampler, l2c_compile, run_reference
from l2c_compile import compile as compile_module
from l2c_compile.frontend.stand_in import Loop
from l2c_compile.graphs.loop_graph import LoopGraph, ProgramGraph
from l2c_compile.models import DiT, UViT
from l2c_compile.passes.base import Pipeline
from l2c_compile.passes.pipeline import LOOP


class Residual(nn.Module):
    """A denoiser of two residual sublayers on (B, D) latents, the second of which is gated by the timestep."""

    def __init__(self, dim: int = 4) -> None:
        super().__init__()
        self.time = nn.Linear(1, dim)
        self.norm = nn.LayerNorm(dim)
        self.a = nn.Linear(dim, dim)
        self.b = nn.Linear(dim, dim)

    def forward(self, x_BD: Tensor, t_B: Tensor, y: Tensor | float | None = None) -> Tensor:
        c_BD = torch.sin(self.time(t_B[:, None].to(self.time.weight.dtype)))
        x_BD = x_BD + self.a(self.norm(x_BD))
        x_BD = x_BD + c_BD * self.b(torch.tanh(x_BD))
        return x_BD if y is None else x_BD * y


def seeded(module: nn.Module, seed: int = 0, std: float = 0.3) -> Any:  # noqa: ANN401 - the module itself
    """Draw every parameter anew, because its initialisation may be zero, and switch to evaluation mode."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_(std=std, generator=generator)
    return module.eval()


def residual(dim: int = 4) -> Residual:
    return seeded(Residual(dim))  # type: ignore[no-any-return]


def tiny_dit(depth: int = 2) -> DiT:
    model = DiT(input_size=4, patch_size=2, hidden_size=16, depth=depth, num_heads=2, num_classes=5)
    return seeded(model)  # type: ignore[no-any-return]


def tiny_uvit() -> UViT:
    model = UViT(img_size=4, patch_size=2, embed_dim=16, depth=2, num_heads=2, num_classes=6)
    return seeded(model)  # type: ignore[no-any-return]


def draw(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def at(x: Tensor, timestep: float) -> Tensor:
    """Return a tensor of the timestep for every sample of a batch."""
    return torch.full((x.shape[0],), float(timestep), device=x.device)


def steps(count: int) -> Loop:
    """Return a loop of ``count`` evaluations."""

    def loop(denoiser: Callable[..., Any], noise: Any, **conditions: object) -> Tensor:  # noqa: ANN401
        x: Tensor = noise
        for i in range(count):
            x = x - 0.25 * denoiser(x, at(x, count - i), **conditions)
        return x

    return loop


def check_equals_reference(
    model: nn.Module,
    schedule: CacheSchedule,
    loop: Loop,
    noise: object,
    **conditions: object,
) -> CompiledSampler:
    """Compile, compare with the reference, and with the plain loop where nothing is reused, bit for bit; and prove."""
    sampler = l2c_compile(model, schedule, loop)
    sampler.capture(own(noise), **own(conditions))
    # Another seed than the capture ran under, so that nothing drawn then can be right.
    torch.manual_seed(11)
    got = sampler(own(noise), **own(conditions))
    torch.manual_seed(11)
    wanted = run_reference(model, loop, sampler.schedule, own(noise), own(conditions))
    assert same_bits(got, wanted), (got, wanted)
    if not schedule.reuses:
        torch.manual_seed(11)
        with torch.no_grad():
            assert same_bits(got, loop(model, own(noise), **own(conditions)))
    assert str(sampler.summary())
    report = sampler.verify(own(noise), **own(conditions))
    assert report.holds, str(report)
    return sampler


def set_passes(sampler: CompiledSampler, passes: Pipeline) -> None:
    """Make a sampler run passes that no option asks for."""
    sampler.options = replace(sampler.options)
    vars(sampler.options)["passes"] = passes


def program(function: Callable[..., object], *inputs: Tensor) -> ProgramGraph:
    """Return the graph of a function of tensors that returns a list of tensors."""
    module = make_fx(function, tracing_mode="fake")(*inputs)
    return ProgramGraph(module.graph, module)


def run(graph: ProgramGraph, *inputs: Tensor) -> list[Tensor]:
    with torch.no_grad():
        return list(fx.Interpreter(graph.root, graph=graph.graph).run(*inputs))


def targets(graph: ProgramGraph) -> list[str]:
    """Return the names of the operations in order."""
    return [str(n.target).removeprefix("aten.") for n in graph.graph.nodes if n.op == "call_function"]


def unrolled(
    model: nn.Module, schedule: CacheSchedule, loop: Loop, noise: object, conditions: Mapping[str, object] | None = None
) -> LoopGraph:
    """Return the loop graph before its pipeline runs."""
    none = Pipeline((), LOOP.assumes)
    graph, _ = compile_module.build_loop_graph(model, loop, schedule, noise, conditions or {}, none)
    return graph


def assert_strides_as_noted(graph: LoopGraph, *inputs: Tensor) -> None:
    """Run the graph and compare the strides of every value with those noted in its metadata, which backends rely on."""

    class Checked(fx.Interpreter):
        def run_node(self, n: fx.Node) -> Any:  # noqa: ANN401
            value = super().run_node(n)
            if isinstance(value, Tensor) and n.op == "call_function":
                assert value.stride() == n.meta["val"].stride(), n.format_node()
            return value

    Checked(graph.module()).run(*inputs)


def calls_in(function: Callable[[], object], within: str = "") -> int:
    """Return how many functions are called while ``function`` runs, in modules whose name begins with ``within``.

    In tests it is taken in place of the time, which depends on what else the machine does.
    """
    calls = 0

    def note(frame: FrameType, event: str, argument: object) -> None:
        nonlocal calls
        calls += event == "call" and str(frame.f_globals.get("__name__", "")).startswith(within)

    before = sys.getprofile()
    sys.setprofile(note)
    try:
        function()
    finally:
        sys.setprofile(before)
    return calls
