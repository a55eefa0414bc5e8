"""Pickles from strangers: nothing in them runs, and they cost no more than their bytes."""

from __future__ import annotations

import io
import os
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from l2c_compile.errors import FileFormatError
from l2c_compile.files.pickles import load_pickle


def save(path: Path, content: object) -> Path:
    torch.save(content, path)
    return path


def repack(path: Path, change: Callable[[str, bytes], bytes], compression: int = zipfile.ZIP_STORED) -> Path:
    with zipfile.ZipFile(path) as archive:
        entries = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, data in entries.items():
            archive.writestr(name, change(name, data))
    return path


class Harm:
    """An object whose unpickling makes a folder."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[object, ...]:
        return os.mkdir, (str(self.marker),)


def test_plain_tensors_come_back(tmp_path: Path) -> None:
    content = load_pickle(save(tmp_path / "r.pt", {"0.prob": torch.arange(4.0)}))
    tensor = content["0.prob"]
    assert isinstance(tensor, torch.Tensor)
    assert tensor.tolist() == [0, 1, 2, 3]


def test_a_pickle_that_would_run_code_is_refused_and_does_not_run(tmp_path: Path) -> None:
    marker = tmp_path / "marker"
    path = save(tmp_path / "r.pt", {"a": Harm(marker)})
    torch.load(path, weights_only=False)
    assert marker.exists(), "the pickle of this test does no harm, so the test shows nothing"
    marker.rmdir()
    with pytest.raises(FileFormatError, match=rf"wants to import {os.name}\.mkdir"):
        load_pickle(path)
    assert not marker.exists()


def test_a_forbidden_global_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileFormatError, match=r"_?io\.StringIO"):
        load_pickle(save(tmp_path / "r.pt", {"a": io.StringIO}))


def test_a_storage_larger_than_its_data_is_refused(tmp_path: Path) -> None:
    path = save(tmp_path / "r.pt", {"0.prob": torch.zeros(4)})
    small, large = b"K\x04", b"J\x00\x00\x00\x40"
    repack(path, lambda name, data: data.replace(small, large) if name.endswith("data.pkl") else data)
    with pytest.raises(FileFormatError, match="not a pickle of plain tensors"):
        load_pickle(path)


def test_compressed_entries_and_bombs_are_refused(tmp_path: Path) -> None:
    path = save(tmp_path / "r.pt", {"a": torch.zeros(4)})
    repack(path, lambda _, data: data, zipfile.ZIP_DEFLATED)
    with pytest.raises(FileFormatError, match="uncompressed"):
        load_pickle(path)
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", b"\x00" * 2**27)
    with pytest.raises(FileFormatError, match="claims"):
        load_pickle(path)


def test_a_file_too_large_is_refused_before_it_is_read(tmp_path: Path) -> None:
    path = tmp_path / "r.pt"
    with path.open("wb") as file:
        file.write(b"PK\x03\x04")
        file.truncate(2**40)
    with pytest.raises(FileFormatError, match="wants at most 67108864 bytes, got 1099511627776"):
        load_pickle(path)


def test_content_that_is_no_dict_and_other_files_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "r.pt"
    for content in (3, [1, 2], torch.zeros(3)):
        with pytest.raises(FileFormatError, match="wants a dict"):
            load_pickle(save(path, content))
    torch.save({"a": 1}, path, _use_new_zipfile_serialization=False)
    with pytest.raises(FileFormatError, match=r"before torch 1\.6 must be saved again"):
        load_pickle(path)


def test_every_truncation_is_refused(tmp_path: Path) -> None:
    path = save(tmp_path / "r.pt", {"0.prob": torch.zeros(2)})
    data = path.read_bytes()
    for length in range(0, len(data), 37):
        path.write_bytes(data[:length])
        with pytest.raises(FileFormatError):
            load_pickle(path)
