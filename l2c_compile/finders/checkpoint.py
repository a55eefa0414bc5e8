"""The file from which learning a router goes on after an interruption."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from l2c_compile.errors import FileFormatError, ScheduleError
from l2c_compile.files.documents import check_header
from l2c_compile.files.tensors import read_tensors, write_tensors

_KEY = "l2c_compile.training"
"""The name of the document in the metadata; it says the format, too."""
_VERSION = 1
_FROM_ZERO = ("penalty", "work.total", "step.", "exp_avg_sq.", "weights")
"""How the names of tensors begin in which no number may be negative."""


@dataclass(frozen=True)
class Checkpoint:
    """All that the next round depends on, with which it can go on."""

    run: Mapping[str, object]
    """Sites, evaluations and settings of the run: those with which alone it may go on. In JSON values."""
    round: int
    """How many rounds are done."""
    tensors: Mapping[str, Tensor]
    """On the CPU."""

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write a safetensors file, atomically."""
        write_tensors(path, {"version": _VERSION, **self.run, "round": self.round}, self.tensors, key=_KEY)

    @classmethod
    def load(cls, path: str | os.PathLike[str], run: Mapping[str, object]) -> Checkpoint:
        """Read a file written by ``save``.

        Args:
            path: the file.
            run: what the file must say of the run.

        Raises:
            FileFormatError: if it is no such file, or damaged.
            ScheduleError: if it is of another run.
            OSError: if it cannot be read.
        """
        document, tensors = read_tensors(path, "checkpoint", key=_KEY)
        check_header(document, "checkpoint", None, _VERSION, {"version", *run, "round"})
        if names := sorted(name for name in run if document[name] != run[name]):
            raise ScheduleError(
                f"{os.fspath(path)} was made with another {', '.join(names)}; choose another file, or the same settings"
            )
        done = document["round"]
        if type(done) is not int or done < 0:
            raise FileFormatError(f"round wants a number from 0, got {done!r:.80}")
        return cls(run, done, tensors)

    def check_forms(self, needed: Mapping[str, Tensor], optional: Mapping[str, Tensor]) -> None:
        """Check the tensors against others of the forms that they must have.

        Args:
            needed: must all be there.
            optional: may be there, too.

        Raises:
            FileFormatError: if a tensor is missing, unknown, of another form, or holds what cannot be.
        """
        if missing := sorted(needed.keys() - self.tensors.keys()):
            raise FileFormatError(f"parts of it are missing: {missing[:5]}")
        for name, tensor in self.tensors.items():
            like = needed.get(name, optional.get(name))
            if like is None or tensor.shape != like.shape or tensor.dtype != like.dtype:
                raise FileFormatError(f"its part {name:.80} has another form: {tensor.dtype} {tuple(tensor.shape)}")
            if not torch.isfinite(tensor).all() or (name.startswith(_FROM_ZERO) and (tensor < 0).any()):
                raise FileFormatError(f"its part {name} holds numbers that cannot be")
