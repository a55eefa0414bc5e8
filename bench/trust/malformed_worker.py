"""Read malformed files in a process of its own and print what came of each, one line of JSON a file.

    python -m bench.trust.malformed_worker SEED START STOP

What a file may cost is enforced here: processor time by the clock, memory by the address space that is left to the
process while a file is read. Whatever the file makes Python do is seen by an audit hook.
"""

from __future__ import annotations

import gc
import json
import os
import resource
import shutil
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Protocol

import torch

from bench.trust import finder_files
from bench.trust.file_mutations import Malformed, malformed
from bench.trust.mutate.valid import valid_files
from l2c_compile import CacheSchedule, LoadedSampler, load, load_schedule_file
from l2c_compile.errors import L2CError
from l2c_compile.schedules.router import Router

SECONDS = 1.0
"""The processor time that a file may take."""
MEMORY_BYTES = 256 * 2**20
"""The address space that a file may take beyond what the process has before it is read."""
MAX_MESSAGE_CHARACTERS = 1000

_Read = Router | CacheSchedule | LoadedSampler | finder_files.FinderFile


@dataclass(frozen=True)
class Outcome:
    """What came of one file."""

    index: int
    kind: str
    mutation: str
    outcome: str
    """One of ``refused``, ``not readable`` (an OSError of the file system), ``read as before`` and ``read as another``;
    anything else is a failure."""
    detail: str
    """The error, or what went wrong."""
    seconds: float
    """The processor time of reading."""


class ForbiddenActionRecorder:
    """Records which forbidden things Python does while a file is read: processes, network, changes of files."""

    _FORBIDDEN = (
        *(
            "os.system",
            "os.exec",
            "os.posix_spawn",
            "os.spawn",
            "os.fork",
            "os.forkpty",
            "subprocess.Popen",
            "pty.spawn",
        ),
        *(
            "socket.",
            "ctypes.dlopen",
            "os.remove",
            "os.rename",
            "os.mkdir",
            "os.rmdir",
            "os.chmod",
            "os.link",
            "os.truncate",
        ),
        *("os.symlink", "shutil.", "tempfile.", "urllib.", "webbrowser.", "ftplib.", "signal.pthread_kill", "os.kill"),
    )

    def __init__(self) -> None:
        self.seen: list[str] = []
        """What was done that is forbidden."""
        self._active = False
        self._vanishing: Path | None = None
        self._num_opened = 0
        sys.addaudithook(self._hook)

    @contextmanager
    def recording(self, vanishing: Path | None = None) -> Iterator[None]:
        """Record what is done in this context; ``vanishing`` is a file to remove when it is opened a second time."""
        self.seen, self._num_opened = [], 0
        self._vanishing = vanishing
        self._active = True
        try:
            yield
        finally:
            self._active = False

    def _hook(self, event: str, args: tuple[object, ...]) -> None:
        if not self._active:
            return
        writes = event == "open" and isinstance(args[2], int) and args[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
        if event.startswith(self._FORBIDDEN) or writes:
            self.seen.append(f"{event} {args!r:.200}")
        if event == "open" and self._vanishing is not None and str(args[0]) == str(self._vanishing):
            self._num_opened += 1
            if self._num_opened == 2:
                self._active = False
                self._vanishing.unlink()
                self._active = True


def _reader(kind: str) -> Callable[[Path], _Read]:
    if kind in finder_files.KINDS:
        return partial(finder_files.read, kind)
    return load if kind == "sampler" else load_schedule_file


@contextmanager
def bounded_memory(more_bytes: int) -> Iterator[None]:
    """Give the process no more address space than it has, and so many bytes."""
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[0])
    _, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + more_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (hard, hard))


def _surroundings() -> dict[str, object]:
    """Return the state of the process that reading a file must not change."""
    return {
        "default dtype": torch.get_default_dtype(),
        "grad mode": torch.is_grad_enabled(),
        "modes": torch._C._len_torch_dispatch_stack(),
        "function modes": torch._C._len_torch_function_stack(),
        "random state": torch.get_rng_state().sum().item(),
        "folder": os.getcwd(),
        "open files": len(os.listdir("/proc/self/fd")),
        "safe globals": len(torch.serialization.get_safe_globals()),
    }


def _digest(kind: str, result: _Read) -> object:
    """Return the content of a valid file in a form that is equal for equal content."""
    if isinstance(result, LoadedSampler):
        sample = result(torch.ones(2, 4), y=torch.ones(2, 4), scale=0.5)
        return sample["latent"].tolist()
    return result


