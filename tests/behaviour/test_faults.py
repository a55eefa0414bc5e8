"""Whatever fails or is interrupted: the model stays as it was, the sampler can be used again, files stay whole."""

from __future__ import annotations

import errno
import os
import re
import resource
import signal
import subprocess
import sys
import traceback
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import CodeType, FrameType

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import TorchDispatchMode

from l2c_compile import CacheSchedule, CompiledSampler, l2c_compile, run_reference
from l2c_compile import compile as compile_module
from l2c_compile.errors import BackendError, L2CError
from l2c_compile.files.documents import replaced_at_once, write_atomically
from l2c_compile.files.torch_cache import cache_folder_named
from l2c_compile.frontend import capture
from l2c_compile.passes.base import Pipeline
from l2c_compile.samplers import compiled_sampler as compiled_module
from l2c_compile.schedules.router import Router
from tests.forked import needs_fork, run_in_fork
from tests.root import ROOT
from tests.tiny import draw, residual, steps

pytestmark = pytest.mark.usefixtures("captured_anew")

ERRORS = (torch.OutOfMemoryError, MemoryError, KeyboardInterrupt)


def compiled() -> CompiledSampler:
    return l2c_compile(residual(), CacheSchedule.from_table({"a": [1, 0, 1], "b": [1, 0, 0]}), steps(3))


def state_of(model: nn.Module) -> list[object]:
    """Return all that a capture touches: identities of weights and hooks, values, training flags."""
    state: list[object] = []
    for path, module in model.named_modules():
        own = [*module._parameters.items(), *module._buffers.items()]
        state += [path, module.training, list(module._forward_hooks), list(module._forward_pre_hooks)]
        state += [(name, id(tensor), str(tensor)) for name, tensor in own]
    return state


def assert_usable(sampler: CompiledSampler, noise: Tensor) -> None:
    """Check that the sampler captures and samples as if nothing had happened."""
    assert not any(isinstance(weight, FakeTensor) for weight in sampler.model.parameters())
    wanted = run_reference(sampler.model, sampler.loop, sampler.schedule, noise.clone(), {})
    assert isinstance(wanted, Tensor)
    assert torch.equal(sampler(noise), wanted)


@contextmanager
def raising_in(code: CodeType, error: type[BaseException]) -> Iterator[None]:
    """Raise at the beginning of the next call of the function that has this code."""

    def profile(frame: FrameType, event: str, argument: object) -> None:
        if event == "call" and frame.f_code is code:
            sys.setprofile(None)
            raise error("made up")

    sys.setprofile(profile)
    try:
        yield
    finally:
        sys.setprofile(None)


def first_calls(function: Callable[[], object]) -> dict[str, CodeType]:
    """Return which function of each module is called first while ``function`` runs."""
    first: dict[str, CodeType] = {}

    def profile(frame: FrameType, event: str, argument: object) -> None:
        if event == "call":
            first.setdefault(str(frame.f_globals.get("__name__")), frame.f_code)

    sys.setprofile(profile)
    try:
        function()
    finally:
        sys.setprofile(None)
    return first


