"""Safetensors files with one JSON document: what comes back, what is refused, and when."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import pytest
import safetensors.torch
import torch

from l2c_compile.errors import FileFormatError
from l2c_compile.files.tensors import read_tensors, write_tensors

DOCUMENT = {"name": "a", "list": [1, {"deep": None}], "text": 'quoted "twice"'}
TENSORS = {"x": torch.arange(6.0).reshape(2, 3), "one": torch.tensor(2.5, dtype=torch.float64)}


def with_header(header: object, data: bytes = b"") -> bytes:
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def test_document_and_tensors_come_back(tmp_path: Path) -> None:
    path = tmp_path / "f"
    write_tensors(path, DOCUMENT, TENSORS)
    document, tensors = read_tensors(path, "thing", names=("x", "one"))
    assert document == DOCUMENT
    assert tensors.keys() == TENSORS.keys()
    for name, tensor in tensors.items():
        assert torch.equal(tensor, TENSORS[name])
        assert tensor.dtype == TENSORS[name].dtype
    assert [each.name for each in tmp_path.iterdir()] == ["f"]


def test_what_was_read_does_not_change_with_the_file(tmp_path: Path) -> None:
    path = tmp_path / "f"
    write_tensors(path, DOCUMENT, TENSORS)
    _, tensors = read_tensors(path, "thing")
    path.write_bytes(bytes(path.stat().st_size))
    assert torch.equal(tensors["x"], TENSORS["x"])


def test_a_document_may_have_a_name_of_its_own(tmp_path: Path) -> None:
    path = tmp_path / "f"
    write_tensors(path, DOCUMENT, {}, key="other")
    assert read_tensors(path, "thing", key="other") == (DOCUMENT, {})
    with pytest.raises(FileFormatError, match=r"a thing file wants metadata 'l2c_compile', got .*\['other'\]"):
        read_tensors(path, "thing")


def test_what_has_no_json_form_is_not_written(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="JSON"):
        write_tensors(tmp_path / "f", {"number": float("inf")}, TENSORS)
    assert list(tmp_path.iterdir()) == []


EMPTY = {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}
METADATA = {"l2c_compile": "{}"}
REFUSED: dict[str, bytes] = {
    "nothing": b"",
    "seven bytes": b"\0" * 7,
    "no header": b"\0" * 8,
    "header beyond the file": struct.pack("<Q", 100) + b"{}",
    "header beyond all bounds": struct.pack("<Q", 2**63) + b"{}",
    "header of another encoding": struct.pack("<Q", 4) + "{}".encode("utf-16-le"),
    "header that is a list": with_header([]),
    "header with one key twice": struct.pack("<Q", 14) + b'{"a":{},"a":1}',
    "header of many tensors": with_header({"__metadata__": METADATA, **{str(i): EMPTY for i in range(10**5)}}),
    "unknown dtype": with_header({"x": {**EMPTY, "dtype": "F7"}}),
    "sizes beyond all bounds": with_header({"x": {**EMPTY, "shape": [0, 2**63]}}),
    "tensor beyond the file": with_header({"x": {"dtype": "F32", "shape": [9], "data_offsets": [0, 36]}}, bytes(8)),
    "data of no tensor": with_header({"x": EMPTY}, bytes(8)),
    "metadata that is no text": with_header({"__metadata__": {"l2c_compile": {}}}),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_no_safetensors_file_is_refused(name: str, tmp_path: Path) -> None:
    path = tmp_path / "f"
    path.write_bytes(REFUSED[name])
    with pytest.raises(FileFormatError, match="not a safetensors file"):
        read_tensors(path, "thing")


@pytest.mark.parametrize("metadata", [None, {}, {"other": "{}"}])
def test_a_file_without_the_document_is_refused(metadata: dict[str, str] | None, tmp_path: Path) -> None:
    path = tmp_path / "f"
    path.write_bytes(with_header({"__metadata__": metadata, "x": EMPTY}))
    with pytest.raises(FileFormatError, match="a thing file wants metadata 'l2c_compile', got tensors"):
        read_tensors(path, "thing")


@pytest.mark.parametrize("names", [(), ("x",), ("x", "one", "two"), ("y", "one")])
def test_other_tensors_than_those_wanted_are_refused(names: tuple[str, ...], tmp_path: Path) -> None:
    path = tmp_path / "f"
    write_tensors(path, DOCUMENT, TENSORS)
    with pytest.raises(FileFormatError, match=r"wants the tensors .*got tensors \['one', 'x'\]"):
        read_tensors(path, "thing", names=names)


def test_a_document_is_read_as_strictly_as_any(tmp_path: Path) -> None:
    path = tmp_path / "f"
    path.write_bytes(safetensors.torch.save({"x": torch.ones(2)}, {"l2c_compile": '{"a": NaN}'}))
    with pytest.raises(FileFormatError, match="finite"):
        read_tensors(path, "thing")


def test_a_file_beyond_the_bound_is_refused_unread(tmp_path: Path) -> None:
    path = tmp_path / "f"
    write_tensors(path, DOCUMENT, TENSORS)
    size_bytes = path.stat().st_size
    read_tensors(path, "thing", max_bytes=size_bytes)
    with pytest.raises(FileFormatError, match=f"a thing file wants at most {size_bytes - 1} bytes, got {size_bytes}"):
        read_tensors(path, "thing", max_bytes=size_bytes - 1)
