"""Reading and writing of small JSON documents that may come from strangers: strict, bounded, atomic."""

from __future__ import annotations

import errno
import json
import math
import os
import stat
import tempfile
from collections.abc import Iterator, Mapping
from collections.abc import Set as AbstractSet
from contextlib import contextmanager
from pathlib import Path
from types import MappingProxyType
from typing import BinaryIO

from l2c_compile.errors import FileFormatError, L2CError

MAX_JSON_BYTES = 4 * 2**20
"""The largest JSON document read: 1000 evaluations x 1000 sites fit, and parsing it stays within a second."""

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_MAX_DEPTH = 32
# A list costs far more memory than the two bytes it takes in a file.
_MAX_CONTAINERS = 100_000


def open_regular(path: str | os.PathLike[str]) -> BinaryIO:
    """Open a file for reading. A pipe or a device, on which reading may wait without end, is refused.

    Raises:
        FileFormatError: if it is no regular file.
        OSError: if it cannot be opened.
    """
    file = open(path, "rb", opener=_open_without_waiting)  # noqa: SIM115 - returned open
    if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
        file.close()
        raise FileFormatError(f"{os.fspath(path)} is no regular file; copy what it gives into one")
    return file


def read_bytes(path: str | os.PathLike[str], *, max_bytes: int) -> bytes:
    """Return the content of a file of at most ``max_bytes``.

    Raises:
        FileFormatError: if the file is larger, or no regular file.
        OSError: if it cannot be read.
    """
    with open_regular(path) as file:
        data = file.read(max_bytes + 1)
    if len(data) > max_bytes:
        raise FileFormatError(f"{os.fspath(path)} wants at most {max_bytes} bytes to be read, has more")
    return data


def write_atomically(path: str | os.PathLike[str], data: bytes) -> None:
    """Write a file so that a reader sees the old content or the new one, never a part.

    Raises:
        OSError: if the folder cannot be written to.
    """
    with replaced_at_once(path) as temporary:
        temporary.write_bytes(data)


