"""Tensors with one JSON document beside them, as safetensors files that may come from strangers."""

from __future__ import annotations

import json
import os
from collections.abc import Collection, Mapping

import safetensors.torch
from torch import Tensor

from l2c_compile.errors import FileFormatError
from l2c_compile.files.documents import MAX_JSON_BYTES, open_regular, parse_json, write_atomically

_KEY = "l2c_compile"
# A document of the largest size, as text inside the text of the header.
_MAX_HEADER_BYTES = 2 * MAX_JSON_BYTES


def write_tensors(
    path: str | os.PathLike[str], document: Mapping[str, object], tensors: Mapping[str, Tensor], *, key: str = _KEY
) -> None:
    """Write a safetensors file with a JSON document in its metadata, atomically.

    Args:
        path: the file.
        document: the document, which has a JSON form.
        tensors: the tensors by name, contiguous, no two of them in the same memory.
        key: the name of the document in the metadata.

    Raises:
        OSError: if the folder cannot be written to.
    """
    write_atomically(path, safetensors.torch.save(dict(tensors), {key: json.dumps(document, allow_nan=False)}))


def read_tensors(
    path: str | os.PathLike[str],
    what: str,
    *,
    names: Collection[str] | None = None,
    key: str = _KEY,
    max_bytes: int = 2**30,
) -> tuple[dict[str, object], dict[str, Tensor]]:
    """Return the document and the tensors of a file written by ``write_tensors``; the tensors are on the CPU.

    Args:
        path: the file.
        what: the kind of file, for messages.
        names: the tensors that the file must have, neither more nor fewer; None takes any.
        key: the name of the document in the metadata.
        max_bytes: the largest file to read.

    Raises:
        FileFormatError: if the file is no such file, or larger.
        OSError: if the file cannot be read.
    """
    with open_regular(path) as file:
        size_bytes = os.fstat(file.fileno()).st_size
        if size_bytes > max_bytes:
            raise FileFormatError(f"a {what} file wants at most {max_bytes} bytes, got {size_bytes}")
        header_bytes = int.from_bytes(file.read(8), "little")
        if header_bytes > min(size_bytes - 8, _MAX_HEADER_BYTES):
            raise FileFormatError(f"not a safetensors file: {size_bytes} bytes do not hold the header that they claim")
        header = file.read(header_bytes)
        file.seek(0)
        content = file.read()
    try:
        # The header is parsed within bounds first: the memory that safetensors takes grows with what it claims.
        found = parse_json(header, max_bytes=_MAX_HEADER_BYTES).get("__metadata__")
        tensors = safetensors.torch.load(content)
    # All but the first two are raised for dtypes and shapes that torch does not have.
    except (FileFormatError, safetensors.SafetensorError, KeyError, RuntimeError, TypeError, AssertionError) as error:
        raise FileFormatError(f"not a safetensors file: {error}") from error
    metadata: dict[str, str] = found if isinstance(found, dict) else {}
    if key not in metadata or (names is not None and tensors.keys() != set(names)):
        wanted = "" if names is None else f"the tensors {', '.join(names)} and "
        raise FileFormatError(
            f"a {what} file wants {wanted}metadata {key!r}, got tensors {sorted(tensors)[:6]} and metadata "
            f"{sorted(metadata)[:5]}"
        )
    return parse_json(metadata[key]), tensors
