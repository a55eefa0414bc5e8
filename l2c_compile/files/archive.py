"""Zip archives that may come from strangers: uncompressed, bounded, nothing hidden.

An archive is checked from its last bytes on, before anything is allocated for what it claims: no compression (so no zip
bomb), no encryption, no name twice, no records that overlap or reach beyond the file. What is read is as large as the
file at most.
"""

from __future__ import annotations

import errno
import hashlib
import os
import re
import struct
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import BinaryIO

from l2c_compile.errors import FileFormatError
from l2c_compile.files.documents import open_regular

_MAX_DIRECTORY_BYTES = 8 * 2**20
_CHUNK_BYTES = 2**20
_NAME = re.compile(r"[A-Za-z0-9_.\-]+(/[A-Za-z0-9_.\-]+)+", re.ASCII)

# End of central directory: signature, disks, entries, size and offset of the directory, length of the comment.
_END = struct.Struct("<4s4H2LH")
_END64_LOCATOR = struct.Struct("<4sLQL")
_END64 = struct.Struct("<4sQ2H2L4Q")


class Archive:
    """An open archive. The names of its records leave out the folder that all records of a ``.pt2`` are in.

    Raises:
        FileFormatError: if the file is no regular file, or not a zip archive of the plain kind.
        OSError: if the file cannot be read.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self._file: BinaryIO = open_regular(path)
        try:
            with _as_format_errors():
                size_bytes = self._file.seek(0, os.SEEK_END)
                _check_directory_size(self._file, size_bytes)
                self._zip = zipfile.ZipFile(self._file)
                self.root, self._records = _checked_records(self._zip.infolist(), size_bytes)
        except BaseException:
            self._file.close()
            raise

    def __enter__(self) -> Archive:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._file.close()

    @property
    def names(self) -> frozenset[str]:
        """The names of the records."""
        return frozenset(self._records)

    def size_bytes(self, name: str) -> int:
        """Return the size of a record.

        Raises:
            FileFormatError: if there is no such record.
        """
        return self._record(name).file_size

    def read(self, name: str, *, max_bytes: int) -> bytes:
        """Return the content of a record.

        Raises:
            FileFormatError: if the record is missing, damaged or larger than ``max_bytes``.
        """
        if self.size_bytes(name) > max_bytes:
            raise FileFormatError(f"{name} wants at most {max_bytes} bytes, has {self.size_bytes(name)}")
        content = bytearray(self.size_bytes(name))
        self.read_into(name, memoryview(content))
        return bytes(content)

    def read_into(self, name: str, target: memoryview) -> str:
        """Fill ``target``, which has the size of the record, and return the sha256 of the content.

        Raises:
            FileFormatError: if the record is missing or damaged.
        """
        digest = hashlib.sha256()
        done = 0
        with _as_format_errors(), self._zip.open(self._record(name)) as record:
            while chunk := record.read(_CHUNK_BYTES):
                target[done : done + len(chunk)] = chunk
                digest.update(chunk)
                done += len(chunk)
        if done != len(target):
            raise FileFormatError(f"{name} wants {len(target)} bytes, has {done}")
        return digest.hexdigest()

    def sha256(self, name: str) -> str:
        """Return the sha256 of a record.

        Raises:
            FileFormatError: if the record is missing or damaged.
        """
        digest = hashlib.sha256()
        with _as_format_errors(), self._zip.open(self._record(name)) as record:
            while chunk := record.read(_CHUNK_BYTES):
                digest.update(chunk)
        return digest.hexdigest()

    def _record(self, name: str) -> zipfile.ZipInfo:
        if name not in self._records:
            raise FileFormatError(f"the archive has no record {name!r:.80}")
        return self._records[name]


def _check_directory_size(file: BinaryIO, size_bytes: int) -> None:
    """Bound what ``zipfile`` reads and allocates for the directory of the archive."""
    ends = _tail(file, size_bytes, _END64.size + _END64_LOCATOR.size + _END.size)
    if len(ends) < _END.size:
        raise FileFormatError(f"a saved sampler is a zip archive, this is a file of {size_bytes} bytes")
    signature, _, _, _, _, directory_bytes, _, comment_bytes = _END.unpack(ends[-_END.size :])
    if signature != b"PK\5\6" or comment_bytes:
        raise FileFormatError("not a zip archive, truncated, or followed by other data")
    locator = ends[-_END.size - _END64_LOCATOR.size : -_END.size]
    if locator.startswith(b"PK\6\7"):
        end64_at = size_bytes - _END64.size - _END64_LOCATOR.size - _END.size
        # Readers disagree on where to look for the 64-bit record; here it stands where both look.
        if end64_at < 0 or _END64_LOCATOR.unpack(locator)[2] != end64_at:
            raise FileFormatError("the zip archive is damaged: its directory ends in an odd place")
        directory_bytes = _END64.unpack(ends[: _END64.size])[8]
    if directory_bytes > _MAX_DIRECTORY_BYTES:
        raise FileFormatError(
            f"the directory of the zip archive wants at most {_MAX_DIRECTORY_BYTES} bytes, has {directory_bytes}"
        )


def _tail(file: BinaryIO, size_bytes: int, num_bytes: int) -> bytes:
    file.seek(max(0, size_bytes - num_bytes))
    return file.read(num_bytes)


def _checked_records(infos: list[zipfile.ZipInfo], size_bytes: int) -> tuple[str, dict[str, zipfile.ZipInfo]]:
    records: dict[str, zipfile.ZipInfo] = {}
    roots: set[str] = set()
    total_bytes = 0
    for info in infos:
        if not _NAME.fullmatch(info.filename) or ".." in info.filename:
            raise FileFormatError(f"the archive has a record of an odd name, {info.filename!r:.80}")
        root, _, name = info.filename.partition("/")
        roots.add(root)
        if name in records:
            raise FileFormatError(f"the archive has two records {name!r:.80}")
        if info.compress_type != zipfile.ZIP_STORED or info.compress_size != info.file_size:
            raise FileFormatError(f"record {name!r:.80} is compressed; a saved sampler is not")
        if info.flag_bits & 1:
            raise FileFormatError(f"record {name!r:.80} is encrypted")
        total_bytes += info.file_size
        if info.header_offset + info.file_size > size_bytes or total_bytes > size_bytes:
            raise FileFormatError(f"record {name!r:.80} claims more bytes than the file has")
        records[name] = info
    if len(roots) != 1:
        raise FileFormatError("the records of a .pt2 archive are in one folder, these are not")
    return roots.pop(), records


@contextmanager
def _as_format_errors() -> Iterator[None]:
    try:
        yield
    except FileFormatError:
        raise
    except OSError as error:
        # zipfile gets EINVAL where a forged offset lies before the beginning of the file; other numbers mean that the
        # disk failed.
        if error.errno != errno.EINVAL:
            raise
        raise FileFormatError("the zip archive is damaged: it names a place that the file does not have") from error
    except (zipfile.BadZipFile, struct.error, RuntimeError, ValueError, EOFError, OverflowError) as error:
        raise FileFormatError(f"the zip archive is damaged: {error}") from error
