"""Saved samplers whose checksums are put right after the change."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path

from bench.trust.mutate.json_text import edits
from bench.trust.mutate.raw import Bytes, Draw
from bench.trust.mutate.zips import Records, records_of, zipped

_OURS = "archive/data/extra/l2c_compile/"
_MANIFEST, _GRAPH, _SCHEDULE = (_OURS + name for name in ("manifest.json", "graph.jsonl", "schedule.json"))


def _with_hashes(records: Records) -> bytes:
    manifest = json.loads(records[_MANIFEST])
    if isinstance(manifest, dict):
        hashes = {"graph": _sha256(records[_GRAPH]), "schedule": _sha256(records[_SCHEDULE])}
        records[_MANIFEST] = json.dumps({**manifest, "sha256": hashes}).encode()
    return zipped(records)


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


_LinesEdit = Callable[[Draw, list[bytes], Path], list[bytes]]


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


_LINES: dict[str, _LinesEdit] = {
    "hostile line": _hostile_line,
    "shuffled": _shuffled,
    "long graph": _long_graph,
    "not lines": _not_lines,
}


def _other_weights(draw: Draw, content: bytes) -> bytes:
    """Return weights that are not finite, of another length, or others, with or without a checksum that fits."""
    records = records_of(content)
    name = draw.choice([name for name in records if "/weight_" in name or "/tensor_" in name])
    old = records[name]
    new = draw.choice(
        (b"\x00\x00\xc0\x7f" * (len(old) // 4), b"\x00\x00\x80\x7f" * (len(old) // 4), old[:-4], old * 2, b"")
    )
    records[name] = new
    if draw.random() < 0.5:
        records[_GRAPH] = records[_GRAPH].replace(_sha256(old).encode(), _sha256(new).encode())
    return _with_hashes(records)


def groups(canary: Path) -> dict[str, dict[str, Bytes]]:
    """Return the mutations of what is inside a saved sampler, by group."""
    of_json = edits(canary)
    return {
        "manifest": {name: _in_record(_MANIFEST, change) for name, change in of_json.items()},
        "schedule inside": {name: _in_record(_SCHEDULE, change) for name, change in of_json.items()},
        "graph line": {name: _in_graph(_one_line(change), canary) for name, change in of_json.items()},
        "graph": {name: _in_graph(edit, canary) for name, edit in _LINES.items()},
        "weights": {"weights": _other_weights},
    }


def _in_record(name: str, change: Bytes) -> Bytes:
    def changed(draw: Draw, content: bytes) -> bytes:
        records = records_of(content)
        records[name] = change(draw, records[name])
        return zipped(records) if name == _MANIFEST else _with_hashes(records)

    return changed


def _one_line(change: Bytes) -> _LinesEdit:
    def changed(draw: Draw, lines: list[bytes], canary: Path) -> list[bytes]:
        at = draw.randrange(len(lines))
        return [*lines[:at], change(draw, lines[at]) + b"\n", *lines[at + 1 :]]

    return changed


def _in_graph(edit: _LinesEdit, canary: Path) -> Bytes:
    def changed(draw: Draw, content: bytes) -> bytes:
        records = records_of(content)
        records[_GRAPH] = b"".join(edit(draw, records[_GRAPH].splitlines(keepends=True), canary))
        return _with_hashes(records)

    return changed
