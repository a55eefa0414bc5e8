"""What a pass is, and the runner that every pass goes through."""

from __future__ import annotations

import enum
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from typing import ClassVar

from l2c_compile.errors import L2CError, PassFailed
from l2c_compile.graphs.facts import Fact, check
from l2c_compile.graphs.loop_graph import ProgramGraph

__all__ = ["Numerics", "Pass", "PassReport", "PassRun", "Pipeline"]


class Numerics(enum.Enum):
    """What a pass may do to the numbers."""

    BITWISE = 0
    """Not one bit changes in eager mode."""
    ROUNDING = 1
    """The same formula, rounded elsewhere (a fused kernel, a batched matrix product)."""
    APPROXIMATE = 2
    """Another formula; only on request."""


@dataclass
class PassReport:
    """What a pass did."""

    rewrites: int = 0
    left_alone: dict[str, str] = field(default_factory=dict)
    """Node name -> why this candidate was not rewritten."""


@dataclass(frozen=True)
class Pass(ABC):
    """One change to a graph. Fields of a subclass are its options, class constants are its contract."""

    name: ClassVar[str]
    needs: ClassVar[frozenset[Fact]] = frozenset()
    gives: ClassVar[frozenset[Fact]] = frozenset()
    breaks: ClassVar[frozenset[Fact]] = frozenset()
    numerics: ClassVar[Numerics] = Numerics.BITWISE
    is_followed_by_proof: ClassVar[bool] = True
    """Whether ``l2c_compile/values.py`` has the rules by which what it makes is equal to what was there."""

    @abstractmethod
    def run(self, program: ProgramGraph) -> PassReport:
        """Edit ``program`` in place. Removes no work itself: it redirects users, ``DropDead`` removes."""


@dataclass(frozen=True)
class PassRun:
    """One pass of one pipeline run, as the runner saw it."""

    name: str
    report: PassReport
    nodes_before: int
    nodes_after: int
    seconds: float


@dataclass(frozen=True)
class Pipeline:
    """Passes in order. The order is checked here, before any graph exists.

    Raises:
        ValueError: a pass needs a fact that no earlier pass gives.
    """

    passes: tuple[Pass, ...]
    assumes: frozenset[Fact] = frozenset()
    """What the graph is known to satisfy before the first pass."""

    def __post_init__(self) -> None:
        facts = set(self.assumes)
        for each in self.passes:
            for fact in each.needs - facts:
                raise ValueError(f"pass '{each.name}' needs {fact.name}, which no earlier pass gives")
            facts = (facts - each.breaks) | each.gives

    @property
    def facts(self) -> frozenset[Fact]:
        """What the graph satisfies after the last pass."""
        facts = self.assumes
        for each in self.passes:
            facts = (facts - each.breaks) | each.gives
        return facts

    @property
    def is_bitwise(self) -> bool:
        """Whether no pass changes a bit."""
        return all(each.numerics is Numerics.BITWISE for each in self.passes)

    def within(self, numerics: Numerics) -> Pipeline:
        """Return the passes that do no more to the numbers than ``numerics``, in the same order."""
        return Pipeline(tuple(p for p in self.passes if p.numerics.value <= numerics.value), self.assumes)

    def without(self, names: Collection[str]) -> Pipeline:
        """Return the pipeline without the passes called ``names``.

        Raises:
            ValueError: no pass has such a name, or a remaining pass needs what one of them gives.
        """
        unknown = set(names) - {p.name for p in self.passes}
        if unknown:
            known = [p.name for p in self.passes]
            raise ValueError(f"there is no pass '{min(unknown)}'; there are {', '.join(known)}")
        return Pipeline(tuple(p for p in self.passes if p.name not in names), self.assumes)

    def run(self, program: ProgramGraph, on_pass: Callable[[str], None] | None = None) -> list[PassRun]:
        """Run every pass on ``program`` in place, checking the facts that hold after each.

        Args:
            program: the graph to edit.
            on_pass: told the name of each pass before it runs, for progress.

        Raises:
            PassFailed: a pass raised, or left a graph that violates a fact.
        """
        facts = set(self.assumes)
        done: list[PassRun] = []
        for each in self.passes:
            if on_pass is not None:
                on_pass(each.name)
            before, start = len(program.graph.nodes), time.perf_counter()
            try:
                report = each.run(program)
                facts = (facts - each.breaks) | each.gives
                seconds = time.perf_counter() - start
                check(program, facts)
            except L2CError as error:
                if isinstance(error, ValueError):  # the caller's mistake, found by a pass
                    raise
                raise _failed(each, done, error) from error
            except Exception as error:
                raise _failed(each, done, error) from error
            done.append(PassRun(each.name, report, before, len(program.graph.nodes), seconds))
        return done


def _failed(failing: Pass, done: list[PassRun], error: Exception) -> PassFailed:
    after = ", ".join(run.name for run in done) or "nothing"
    return PassFailed(f"pass '{failing.name}' failed (after: {after}): {error}")
