"""The models, loops and schedules that several benches share, with what is compiled of them."""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bench.cases import BenchError
from bench.report import ROOT, Condition
from l2c_compile import CacheSchedule, CompiledSampler, Router, Site, l2c_compile, run_reference
from l2c_compile.loops import DDIM, STABLE_DIFFUSION_BETAS, BuiltInLoop, DPMSolver, Guidance
from l2c_compile.methods import uniform_interval
from l2c_compile.models import DiT, UViT
from l2c_compile.schedules.importers import import_l2c_dit, import_l2c_uvit

DTYPES = ("float32", "bfloat16", "float16")

SCHEDULES = ("published", "every-second", "nothing")
"""The router that Learning-to-Cache published, a formula (odd evaluations reuse every layer), and no reuse."""

_DITS: Mapping[str, Mapping[str, int]] = {
    "dit-s": {"hidden_size": 384, "depth": 12, "num_heads": 6},
    "dit-xl": {"hidden_size": 1152, "depth": 28, "num_heads": 16},
    "dit-xl-depth": {"hidden_size": 384, "depth": 28, "num_heads": 6},
    "nothing-gained": {"hidden_size": 384, "depth": 12, "num_heads": 6},
    "tiny": {"hidden_size": 8, "depth": 1, "num_heads": 1, "input_size": 4},
}
MODELS = (*_DITS, "uvit")
"""DiT-S, DiT-XL/2, a narrow DiT of its depth, one that reuses nothing, one to try scripts, and a U-ViT."""

_KEPT: dict[object, Workload] | None = None


@dataclass(frozen=True, eq=False)
class Workload:
    """A denoiser with random weights, the loop that samples it, its schedule and its inputs."""

    case: str
    """One of ``MODELS``."""
    size: str
    """A description in words."""
    steps: int
    model: nn.Module
    loop: BuiltInLoop
    schedule: CacheSchedule
    schedule_name: str
    noise: Tensor
    labels: Tensor
    backend: str
    """The name of the backend that compiles."""

    @property
    def uncached(self) -> CacheSchedule:
        """The schedule of the same loop that reuses nothing."""
        return CacheSchedule.all_compute(self.schedule.num_evaluations, self.schedule.sites)

    @property
    def conditions(self) -> dict[str, Condition]:
        """The conditions of its rows."""
        where: dict[str, Condition] = {"case": self.case, "model": self.size, "batch": len(self.noise)}
        where |= {"steps": self.steps, "dtype": str(self.noise.dtype).removeprefix("torch.")}
        where["schedule"] = self.schedule_name
        return where | ({"threads": torch.get_num_threads()} if self.noise.device.type == "cpu" else {})

    @cached_property
    def ours(self) -> CompiledSampler:
        """The compiled loop; compiled in its first call, and once."""
        return self.sampler(self.schedule)

    @cached_property
    def ours_uncached(self) -> CompiledSampler:
        """The compiled loop that reuses nothing."""
        return self.sampler(self.uncached)

    def sampler(self, schedule: CacheSchedule, **options: Any) -> CompiledSampler:  # noqa: ANN401
        """Return a compiled loop; ``options`` are those of ``l2c_compile``."""
        return l2c_compile(self.model, schedule, self.loop, **{"backend": self.backend, **options})

    def sample(self, sampler: CompiledSampler) -> Tensor:
        """Sample with a compiled loop."""
        result = sampler(self.noise, y=self.labels)
        assert isinstance(result, Tensor)
        return result

    def sample_with_hooks(self) -> Tensor:
        """Sample eagerly, with hooks that keep what is reused."""
        result = run_reference(self.model, self.loop, self.schedule, self.noise, {"y": self.labels})
        assert isinstance(result, Tensor)
        return result

    def sample_plainly(self, denoiser: Callable[..., object]) -> Tensor:
        """Sample with the loop as it is, around any denoiser."""
        with torch.no_grad():
            return self.loop(denoiser, self.noise, y=self.labels)  # type: ignore[arg-type]


@contextmanager
def keeping() -> Iterator[None]:
    """Make each workload once until the block ends, so that what is compiled for one bench is there for the next."""
    global _KEPT
    _KEPT = {}
    try:
        yield
    finally:
        _KEPT = None