class _RunsOutOfMemory(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Makes the ``number``-th operation of torch fail."""

    def __init__(self, number: int, error: type[BaseException]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.remaining, self.error = number, error

    def __torch_dispatch__(
        self,
        func: Callable[..., object],
        types: object,
        args: tuple[object, ...] = (),
        kwargs: dict[str, object] | None = None,
    ) -> object:
        self.remaining -= 1
        if self.remaining == 0:
            raise self.error("made up")
        return func(*args, **(kwargs or {}))


OURS = re.compile(r"l2c_compile\.(?!passes\.(?!base))|torch\.export\._trace$")
"""The modules that an interrupt is tried in: ours (the runner stands for the passes), and what begins the export."""
EXPORT = re.compile(r"torch\.export\.(?!_tree_utils)|torch\._export\.")
"""The modules of torch that do the export."""


def interrupt_captures(inside: re.Pattern[str]) -> None:
    """Interrupt captures where each of many modules is entered first, and check what they leave."""
    sampler, noise = compiled(), draw(2, 4)
    sampler.capture(noise)  # the first one imports much
    sampler._begin_empty()
    before = state_of(sampler.model)
    entered = {name: code for name, code in first_calls(lambda: sampler.capture(noise)).items() if inside.match(name)}
    sampler._begin_empty()
    assert "torch.export._trace" in entered
    assert inside is EXPORT or {"l2c_compile.frontend.capture", "l2c_compile.backends.lower"} <= entered.keys()
    for name, code in entered.items():
        with pytest.raises(KeyboardInterrupt, match="made up"), raising_in(code, KeyboardInterrupt):
            sampler.capture(noise)
        assert state_of(sampler.model) == before, name
        assert not sampler._forms, name
    assert_usable(sampler, noise)


def run_alone(code: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run Python in a process of its own."""
    return subprocess.run(
        [sys.executable, "-c", code, *arguments],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        cwd=ROOT,
    )


class TestCapture:
    @pytest.mark.parametrize("error", ERRORS)
    @pytest.mark.parametrize(
        ("owner", "stage"),
        [
            (compile_module, "trace_without_effects"),
            (capture, "_to_evaluation_graph"),
            (compile_module, "unroll"),
            (Pipeline, "run"),
            (compiled_module, "lower_to_backend"),
        ],
    )
    def test_a_stage_that_fails_leaves_everything_as_it_was(
        self, owner: object, stage: str, error: type[BaseException], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        sampler, noise = compiled(), draw(2, 4)
        before = state_of(sampler.model)

        def fail(*args: object, **kwargs: object) -> None:
            raise error("made up")

        with monkeypatch.context() as patch:
            patch.setattr(owner, stage, fail)
            with pytest.raises(error, match="made up"):
                sampler(noise)
        assert state_of(sampler.model) == before
        assert not sampler._forms
        assert_usable(sampler, noise)

    @pytest.mark.parametrize("error", ERRORS)
    def test_a_forward_that_fails_leaves_everything_as_it_was(self, error: type[BaseException]) -> None:
        sampler, noise = compiled(), draw(2, 4)
        before = state_of(sampler.model)

        def fail(module: nn.Module, args: object) -> None:
            raise error("made up")

        hook = sampler.model.norm.register_forward_pre_hook(fail)  # type: ignore[union-attr]
        with pytest.raises((error, L2CError), match="made up"):
            sampler(noise)
        hook.remove()
        assert state_of(sampler.model) == before
        assert_usable(sampler, noise)

    @needs_fork
    @pytest.mark.parametrize("inside", [OURS, EXPORT], ids=["ours", "export"])
    def test_an_interrupt_anywhere_leaves_everything_as_it_was(self, inside: re.Pattern[str]) -> None:
        # In a process of its own: torch's table of decompositions does not survive every interrupt.
        run_in_fork(interrupt_captures, inside)

    def test_weights_are_put_back_even_if_torch_was_interrupted_in_its_own_cleanup(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        sampler, noise = compiled(), draw(2, 4)
        before = state_of(sampler.model)

        def interrupted(flat: nn.Module, *args: object, **kwargs: object) -> None:
            first, second = flat.get_submodule("denoiser.a"), flat.get_submodule("denoiser.b")
            first._parameters["weight"] = nn.Parameter(torch.empty(4, 4, device="meta"))
            second._parameters.clear()
            flat.train()
            raise KeyboardInterrupt

        with monkeypatch.context() as patch:
            patch.setattr(torch.export, "export", interrupted)
            with pytest.raises(KeyboardInterrupt):
                sampler(noise)
        assert state_of(sampler.model) == before
        assert_usable(sampler, noise)


class TestRun:
    @pytest.mark.parametrize("error", ERRORS)
    def test_an_operation_that_fails_leaves_the_sampler_usable(self, error: type[BaseException]) -> None:
        sampler, noise = compiled(), draw(2, 4)
        wanted = sampler(noise)
        before = state_of(sampler.model)
        for number in (1, 4, 9):
            with pytest.raises(error, match="made up"), _RunsOutOfMemory(number, error):
                sampler(noise)
            assert torch.equal(sampler(noise), wanted)
        assert state_of(sampler.model) == before
        # The next form is captured without waiting for the run that failed.
        sampler.capture(draw(3, 4))


def assert_no_internals(error: Exception) -> None:
    """Check that a traceback does not go through torch, but for the call of the denoiser as a module."""
    text = "".join(traceback.format_exception(error)).replace(os.sep, "/")
    assert "torch/" not in text.replace("torch/nn/modules/module.py", "")


WAY_OUT = r"cannot write what it compiles to the folder '.*': {}; set TORCHINDUCTOR_CACHE_DIR"


def capture_below_a_file(folder: str) -> None:
    """Capture while torch's cache folder would lie below a regular file, where not even the superuser can make it."""
    sampler, noise = compiled(), draw(2, 4)
    before = state_of(sampler.model)
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = os.path.join(folder, "file", "cache")
    with pytest.raises(BackendError, match=WAY_OUT.format("Not a directory")) as raised:
        sampler.capture(noise)
    assert_no_internals(raised.value)
    assert state_of(sampler.model) == before
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = folder
    assert_usable(sampler, noise)


class TestCacheFolder:
    """The folder where torch keeps what it compiles."""

    def test_one_that_cannot_be_made_is_named_by_the_capture(self, tmp_path: Path) -> None:
        (tmp_path / "file").write_bytes(b"")
        # In a process of its own: torch makes the folder in the first capture only.
        code = "import sys; from tests.behaviour.test_faults import capture_below_a_file as f; f(sys.argv[1])"
        done = run_alone(code, str(tmp_path))
        assert done.returncode == 0, done.stderr

    @pytest.mark.parametrize("code", [errno.ENOSPC, errno.EACCES, errno.EROFS])
    def test_one_that_cannot_be_written_is_named_by_inductor(
        self, code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        sampler, noise = compiled(), draw(2, 4)
        sampler.options = replace(sampler.options, backend="inductor")
        monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))

        def fail(*args: object, **kwargs: object) -> None:
            # open() names the file, write() does not.
            names = (str(tmp_path / "ab" / "x.tmp"),) if code == errno.EACCES else ()
            raise OSError(code, os.strerror(code), *names)

        with monkeypatch.context() as patch:
            patch.setattr(torch._inductor.codecache, "write_atomic", fail)
            with pytest.raises(BackendError, match=WAY_OUT.format(os.strerror(code))) as raised:
                sampler.capture(noise)
        assert_no_internals(raised.value)
        assert not sampler._forms
        sampler.options = replace(sampler.options, backend="eager")
        assert_usable(sampler, noise)

    def test_other_errors_of_files_stay_what_they_are(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "cache"))
        (tmp_path / "cache").mkdir()
        for error in (FileNotFoundError(errno.ENOENT, "no such file", str(tmp_path / "mine")), ValueError("mine")):
            with pytest.raises(type(error)) as raised, cache_folder_named():
                raise error
            assert raised.value is error

    def test_one_that_cannot_be_made_is_named_when_the_package_is_first_used(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        (tmp_path / "file").write_bytes(b"")
        monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "file" / "cache"))
        done = run_alone("from l2c_compile import l2c_compile")
        assert done.returncode == 1
        assert re.search(WAY_OUT.format("Not a directory"), done.stderr)
        assert "torch/" not in done.stderr