def _check_consistent(kind: str, result: _Read, folder: Path) -> None:
    """Raise an error if what was read cannot be written and read again."""
    if isinstance(result, LoadedSampler):
        repr(result)
        str(result.summary())
        return
    again = folder / "again"
    result.save(again)
    assert _reader(kind)(again) == result, "is another after it was saved and read again"
    again.unlink()


class _MalformedFileReader:
    """Reads malformed files, one after the other."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder / "files"
        self.canary = folder / "canary"
        (folder / "valid").mkdir()
        self.valid = valid_files(folder / "valid")
        self.recorder = ForbiddenActionRecorder()
        self.wanted: dict[str, object] = {}
        for kind, content in self.valid.items():
            path = folder / "valid" / f"valid-{kind}"
            path.write_bytes(content)
            # The first time torch sets up a few things, so the second result counts.
            for _ in range(2):
                self.wanted[kind] = _digest(kind, _reader(kind)(path))
        # Otherwise the garbage collector would go through all of torch after every file.
        gc.freeze()

    def outcome(self, index: int, seed: int) -> Outcome:
        shutil.rmtree(self.folder, ignore_errors=True)
        self.folder.mkdir()
        file = malformed(index, seed, self.valid, self.folder, self.canary)
        there = sorted(path.name for path in self.folder.iterdir())
        gc.collect()
        before = _surroundings()
        outcome, detail, seconds = self._read(file)
        gc.collect()
        after = _surroundings()
        changed = [name for name in before if before[name] != after[name]]
        left = sorted(path.name for path in self.folder.iterdir())
        if self.recorder.seen or self.canary.exists():
            shutil.rmtree(self.canary, ignore_errors=True)
            outcome, detail = "EXECUTED", f"{self.recorder.seen}"
        elif seconds > SECONDS:
            outcome = "SLOW"
        elif changed or (left != there and not file.vanishes):
            outcome, detail = "STATE CHANGED", f"{changed}, files {left}"
        return Outcome(index, file.kind, file.mutation, outcome, detail, seconds)

    def _read(self, file: Malformed) -> tuple[str, str, float]:
        result: _Read | None = None
        error: BaseException | None = None
        start = time.process_time()
        try:
            with self.recorder.recording(file.path if file.vanishes else None), bounded_memory(MEMORY_BYTES):
                result = _reader(file.kind)(file.path)
        except Exception as raised:
            error = raised
        seconds = time.process_time() - start
        if result is not None:
            return *self._judge_result(file, result), seconds
        assert error is not None
        return *judge_error(error), seconds

    def _judge_result(self, file: Malformed, result: _Read) -> tuple[str, str]:
        same = file.kind != "sampler" and result == self.wanted[file.kind]
        try:
            if file.checked and file.kind == "sampler":
                same = _digest(file.kind, result) == self.wanted[file.kind]
                if not same:
                    return "WRONG RESULT", "a damaged file was read as another"
            _check_consistent(file.kind, result, self.folder)
        except Exception as error:
            return "INCONSISTENT", f"{type(error).__name__}: {error!s:.200}"
        return ("read as before" if same else "read as another"), ""


def judge_error(error: BaseException) -> tuple[str, str]:
    """Return the outcome of an error, and the words for it."""
    message = f"{type(error).__name__}: {error!s:.300}"
    if isinstance(error, MemoryError):
        return "OUT OF MEMORY", message
    if isinstance(error, OSError):
        return ("not readable" if error.filename is not None else "NAMELESS"), message
    if not isinstance(error, L2CError):
        return "FOREIGN ERROR", message
    text = str(error)
    if len(text) > MAX_MESSAGE_CHARACTERS or not all(line.isprintable() for line in text.split("\n")):
        return "BAD MESSAGE", f"{len(text)} characters: {text!a:.300}"
    return "refused", message


class Reader(Protocol):
    """What makes a file by its number, reads it and judges what happens."""

    def outcome(self, index: int, seed: int) -> Outcome:
        """Return what happened with file number ``index`` of a seed."""


def print_outcomes(make_reader: Callable[[Path], Reader], seed: int, start: int, stop: int) -> None:
    """Print the outcomes of some files as lines of JSON, after the word that the worker is ready.

    Args:
        make_reader: a function that makes what reads the files, in a folder of its own.
        seed: the seed of the files.
        start: the number of the first file.
        stop: the number behind that of the last file.
    """
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        reader = make_reader(Path(folder))
        print("ready", flush=True)
        for index in range(start, stop):
            print(json.dumps(asdict(reader.outcome(index, seed))), flush=True)


if __name__ == "__main__":
    print_outcomes(_MalformedFileReader, *map(int, sys.argv[1:]))