def workload(case: str, options: argparse.Namespace, **instead: Any) -> Workload:  # noqa: ANN401
    """Return one of ``MODELS`` in its loop: a DiT in DDIM with batched guidance, a U-ViT in DPM-Solver without.

    Args:
        case: one of ``MODELS``.
        options: ``steps`` of the sampler (U-ViT is called twice a step), ``batch``, and what ``Options.add_loop`` and
            ``Options.add_device`` add; ``depth``, of a DiT, may be absent.
        instead: the values that take the place of those in the options.

    Raises:
        BenchError: if a published router is wanted that is not there, or a formula for U-ViT.
    """
    of = argparse.Namespace(**{"depth": None, **vars(options), **instead})
    key = (case, of.steps, of.batch, of.depth, of.width, of.dtype, of.schedule, of.device, of.backend)
    if _KEPT is not None and key in _KEPT:
        return _KEPT[key]
    sizes = {"input_size": 32, **_DITS.get(case, {})}
    if of.width is not None:
        sizes |= {"hidden_size": of.width, "num_heads": max(1, of.width // 64)}
    if of.depth is not None:
        sizes |= {"depth": of.depth}
    model, loop, size = _uvit(of.steps) if case == "uvit" else _dit(of.steps, sizes)
    name = "nothing" if case == "nothing-gained" else of.schedule
    schedule, name = _schedule(name, of.steps, loop.num_evaluations, sizes.get("depth"))
    generator = torch.Generator().manual_seed(1)
    noise = torch.randn(of.batch, 4, sizes["input_size"], sizes["input_size"], generator=generator)
    noise = noise.to(of.device, getattr(torch, of.dtype))
    labels = torch.randint(0, 1000, (of.batch,), generator=generator).to(of.device)
    model = _with_random_weights(model.to(noise.dtype), of.device)
    made = Workload(case, size, of.steps, model, loop, schedule, name, noise, labels, of.backend)
    if _KEPT is not None:
        _KEPT[key] = made
    return made


def _dit(steps: int, sizes: Mapping[str, Any]) -> tuple[nn.Module, BuiltInLoop, str]:
    with torch.device("meta"):
        model = DiT(patch_size=2, num_classes=1000, **sizes)
    tokens = (sizes["input_size"] // 2) ** 2
    loop = DDIM(steps=steps, guidance=Guidance(scale=1.5, null={"y": 1000}, channels=3))
    return model, loop, f"DiT depth {sizes['depth']} width {sizes['hidden_size']} tokens {tokens}"


def _uvit(steps: int) -> tuple[nn.Module, BuiltInLoop, str]:
    with torch.device("meta"):
        model = UViT(img_size=32, patch_size=2, embed_dim=192, depth=28, num_heads=3, num_classes=1001, conv=False)
    guidance = Guidance(scale=0.4, null={"y": 1000}, batched=False, base="cond")
    loop = DPMSolver(evaluations=steps, betas=STABLE_DIFFUSION_BETAS, first_timestep=1, guidance=guidance)
    return model, loop, "U-ViT depth 28 width 192 tokens 258"


def _schedule(name: str, steps: int, num_evaluations: int, depth: int | None) -> tuple[CacheSchedule, str]:
    """Return a schedule for a DiT, or for U-ViT if there is no depth, and what its rows call it."""
    sites = _layers(depth) if depth else ("in_blocks.0.attn",)
    if name == "nothing":
        return CacheSchedule.all_compute(num_evaluations, sites), "nothing reused"
    if name == "every-second":
        if not depth:
            raise BenchError("every second evaluation of U-ViT is one without guidance; use its published schedule")
        return uniform_interval(num_evaluations, sites, 2), "formula: odd evaluations reuse everything"
    file = f"l2c_DDIM{steps}_router.pt" if depth else f"l2c_dpm{steps}_router.pth"
    router = published_router(file)
    return (scaled_to_depth(router, depth) if depth else router).schedule(), file


def _layers(depth: int) -> tuple[Site, ...]:
    return tuple(Site(f"blocks.{i}.{name}") for i in range(depth) for name in ("attn", "mlp"))


def _with_random_weights(model: nn.Module, device: str) -> nn.Module:
    """Give every weight a value where it is needed: the zeros that a DiT starts from would make its layers idle."""
    model = model.to_empty(device=device).eval()
    generator = torch.Generator(device).manual_seed(0)
    with torch.no_grad():
        for weight in model.parameters():
            weight.normal_(std=0.02, generator=generator)
    return model


def shared_folder() -> Path:
    """Return where the files of others are: ``$L2C_SHARED``, ``shared`` in the checkout, or ``../shared`` beside it."""
    inside = ROOT / "shared"
    return Path(os.environ.get("L2C_SHARED", inside if inside.is_dir() else ROOT.parent / "shared"))


def routers_folder() -> Path:
    """Return the folder of the published routers."""
    return shared_folder() / "routers"


def published_router(name: str) -> Router:
    """Read a published router.

    Raises:
        BenchError: if the file is not there.
    """
    path = routers_folder() / name
    if not path.is_file():
        raise BenchError(f"this bench wants the published router {name} in {path.parent}; set L2C_SHARED to its folder")
    return import_l2c_uvit(path) if "dpm" in name else import_l2c_dit(path)


def scaled_to_depth(router: Router, depth: int) -> Router:
    """Return the router for a DiT of another depth: block i takes the scores of block floor((i + .5) * old / depth)."""
    old = len(router.sites) // 2
    blocks = [int((i + 0.5) * old / depth) for i in range(depth)]
    columns = [2 * block + sublayer for block in blocks for sublayer in (0, 1)]
    return replace(router, scores=router.scores[:, columns], sites=_layers(depth))


def relative_error(got: Tensor, wanted: Tensor) -> float:
    """Return max |got - wanted| / max |wanted|."""
    wanted = wanted.double()
    return float((got.to(wanted) - wanted).abs().max() / wanted.abs().max())


@contextmanager
def without_tf32() -> Iterator[None]:
    """Compute float32 in float32: torch lets convolutions on a GPU round their factors to TF32."""
    before = torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32 = before
