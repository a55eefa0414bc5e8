"""Every error that this package raises on purpose. A message says what was wanted, what was got and what to do."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class L2CError(Exception):
    """The base of all errors of l2c_compile."""


class ScheduleError(L2CError, ValueError):
    """A schedule or router that cannot be honoured: wrong shape, wrong evaluation count, read before compute."""


class UnknownSiteError(ScheduleError):
    """A site names a module that the denoiser does not have, or never calls."""


class FileFormatError(L2CError, ValueError):
    """A file that is truncated, malicious, of a newer schema, or not of the form that its reader knows.

    The message may quote the file, so it is kept short, and characters that a terminal would obey are escaped.
    """

    def __init__(self, message: str) -> None:
        shown = "".join(c if c.isprintable() or c == "\n" else repr(c)[1:-1] for c in _middle_cut(message))
        super().__init__(shown)


class LoopError(L2CError, ValueError):
    """A sampling loop with settings that make no sense, or called with conditions that do not fit them."""


class LoopTraceError(L2CError, ValueError):
    """The sampling loop cannot be unrolled, for example because it branches on latent values."""


class CaptureError(L2CError, ValueError):
    """The denoiser cannot be captured as one functional graph."""


class BackendError(L2CError, ValueError):
    """The backend does not exist, or cannot take the graph."""


class ProfileError(L2CError, ValueError):
    """A profile that cannot be taken, or that does not hold what a selector asks of it."""


class QualityError(L2CError, ValueError):
    """A measure of quality that the samples do not allow: too few of them, too small, not of one shape."""


class SaveError(L2CError, ValueError):
    """A compiled sampler holds something that a file cannot: a foreign operator, an object among its conditions."""


class InputFormError(L2CError, ValueError):
    """A loaded sampler is given inputs of another form than it was saved for."""


class OperandError(L2CError, ValueError):
    """An operator of a loaded sampler does not take the values that it is given, such as a label that is too large."""


class StaleConstantsError(L2CError, RuntimeError):
    """Weights changed after constants were folded from them; call ``refresh()``."""


class KernelError(L2CError, ValueError):
    """A kernel got tensors that do not fit together, or was asked for a gradient that it does not have."""


class PassFailed(L2CError, RuntimeError):
    """A compiler pass broke an invariant. This is a bug of l2c_compile, not of the caller."""


class FirstCallError(L2CError, RuntimeError):
    """The first call of a compiled form gave something else than the eager loop on the same inputs."""


class VerificationError(L2CError, RuntimeError):
    """A loop graph violates its specification, or a compiled sampler differs from the reference."""


def _middle_cut(message: str) -> str:
    # What the user can do stands at the end of a message, so the end is kept.
    return message if len(message) <= 600 else f"{message[:350]} ... {message[-200:]}"


def nearest(name: str, known: Iterable[str], *, count: int = 3) -> str:
    """Return ``did you mean 'a', 'b'?`` for the known names closest to ``name``, or ``""`` if none is close."""
    close = difflib.get_close_matches(name, list(known), n=count, cutoff=0.6)
    return f"did you mean {', '.join(map(repr, close))}?" if close else ""
