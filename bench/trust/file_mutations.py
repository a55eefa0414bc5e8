"""Valid files of every kind that the package reads, and the ways to break them, each drawn from a seed."""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import os
import pickle
import random
import struct
import warnings
import zipfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import safetensors.torch
import torch
from torch import Tensor, nn

from l2c_compile import CacheSchedule, CompiledSampler, l2c_compile
from l2c_compile.schedules.router import Router

__all__ = ["KINDS", "Malformed", "malformed", "valid_files"]

KINDS = ("schedule", "router", "l2c-dit", "l2c-uvit", "smoothcache", "invardiff", "sampler")
"""What the package reads, by the name of its project or class."""

_SUFFIX = {"router": ".safetensors", "l2c-dit": ".pt", "l2c-uvit": ".pth", "sampler": ".pt2"}
_ZIPS = ("l2c-dit", "l2c-uvit", "sampler")
_OURS = "archive/data/extra/l2c_compile/"
_MANIFEST, _GRAPH, _SCHEDULE = (_OURS + name for name in ("manifest.json", "graph.jsonl", "schedule.json"))

Draw = random.Random
Bytes = Callable[[Draw, bytes], bytes]
Records = dict[str, bytes]


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
        index: counts the files of a run; with ``seed`` it decides everything.
        seed: of the run.
        valid: what ``valid_files`` returned.
        folder: where to.
        canary: what a payload in the file would create, if anything of it were executed.
    """
    draw = Draw(f"{seed}:{index}")
    kind = KINDS[index % len(KINDS)]
    makers = _mutations(kind, canary)
    group = draw.choice(list(makers))
    name = draw.choice(list(makers[group]))
    path = folder / f"file{_SUFFIX.get(kind, '.json')}"
    if group == "file system":
        _FILE_SYSTEM[name](path, valid[kind])
        return Malformed(kind, name, path, True, name == "vanishes")
    path.write_bytes(makers[group][name](draw, valid[kind]))
    return Malformed(kind, name, path, checked=group == "bytes" and kind == "sampler")


# The valid files.


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


def _torch_save(content: object) -> bytes:
    buffer = io.BytesIO()
    torch.save(content, buffer)
    return buffer.getvalue()


def _logits(num_rows: int, num_entries: int) -> dict[str, Tensor]:
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
        "schedule": schedule.to_json().encode(),
        "router": (folder / "valid.safetensors").read_bytes(),
        "l2c-dit": _torch_save({"routers": _logits(4, 6), "args": arguments}),
        "l2c-uvit": _torch_save(_logits(4, 6)),
        "smoothcache": json.dumps({"attn": [1, 0, 1, 0], "mlp-3": [1, 0, 0, 1]}).encode(),
        "invardiff": json.dumps(books).encode(),
        "sampler": (folder / "valid.pt2").read_bytes(),
    }


# Which mutations a kind has.


def _mutations(kind: str, canary: Path) -> dict[str, dict[str, Bytes]]:
    """Return the mutations by group; groups are drawn alike, however many mutations they have."""
    groups: dict[str, dict[str, Bytes]] = {"bytes": _BYTES, "file system": dict.fromkeys(_FILE_SYSTEM, _unchanged)}
    if kind in _ZIPS:
        groups["archive"] = {name: _in_zip(edit, canary) for name, edit in _ARCHIVE.items()}
    if kind == "sampler":
        groups["manifest"] = {name: _in_record(_MANIFEST, edit, canary) for name, edit in _JSON.items()}
        groups["schedule inside"] = {name: _in_record(_SCHEDULE, edit, canary) for name, edit in _JSON.items()}
        groups["graph line"] = {name: _in_graph_line(edit, canary) for name, edit in _JSON.items()}
        groups["graph"] = {name: _in_graph(edit, canary) for name, edit in _LINES.items()}
        groups["weights"] = {"weights": _other_weights}
    elif kind in _ZIPS:
        groups["pickle"] = {name: _pickled(make, canary) for name, make in _PICKLES.items()}
    elif kind == "router":
        groups["header"] = {name: _in_header(edit, canary) for name, edit in _JSON.items()}
        groups["metadata"] = {name: _in_metadata(edit, canary) for name, edit in _JSON.items()}
        groups["scores"] = {"scores": _other_scores}
    else:
        groups["json"] = {name: _json_bytes(edit, canary) for name, edit in _JSON.items()}
        groups["json"]["large"] = _large_json
    return groups


def _unchanged(draw: Draw, content: bytes) -> bytes:
    return content


# Bytes: what a bad disk, a broken download or a careless editor does.


def _place(draw: Draw, content: bytes) -> int:
    return draw.randrange(len(content) + 1)


def _truncate(draw: Draw, content: bytes) -> bytes:
    return content[: draw.randrange(len(content))]


def _flip_bits(draw: Draw, content: bytes) -> bytes:
    flipped = bytearray(content)
    for _ in range(draw.choice((1, 1, 2, 8, 64))):
        flipped[draw.randrange(len(flipped))] ^= 1 << draw.randrange(8)
    return bytes(flipped)


def _overwrite(draw: Draw, content: bytes) -> bytes:
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


def _zero(draw: Draw, content: bytes) -> bytes:
    start, stop = sorted((_place(draw, content), _place(draw, content)))
    return content[:start] + bytes(stop - start) + content[stop:]


def _swap(draw: Draw, content: bytes) -> bytes:
    a, b, c = sorted(_place(draw, content) for _ in range(3))
    return content[:a] + content[b:c] + content[a:b] + content[c:]


def _claim_much(draw: Draw, content: bytes) -> bytes:
    """Write a huge number over any 2, 4 or 8 bytes, more often near the ends, where sizes stand."""
    size = draw.choice((2, 4, 8))
    at = draw.choice((draw.randrange(64), len(content) - draw.randrange(1, 128), _place(draw, content)))
    number = draw.choice((b"\xff" * size, b"\xff" * (size - 1) + b"\x7f", b"\x00" * (size - 1) + b"\x01"))
    return content[: max(at, 0)] + number + content[max(at, 0) + size :]


def _foreign(draw: Draw, content: bytes) -> bytes:
    """Content of a known other format, or of none."""
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


_BYTES: dict[str, Bytes] = {
    "truncate": _truncate,
    "flip bits": _flip_bits,
    "overwrite": _overwrite,
    "insert": _insert,
    "delete": _delete,
    "repeat": _repeat,
    "zero": _zero,
    "swap": _swap,
    "claim much": _claim_much,
    "foreign": _foreign,
    "splice": _splice,
}


# What is no plain file, or not for long.


def _make_link_loop(path: Path, content: bytes) -> None:
    path.symlink_to(path.name)


def _make_folder(path: Path, content: bytes) -> None:
    path.mkdir()


def _make_nothing(path: Path, content: bytes) -> None:
    pass


def _make_pipe(path: Path, content: bytes) -> None:
    os.mkfifo(path)


def _make_endless(path: Path, content: bytes) -> None:
    path.symlink_to("/dev/zero")


def _make_sparse(path: Path, content: bytes) -> None:
    path.write_bytes(content)
    # As long as it claims, and without a block on the disk.
    os.truncate(path, 2**40)


def _make_vanishing(path: Path, content: bytes) -> None:
    path.write_bytes(content)


_FILE_SYSTEM: dict[str, Callable[[Path, bytes], None]] = {
    "folder": _make_folder,
    "missing": _make_nothing,
    "link loop": _make_link_loop,
    "pipe": _make_pipe,
    "endless": _make_endless,
    "sparse": _make_sparse,
    "vanishes": _make_vanishing,
}


# JSON: one value, key or object of the document replaced by something odd.

JsonEdit = Callable[[Draw, object, Path], object]


def _odd_value(draw: Draw, canary: Path) -> object:
    """Return a value that no reader expects where it stands; ``_Raw`` is written as it is."""
    code = f"__import__('os').mkdir({str(canary)!r})"
    deep: object = 0
    for _ in range(draw.choice((10, 40, 300))):
        deep = [deep] if draw.random() < 0.5 else {"a": deep}
    return draw.choice(
        (
            *(None, True, False, 0, 1, -1, 0.5, -0.0, 1e308, "", [], {}, [[]], "0", "%0", "%99999999", "%-1", 2**31),
            *(2**63 - 1, 2**63, -(2**63), 10**400, 3.0, [0] * 1000, [None], {"": 0}, [1, [2, [3]]]),
            *(_Raw("NaN"), _Raw("Infinity"), _Raw("-Infinity"), _Raw("1e999"), _Raw("1" * 5000), _Raw("-0")),
            *(
                "\x00",
                "\u202eevil",
                "\ud800",
                "bl\u043ecks.0",
                "\uff10",
                "\u0660",
                "\x1b[2J",
                "a\nb",
                "\ufeff",
                "x" * 10**5,
            ),
            *("../../etc/passwd", "/dev/zero", "blocks.*", "*" * 50, "a." * 5000 + "a", "blocks.0..blocks.99999999"),
            *("blocks.0..blocks." + "9" * 400, "delta(" * 50, "x@99999999999", "__class__", "__proto__"),
            *(code, f"{{{code}}}", f"\n{code}\n", f"x); {code}  #", {"str": code}, {"device": "cuda:999"}),
            *({"float": "nan"}, {"dtype": "float128"}, {"tensor": {}}, {"list": [{"list": []}] * 100}, deep),
        )
    )


class _Raw:
    """Text that goes into the document as it is, valid JSON or not."""

    def __init__(self, text: str) -> None:
        self.text = text


def _dumps(document: object) -> bytes:
    raw: list[str] = []

    def stand_in(value: object) -> str:
        assert isinstance(value, _Raw)
        raw.append(value.text)
        return f"@raw{len(raw) - 1}@"

    text = json.dumps(document, default=stand_in)
    for number, each in enumerate(raw):
        text = text.replace(f'"@raw{number}@"', each)
    return text.encode()


def _places(document: object, above: tuple[object, ...] = ()) -> list[tuple[object, ...]]:
    """Return the path of every value in the document, the whole included."""
    found = [above]
    if isinstance(document, (dict, list)):
        items = document.items() if isinstance(document, dict) else enumerate(document)
        for key, value in items:
            found += _places(value, (*above, key))
    return found


def _edited(document: object, place: tuple[object, ...], edit: Callable[[object], object]) -> object:
    if not place:
        return edit(document)
    first, *rest = place
    if isinstance(document, dict):
        return {key: _edited(v, tuple(rest), edit) if key == first else v for key, v in document.items()}
    assert isinstance(document, list)
    return [_edited(v, tuple(rest), edit) if i == first else v for i, v in enumerate(document)]


def _replace_value(draw: Draw, document: object, canary: Path) -> object:
    value = _odd_value(draw, canary)
    return _edited(document, draw.choice(_places(document)), lambda _: value)


def _nearly(draw: Draw, document: object, canary: Path) -> object:
    """Change a number or a text by little, so that the form is right and the content is not."""

    def shift(value: object) -> object:
        if isinstance(value, bool):
            return not value
        if isinstance(value, (int, float)):
            return value + draw.choice((-1, 1, 2, 100, 0.5))
        if isinstance(value, str):
            at = draw.randrange(len(value) + 1)
            return value[:at] + draw.choice(("0", ".", "*", "(", "@1", " ", "-")) + value[at:]
        return value

    leaves = [place for place in _places(document) if place]
    return _edited(document, draw.choice(leaves), shift) if leaves else document


def _drop(draw: Draw, document: object, canary: Path) -> object:
    inner = [place for place in _places(document) if place]
    if not inner:
        return {}
    *above, last = draw.choice(inner)

    def without(value: object) -> object:
        if isinstance(value, dict):
            return {key: item for key, item in value.items() if key != last}
        assert isinstance(value, list)
        return [item for i, item in enumerate(value) if i != last]

    return _edited(document, tuple(above), without)


def _add_key(draw: Draw, document: object, canary: Path) -> object:
    objects = [place for place in _places(document) if isinstance(_at(document, place), dict)]
    if not objects:
        return document
    key = draw.choice(("surprise", "", "__class__", "blocks.0", "format", "4", "\u202e", "\ud800", "a\nb"))
    value = _odd_value(draw, canary)
    return _edited(document, draw.choice(objects), lambda d: {**d, key: value})  # type: ignore[dict-item]


def _rename_key(draw: Draw, document: object, canary: Path) -> object:
    keys = [place for place in _places(document) if place and isinstance(place[-1], str)]
    if not keys:
        return document
    *above, last = draw.choice(keys)
    new = draw.choice(
        (str(last).upper(), f"{last} ", f" {last}", str(last)[::-1], f"{last}\x00", "\x1b[31m", "x" * 9999)
    )
    return _edited(document, tuple(above), lambda d: {new if k == last else k: v for k, v in d.items()})  # type: ignore[attr-defined]


def _multiply(draw: Draw, document: object, canary: Path) -> object:
    lists = [place for place in _places(document) if isinstance(_at(document, place), list)]
    place = draw.choice(lists or [()])
    # At most what the largest JSON document may have, and a bit.
    count = min(draw.choice((2, 100, 20_000)), 5 * 2**20 // len(_dumps(_at(document, place))))
    return _edited(document, place, lambda value: list(value if isinstance(value, list) else [value]) * count)


def _twice(draw: Draw, document: object, canary: Path) -> object:
    """One key twice in one object: readers disagree on which of them counts."""
    if not isinstance(document, dict) or not document:
        return document
    text = _dumps(document).decode()
    key = json.dumps(draw.choice(list(document)))
    return _Raw("{" + f"{key}: {draw.choice(('0', 'null', '[]', '{}'))}, " + text[1:])


def _at(document: object, place: tuple[object, ...]) -> object:
    for key in place:
        document = document[key]  # type: ignore[index]
    return document


_JSON: dict[str, JsonEdit] = {
    "odd value": _replace_value,
    "nearly": _nearly,
    "missing": _drop,
    "more": _add_key,
    "other name": _rename_key,
    "multiplied": _multiply,
    "twice": _twice,
}


def _json_bytes(edit: JsonEdit, canary: Path) -> Bytes:
    def change(draw: Draw, content: bytes) -> bytes:
        document = json.loads(content)
        for _ in range(draw.choice((1, 1, 3))):
            changed = edit(draw, document, canary)
            if isinstance(changed, _Raw):
                return changed.text.encode()
            document = changed
            if not isinstance(document, (dict, list)):
                break
        return _dumps(document)

    return change


def _large_json(draw: Draw, content: bytes) -> bytes:
    """Return a schedule with so many sites, evaluations or rules that only a bound keeps its reading short."""
    num_sites, num_evaluations = draw.choice(((1, 100_000), (1000, 1000), (9000, 20), (100_000, 3), (200, 5000)))
    sites = draw.choice(
        (
            [f"blocks.{i}.attn" for i in range(num_sites)],
            [f"blocks.{i}..blocks.{num_sites}" for i in range(min(num_sites, 2000))],
            [".".join(["a"] * (1 + i % 200)) + f".{i}" for i in range(min(num_sites, 5000))],
            [f"{'a.' * (i + 1)}a" for i in range(min(num_sites, 300))],
        )
    )
    row = [1, *draw.choices((0, 1), k=num_evaluations - 1)]
    ours = json.loads(CacheSchedule.all_compute(3, ["a"]).to_json())
    ours["sites"] = dict.fromkeys(sites, row)
    ours["num_evaluations"] = num_evaluations
    if draw.random() < 0.5:
        ours["cacheable"] = list(range(1, num_evaluations))
    rows = dict.fromkeys(("attn", *(f"attn-{i}" for i in range(len(sites)))), row)
    text = json.dumps(
        ours if b"format" in content else rows if draw.random() < 0.5 else {"step_cache_book": [0] * 10**5}
    )
    return text.encode()[: 8 * 2**20]


# Zip archives: .pt, .pth and .pt2.


def _records_of(content: bytes) -> Records:
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def _zipped(
    records: Mapping[str, bytes] | Sequence[tuple[str | zipfile.ZipInfo, bytes]], compression: int = zipfile.ZIP_STORED
) -> bytes:
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
    return _zipped({**records, name: draw.choice((b"", b"x", b"x" * 1000))})


def _with_link(draw: Draw, records: Records, canary: Path) -> bytes:
    """Make a record what would be unpacked as a symbolic link."""
    old = draw.choice(list(records))
    link = zipfile.ZipInfo(old)
    link.create_system, link.external_attr = 3, 0o120777 << 16
    return _zipped([(link if name == old else name, content) for name, content in records.items()])


def _with_twin(draw: Draw, records: Records, canary: Path) -> bytes:
    twin = draw.choice(list(records))
    changed = _flip_bits(draw, records[twin]) if records[twin] else b"x"
    return _zipped([*records.items(), (twin, changed)])


def _bomb(draw: Draw, records: Records, canary: Path) -> bytes:
    old = draw.choice(list(records))
    compression = draw.choice((zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA))
    return _zipped({**records, old: bytes(draw.choice((10**6, 3 * 10**7)))}, compression)


def _compressed(draw: Draw, records: Records, canary: Path) -> bytes:
    return _zipped(records, draw.choice((zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA)))


def _forged_directory(draw: Draw, records: Records, canary: Path) -> bytes:
    """Other sizes, offsets, flags or methods in an entry of the directory than in the record."""
    content = bytearray(_zipped(records))
    entries = [i for i in range(len(content)) if content.startswith(b"PK\1\2", i)]
    for entry in draw.sample(entries, k=draw.choice((1, len(entries)))):
        field, size = draw.choice(
            ((8, 2), (10, 2), (16, 4), (20, 4), (24, 4), (20, 8), (28, 2), (30, 2), (32, 2), (42, 4))
        )
        number = draw.choice((0, 1, 0xFFFF, 0xFFFFFFFE, 0xFFFFFFFF, 0x7FFFFFFF, len(content))) & (256**size - 1)
        content[entry + field : entry + field + size] = number.to_bytes(size, "little")
    return bytes(content)


def _forged_end(draw: Draw, records: Records, canary: Path) -> bytes:
    content = bytearray(_zipped(records))
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
    return _zipped({**records, **{f"{root}/data/{i}": b"" for i in range(draw.choice((1000, 12_000)))}})


def _lost(draw: Draw, records: Records, canary: Path) -> bytes:
    lost = draw.sample(list(records), k=draw.choice((1, 2, len(records))))
    return _zipped({name: content for name, content in records.items() if name not in lost})


def _emptied(draw: Draw, records: Records, canary: Path) -> bytes:
    return _zipped({**records, draw.choice(list(records)): b""})


def _around(draw: Draw, records: Records, canary: Path) -> bytes:
    content = _zipped(records)
    garbage = draw.randbytes(100)
    comment = content[:-2] + struct.pack("<H", 100) + garbage
    return draw.choice((garbage + content, content + garbage, comment, content + content, _zipped({"x/y": content})))


def _changed(draw: Draw, records: Records, canary: Path) -> bytes:
    """One record changed, and the checksum of the archive put right."""
    name = draw.choice([name for name in records if records[name]])
    mutation = draw.choice((_flip_bits, _truncate, _overwrite, _zero, _swap, _claim_much))
    return _zipped({**records, name: mutation(draw, records[name])})


def _executing(draw: Draw, records: Records, canary: Path) -> bytes:
    """Put a pickle that creates the canary, in place of any record or beside them."""
    root = next(iter(records)).split("/")[0]
    beside = (f"{root}/data.pkl", f"{root}/data/sample_inputs/model.pt", f"{root}/data/constants/custom_obj_0")
    name = draw.choice((*records, *beside))
    payload = _payload(draw, canary)
    if draw.random() < 0.5:
        payload = _zipped({"archive/data.pkl": payload, "archive/version": b"3\n"})
    return _zipped({**records, name: payload})


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


def _in_zip(edit: ZipEdit, canary: Path) -> Bytes:
    return lambda draw, content: edit(draw, _records_of(content), canary)


# Pickles.


class _Calls:
    """Pickles as a call of ``function`` with ``arguments``."""

    def __init__(self, function: Callable[..., object], *arguments: object) -> None:
        self.call = function, arguments

    def __reduce__(self) -> tuple[object, ...]:
        return self.call


def _payload(draw: Draw, canary: Path) -> bytes:
    """Return a pickle that would create the canary if it were loaded the ordinary way."""
    path = str(canary)
    code = f"import os; os.mkdir({path!r})"
    quoted = path.encode()
    return draw.choice(
        (
            pickle.dumps(_Calls(os.mkdir, path)),
            pickle.dumps(_Calls(os.system, f"mkdir {path}")),
            pickle.dumps(_Calls(exec, code)),
            pickle.dumps(_Calls(eval, f"__import__('os').mkdir({path!r})"), protocol=0),
            pickle.dumps({"routers": {"0.prob": _Calls(open, path, "w")}}, protocol=2),
            pickle.dumps(_Calls(getattr, _Calls(__import__, "os"), "mkdir")),
            pickle.dumps(argparse.Namespace(model=_Calls(os.mkdir, path)), protocol=2),
            b"cos\nmkdir\n(V" + quoted + b"\ntR.",
            b"(S'" + quoted + b"'\nios\nmkdir\n.",
            b"(cos\nmkdir\nS'" + quoted + b"'\no.",
            b"\x80\x04\x8c\x02os\x8c\x05mkdir\x93\x8c" + bytes([len(quoted) % 256]) + quoted + b"\x85R.",
            b"ctorch.serialization\nload\n(V" + quoted + b"\ntR.",
            b"ctorch.hub\nload_state_dict_from_url\n(V" + quoted + b"\ntR.",
            b"ctorch._dynamo\noptimize\n(tR.",
            b"cargparse\nNamespace\n(tR}(V__class__\ncos\nmkdir\nsb.",
            b"cargparse\nFileType\n(Vw\ntR(V" + quoted + b"\ntR.",
        )
    )


def _with_pickle(pickled: bytes, storages: int = 1) -> bytes:
    extra = {f"archive/data/{i}": bytes(64) for i in range(storages)}
    return _zipped({"archive/data.pkl": pickled, "archive/byteorder": b"little", **extra, "archive/version": b"3\n"})


def _odd_pickle(draw: Draw, content: bytes, canary: Path) -> bytes:
    """Return a pickle of odd structure: broken, deep, endless, or of things that are no tensors."""
    deep = b"\x80\x02" + b"]" * 30_000 + b"a" * 29_999 + b"."
    doubling = b"\x80\x02]q\x00" + b"".join(b"]q%c(h%ch%ce" % (i + 1, i, i) for i in range(100)) + b"."
    long = b"\x80\x02\x8b" + struct.pack("<i", 10**6) + b"\x01" * 10**6 + b"."
    pickled = _records_of(content)[_pickle_name(content)]
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
                    _flip_bits(draw, pickled),
                ),
                *(_overwrite(draw, pickled), _truncate(draw, pickled), _swap(draw, pickled), _payload(draw, canary)),
            )
        )
    )


def _pickle_name(content: bytes) -> str:
    return next(name for name in _records_of(content) if name.endswith("data.pkl"))


def _odd_tensors(draw: Draw, content: bytes, canary: Path) -> bytes:
    """Router logits of other forms, numbers, names and counts."""
    num_rows, num_entries = draw.choice(((4, 6), (1, 6), (3, 6), (4, 5), (0, 6), (10_000, 1), (2, 100_001), (50, 4000)))
    rows: dict[object, object] = dict(_logits(num_rows, num_entries).items())
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
    return _torch_save({"routers": rows, "args": arguments} if draw.random() < 0.7 else rows)


def _odd_state(draw: Draw, content: bytes, canary: Path) -> bytes:
    shared = torch.zeros(1).expand(100_000)
    return _torch_save(
        draw.choice(
            (
                # 40 GB of logits, all of them in 4 bytes of the file.
                {"routers": {f"{row}.prob": shared for row in range(draw.choice((1000, 10_000)))}},
                {f"{row}.prob": shared[:2002] for row in range(1000)},
                {"routers": None},
                {"routers": [torch.zeros(6)] * 4},
                {"routers": torch.zeros(4, 6)},
                {"routers": {}},
                {"routers": {"routers": _logits(4, 6)}},
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
    "executing": lambda draw, content, canary: _with_pickle(_payload(draw, canary)),
    "only a pickle": lambda draw, content, canary: _payload(draw, canary),
}


def _pickled(make: Callable[[Draw, bytes, Path], bytes], canary: Path) -> Bytes:
    return lambda draw, content: make(draw, content, canary)


# Saved samplers whose checksums are put right after the change.


def _with_hashes(records: Records) -> bytes:
    manifest = json.loads(records[_MANIFEST])
    if isinstance(manifest, dict):
        hashes = {"graph": _sha256(records[_GRAPH]), "schedule": _sha256(records[_SCHEDULE])}
        records[_MANIFEST] = json.dumps({**manifest, "sha256": hashes}).encode()
    return _zipped(records)


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def _in_record(name: str, edit: JsonEdit, canary: Path) -> Bytes:
    def change(draw: Draw, content: bytes) -> bytes:
        records = _records_of(content)
        records[name] = _json_bytes(edit, canary)(draw, records[name])
        return _zipped(records) if name == _MANIFEST else _with_hashes(records)

    return change


def _in_graph_line(edit: JsonEdit, canary: Path) -> Bytes:
    def change(draw: Draw, lines: list[bytes], canary: Path) -> list[bytes]:
        at = draw.randrange(len(lines))
        changed = _json_bytes(edit, canary)(draw, lines[at])
        return [*lines[:at], changed + b"\n", *lines[at + 1 :]]

    return _in_graph(change, canary)


LinesEdit = Callable[[Draw, list[bytes], Path], list[bytes]]


def _in_graph(edit: LinesEdit, canary: Path) -> Bytes:
    def change(draw: Draw, content: bytes) -> bytes:
        records = _records_of(content)
        records[_GRAPH] = b"".join(edit(draw, records[_GRAPH].splitlines(keepends=True), canary))
        return _with_hashes(records)

    return change


_HOSTILE_OPERATORS = (
    *("aten::from_file", "aten::save", "aten::item", "aten::_local_scalar_dense", "aten::set_", "aten::add_.Tensor"),
    *("aten::resize_", "aten::manual_seed", "aten::__class__", "aten::_print", "aten::nonzero", "aten::unique_dim"),
    *("higher_order::invoke_subgraph", "prim::print", "os::system", "builtins::eval", "l2c::site", "l2c::cache_read"),
    *("prims::device_put", "aten::empty_strided", "aten::as_strided", "aten::record_stream", "aten::pin_memory"),
    *("aten::zeros", "aten::rand", "aten::repeat", "aten::expand", "aten::unbind.int", "aten::chunk", "aten::neg"),
    *("aten::matmul", "aten::index.Tensor", "aten::embedding", "aten::tensor_split.sections", "getitem", "aten::pad"),
)


def _hostile_line(draw: Draw, lines: list[bytes], canary: Path) -> list[bytes]:
    argument = draw.choice(
        ("%0", "%1", 0, 2**40, [2**40], [2**31, 2**31], [], ["%0"] * 5000, {"str": str(canary)}, [-1], 0.5)
    )
    arguments = [draw.choice(("%0", argument)), argument, argument][: draw.randrange(4)]
    line: dict[str, object] = {"op": draw.choice(_HOSTILE_OPERATORS), "args": arguments}
    if draw.random() < 0.3:
        line["kwargs"] = {draw.choice(("dim", "dtype", "out", "x); import os #")): argument}
    output = json.loads(lines[-1])
    # Used, so that it is more than a dead node.
    output["output"] = [f"%{len(lines) - 1}"]
    return [*lines[:-1], json.dumps(line).encode() + b"\n", json.dumps(output).encode() + b"\n"]


def _shuffled(draw: Draw, lines: list[bytes], canary: Path) -> list[bytes]:
    a, b = draw.randrange(len(lines)), draw.randrange(len(lines))
    lines[a], lines[b] = lines[b], lines[a]
    return draw.choice(
        (lines, lines[::-1], lines[:a] + lines[a + 1 :], lines + lines[:1], [*lines[:a], lines[a], *lines[a:]])
    )


def _long_graph(draw: Draw, lines: list[bytes], canary: Path) -> list[bytes]:
    """Return a graph of thousands of lines: alike or all different, dead, in a chain, or all feeding the last."""
    first, count = len(lines) - 1, draw.choice((1000, 5000, 10_000))
    chain = [b'{"op":"aten::neg","args":["%%%d"]}\n' % (0 if i == 0 else first + i - 1) for i in range(count)]
    more = draw.choice(
        (
            [b'{"op":"aten::neg","args":["%0"]}\n'] * count,
            chain,
            [b'{"op":"aten::add.Scalar","args":["%%0",%d]}\n' % i for i in range(count)],
            [b'{"op":"aten::zeros","args":[[%d]]}\n' % i for i in range(count)],
            [b'{"op":"aten::zeros","args":[[%d]]}\n' % i for i in range(count - 1)]
            + [b'{"op":"aten::cat","args":[[%s]]}\n' % b",".join(b'"%%%d"' % (first + i) for i in range(count - 1))],
            [b'{"input":0}\n'] * count,
            [lines[0]] * count,
            [lines[draw.randrange(first)]] * count,
        )
    )
    output = lines[-1] if draw.random() < 0.5 else b'{"output":["%%%d"]}\n' % (first + len(more) - 1)
    return [*lines[:-1], *more, output]


def _not_lines(draw: Draw, lines: list[bytes], canary: Path) -> list[bytes]:
    return draw.choice(
        (
            [],
            [b"\n"],
            [b"".join(lines).replace(b"\n", b" ")],
            [line.replace(b"\n", b"\r\n") for line in lines],
            [b"[" * 100_000],
            [b'{"input":' + b"0" * 4_000_000 + b"}\n"],
            [b"{}\n"] * 20_000,
            [b" " * 1000 + b"\n"] * 1000,
            [*lines[:-1], b"\x00\n"],
            [b"\xef\xbb\xbf", *lines],
        )
    )


_LINES: dict[str, LinesEdit] = {
    "hostile line": _hostile_line,
    "shuffled": _shuffled,
    "long graph": _long_graph,
    "not lines": _not_lines,
}


def _other_weights(draw: Draw, content: bytes) -> bytes:
    """Weights that are not finite, of another length, or others, with or without a checksum that says so."""
    records = _records_of(content)
    name = draw.choice([name for name in records if "/weight_" in name or "/tensor_" in name])
    old = records[name]
    new = draw.choice(
        (b"\x00\x00\xc0\x7f" * (len(old) // 4), b"\x00\x00\x80\x7f" * (len(old) // 4), old[:-4], old * 2, b"")
    )
    records[name] = new
    if draw.random() < 0.5:
        records[_GRAPH] = records[_GRAPH].replace(_sha256(old).encode(), _sha256(new).encode())
    return _with_hashes(records)


# Routers of ours: safetensors.


def _split_header(content: bytes) -> tuple[dict[str, object], bytes]:
    length = int.from_bytes(content[:8], "little")
    return json.loads(content[8 : 8 + length]), content[8 + length :]


def _joined(header: bytes, data: bytes) -> bytes:
    return struct.pack("<Q", len(header)) + header + data


def _in_header(edit: JsonEdit, canary: Path) -> Bytes:
    def change(draw: Draw, content: bytes) -> bytes:
        header, data = _split_header(content)
        return _joined(_json_bytes(edit, canary)(draw, json.dumps(header).encode()), data)

    return change


def _in_metadata(edit: JsonEdit, canary: Path) -> Bytes:
    def change(draw: Draw, content: bytes) -> bytes:
        header, data = _split_header(content)
        metadata = header["__metadata__"]
        assert isinstance(metadata, dict)
        changed = _json_bytes(edit, canary)(draw, metadata["l2c_compile"].encode())
        header["__metadata__"] = {"l2c_compile": changed.decode()}
        return _joined(json.dumps(header).encode(), data)

    return change


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
