"""Malformed files of every kind that the package reads, each drawn from a seed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from bench.trust.mutate import graphs, json_text, pickles, tensors, zips
from bench.trust.mutate.file_system import FILE_SYSTEM
from bench.trust.mutate.raw import BYTES, Bytes, Draw

KINDS = ("schedule", "router", "l2c-dit", "l2c-uvit", "smoothcache", "invardiff", "sampler", "profile", "checkpoint")
"""What the package reads, by the name of its project or class."""

_TENSORS = ("router", "profile", "checkpoint")
_SUFFIX = {**dict.fromkeys(_TENSORS, ".safetensors"), "l2c-dit": ".pt", "l2c-uvit": ".pth", "sampler": ".pt2"}
_ZIPS = ("l2c-dit", "l2c-uvit", "sampler")


@dataclass(frozen=True)
class Malformed:
    """A file that was broken on purpose."""

    kind: str
    mutation: str
    path: Path
    checked: bool
    """Whether checksums cover what was changed, so that a file that is read has the content that it had."""
    vanishes: bool = False
    """Whether the file is to be removed when it is opened for the second time."""


def malformed(index: int, seed: int, valid: Mapping[str, bytes], folder: Path, canary: Path) -> Malformed:
    """Write malformed file number ``index`` into an empty folder.

    Args:
        index: the number of the file in its run; with ``seed`` it decides everything.
        seed: the seed of the run.
        valid: the valid files, which ``valid_files`` returned.
        folder: the folder to write the file to.
        canary: the file that a payload would create if it were executed.
    """
    draw = Draw(f"{seed}:{index}")
    kind = KINDS[index % len(KINDS)]
    makers = _mutations(kind, canary)
    group = draw.choice(list(makers))
    name = draw.choice(list(makers[group]))
    path = folder / f"file{_SUFFIX.get(kind, '.json')}"
    if group == "file system":
        FILE_SYSTEM[name](path, valid[kind])
        return Malformed(kind, name, path, True, name == "vanishes")
    path.write_bytes(makers[group][name](draw, valid[kind]))
    return Malformed(kind, name, path, checked=group == "bytes" and kind == "sampler")


def _mutations(kind: str, canary: Path) -> dict[str, dict[str, Bytes]]:
    """Return the mutations by group. Each group is drawn equally often, however many mutations it has."""
    groups: dict[str, dict[str, Bytes]] = {"bytes": BYTES, "file system": dict.fromkeys(FILE_SYSTEM, _unchanged)}
    if kind in _ZIPS:
        groups["archive"] = zips.edits(canary)
    if kind == "sampler":
        groups |= graphs.groups(canary)
    elif kind in _ZIPS:
        groups["pickle"] = pickles.edits(canary)
    elif kind in _TENSORS:
        groups |= tensors.groups(kind, canary)
    else:
        groups["json"] = {**json_text.edits(canary), "large": json_text.large_json}
    return groups


def _unchanged(draw: Draw, content: bytes) -> bytes:
    return content
