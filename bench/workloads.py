"""The models, loops and published schedules that several benches share."""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from bench.cases import BenchError
from bench.report import ROOT
from l2c_compile import CacheSchedule, Router, Site
from l2c_compile.loops import DDIM, STABLE_DIFFUSION_BETAS, BuiltInLoop, DPMSolver, Guidance
from l2c_compile.models import DiT, UViT
from l2c_compile.schedules.importers import import_l2c_dit, import_l2c_uvit

__all__ = ["Workload", "dit_workload", "published_router", "routers_folder", "scaled_to_depth", "uvit_workload"]


@dataclass(frozen=True)
class Workload:
    """A denoiser with random weights, the loop that samples it, its schedule and its inputs."""

    name: str
    model: nn.Module
    loop: BuiltInLoop
    schedule: CacheSchedule
    noise: Tensor
    labels: Tensor

    @property
    def uncached(self) -> CacheSchedule:
        """The schedule of the same loop that reuses nothing."""
        return CacheSchedule.all_compute(self.schedule.num_evaluations, self.schedule.sites)


def routers_folder() -> Path:
    """Return the folder of the published routers, in ``../shared`` beside the checkout, or in ``$L2C_SHARED``."""
    return Path(os.environ.get("L2C_SHARED", ROOT.parent / "shared")) / "routers"


def published_router(name: str) -> Router:
    """Read a published router from ``../shared/routers`` (or ``$L2C_SHARED/routers``).

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
    sites = tuple(Site(f"blocks.{i}.{name}") for i in range(depth) for name in ("attn", "mlp"))
    return replace(router, scores=router.scores[:, columns], sites=sites)


def dit_workload(
    *, width: int, depth: int, steps: int, batch: int, input_size: int = 32, device: str = "cpu", dtype: str = "float32"
) -> Workload:
    """Return a class-conditional DiT with patch 2 and batched guidance, under a published DDIM router."""
    model = _random_weights(
        DiT(
            input_size=input_size,
            patch_size=2,
            hidden_size=width,
            depth=depth,
            num_heads=_heads(width),
            num_classes=1000,
        )
    )
    loop = DDIM(steps=steps, guidance=Guidance(scale=1.5, null={"y": 1000}, channels=3))
    router = published_router(f"l2c_DDIM{steps}_router.pt")
    if depth != len(router.sites) // 2:
        router = scaled_to_depth(router, depth)
    name = f"DiT depth {depth} width {width} tokens {(input_size // 2) ** 2}"
    return _workload(name, model, loop, router.schedule(), batch, input_size, device, dtype)


def uvit_workload(
    *, width: int, evaluations: int, batch: int, input_size: int = 32, device: str = "cpu", dtype: str = "float32"
) -> Workload:
    """Return a U-ViT of U-ViT-H/2's depth with guidance in two calls, under the published DPM-Solver router."""
    model = _random_weights(
        UViT(
            img_size=input_size,
            patch_size=2,
            embed_dim=width,
            depth=28,
            num_heads=_heads(width),
            num_classes=1001,
            conv=False,
        )
    )
    guidance = Guidance(scale=0.4, null={"y": 1000}, batched=False, base="cond")
    loop = DPMSolver(evaluations=evaluations, betas=STABLE_DIFFUSION_BETAS, first_timestep=1, guidance=guidance)
    schedule = published_router(f"l2c_dpm{evaluations}_router.pth").schedule()
    name = f"U-ViT depth 28 width {width} tokens {(input_size // 2) ** 2 + 2}"
    return _workload(name, model, loop, schedule, batch, input_size, device, dtype)


def _workload(
    name: str,
    model: nn.Module,
    loop: BuiltInLoop,
    schedule: CacheSchedule,
    batch: int,
    size: int,
    device: str,
    dtype: str,
) -> Workload:
    generator = torch.Generator().manual_seed(1)
    noise = torch.randn(batch, 4, size, size, generator=generator).to(device, getattr(torch, dtype))
    labels = torch.randint(0, 1000, (batch,), generator=generator).to(device)
    return Workload(name, model.to(device, getattr(torch, dtype)), loop, schedule, noise, labels)


def _random_weights(model: nn.Module) -> nn.Module:
    """Give every weight a random value: the zeros that a DiT starts from would leave its layers without effect."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for weight in model.parameters():
            weight.copy_(torch.randn(weight.shape, generator=generator) * 0.02)
    return model.eval()


def _heads(width: int) -> int:
    return max(1, width // 64)
