"""What a pass is, and the runner that every pass goes through."""

from __future__ import annotations

import enum
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from typing import Any, ClassVar

from torch.fx.node import Node

from l2c_compile.errors import L2CError, PassFailed
from l2c_compile.graphs.facts import Fact, check
from l2c_compile.graphs.loop_graph import EvaluationGraph, LoopGraph, ProgramGraph
from l2c_compile.graphs.nodes import evaluation_of, module_path
from l2c_compile.graphs.strides import addresses_memory, follow


class Numerics(enum.Enum):
    """What a pass may do to the numbers."""

    BITWISE = 0
    """No bit changes in eager mode."""
    ROUNDING = 1
    """The same formula, rounded elsewhere (a fused kernel, a batched matrix product)."""
    APPROXIMATE = 2
    """The formula may be another one; only on request."""


class Reason:
    """Why a candidate is left alone. The text is made only when it is asked for, because texts cost compile time."""

    __slots__ = ("details", "text")

    def __init__(self, text: str, *details: object) -> None:
        self.text = text
        """The text, with a ``{}`` for each detail; equal for candidates that count together."""
        self.details = details

    def __str__(self) -> str:
        return self.text.format(*self.details)


@dataclass
class LeftAlone:
    """The candidates that a pass left alone for one reason."""

    reason: Reason
    """The reason, with the details of the first of them."""
    name: str
    """The name of the first one's node."""
    module: str
    """The path of the module that the first one belongs to; "" where it belongs to none."""
    evaluation: int | None
    """The evaluation that the first one belongs to; None where it belongs to none."""
    count: int = 1


@dataclass
class PassReport:
    """What a pass did."""

    rewrites: int = 0
    left_alone: dict[str, LeftAlone] = field(default_factory=dict)
    """The candidates that were left alone, by the text of the reason."""
    other_strides: set[Node] = field(default_factory=set)
    """The nodes that took the place of nodes with other strides."""

    def leave(self, candidate: Node, reason: Reason) -> None:
        """Note why a candidate is not rewritten."""
        known = self.left_alone.get(reason.text)
        if known is None:
            where = module_path(candidate), evaluation_of(candidate)
            self.left_alone[reason.text] = LeftAlone(reason, candidate.name, *where)
        else:
            known.count += 1

    def reasons(self) -> dict[str, int]:
        """Return why candidates were left alone, in words, and how many of them."""
        return {str(each.reason): each.count for each in self.left_alone.values()}

    def note(self, candidate: Node, reason: Reason | None) -> None:
        """Count a rewrite, or note why there is none."""
        if reason is None:
            self.rewrites += 1
        else:
            self.leave(candidate, reason)


@dataclass(frozen=True)
class Pass(ABC):
    """One change to a graph of any kind. Fields of a subclass are its options, class constants are its contract."""

    name: ClassVar[str]
    needs: ClassVar[frozenset[Fact]] = frozenset()
    gives: ClassVar[frozenset[Fact]] = frozenset()
    breaks: ClassVar[frozenset[Fact]] = frozenset()
    numerics: ClassVar[Numerics] = Numerics.BITWISE
    is_followed_by_proof: ClassVar[bool] = True
    """Whether ``l2c_compile/checking/values.py`` has the rules that prove the new nodes equal to those they replace."""

    changes_strides: ClassVar[bool] = False
    """Whether the pass chooses other strides than the program has. It is then not run on a graph that addresses memory
    by strides, and what the graph returns is given the strides that it had."""
    graph_kind: ClassVar[type[ProgramGraph]] = ProgramGraph

    @abstractmethod
    def rewrite(self, graph: Any, report: PassReport) -> None:  # noqa: ANN401 - what ``graph_kind`` says
        """Edit ``graph`` in place. A pass redirects users; the work that is then unused is removed by ``DropDead``.

        Args:
            graph: the graph to edit.
            report: the report, which gets each rewrite, the reason why a candidate is left alone, and the values that
                have other strides than those they replace.
        """

    def run(self, graph: ProgramGraph) -> PassReport:
        """Edit ``graph`` in place, find the strides of all that is computed from what changed, and return the report.

        Raises:
            TypeError: if the pass is for another kind of graph.
        """
        if not isinstance(graph, self.graph_kind):
            wanted, got = self.graph_kind.__name__, type(graph).__name__
            raise TypeError(f"pass '{self.name}' wants a graph of kind {wanted}, got {got}")
        report = PassReport()
        by_strides = addresses_memory(graph.graph) if self.changes_strides else None
        if by_strides is not None:
            report.leave(by_strides, Reason("addresses memory by strides, so none may change"))
            return report
        self.rewrite(graph, report)
        follow(graph.graph, report.other_strides, restore_results=self.changes_strides)
        return report


class LoopPass(Pass):
    """A change to a whole loop."""

    graph_kind: ClassVar[type[ProgramGraph]] = LoopGraph

    @abstractmethod
    def rewrite(self, graph: LoopGraph, report: PassReport) -> None:
        """See ``Pass``."""


class EvaluationPass(Pass):
    """A change to a single evaluation."""

    graph_kind: ClassVar[type[ProgramGraph]] = EvaluationGraph

    @abstractmethod
    def rewrite(self, graph: EvaluationGraph, report: PassReport) -> None:
        """See ``Pass``."""


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
        ValueError: if a pass needs a fact that no earlier pass gives, or two passes want graphs of different kinds.
    """

    passes: tuple[Pass, ...]
    assumes: frozenset[Fact] = frozenset()
    """The facts that the graph satisfies before the first pass."""

    def __post_init__(self) -> None:
        facts = set(self.assumes)
        for each in self.passes:
            for fact in each.needs - facts:
                raise ValueError(f"pass '{each.name}' needs {fact.name}, which no earlier pass gives")
            facts = (facts - each.breaks) | each.gives
        kinds = {each.graph_kind.__name__: each.name for each in self.passes if each.graph_kind is not ProgramGraph}
        if len(kinds) > 1:
            wanted = " and ".join(f"pass '{name}' a graph of kind {kind}" for kind, name in kinds.items())
            raise ValueError(f"no graph suits all passes: {wanted}")

    @property
    def facts(self) -> frozenset[Fact]:
        """The facts that the graph satisfies after the last pass."""
        facts = self.assumes
        for each in self.passes:
            facts = (facts - each.breaks) | each.gives
        return facts

    @property
    def is_bitwise(self) -> bool:
        """Whether no pass changes a bit."""
        return all(each.numerics is Numerics.BITWISE for each in self.passes)

    def within(self, numerics: Numerics) -> Pipeline:
        """Return the passes that change numbers no more than ``numerics`` allows, in the same order."""
        return Pipeline(tuple(p for p in self.passes if p.numerics.value <= numerics.value), self.assumes)

    def without(self, names: Collection[str]) -> Pipeline:
        """Return the pipeline without the passes called ``names``.

        Raises:
            ValueError: if no pass has such a name, or a remaining pass needs what one of them gives.
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
            on_pass: a function that is told the name of each pass before it runs, for progress.

        Raises:
            PassFailed: if a pass raised, or left a graph that violates a fact.
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
