"""Locks that allow one capture at a time, and none while a sampler reads weights.

While ``torch.export`` captures a denoiser, the module holds fake weights, in every thread. So code that reads weights
of a model does so within ``weights_in_use``, which many threads may enter at once, and ``torch.export`` runs within
``weights_swapped``, which one thread enters alone. There is one lock for the process: models may share weights, and
``torch.export`` itself is not made for two threads at once.
``one_capture`` is held around a whole capture, so that two threads never build one form twice; samplers run meanwhile.

A ``fork`` waits until no other thread has the weights swapped, and the child begins with new locks.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from l2c_compile.errors import CaptureError


class _HeldByThread(threading.local):
    """How many reads and writes this thread holds."""

    num_reads = 0
    num_writes = 0


class _ReadWriteLock:
    """A lock for many readers or one writer, both reentrant; a waiting writer goes before new readers."""

    def __init__(self) -> None:
        self._changed = threading.Condition(threading.Lock())
        self._num_readers = 0
        self._num_waiting = 0
        self._is_written = False
        self._held = _HeldByThread()

    def acquire_read(self) -> None:
        held = self._held
        # A thread that already holds the lock does not wait: a writer would wait for it.
        if not held.num_reads and not held.num_writes:
            with self._changed:
                while self._is_written or self._num_waiting:
                    self._changed.wait()
                self._num_readers += 1
        held.num_reads += 1

    def release_read(self) -> None:
        held = self._held
        held.num_reads -= 1
        if not held.num_reads and not held.num_writes:
            with self._changed:
                self._num_readers -= 1
                if not self._num_readers:
                    self._changed.notify_all()

    def check_not_reading(self) -> None:
        if self._held.num_reads and not self._held.num_writes:
            raise CaptureError(
                "a denoiser is to be captured while a sampler runs in the same thread; call sampler.capture(noise,"
                " **conditions) before the run that needs it"
            )

    def acquire_write(self) -> None:
        self.check_not_reading()
        held = self._held
        if not held.num_writes:
            with self._changed:
                self._num_waiting += 1
                try:
                    while self._is_written or self._num_readers:
                        self._changed.wait()
                    self._is_written = True
                finally:
                    self._num_waiting -= 1
                    self._changed.notify_all()
        held.num_writes += 1

    def release_write(self) -> None:
        held = self._held
        held.num_writes -= 1
        if not held.num_writes:
            with self._changed:
                self._is_written = False
                self._changed.notify_all()


_weights = _ReadWriteLock()
_captures = threading.RLock()


@contextmanager
def weights_in_use() -> Iterator[None]:
    """Keep the weights of all models real while the context is open, after waiting for other threads' captures."""
    lock = _weights
    lock.acquire_read()
    try:
        yield
    finally:
        lock.release_read()


@contextmanager
def weights_swapped() -> Iterator[None]:
    """Let no other thread use any model while the context is open, after waiting for the samplers that run.

    Raises:
        CaptureError: if this thread is reading weights, so that it would wait for itself.
    """
    lock = _weights
    lock.acquire_write()
    try:
        yield
    finally:
        lock.release_write()


@contextmanager
def one_capture() -> Iterator[None]:
    """Keep other threads from capturing while the context is open; a thread may enter it again.

    Raises:
        CaptureError: if this thread is reading weights, so that the capture would wait for itself.
    """
    _weights.check_not_reading()
    with _captures:
        yield


def _begin_anew() -> None:
    # The threads that held the old locks do not exist in the child.
    global _weights, _captures
    _weights, _captures = _ReadWriteLock(), threading.RLock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(
        before=lambda: _weights.acquire_read(),
        after_in_parent=lambda: _weights.release_read(),
        after_in_child=_begin_anew,
    )
