"""Hunt for bugs: random denoisers, loops, schedules and passes; compiled must equal the reference.

Options: ``--minutes N`` (default 1) ``--seed S``: the first seed to draw from; each seed is one denoiser with its
loops and schedules. ``--replay SEED`` or ``--replay SEED:NUMBER``: check the programs of one seed, or one of them, and
make what fails smaller. A program is counted once for each distinct denoiser, loop and schedule; passes do not count.
``--dynamo`` compiles the loops with ``torch.compile(..., backend="l2c")`` instead, a few programs of each seed; many
more are refused, for what a module returns of its input leaves no trace in Dynamo's graph.
``--python`` draws denoisers and loops with state, hooks, caches and other things of Python, and changes them between
the calls of a sampler; each has to equal eager torch or to be refused, and many are. A row for each thing says which
share of its programs that is.
"""

from __future__ import annotations

import random
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

from rich.progress import Progress

from bench.cases import BenchError
from bench.options import Options
from bench.report import Row
from bench.trust.programs.checking import Checker, Program, draw_programs
from bench.trust.programs.python.checking import PythonChecker
from bench.trust.programs.python.drawing import PythonProgram, draw_python_programs
from bench.trust.programs.shrinking import Check, Drawn, checker_of, minimise
from l2c_compile.errors import CaptureError

_REPORT_SECONDS = 60.0
_MINIMISED = 3
"""The number of failures that are made smaller: each takes minutes."""

_EVERY_THROUGH_DYNAMO = 8
"""One in so many programs of a denoiser goes through Dynamo: each is traced anew, and others vary the denoiser."""


@dataclass
class _SearchState:
    """Checks drawn programs and counts what was tried, refused and failed so far."""

    kind: str = ""
    """What programs are tried: plain ones, "dynamo" or "python"."""
    programs: set[str] = field(default_factory=set)
    denoisers: int = 0
    refused: Counter[str] = field(default_factory=Counter)
    """The number of programs that the compiler refuses, by the class of its error."""
    tried_with: Counter[str] = field(default_factory=Counter)
    """The number of programs in Python, by what each does."""
    refused_with: Counter[str] = field(default_factory=Counter)
    failures: list[tuple[str, str, Drawn | None]] = field(default_factory=list)
    """The text for ``--replay``, the message, and the program, or None if the seed gives none that torch can run."""
    start: float = field(default_factory=time.monotonic)

    def draw(self, seed: int) -> list[Drawn]:
        """Draw the programs of a seed."""
        draw: Callable[[random.Random], Iterator[Drawn]] = (
            draw_python_programs if self.kind == "python" else draw_programs
        )
        return list(draw(random.Random(seed)))

    def check(self, seed: int, programs: Sequence[Drawn]) -> None:
        """Check the programs of one denoiser."""
        checker = checker_of(programs[0])
        self.denoisers += 1
        for number, program in enumerate(programs):
            if program.key in self.programs or (self.kind == "dynamo" and number % _EVERY_THROUGH_DYNAMO):
                continue
            self.programs.add(program.key)
            try:
                refused = self.judge(checker, program).refused
            # Any error but a refusal is a bug.
            except Exception as error:
                self.failures.append((f"{seed}:{number}", f"{type(error).__name__}: {error}", program))
                continue
            self._count(program, refused)
            if isinstance(program, Program) and refused.startswith(CaptureError.__name__):
                # All programs of this denoiser share its captures, and are refused in the same words.
                return

    def _count(self, program: Drawn, refused: str) -> None:
        things = program.things if isinstance(program, PythonProgram) else ()
        self.tried_with.update(things)
        if refused:
            self.refused[refused.partition(":")[0]] += 1
            self.refused_with.update(things)

    @property
    def judge(self) -> Check:
        checks: dict[str, Check] = {"dynamo": Checker.check_through_dynamo, "python": PythonChecker.check}
        return checks.get(self.kind, Checker.check)

    @property
    def minutes(self) -> float:
        return (time.monotonic() - self.start) / 60

    def in_short(self) -> str:
        count = len(self.programs)
        return (
            f"{count} programs of {self.denoisers} denoisers in {self.minutes:.1f} min, {count / self.minutes:.0f} a"
            f" minute; {len(self.failures)} mismatches; {self.refused.total()} refused"
        )


def run(args: Sequence[str], progress: Progress) -> list[Row]:
    """Return how many programs were tried, refused and failed, and a row for each failure with what replays it."""
    parser = Options("fuzz")
    parser.add_argument("--minutes", type=float, default=1.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--replay", metavar="SEED[:NUMBER]")
    kinds = parser.add_mutually_exclusive_group()
    for kind in ("dynamo", "python"):
        kinds.add_argument(f"--{kind}", action="store_const", const=kind, dest="kind", default="")
    options = parser.read(args)
    state = _SearchState(options.kind)
    if options.replay is not None:
        seed, programs = _replayed(state, options.replay)
        state.check(seed, programs)
    else:
        _search(state, options.seed, options.minutes, progress)
    return list(_rows(state, options.seed))


def _search(state: _SearchState, seed: int, minutes: float, progress: Progress) -> None:
    task = progress.add_task("random programs", total=None)
    reported = state.start
    while state.minutes < minutes:
        known = len(state.failures)
        try:
            programs = state.draw(seed)
        # An error of the draw is a bug as well, and must not end the search.
        except Exception as error:
            state.failures.append((f"{seed}", f"no programs: {type(error).__name__}: {error}", None))
        else:
            state.check(seed, programs)
        progress.update(task, completed=len(state.programs))
        for replay, message, _ in state.failures[known:]:
            progress.console.print(f"--replay {replay}: {message[:300]}", markup=False, highlight=False)
        if time.monotonic() - reported > _REPORT_SECONDS:
            reported = time.monotonic()
            progress.console.print(f"next seed {seed + 1}: {state.in_short()}", markup=False, highlight=False)
        seed += 1


def _replayed(state: _SearchState, text: str) -> tuple[int, list[Drawn]]:
    seed, _, number = text.partition(":")
    if not seed.isdigit() or not (number.isdigit() or not number):
        raise BenchError(f"--replay wants SEED or SEED:NUMBER, two whole numbers, got {text!r}")
    programs = state.draw(int(seed))
    if number and int(number) >= len(programs):
        raise BenchError(f"seed {seed} has the programs 0 to {len(programs) - 1}, got {number}")
    return int(seed), programs[int(number) :][:1] if number else programs


def _rows(state: _SearchState, seed: int) -> Iterator[Row]:
    count = len(state.programs)
    where = {"first_seed": seed, "denoisers": state.denoisers}
    through = {"dynamo": "_through_dynamo", "python": "_in_python"}.get(state.kind, "")
    yield Row("programs", count, "", where)
    yield Row("programs_a_minute", count / state.minutes, "", where)
    yield Row("mismatches", len(state.failures), "", where)
    yield Row(f"refused{through}_percent", 100 * state.refused.total() / max(1, count), "%", where)
    for error, number in sorted(state.refused.items()):
        yield Row("refused", number, "", {"error": error})
    for thing, number in sorted(state.tried_with.items()):
        share = 100 * state.refused_with[thing] / number
        yield Row("refused_with_percent", share, "%", {"thing": thing, "programs": number})
    for index, (replay, message, program) in enumerate(state.failures):
        smaller = program
        if program is not None and index < _MINIMISED:
            smaller = minimise(program, check=state.judge)
        drawn = smaller.to_json() if smaller is not None else ""
        yield Row("mismatch", 1, "", {"replay": replay, "message": message[:500], "program": drawn})
