"""Make a program in Python that fails smaller: fewer features, changes and calls, and the plainest network and loop."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from bench.trust.programs.python.drawing import PythonProgram, counted


def simpler_python_programs(program: PythonProgram) -> Iterator[PythonProgram]:
    """Yield programs with one thing less that eager torch still runs, the largest things first."""
    for candidate in _candidates(program):
        # A change may belong to a feature that is gone, or to one that was changed before.
        repaired = counted(candidate)
        if repaired is not None:
            yield repaired


def _candidates(program: PythonProgram) -> Iterator[PythonProgram]:
    if program.sites:
        yield replace(program, sites=[], entries=[])
    if program.net is not None:
        yield replace(program, net=None, sites=[], entries=[])
    if program.steps is not None:
        yield replace(program, steps=None, sites=[], entries=[])
    if program.backend != "eager":
        yield replace(program, backend="eager")
    if program.packs:
        yield replace(program, packs=False)
    for index in range(len(program.features)):
        yield replace(program, features=_without(program.features, index))
    for index in reversed(range(1, len(program.history))):
        yield replace(program, history=_without(program.history, index))
    for index in range(len(program.entries)):
        yield replace(program, entries=_without(program.entries, index))
    first = program.history[0]
    for index, event in enumerate(program.history):
        if index and "change" not in event and event != first:
            yield replace(program, history=[*program.history[:index], first, *program.history[index + 1 :]])


def _without(items: list, index: int) -> list:  # type: ignore[type-arg]
    return items[:index] + items[index + 1 :]