@contextmanager
def replaced_at_once(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield the path of a temporary file that takes the place of ``path`` when the context ends without an error.

    A link stays, and what it leads to is replaced.

    Raises:
        OSError: if the folder cannot be written to, the disk is full, or ``path`` is no regular file; it names the
            path, which is unchanged.
    """
    target = Path(os.path.realpath(path)) if os.path.islink(path) else Path(path)
    with _as_write_errors(target):
        if os.path.lexists(target) and not target.is_file():
            raise OSError(errno.EINVAL, "Not a regular file")
        # The suffix stays: torch reads it.
        descriptor, name = tempfile.mkstemp(prefix=f".{target.stem}.", suffix=target.suffix, dir=target.parent)
        os.close(descriptor)
        temporary = Path(name)
        try:
            yield temporary
            with temporary.open("rb+") as file:
                os.fsync(file.fileno())
            # mkstemp makes files for the owner alone; a saved schedule gets the mode that open() would have given it.
            os.chmod(temporary, 0o666 & ~_umask())
            os.replace(temporary, target)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise


@contextmanager
def _as_write_errors(target: Path) -> Iterator[None]:
    """Turn errors of the file system into errors that name the file to be written and what the user can do."""
    try:
        yield
    except OSError as error:
        way_out = "free some space or choose another folder" if error.errno in _FULL else "choose another folder"
        reason = error.strerror or str(error)
        text = f"{reason}: {target} cannot be written; {way_out}, what was there is unchanged"
        raise OSError(error.errno or errno.EIO, text, str(target)) from error


def parse_json(text: str | bytes, *, max_bytes: int = MAX_JSON_BYTES) -> dict[str, object]:
    """Parse a JSON object. NaN, infinities, duplicate keys, deep nesting and other top-level values are errors.

    Raises:
        FileFormatError: if ``text`` is not such a document, or longer than ``max_bytes``.
    """
    if len(text) > max_bytes:
        raise FileFormatError(f"JSON wants at most {max_bytes} bytes, got {len(text)}")
    opened = text.count("[") + text.count("{") if isinstance(text, str) else text.count(b"[") + text.count(b"{")
    if opened > _MAX_CONTAINERS:
        raise FileFormatError(f"JSON wants at most {_MAX_CONTAINERS} lists and objects, has more")
    try:
        document = json.loads(text, object_pairs_hook=_object, parse_constant=_refuse_constant, parse_float=_finite)
    except FileFormatError:
        raise
    except RecursionError:
        raise FileFormatError("JSON is nested too deeply") from None
    except ValueError as error:
        raise FileFormatError(f"not valid JSON: {error}") from error
    if not isinstance(document, dict):
        raise FileFormatError(f"JSON wants an object at the top, got {type(document).__name__}")
    return document


def check_header(
    document: Mapping[str, object],
    what: str,
    format_name: str | None,
    version: int,
    keys: AbstractSet[str],
    optional: AbstractSet[str] = frozenset(),
) -> None:
    """Check what every document of ours begins with: format, version, keys and the order of its evaluations.

    Args:
        document: the document as it was read.
        what: the kind of file, for messages.
        format_name: what the document must say under ``format``; None where the file says it in another place.
        version: the latest version that is read.
        keys: the keys that the document must have; with ``orientation`` its evaluations must be in execution order.
        optional: the keys that it may have as well.

    Raises:
        FileFormatError: if the document is of another kind, of a newer version, or damaged.
    """
    if format_name is not None and document.get("format") != format_name:
        raise FileFormatError(f"a {what} wants format {format_name!r}, got {document.get('format')!r:.80}")
    got = document.get("version")
    if type(got) is not int or got < 1:
        raise FileFormatError(f"a {what} wants a version number, got {got!r:.80}")
    if got > version:
        raise FileFormatError(
            f"the {what} is of version {got}, this l2c_compile reads up to {version}; update l2c_compile"
        )
    if missing := sorted(keys - document.keys()):
        raise FileFormatError(f"the {what} lacks {missing}")
    if unknown := sorted(document.keys() - keys - optional):
        raise FileFormatError(f"the {what} has unknown keys {unknown[:5]}")
    if document.get("orientation", "execution") != "execution":
        raise FileFormatError(f"orientation wants 'execution', got {document['orientation']!r:.80}")


@contextmanager
def honoured(what: str) -> Iterator[None]:
    """Turn errors about what a file describes into errors about the file, whose form was right.

    Args:
        what: what the file describes.

    Raises:
        FileFormatError: if another error of ours, or a ``TypeError``, is raised inside; it takes the error's place.
    """
    try:
        yield
    except FileFormatError:
        raise
    except (L2CError, TypeError) as error:
        raise FileFormatError(f"the file describes a {what} that cannot be honoured: {error}") from error


def frozen_json(value: Mapping[str, object], what: str) -> Mapping[str, object]:
    """Return a read-only copy of a JSON object: lists as tuples, objects as read-only mappings.

    Raises:
        FileFormatError: if something in it has no JSON form; the message starts with ``what``.
    """
    if not isinstance(value, Mapping):
        raise FileFormatError(f"{what} wants a JSON object, got {type(value).__name__}")
    frozen = _frozen(value, what, _MAX_DEPTH)
    assert isinstance(frozen, Mapping)
    return frozen


def plain_json(value: object) -> object:
    """Return what ``frozen_json`` made as dicts and lists, which ``json.dumps`` takes."""
    if isinstance(value, Mapping):
        return {key: plain_json(item) for key, item in value.items()}
    if isinstance(value, tuple):
        return [plain_json(item) for item in value]
    return value


def _open_without_waiting(path: str, flags: int) -> int:
    # Opening a pipe waits for somebody who writes into it.
    return os.open(path, flags | getattr(os, "O_NONBLOCK", 0))


def _frozen(value: object, what: str, depth: int) -> object:
    if depth == 0:
        raise FileFormatError(f"{what} is nested more than {_MAX_DEPTH} deep")
    if isinstance(value, Mapping):
        for key in value:
            if not isinstance(key, str):
                raise FileFormatError(f"{what} wants text as keys, got {key!r:.80}")
        return MappingProxyType({key: _frozen(item, what, depth - 1) for key, item in value.items()})
    if isinstance(value, (list, tuple)):
        return tuple(_frozen(item, what, depth - 1) for item in value)
    if isinstance(value, float) and not math.isfinite(value):
        raise FileFormatError(f"{what} wants finite numbers, got {value}")
    if value is None or isinstance(value, (str, bool, int, float)):
        return value
    raise FileFormatError(f"{what} wants JSON values, got {type(value).__name__}")


def _object(pairs: list[tuple[str, object]]) -> dict[str, object]:
    result = dict(pairs)
    if len(result) != len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise FileFormatError(f"JSON has the key {twice!r:.80} twice in one object")
    return result


def _refuse_constant(name: str) -> float:
    raise FileFormatError(f"JSON wants finite numbers, got {name}")


def _finite(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise FileFormatError(f"JSON wants finite numbers, got {text:.80}")
    return number


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
