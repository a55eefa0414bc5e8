"""Valid files of the finders, profiles and checkpoints of learning, how to break them and what they say when read."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path

import safetensors.torch
import torch
from torch import Tensor, nn

from bench.trust.file_mutations import (
    _BYTES,
    _FILE_SYSTEM,
    _JSON,
    Bytes,
    Draw,
    JsonEdit,
    Malformed,
    _in_header,
    _json_bytes,
    _split_header,
)
from l2c_compile.finders import Profile, Work
from l2c_compile.finders.open_evaluations import SoftDenoiser
from l2c_compile.finders.processes import Workers
from l2c_compile.finders.training import Learner, Settings
from l2c_compile.schedules.sites import Site

__all__ = ["KINDS", "FinderFile", "malformed", "read", "valid_files"]

KINDS = ("profile", "checkpoint")
"""What the finders read, by the name of its class."""

_METADATA = {"profile": "l2c_compile", "checkpoint": "l2c_compile.training"}
_SITES = ("0", "1")
_NUM_EVALUATIONS = 4


class FinderFile:
    """What a file of a finder says; equal for equal content."""

    def __init__(self, tensors: Mapping[str, Tensor], rest: object, save: Callable[[Path], None]) -> None:
        self._tensors = {name: tensor.clone() for name, tensor in tensors.items()}
        self._rest = rest
        self.save = save

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, FinderFile):
            return NotImplemented
        theirs = other._tensors
        same = self._rest == other._rest and self._tensors.keys() == theirs.keys()
        return same and all(torch.equal(tensor, theirs[name]) for name, tensor in self._tensors.items())

    __hash__ = None  # type: ignore[assignment]


def read(kind: str, path: Path) -> FinderFile:
    """Read a file of one of ``KINDS``, as a user of the package does."""
    if kind == "profile":
        profile = Profile.load(path)
        tensors = {"change": profile.change, "size": profile.size, "growth": profile.growth}
        rest = (profile.work, profile.sites, profile.branches, profile.loop, profile.model)
        return FinderFile(tensors, rest, profile.save)
    learner = _learner()
    learner.restore(path)
    checkpoint = learner.checkpoint()
    return FinderFile(checkpoint.tensors, (checkpoint.run, checkpoint.round), checkpoint.save)


def valid_files(folder: Path) -> dict[str, bytes]:
    """Return a small valid file of every kind; ``folder`` is for what is written on the way."""
    generator = torch.Generator().manual_seed(0)
    change, size, growth = (torch.rand(*shape, 3, 2, generator=generator) for shape in ((2, 2), (2,), (2,)))
    sites = tuple(map(Site.parse, ("blocks.0.attn", "delta(mid)")))
    work = Work((100, 100, 90), dict.fromkeys(sites, (20, 20, 10)))
    Profile(change, size, growth, work, sites, 1, {"name": "ddim"}, {"class": "DiT"}).save(folder / "profile")
    learner = _learner()
    # So that the optimiser has moments, and one evaluation has none.
    learner.update({1: learner.scores(1).square().sum()})
    learner.finish_round()
    learner.checkpoint().save(folder / "checkpoint")
    return {kind: (folder / kind).read_bytes() for kind in KINDS}


def malformed(index: int, seed: int, valid: Mapping[str, bytes], folder: Path, canary: Path) -> Malformed:
    """Write malformed file number ``index`` into an empty folder; see ``file_mutations.malformed``."""
    draw = Draw(f"{seed}:{index}")
    kind = KINDS[index % len(KINDS)]
    groups: dict[str, dict[str, Bytes]] = {
        "bytes": _BYTES,
        "header": {name: _in_header(edit, canary) for name, edit in _JSON.items()},
        "metadata": {name: _in_metadata(_METADATA[kind], edit, canary) for name, edit in _JSON.items()},
        "tensors": {"tensors": _other_tensors, "header of many": _many_entries},
    }
    group = draw.choice(["file system", *groups])
    path = folder / "file.safetensors"
    if group == "file system":
        name = draw.choice(list(_FILE_SYSTEM))
        _FILE_SYSTEM[name](path, valid[kind])
        return Malformed(kind, name, path, True, name == "vanishes")
    name = draw.choice(list(groups[group]))
    path.write_bytes(groups[group][name](draw, valid[kind]))
    return Malformed(kind, name, path, checked=False)


@cache
def _learner() -> Learner:
    """Return the one learner of this process, into which every checkpoint is read."""
    torch.manual_seed(0)
    denoiser = SoftDenoiser(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)).eval(), _SITES)

    def loop(model: nn.Module, noise: Tensor) -> Tensor:
        for _ in range(_NUM_EVALUATIONS):
            noise = model(noise)
        return noise

    forms = denoiser.forms_of(loop, torch.ones(1, 4), {})
    return Learner(denoiser, forms, [1, 3], Settings(budget=0.9), Workers(), 1.0)


def _in_metadata(key: str, edit: JsonEdit, canary: Path) -> Bytes:
    def change(draw: Draw, content: bytes) -> bytes:
        header, data = _split_header(content)
        metadata = header["__metadata__"]
        assert isinstance(metadata, dict)
        header["__metadata__"] = {key: _json_bytes(edit, canary)(draw, metadata[key].encode()).decode()}
        text = json.dumps(header).encode()
        return struct.pack("<Q", len(text)) + text + data

    return change


def _other_tensors(draw: Draw, content: bytes) -> bytes:
    """Replace, add or leave out a tensor."""
    header, _ = _split_header(content)
    metadata = header["__metadata__"]
    assert isinstance(metadata, dict)
    tensors = safetensors.torch.load(content)
    name = draw.choice(sorted(tensors))
    like = tensors[name]
    wide = like.double()
    other = draw.choice(
        (
            *(torch.full_like(wide, value).to(like.dtype) for value in (-1.0, 0.0, 1e30)),
            *(torch.full(like.shape, value) for value in (float("nan"), float("inf"))),
            *(wide.to(dtype) for dtype in (torch.float64, torch.float16, torch.int8, torch.bool, torch.float8_e4m3fn)),
            *(like[None], like.flatten()[:0], torch.ones(()), torch.zeros(3_000_000, dtype=like.dtype)),
            *(torch.zeros(2, 2, 1_000_000), torch.zeros(0, 2**40), torch.full(like.shape, 2**62)),
        )
    )
    changes = draw.choice(({name: other}, {name: other}, {"more": other}, {name.upper(): like}))
    missing = draw.choice((None, None, None, name))
    left = {name: tensor.clone() for name, tensor in {**tensors, **changes}.items() if name != missing}
    return safetensors.torch.save(left, metadata)


def _many_entries(draw: Draw, content: bytes) -> bytes:
    """Return a file with so many tensors, all empty, that only a bound keeps its reading short."""
    header, data = _split_header(content)
    count = draw.choice((1000, 100_000, 1_000_000))
    entry = {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}
    text = json.dumps({**{f"t{i}": entry for i in range(count)}, **header}).encode()
    return struct.pack("<Q", len(text)) + text + data
