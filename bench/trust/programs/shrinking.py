"""Make a program that fails smaller, as long as it fails in the same way."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Iterator
from dataclasses import asdict
from typing import Any, TypeAlias, TypeVar

from bench.trust.programs.checking import Checker, Outcome, Program, evaluations_of
from bench.trust.programs.python.checking import PythonChecker
from bench.trust.programs.python.drawing import PythonProgram
from bench.trust.programs.python.shrinking import simpler_python_programs

Drawn: TypeAlias = Program | PythonProgram
"""A program of any kind."""

P = TypeVar("P", bound=Drawn)

Check = Callable[[Any, Any], Outcome]
"""A method of a checker that judges a program."""

_PLAIN: dict[str, object] = {
    "dtype": "float64",
    "form": "vector",
    "time": "linear",
    "time_dtype": "latent",
    "position": "none",
    "skip": "none",
    "result": "tensor",
    "norm": "none",
    "norm_position": "pre",
    "gate": "none",
    "split": "chunk",
    "residual": "add",
    "work": "linear",
    "buffer": "none",
    "cast": "none",
    "in_place": "none",
    "returns": "tensor",
    "kind": "euler",
    "layout": "contiguous",
    "guidance": "none",
    "batch": 1,
}
"""The plainest choice of every option."""


def checker_of(program: Drawn) -> Checker | PythonChecker:
    """Return what judges a program, and others of its denoiser."""
    return Checker(program.denoiser) if isinstance(program, Program) else PythonChecker()


def failure_of(program: Drawn, check: Check = Checker.check) -> str:
    """Return how a program fails, in short: equal for failures of one cause. Empty if it does not fail."""
    try:
        check(checker_of(program), program)
    except Exception as error:  # whatever the compiler raises is what is looked for
        return f"{type(error).__name__}: {str(error)[:24]}"
    return ""


def minimise(program: P, max_tries: int = 200, check: Check = Checker.check) -> P:
    """Return a program that fails as ``program`` does and that no single step makes smaller, if tries suffice."""
    failure = failure_of(program, check)
    tries = 0
    smaller = True
    while smaller:
        smaller = False
        for candidate in _simpler(program):
            tries += 1
            if tries > max_tries:
                return program
            if failure_of(candidate, check) == failure:
                program, smaller = candidate, True
                break
    return program


def _simpler(program: Drawn) -> Iterator[Any]:
    """Yield programs with one thing less, the largest things first."""
    if isinstance(program, PythonProgram):
        yield from simpler_python_programs(program)
        return
    document = asdict(program)
    for path in _paths(document):
        changed = copy.deepcopy(document)
        if _simplify(changed, path):
            repaired = _repaired(changed)
            if repaired is not None:
                yield repaired


def _paths(value: Any, prefix: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:  # noqa: ANN401 - any JSON
    """Return the paths to all list items and options, outer ones first."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    inner = [(*prefix, key) for key, _ in items]
    return inner + [path for key, each in items for path in _paths(each, (*prefix, key))] if inner else []


def _simplify(document: Any, path: tuple[Any, ...]) -> bool:  # noqa: ANN401 - any JSON
    *outer, last = path
    owner = document
    for key in outer:
        owner = owner[key]
    if isinstance(owner, list):
        if len(owner) == 1 and outer[-1] not in ("entries", "read_inputs"):
            return False
        del owner[last]
        return True
    plain = False if isinstance(owner[last], bool) else _PLAIN.get(last, owner[last])
    if owner[last] == plain:
        return False
    owner[last] = plain
    return True


def _repaired(document: dict[str, Any]) -> Program | None:
    """Return the program of a changed description, None where the change leaves none."""
    sites = document["sites"]
    document["read_inputs"] = [site for site in document["read_inputs"] if site in sites]
    order, count = document["denoiser"]["order"], len(document["denoiser"]["blocks"])
    document["denoiser"]["order"] = [index for index in order if index < count] or [0]
    program = Program(**document)
    try:
        document["num_evaluations"] = evaluations_of(program)
    except Exception:  # another shape, another option: the program may make no sense
        return None
    if any(entry["site"] not in sites for entry in document["entries"]):
        return None
    return Program.from_json(json.dumps(document))
