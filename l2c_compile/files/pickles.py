"""Pickles from strangers, read without running anything in them and within bounds."""

from __future__ import annotations

import argparse
import errno
import os
import pickle
import re
import struct
import zipfile
from collections.abc import Mapping

import torch

from l2c_compile.errors import FileFormatError
from l2c_compile.files.documents import open_regular

_MAX_PICKLE_BYTES = 64 * 2**20
_MAX_PICKLE_ENTRIES = 10_000


def load_pickle(path: str | os.PathLike[str]) -> Mapping[str, object]:
    """Read a pickle without running anything in it, within bounds of memory."""
    _check_archive(path)
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):
            # mmap: a storage can then never be larger than the file, whatever the pickle claims.
            content = torch.load(os.fspath(path), map_location="cpu", weights_only=True, mmap=True)
    except OSError:
        raise
    except pickle.UnpicklingError as error:
        forbidden = re.search(r"GLOBAL (\S+)", str(error))
        if forbidden is None:
            raise FileFormatError(f"not a pickle of plain tensors: {str(error)[:200]}") from error
        raise FileFormatError(
            f"the pickle wants to import {forbidden[1]}, which could run code and was refused; nothing of it was run"
        ) from error
    except Exception as error:  # A hostile pickle can make the unpickler fail in any way; each way means the same.
        raise FileFormatError(f"not a pickle of plain tensors: {type(error).__name__}: {str(error)[:200]}") from error
    if not isinstance(content, Mapping):
        raise FileFormatError(f"a router pickle wants a dict, got {type(content).__name__}")
    return content


def _check_archive(path: str | os.PathLike[str]) -> None:
    with open_regular(path) as file:
        size_bytes = os.fstat(file.fileno()).st_size
        if size_bytes > _MAX_PICKLE_BYTES:
            raise FileFormatError(f"a router pickle wants at most {_MAX_PICKLE_BYTES} bytes, got {size_bytes}")
        try:
            entries = zipfile.ZipFile(file).infolist()
        except (zipfile.BadZipFile, NotImplementedError, ValueError, EOFError, struct.error, OSError) as error:
            # zipfile gets EINVAL where it seeks to a forged offset; other numbers mean that the disk failed.
            if isinstance(error, OSError) and error.errno not in (None, errno.EINVAL):
                raise
            raise FileFormatError(
                f"not a file of torch.save: {error}. Files from before torch 1.6 must be saved again by their owner"
            ) from error
    if len(entries) > _MAX_PICKLE_ENTRIES or sum(entry.file_size for entry in entries) > _MAX_PICKLE_BYTES:
        raise FileFormatError(
            f"a router pickle wants at most {_MAX_PICKLE_ENTRIES} entries of {_MAX_PICKLE_BYTES} bytes in all, claims "
            f"{len(entries)} of {sum(entry.file_size for entry in entries)}"
        )
    if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):
        raise FileFormatError("a router pickle wants uncompressed entries, as torch.save writes them")
