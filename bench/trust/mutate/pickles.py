"""Pickles: of odd structure, of odd tensors, of what is no router at all."""

from __future__ import annotations

import argparse
import struct
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

from bench.trust.mutate.payloads import payload
from bench.trust.mutate.raw import Bytes, Draw, flip_bits, overwrite, swap, truncate
from bench.trust.mutate.valid import logits, torch_save
from bench.trust.mutate.zips import records_of, zipped


def _with_pickle(pickled: bytes, storages: int = 1) -> bytes:
    extra = {f"archive/data/{i}": bytes(64) for i in range(storages)}
    return zipped({"archive/data.pkl": pickled, "archive/byteorder": b"little", **extra, "archive/version": b"3\n"})


def _odd_pickle(draw: Draw, content: bytes, canary: Path) -> bytes:
    """Return a pickle of odd structure: broken, deep, endless, or of things that are no tensors."""
    deep = b"\x80\x02" + b"]" * 30_000 + b"a" * 29_999 + b"."
    doubling = b"\x80\x02]q\x00" + b"".join(b"]q%c(h%ch%ce" % (i + 1, i, i) for i in range(100)) + b"."
    long = b"\x80\x02\x8b" + struct.pack("<i", 10**6) + b"\x01" * 10**6 + b"."
    pickled = records_of(content)[_pickle_name(content)]
    return _with_pickle(
        draw.choice(
            (
                *(
                    deep,
                    doubling,
                    long,
                    b"",
                    b".",
                    b"\x80\x02}.",
                    b"\x80\x02]q\x00h\x00a.",
                    b"\x80\x05" + b"(" * 10**6 + b".",
                ),
                *(
                    b"\x80\x02X\xff\xff\xff\x7f",
                    b"\x80\x04\x8e" + b"\xff" * 8,
                    b"\x80\x02\x8b\xff\xff\xff\x7f",
                    b"I1\n" * 10**5,
                ),
                *(
                    b"\x80\x02r\xff\xff\xff\x7f}r\xff\xff\xff\x7f.",
                    b"\x80\x02}(K\x00K\x01u}.",
                    flip_bits(draw, pickled),
                ),
                *(overwrite(draw, pickled), truncate(draw, pickled), swap(draw, pickled), payload(draw, canary)),
            )
        )
    )


def _pickle_name(content: bytes) -> str:
    return next(name for name in records_of(content) if name.endswith("data.pkl"))


def _odd_tensors(draw: Draw, content: bytes, canary: Path) -> bytes:
    """Return router logits of other forms, numbers, names and counts."""
    num_rows, num_entries = draw.choice(((4, 6), (1, 6), (3, 6), (4, 5), (0, 6), (10_000, 1), (2, 100_001), (50, 4000)))
    rows: dict[object, object] = dict(logits(num_rows, num_entries).items())
    plain = torch.zeros(num_entries)
    odd = draw.choice(
        (
            *(torch.full_like(plain, value) for value in (float("nan"), float("inf"), -float("inf"), 1e38, -1e38)),
            *(plain.to(dtype) for dtype in (torch.float64, torch.bfloat16, torch.int64, torch.bool, torch.complex64)),
            *(plain.to(torch.float8_e4m3fn), plain.to_sparse(), plain[None], plain.sum(), plain[:0], plain.to("meta")),
            *(nn.Parameter(plain), torch.zeros(1).expand(100_000), torch.zeros(1).expand(10**12), plain.half()),
            *(torch.quantize_per_tensor(torch.zeros(6), 0.1, 0, torch.qint8), torch.zeros(12)[::2]),
            *(None, 1, 0.5, "logits", [0.0] * 6, {"prob": 1}, argparse.Namespace(a=1), torch.float32, torch.Size([6])),
        )
    )
    everywhere = draw.random() < 0.3
    for name in list(rows) if everywhere else list(rows)[:1]:
        rows[name] = odd
    if draw.random() < 0.3:
        rows[draw.choice(("0.prob ", "prob", "-1.prob", 0, None, ("0.prob",), "0.prob\x00", "9999999999.prob"))] = plain
    arguments = draw.choice(
        (
            *(None, argparse.Namespace(model="\ud800"), argparse.Namespace(model="x" * 10**6), {"model": 1}),
            *(argparse.Namespace(lr=float("nan")), argparse.Namespace(lr=10**5000), argparse.Namespace(lr=True)),
            *(argparse.Namespace(model="\x1b[2J"), argparse.Namespace(**{"__getattr__": 1, "model": "x"})),
        )
    )
    return torch_save({"routers": rows, "args": arguments} if draw.random() < 0.7 else rows)


def _odd_state(draw: Draw, content: bytes, canary: Path) -> bytes:
    shared = torch.zeros(1).expand(100_000)
    return torch_save(
        draw.choice(
            (
                # 40 GB of logits, all of them in 4 bytes of the file.
                {"routers": {f"{row}.prob": shared for row in range(draw.choice((1000, 10_000)))}},
                {f"{row}.prob": shared[:2002] for row in range(1000)},
                {"routers": None},
                {"routers": [torch.zeros(6)] * 4},
                {"routers": torch.zeros(4, 6)},
                {"routers": {}},
                {"routers": {"routers": logits(4, 6)}},
                torch.zeros(4, 6),
                [1, 2, 3],
                "text",
                None,
                {i: i for i in range(10_000)},
            )
        )
    )


_PICKLES: dict[str, Callable[[Draw, bytes, Path], bytes]] = {
    "odd pickle": _odd_pickle,
    "odd tensors": _odd_tensors,
    "odd state": _odd_state,
    "executing": lambda draw, content, canary: _with_pickle(payload(draw, canary)),
    "only a pickle": lambda draw, content, canary: payload(draw, canary),
}


def edits(canary: Path) -> dict[str, Bytes]:
    """Return the mutations of a pickle."""

    def of_pickle(make: Callable[[Draw, bytes, Path], bytes]) -> Bytes:
        return lambda draw, content: make(draw, content, canary)

    return {name: of_pickle(make) for name, make in _PICKLES.items()}
