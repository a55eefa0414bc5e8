"""Bytes: what a bad disk, a broken download or a careless editor does."""

from __future__ import annotations

import random
import struct
from collections.abc import Callable

Draw = random.Random
Bytes = Callable[[Draw, bytes], bytes]
"""A function that breaks the bytes of a file."""


def _place(draw: Draw, content: bytes) -> int:
    return draw.randrange(len(content) + 1)


def truncate(draw: Draw, content: bytes) -> bytes:
    """Keep only the beginning."""
    return content[: draw.randrange(len(content))]


def flip_bits(draw: Draw, content: bytes) -> bytes:
    """Flip one bit or some."""
    flipped = bytearray(content)
    for _ in range(draw.choice((1, 1, 2, 8, 64))):
        flipped[draw.randrange(len(flipped))] ^= 1 << draw.randrange(8)
    return bytes(flipped)


def overwrite(draw: Draw, content: bytes) -> bytes:
    """Write random bytes over others."""
    at, length = _place(draw, content), draw.choice((1, 4, 64, 1024))
    return content[:at] + draw.randbytes(length) + content[at + length :]


def _insert(draw: Draw, content: bytes) -> bytes:
    at = _place(draw, content)
    return content[:at] + draw.randbytes(draw.choice((1, 4, 64, 4096))) + content[at:]


def _delete(draw: Draw, content: bytes) -> bytes:
    at = _place(draw, content)
    return content[:at] + content[at + draw.choice((1, 4, 64, 1024)) :]


def _repeat(draw: Draw, content: bytes) -> bytes:
    start, stop = sorted((_place(draw, content), _place(draw, content)))
    return content[:stop] + content[start:stop] * draw.choice((1, 2, 50)) + content[stop:]


def zero(draw: Draw, content: bytes) -> bytes:
    """Write zeros over a stretch."""
    start, stop = sorted((_place(draw, content), _place(draw, content)))
    return content[:start] + bytes(stop - start) + content[stop:]


def swap(draw: Draw, content: bytes) -> bytes:
    """Exchange two stretches."""
    a, b, c = sorted(_place(draw, content) for _ in range(3))
    return content[:a] + content[b:c] + content[a:b] + content[c:]


def claim_much(draw: Draw, content: bytes) -> bytes:
    """Write a huge number over any 2, 4 or 8 bytes, more often near the ends, where sizes stand."""
    size = draw.choice((2, 4, 8))
    at = draw.choice((draw.randrange(64), len(content) - draw.randrange(1, 128), _place(draw, content)))
    number = draw.choice((b"\xff" * size, b"\xff" * (size - 1) + b"\x7f", b"\x00" * (size - 1) + b"\x01"))
    return content[: max(at, 0)] + number + content[max(at, 0) + size :]


def _foreign(draw: Draw, content: bytes) -> bytes:
    """Return the content of another known format, or of none."""
    return draw.choice(
        (
            b"",
            b"{",
            b"PK",
            b"PK\5\6" + bytes(18),
            b"\x80\x04.",
            b"\x89PNG\r\n\x1a\n" + bytes(64),
            b"\x1f\x8b\x08" + bytes(64),
            b"\xff\xfe{\x00}\x00",
            b"\xef\xbb\xbf{}",
            b"\xff" * 8 + b"{}",
            struct.pack("<Q", 2) + b"{}",
            struct.pack("<Q", 10**8) + b"{" + bytes(4096),
            draw.randbytes(draw.choice((1, 100, 100_000))),
            bytes(5 * 2**20),
            b"[" * 2_000_000,
            b"{" + b" " * 5_000_000 + b"}",
        )
    )


def _splice(draw: Draw, content: bytes) -> bytes:
    prefix = draw.choice((b"PK\3\4", b"{", struct.pack("<Q", 100) + b"{", content))
    return prefix + content[_place(draw, content) :]


BYTES: dict[str, Bytes] = {
    "truncate": truncate,
    "flip bits": flip_bits,
    "overwrite": overwrite,
    "insert": _insert,
    "delete": _delete,
    "repeat": _repeat,
    "zero": zero,
    "swap": swap,
    "claim much": claim_much,
    "foreign": _foreign,
    "splice": _splice,
}