def save_within_limits(path: Path) -> None:
    """Save below limits on the size of files: a disk that is full after so many bytes, for torch's own writer, too."""
    sampler = compiled()
    sampler.capture(draw(2, 4))
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    for limit in (1, 5000, 20000):
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))
        with pytest.raises(OSError, match="unchanged") as raised:
            sampler.save(path)
        assert raised.value.filename == str(path)


def _full(*args: object, **kwargs: object) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


class TestFiles:
    @pytest.mark.parametrize("error", [KeyboardInterrupt, MemoryError])
    def test_an_interrupted_write_leaves_the_old_file_and_no_litter(
        self, error: type[BaseException], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        path = tmp_path / "s.json"
        path.write_bytes(b"old")
        for name in ("fsync", "replace", "chmod"):
            with monkeypatch.context() as patch:

                def fail(*args: object, **kwargs: object) -> None:
                    raise error

                patch.setattr(os, name, fail)
                with pytest.raises(error):
                    write_atomically(path, b"new")
            assert path.read_bytes() == b"old"
            assert list(tmp_path.iterdir()) == [path]

    @pytest.mark.parametrize("what", ["schedule", "router", "sampler"])
    def test_a_full_disk_is_named_and_the_old_file_stays(
        self, what: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        path = tmp_path / "old.pt2"
        path.write_bytes(b"old")
        sampler = compiled()
        sampler.capture(draw(2, 4))
        save = {
            "schedule": sampler.schedule.save,
            "router": Router(torch.ones(2, 1), ("a",), (1,), 0.5).save,  # type: ignore[arg-type]
            "sampler": sampler.save,
        }[what]
        monkeypatch.setattr(os, "fsync", _full)
        with pytest.raises(OSError, match=r"No space left.*old\.pt2.*free some space.*unchanged") as raised:
            save(path)
        assert raised.value.errno == errno.ENOSPC
        assert raised.value.filename == str(path)
        assert path.read_bytes() == b"old"
        assert list(tmp_path.iterdir()) == [path]

    @needs_fork
    def test_a_write_that_really_fails_in_the_middle_of_an_archive_is_named(self, tmp_path: Path) -> None:
        path = tmp_path / "old.pt2"
        path.write_bytes(b"old")
        run_in_fork(save_within_limits, path)
        assert path.read_bytes() == b"old"
        assert list(tmp_path.iterdir()) == [path]

    def test_a_folder_that_is_a_file_or_missing_is_named(self, tmp_path: Path) -> None:
        (tmp_path / "file").write_bytes(b"")
        for folder, kind in (("file", NotADirectoryError), ("missing", FileNotFoundError)):
            path = tmp_path / folder / "s.json"
            with pytest.raises(kind, match=r"s\.json.*folder") as raised:
                write_atomically(path, b"{}")
            assert raised.value.filename == str(path)

    def test_a_folder_without_permission_is_named(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        # The superuser may write anywhere, so the refusal is made up.
        def refuse(*args: object, **kwargs: object) -> None:
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), "temporary")

        monkeypatch.setattr("tempfile.mkstemp", refuse)
        with pytest.raises(PermissionError, match=r"s\.json.*another folder"):
            write_atomically(tmp_path / "s.json", b"{}")

    def test_an_error_of_the_writer_itself_passes_unchanged(self, tmp_path: Path) -> None:
        with pytest.raises(zipfile.BadZipFile), replaced_at_once(tmp_path / "x"):
            raise zipfile.BadZipFile("no zip")
        assert list(tmp_path.iterdir()) == []
