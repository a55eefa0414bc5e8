"""A tiny loop under a schedule, with its trace, for tests of what the proof is made of."""

from __future__ import annotations

from dataclasses import dataclass

from torch import fx
from torch.fx.node import Target

from l2c_compile import CacheSchedule
from l2c_compile.checking.expected import ExpectedValues
from l2c_compile.checking.found import FoundValues
from l2c_compile.checking.values import Leaves, ValueTable
from l2c_compile.compile import graph_of, trace_and_capture
from l2c_compile.frontend.stand_in import Loop
from l2c_compile.graphs.loop_graph import LoopGraph
from l2c_compile.graphs.skeleton import LoopSkeleton
from l2c_compile.passes.base import Pipeline
from l2c_compile.passes.pipeline import BITWISE
from tests.residual_graphs import TABLE
from tests.tiny import Residual, draw, residual, steps


@dataclass
class Traced:
    """A loop graph, what it was made from, and the values of both in one table."""

    model: Residual
    trace: LoopSkeleton
    graph: LoopGraph
    table: ValueTable

    def expected(self) -> ExpectedValues:
        return ExpectedValues(self.trace, self.graph.schedule, self.table, Leaves(self.table, self.model))

    def found(self) -> FoundValues:
        return FoundValues(self.graph, self.table, Leaves(self.table, self.model))

    def first(self, target: Target, evaluation: int | None = None) -> fx.Node:
        """Return the first node of an operation, in any evaluation or in the one that is named."""
        nodes = self.graph.graph.find_nodes(op="call_function", target=target)
        found: fx.Node = next(n for n in nodes if evaluation is None or n.meta.get("evaluation") == evaluation)
        return found


def traced(table: dict[str, list[int]] = TABLE, loop: Loop | None = None, passes: Pipeline = BITWISE) -> Traced:
    """Trace and compile a loop of three evaluations."""
    model, schedule = residual(), CacheSchedule.from_table(table)
    trace = trace_and_capture(model, loop or steps(schedule.num_evaluations), schedule, draw(3, 4), {})
    graph, _ = graph_of(trace, model, schedule, passes)
    return Traced(model, trace, graph, ValueTable(exact=True))
