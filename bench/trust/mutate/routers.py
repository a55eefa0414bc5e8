"""Routers of ours: safetensors."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import safetensors.torch
import torch

from bench.trust.mutate.json_text import edits
from bench.trust.mutate.raw import Bytes, Draw

__all__ = ["groups"]


def _split_header(content: bytes) -> tuple[dict[str, object], bytes]:
    length = int.from_bytes(content[:8], "little")
    return json.loads(content[8 : 8 + length]), content[8 + length :]


def _joined(header: bytes, data: bytes) -> bytes:
    return struct.pack("<Q", len(header)) + header + data


def groups(canary: Path) -> dict[str, dict[str, Bytes]]:
    """Return the mutations of a router, by group."""
    of_json = edits(canary)
    return {
        "header": {name: _in_header(change) for name, change in of_json.items()},
        "metadata": {name: _in_metadata(change) for name, change in of_json.items()},
        "scores": {"scores": _other_scores},
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
        header["__metadata__"] = {"l2c_compile": change(draw, metadata["l2c_compile"].encode()).decode()}
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
