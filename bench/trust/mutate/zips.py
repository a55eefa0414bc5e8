"""Zip archives: .pt, .pth and .pt2."""

from __future__ import annotations

import io
import struct
import warnings
import zipfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from bench.trust.mutate.payloads import payload
from bench.trust.mutate.raw import Bytes, Draw, claim_much, flip_bits, overwrite, swap, truncate, zero

Records = dict[str, bytes]
"""The files of an archive, by name."""


def records_of(content: bytes) -> Records:
    """Return what an archive holds."""
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def zipped(
    records: Mapping[str, bytes] | Sequence[tuple[str | zipfile.ZipInfo, bytes]], compression: int = zipfile.ZIP_STORED
) -> bytes:
    """Return an archive; as pairs, names may occur twice."""
    buffer = io.BytesIO()
    pairs = list(records.items()) if isinstance(records, Mapping) else records
    with warnings.catch_warnings(), zipfile.ZipFile(buffer, "w", compression) as archive:
        warnings.simplefilter("ignore", UserWarning)  # of names that occur twice
        for name, content in pairs:
            archive.writestr(name, content)
    return buffer.getvalue()


ZipEdit = Callable[[Draw, Records, Path], bytes]


def _with_odd_name(draw: Draw, records: Records, canary: Path) -> bytes:
    root = next(iter(records)).split("/")[0]
    name = draw.choice(
        (
            *("/etc/cron.d/x", "../x", f"{root}/../../x", f"{root}/data/../../x", "C:\\x", f"{root}\\x", f"{root}//x"),
            *(
                f"{root}/data/\u0661",
                f"{root}/\u202ex",
                f"{root}/ ",
                "x",
                f"{root}/",
                "other/data.pkl",
                f"{root}/a\x01b",
            ),
            *(
                str(canary),
                f"{root}/data/weights/weight_99",
                f"{root}/data/aotinductor/model/model.so",
                f"{root}/{'x' * 60_000}",
            ),
        )
    )
    return zipped({**records, name: draw.choice((b"", b"x", b"x" * 1000))})


def _with_link(draw: Draw, records: Records, canary: Path) -> bytes:
    """Turn a record into what would be unpacked as a symbolic link."""
    old = draw.choice(list(records))
    link = zipfile.ZipInfo(old)
    link.create_system, link.external_attr = 3, 0o120777 << 16
    return zipped([(link if name == old else name, content) for name, content in records.items()])


def _with_twin(draw: Draw, records: Records, canary: Path) -> bytes:
    twin = draw.choice(list(records))
    changed = flip_bits(draw, records[twin]) if records[twin] else b"x"
    return zipped([*records.items(), (twin, changed)])


def _bomb(draw: Draw, records: Records, canary: Path) -> bytes:
    old = draw.choice(list(records))
    compression = draw.choice((zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA))
    return zipped({**records, old: bytes(draw.choice((10**6, 3 * 10**7)))}, compression)


def _compressed(draw: Draw, records: Records, canary: Path) -> bytes:
    return zipped(records, draw.choice((zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA)))


def _forged_directory(draw: Draw, records: Records, canary: Path) -> bytes:
    """Write other sizes, offsets, flags or methods into an entry of the directory than the record has."""
    content = bytearray(zipped(records))
    entries = [i for i in range(len(content)) if content.startswith(b"PK\1\2", i)]
    for entry in draw.sample(entries, k=draw.choice((1, len(entries)))):
        field, size = draw.choice(
            ((8, 2), (10, 2), (16, 4), (20, 4), (24, 4), (20, 8), (28, 2), (30, 2), (32, 2), (42, 4))
        )
        number = draw.choice((0, 1, 0xFFFF, 0xFFFFFFFE, 0xFFFFFFFF, 0x7FFFFFFF, len(content))) & (256**size - 1)
        content[entry + field : entry + field + size] = number.to_bytes(size, "little")
    return bytes(content)


def _forged_end(draw: Draw, records: Records, canary: Path) -> bytes:
    content = bytearray(zipped(records))
    field, size = draw.choice(((4, 2), (6, 2), (8, 2), (10, 2), (12, 4), (16, 4), (20, 2)))
    number = draw.choice((0, 1, 0xFFFF, 0xFFFFFFFF, 0x7FFFFFFF, len(content))) & (256**size - 1)
    end = len(content) - 22
    content[end + field : end + field + size] = number.to_bytes(size, "little")
    if draw.random() < 0.3:
        locator = struct.pack("<4sLQL", b"PK\6\7", 0, draw.choice((0, end, 2**63)), 1)
        end64 = struct.pack("<4sQ2H2L4Q", b"PK\6\6", 44, 45, 45, 0, 0, 1, 1, draw.choice((46, 2**62)), 0)
        content[end:end] = end64 + locator
    return bytes(content)


def _many(draw: Draw, records: Records, canary: Path) -> bytes:
    root = next(iter(records)).split("/")[0]
    return zipped({**records, **{f"{root}/data/{i}": b"" for i in range(draw.choice((1000, 12_000)))}})


def _lost(draw: Draw, records: Records, canary: Path) -> bytes:
    lost = draw.sample(list(records), k=draw.choice((1, 2, len(records))))
    return zipped({name: content for name, content in records.items() if name not in lost})


def _emptied(draw: Draw, records: Records, canary: Path) -> bytes:
    return zipped({**records, draw.choice(list(records)): b""})


def _around(draw: Draw, records: Records, canary: Path) -> bytes:
    content = zipped(records)
    garbage = draw.randbytes(100)
    comment = content[:-2] + struct.pack("<H", 100) + garbage
    return draw.choice((garbage + content, content + garbage, comment, content + content, zipped({"x/y": content})))


def _changed(draw: Draw, records: Records, canary: Path) -> bytes:
    """Change one record, and correct the checksum of the archive."""
    name = draw.choice([name for name in records if records[name]])
    mutation = draw.choice((flip_bits, truncate, overwrite, zero, swap, claim_much))
    return zipped({**records, name: mutation(draw, records[name])})


def _executing(draw: Draw, records: Records, canary: Path) -> bytes:
    """Put a pickle that creates the canary, in place of any record or beside them."""
    root = next(iter(records)).split("/")[0]
    beside = (f"{root}/data.pkl", f"{root}/data/sample_inputs/model.pt", f"{root}/data/constants/custom_obj_0")
    name = draw.choice((*records, *beside))
    content = payload(draw, canary)
    if draw.random() < 0.5:
        content = zipped({"archive/data.pkl": content, "archive/version": b"3\n"})
    return zipped({**records, name: content})


_ARCHIVE: dict[str, ZipEdit] = {
    "odd name": _with_odd_name,
    "link": _with_link,
    "twin": _with_twin,
    "bomb": _bomb,
    "compressed": _compressed,
    "forged directory": _forged_directory,
    "forged end": _forged_end,
    "many": _many,
    "lost": _lost,
    "emptied": _emptied,
    "around": _around,
    "changed": _changed,
    "executing": _executing,
}


def edits(canary: Path) -> dict[str, Bytes]:
    """Return the mutations of an archive."""

    def of_archive(edit: ZipEdit) -> Bytes:
        return lambda draw, content: edit(draw, records_of(content), canary)

    return {name: of_archive(edit) for name, edit in _ARCHIVE.items()}
