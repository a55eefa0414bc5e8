"""The files of commands: what a schedule file is tried on, and where a command may write."""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from l2c_compile.cli.terminal import say
from l2c_compile.errors import FileFormatError, L2CError
from l2c_compile.files.archive import Archive
from l2c_compile.files.documents import write_atomically
from l2c_compile.finders.profile import Profile
from l2c_compile.loops import BuiltInLoop
from l2c_compile.models.named import NamedModel, named_model
from l2c_compile.sampler_file.manifest import MANIFEST
from l2c_compile.schedules.importers import Family, load_schedule_file
from l2c_compile.schedules.router import Router, schedule_of
from l2c_compile.schedules.schedule import CacheSchedule


class OutputError(L2CError, ValueError):
    """A file that a command may not write where it was asked to."""


@dataclass(frozen=True)
class Case:
    """A schedule, the model to try it on, and the loop that samples it."""

    schedule: CacheSchedule
    model: NamedModel
    loop: BuiltInLoop

    def __str__(self) -> str:
        return f"{self.model.name}, {self.loop.name}, {self.loop.num_evaluations} evaluations"


def load_case(
    path: Path, model: str, steps: int | None, threshold: float | None, *, with_weights: bool = False
) -> Case:
    """Read a schedule or router, and find the model and the loop to try it on.

    Args:
        path: the file.
        model: "digits", or a published size, which has no weights.
        steps: the number of sampler steps; None takes the loop in the file, or as many as the file is for.
        threshold: the threshold for a router, in place of its own.
        with_weights: whether to refuse a model that has none.

    Raises:
        L2CError: if the file cannot be read, there is no such model, or they do not fit together.
        OSError: if the file cannot be read.
    """
    schedule = schedule_of(read_schedule(path, threshold))
    known = named_model(model, with_weights=with_weights)
    return Case(schedule, known, known.loop_of(schedule, steps))


def read_schedule(path: Path, threshold: float | None = None, family: Family | None = None) -> Router | CacheSchedule:
    """Read a schedule or router. The error for another file of ours says what it is and which command takes it.

    Raises:
        L2CError: if the file is none, or an option does not suit it.
        OSError: if it cannot be read.
    """
    try:
        return load_schedule_file(path, threshold=threshold, family=family)
    except FileFormatError as error:
        if is_sampler(path):
            raise FileFormatError(
                f"{path} is a saved sampler, no schedule or router; `l2c verify` takes it, l2c_compile.load reads it"
            ) from error
        if _is_profile(path):
            raise FileFormatError(
                f"{path} is a profile, no schedule or router; `l2c schedule METHOD --profile {path}` makes a schedule"
            ) from error
        raise


def read_profile(path: Path) -> Profile:
    """Read a profile. The error for another file of ours says what it is.

    Raises:
        L2CError: if the file is none.
        OSError: if it cannot be read.
    """
    try:
        return Profile.load(path)
    except FileFormatError as error:
        for what, is_one in (("saved sampler", is_sampler), ("schedule or router", _is_schedule)):
            if is_one(path):
                raise FileFormatError(f"{path} is a {what}, no profile; `l2c profile --out FILE` makes one") from error
        raise FileFormatError(f"{path} is no profile: {error}; `l2c profile --out FILE` makes one") from error


def is_sampler(path: Path) -> bool:
    """Return whether a file is a saved sampler, even a damaged one."""
    try:
        with Archive(path) as archive:
            return MANIFEST in archive.names
    except FileFormatError:
        return False


def output_path(path: Path, ending: str, *, force: bool, reads: Path | None = None) -> Path:
    """Return the path to write to, or raise an error before any work is done.

    Args:
        path: the path as the user gave it. For a link, what it points to is returned, so that the link stays.
        ending: the ending of files of the kind that is written, such as ".json".
        force: whether a file that exists may be overwritten.
        reads: the file that the command reads, which is never overwritten.

    Raises:
        OutputError: if the file cannot or may not be written there.
    """
    if path.suffix.lower() != ending:
        raise OutputError(
            f"the name wants to end in {ending}, which is what is written, got {path}; choose such a name"
        )
    target = Path(os.path.realpath(path)) if path.is_symlink() else path
    if target.is_symlink():
        raise OutputError(f"{path} is a link that leads back to itself; choose another name")
    if target.exists():
        if not stat.S_ISREG(target.stat().st_mode):
            raise OutputError(f"{path} is no regular file, and nothing else is written to; choose another name")
        if reads is not None and target.samefile(reads):
            raise OutputError(f"{path} is what is read, and would be overwritten; choose another name")
        if not force:
            raise OutputError(f"{path} exists already; overwrite it with --force, or choose another name")
    if not target.parent.is_dir() or not os.access(target.parent, os.W_OK):
        raise OutputError(f"the folder {target.parent} does not exist or cannot be written to; make it first")
    return target


def write_report(path: Path, what: str, document: Mapping[str, object]) -> None:
    """Write JSON types to a file, and print its path."""
    write_atomically(path, (json.dumps(document, indent=2, allow_nan=False) + "\n").encode())
    say(f"{what} written to {path}")


def _is_schedule(path: Path) -> bool:
    try:
        return load_schedule_file(path) is not None
    except L2CError:
        return False


def _is_profile(path: Path) -> bool:
    try:
        return path.is_file() and Profile.load(path) is not None
    except FileFormatError:
        return False
