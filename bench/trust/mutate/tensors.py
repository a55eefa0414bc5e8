"""Safetensors files of ours: routers, and what finders keep."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import safetensors.torch
import torch

from bench.trust.mutate.json_text import edits
from bench.trust.mutate.raw import Bytes, Draw


def _split_header(content: bytes) -> tuple[dict[str, object], bytes]:
    length = int.from_bytes(content[:8], "little")
    return json.loads(content[8 : 8 + length]), content[8 + length :]


def _joined(header: bytes, data: bytes) -> bytes:
    return struct.pack("<Q", len(header)) + header + data


def groups(kind: str, canary: Path) -> dict[str, dict[str, Bytes]]:
    """Return the mutations of a router, profile or checkpoint, by group."""
    of_json = edits(canary)
    return {
        "header": {name: _in_header(change) for name, change in of_json.items()} | {"many tensors": _many_tensors},
        "metadata": {name: _in_metadata(change) for name, change in of_json.items()},
        "tensors": {"scores": _other_scores} if kind == "router" else {"tensors": _other_tensors},
    }


def _in_header(change: Bytes) -> Bytes:
    def changed(draw: Draw, content: bytes) -> bytes:
        header, data = _split_header(content)
        return _joined(change(draw, json.dumps(header).encode()), data)

    return changed


def _in_metadata(change: Bytes) -> Bytes:
    def changed(draw: Draw, content: bytes) -> bytes:
        header, data = _split_header(content)
        metadata = header["__metadata__"]
        assert isinstance(metadata, dict)
        ((key, document),) = metadata.items()
        header["__metadata__"] = {key: change(draw, document.encode()).decode()}
        return _joined(json.dumps(header).encode(), data)

    return changed


def _other_scores(draw: Draw, content: bytes) -> bytes:
    header, _ = _split_header(content)
    metadata = header["__metadata__"]
    assert isinstance(metadata, dict)
    good = torch.rand(4, 3)
    scores = draw.choice(
        (
            *(torch.full((4, 3), value) for value in (float("nan"), float("inf"), -0.1, 1.1, 0.0, 1.0)),
            *(good.to(dtype) for dtype in (torch.float64, torch.float16, torch.int8, torch.bool, torch.float8_e4m3fn)),
            *(good[:0], good[0], good[None], torch.rand(3, 4), torch.rand(4, 500_001), torch.rand(1000, 1500)),
        )
    )
    more = draw.choice(({}, {}, {"more": torch.ones(2)}))
    return safetensors.torch.save({draw.choice(("scores", "scores", "score")): scores, **more}, metadata)


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
    left = {each: tensor.clone() for each, tensor in {**tensors, **changes}.items() if each != missing}
    return safetensors.torch.save(left, metadata)


def _many_tensors(draw: Draw, content: bytes) -> bytes:
    """Name so many tensors, all empty, that only a bound keeps the reading short."""
    header, data = _split_header(content)
    entry = {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}
    count = draw.choice((1000, 100_000, 1_000_000))
    return _joined(json.dumps({**{f"t{i}": entry for i in range(count)}, **header}).encode(), data)
