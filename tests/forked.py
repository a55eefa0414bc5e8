"""Run a function in a child process that begins with all that is imported here."""

from __future__ import annotations

import multiprocessing
import os
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection

import pytest
import torch

from tests.waiting import HANG_S

needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")


def run_in_fork(function: Callable[..., object], *arguments: object) -> object:
    """Return what the function returns in a forked child; what it raises there is an error here."""
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    child = context.Process(target=_run, args=(function, arguments, sender))
    child.start()
    try:
        assert receiver.poll(HANG_S), "the child hangs"
        failure, result = receiver.recv()
    finally:
        child.join(10)
        child.kill()
    assert failure is None, failure
    return result


def _run(function: Callable[..., object], arguments: tuple[object, ...], connection: Connection) -> None:
    torch.set_num_threads(1)
    try:
        connection.send((None, function(*arguments)))
    except BaseException:
        connection.send((traceback.format_exc(), None))
