"""A small model and loop whose sampler is saved, and functions that change the file."""

from __future__ import annotations

import hashlib
import json
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from l2c_compile import CacheSchedule, CompiledSampler, l2c_compile, load
from l2c_compile.errors import FileFormatError
from tests.tiny import calls_in

FOLDER = "archive/data/extra/l2c_compile/"


MANIFEST, GRAPH = FOLDER + "manifest.json", FOLDER + "graph.jsonl"


Edit = Callable[[bytes], bytes]


class Block(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(dim)
        self.inner = nn.Linear(dim, dim)
        self.modulation = nn.Linear(dim, 3 * dim)

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        shift, scale, gate = self.modulation(c).chunk(3, dim=-1)
        change: Tensor = gate * torch.tanh(self.inner(self.norm(x) * (1 + scale) + shift))
        return x + change


class Tiny(nn.Module):
    """A denoiser with a tied weight, a buffer and a constant that is not finite."""

    def __init__(self, dim: int = 6, depth: int = 2) -> None:
        super().__init__()
        self.time = nn.Linear(1, dim)
        self.labels = nn.Embedding(4, dim)
        blocks = [Block(dim) for _ in range(depth)]
        blocks[1].inner.weight = blocks[0].inner.weight
        self.blocks = nn.ModuleList(blocks)
        self.mask: Tensor
        self.register_buffer("mask", torch.tensor([False, True] + [False] * (dim - 2)))

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        c = self.time(t[:, None]) + self.labels(y)
        for block in self.blocks:
            x = block(x, c)
        return torch.softmax(x.masked_fill(self.mask, float("-inf")), dim=-1)


def noisy_loop(denoiser: nn.Module, noise: Tensor, y: Tensor, scale: float = 1.0) -> dict[str, object]:
    """Sample in 3 evaluations, drawing noise in between."""
    x, trace = noise, []
    for step in range(3):
        t = torch.full((x.shape[0],), 1 - step / 3, dtype=x.dtype)
        x = x - scale * denoiser(x, t, y=y) + 0.1 * torch.randn_like(x)
        trace.append(x)
    return {"latent": x, "trace": (trace[0], trace[1])}


def compiled(numerics: str = "bitwise") -> CompiledSampler:
    torch.manual_seed(0)
    schedule = CacheSchedule.from_table({"blocks.0.inner": [1, 0, 1], "blocks.1": [1, 0, 0]})
    return l2c_compile(Tiny().eval(), schedule, noisy_loop, numerics=numerics)  # type: ignore[arg-type]


def saved_in(folder: Path, sampler: CompiledSampler) -> Path:
    """Save a sampler for its own inputs and return the path of the file."""
    path = folder / "tiny.pt2"
    noise, y = inputs()
    sampler.save(path, noise, y=y, scale=0.5)
    return path


def inputs(batch: int = 2, dim: int = 6) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(batch, dim, generator=generator), torch.arange(batch) % 4


def flat(sampler: nn.Module) -> list[Tensor]:
    """Sample from one seed and return all tensors of the result."""
    noise, y = inputs()
    torch.manual_seed(2)
    result = sampler(noise, y=y, scale=0.5)
    return [result["latent"], *result["trace"]]


def equal(a: list[Tensor], b: list[Tensor]) -> bool:
    return len(a) == len(b) and all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def rewritten(
    source: Path,
    target: Path,
    edits: Mapping[str, Edit] | None = None,
    extra: Mapping[str, bytes] | None = None,
    compression: int = zipfile.ZIP_STORED,
) -> Path:
    """Copy an archive with some records edited or added, and with the hash of the graph corrected."""
    records = {}
    with zipfile.ZipFile(source) as archive:
        for name in archive.namelist():
            records[name] = (edits or {}).get(name, bytes)(archive.read(name))
    if GRAPH in (edits or {}):
        manifest = json.loads(records[MANIFEST])
        manifest["sha256"]["graph"] = hashlib.sha256(records[GRAPH]).hexdigest()
        records[MANIFEST] = json.dumps(manifest).encode()
    with zipfile.ZipFile(target, "w", compression) as archive:
        for name, content in {**records, **(extra or {})}.items():
            archive.writestr(name, content)
    return target


def with_lines(source: Path, target: Path, *added: object) -> Path:
    """Copy an archive with lines added to its graph; what the last of them computes is returned as well.

    In an added line "%next" stands for the line itself, "%next-1" for the one before, and so on.
    """

    def insert(graph: bytes) -> bytes:
        *lines, last = map(json.loads, graph.splitlines())
        for line in added:
            text = json.dumps(line)
            for back in range(9, 0, -1):
                text = text.replace(f"%next-{back}", f"%{len(lines) - back}")
            lines.append(json.loads(text))
        # What nobody uses is refused for that alone.
        last["output"].append(f"%{len(lines) - 1}")
        return b"".join(json.dumps(each).encode() + b"\n" for each in (*lines, last))

    def one_result_more(manifest: bytes) -> bytes:
        document = json.loads(manifest)
        document["result"]["dict"]["added"] = {"leaf": 3}
        return json.dumps(document).encode()

    return rewritten(source, target, {GRAPH: insert, MANIFEST: one_result_more})


MAX_CALLS = 100_000
"""Python functions that are called until a file is refused: 19000 at most in these tests, a million in a second."""


def refused(path: Path, match: str | None = None) -> None:
    """Check that a file is refused, and with little work."""

    def read() -> None:
        with pytest.raises(FileFormatError, match=match):
            load(path)

    assert calls_in(read) < MAX_CALLS
