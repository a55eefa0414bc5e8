"""The folder where torch keeps what it compiles: an error of the file system there names the folder.

Torch makes the folder when Dynamo is imported, again in the first export, and writes there when Inductor compiles. The
variable ``TORCHINDUCTOR_CACHE_DIR`` names it; torch sets the variable itself where nobody did.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from l2c_compile.errors import BackendError

_VARIABLE = "TORCHINDUCTOR_CACHE_DIR"
_CANNOT_WRITE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)


@contextmanager
def cache_folder_named() -> Iterator[None]:
    """Turn torch's error into one that names torch's cache folder where torch cannot write there.

    Raises:
        BackendError: if torch cannot write there.
    """
    try:
        yield
    except Exception as error:
        failure = _file_error(error)
        folder = os.environ.get(_VARIABLE, "")
        if failure is None or not _is_of(failure, folder):
            raise
        reason = os.strerror(failure.errno or 0)
        # Torch's long traceback says nothing more about the folder.
        raise BackendError(
            f"torch cannot write what it compiles to the folder {folder!r}: {reason}; set {_VARIABLE} to a folder that"
            " can be written to, or free some space"
        ) from None


def _file_error(error: BaseException | None) -> OSError | None:
    while error is not None and not isinstance(error, OSError):
        error = error.__cause__ or error.__context__
    return error


def _is_of(failure: OSError, folder: str) -> bool:
    if failure.filename is None:
        # A write that fails does not say to which file.
        return failure.errno in _CANNOT_WRITE
    here, there = Path(os.path.abspath(os.fsdecode(failure.filename))), Path(os.path.abspath(folder))
    # The folder itself, what lies in it, or what would have to be made for it.
    return here.is_relative_to(there) or (there.is_relative_to(here) and not there.is_dir())
