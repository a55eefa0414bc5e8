"""Small valid files of every kind that the package reads."""

from __future__ import annotations

import argparse
import io
import json
from pathlib import Path

import torch
from torch import Tensor, nn

from bench.trust import finder_files
from l2c_compile import CacheSchedule, CompiledSampler, l2c_compile
from l2c_compile.schedules.router import Router


class _Denoiser(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.time = nn.Linear(1, 4)
        self.blocks = nn.ModuleList(nn.Linear(4, 4) for _ in range(2))

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        for block in self.blocks:
            x = x + block(x + self.time(t[:, None])) * y
        return x


def _loop(denoiser: nn.Module, noise: Tensor, y: Tensor, scale: float = 0.5) -> dict[str, Tensor]:
    x = noise
    for step in range(3):
        x = x - scale * denoiser(x, torch.full((x.shape[0],), 1 - step / 3), y)
    return {"latent": x}


def _sampler() -> CompiledSampler:
    torch.manual_seed(0)
    schedule = CacheSchedule.from_table({"blocks.0": [1, 0, 1], "blocks.1": [1, 0, 0]})
    return l2c_compile(_Denoiser().eval(), schedule, _loop)


def torch_save(content: object) -> bytes:
    """Return what ``torch.save`` writes."""
    buffer = io.BytesIO()
    torch.save(content, buffer)
    return buffer.getvalue()


def logits(num_rows: int, num_entries: int) -> dict[str, Tensor]:
    """Return the logits of a router as Learning-to-Cache stores them."""
    generator = torch.Generator().manual_seed(0)
    return {f"{row}.prob": torch.randn(num_entries, generator=generator) for row in range(num_rows)}


def valid_files(folder: Path) -> dict[str, bytes]:
    """Return a small valid file of every kind; ``folder`` is for what is written on the way."""
    _sampler().save(folder / "valid.pt2", torch.ones(2, 4), y=torch.ones(2, 4), scale=0.5)
    schedule = CacheSchedule.from_table(
        {"blocks.0.attn": [1, 0, 1, 0], "blocks.0..blocks.3": [1, 1, 0, 1], "delta(blocks.1.mlp)": [1, 1, 0, 0]},
        loop={"name": "ddim", "steps": 4},
        info={"method": "by hand"},
    )
    scores = torch.rand(4, 3, generator=torch.Generator().manual_seed(0))
    router = Router(scores, ("blocks.0.attn", "blocks.0.mlp", "delta(mid)"), (1, 3), 0.5)  # type: ignore[arg-type]
    router.save(folder / "valid.safetensors")
    arguments = argparse.Namespace(model="DiT-XL/2", num_sampling_steps=4, lr=0.01, resume="/home/somebody/run")
    rows = [[False, False], [True, False], [False, True]]
    books = {"step_cache_book": [False, True, False], "msa_cache_book": rows, "mlp_cache_book": rows}
    return {
        **finder_files.valid_files(folder),
        "schedule": schedule.to_json().encode(),
        "router": (folder / "valid.safetensors").read_bytes(),
        "l2c-dit": torch_save({"routers": logits(4, 6), "args": arguments}),
        "l2c-uvit": torch_save(logits(4, 6)),
        "smoothcache": json.dumps({"attn": [1, 0, 1, 0], "mlp-3": [1, 0, 0, 1]}).encode(),
        "invardiff": json.dumps(books).encode(),
        "sampler": (folder / "valid.pt2").read_bytes(),
    }
