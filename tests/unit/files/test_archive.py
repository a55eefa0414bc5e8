"""Archives from strangers: what is read, and what is refused before anything is allocated for it."""

from __future__ import annotations

import hashlib
import struct
import zipfile
from pathlib import Path

import pytest

from l2c_compile.errors import FileFormatError
from l2c_compile.files.archive import Archive


def zipped(path: Path, records: dict[str, bytes], compression: int = zipfile.ZIP_STORED) -> Path:
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, content in records.items():
            archive.writestr(name, content)
    return path


def test_records_are_read_without_their_folder(tmp_path: Path) -> None:
    content = bytes(range(256)) * 9
    with Archive(zipped(tmp_path / "a", {"root/data/x": content, "root/version": b"3"})) as archive:
        assert archive.names == {"data/x", "version"}
        assert archive.root == "root"
        assert archive.size_bytes("data/x") == len(content)
        assert archive.read("data/x", max_bytes=len(content)) == content
        assert archive.sha256("data/x") == hashlib.sha256(content).hexdigest()
        target = bytearray(len(content))
        assert archive.read_into("data/x", memoryview(target)) == hashlib.sha256(content).hexdigest()
        assert target == content
        with pytest.raises(FileFormatError, match=f"data/x wants at most 5 bytes, has {len(content)}"):
            archive.read("data/x", max_bytes=5)
        with pytest.raises(FileFormatError, match="no record 'y'"):
            archive.read("y", max_bytes=5)


@pytest.mark.parametrize(
    ("records", "message"),
    [
        ({"archive/../../evil": b"x"}, "odd name"),
        ({"/etc/x": b"x"}, "odd name"),
        ({"x": b"x"}, "odd name"),
        ({"a/x": b"x", "b/x": b"x"}, "two records"),
        ({"a/x": b"x", "b/y": b"x"}, "in one folder"),
    ],
)
def test_records_of_odd_places_are_refused_and_nothing_is_unpacked(
    records: dict[str, bytes], message: str, tmp_path: Path
) -> None:
    path = zipped(tmp_path / "a.pt2", records)
    with pytest.raises(FileFormatError, match=message):
        Archive(path)
    assert [each.name for each in tmp_path.iterdir()] == ["a.pt2"]


def test_compressed_records_are_refused(tmp_path: Path) -> None:
    with pytest.raises(FileFormatError, match="is compressed"):
        Archive(zipped(tmp_path / "a", {"root/x": bytes(10_000)}, zipfile.ZIP_DEFLATED))


def test_a_damaged_record_is_refused_when_it_is_read(tmp_path: Path) -> None:
    path = zipped(tmp_path / "a", {"root/x": b"content"})
    path.write_bytes(path.read_bytes().replace(b"content", b"CONTENT"))
    with Archive(path) as archive, pytest.raises(FileFormatError, match="damaged"):
        archive.read("x", max_bytes=100)


def test_a_directory_before_the_beginning_of_the_file_is_refused(tmp_path: Path) -> None:
    end = struct.pack("<4s4H2LH", b"PK\5\6", 0, 0, 1, 1, 1000, 0, 0)
    (tmp_path / "a").write_bytes(b"PK\3\4" + bytes(96) + end)
    with pytest.raises(FileFormatError, match="damaged"):
        Archive(tmp_path / "a")


def test_what_is_no_archive_is_refused_and_closed(tmp_path: Path) -> None:
    for content, message in (
        (b"short", "of 5 bytes"),
        (bytes(100), "not a zip archive"),
        (b"PK\3\4" * 30, "not a zip"),
    ):
        (tmp_path / "a").write_bytes(content)
        with pytest.raises(FileFormatError, match=message):
            Archive(tmp_path / "a")
