"""Note when each value of an evaluation graph is known (its binding time).

    emb = linear(sin(t), W)   CONSTANT      c = add(emb, table[y])    STEP
    table[y]                  CONDITION     h = mul(x, c)             LATENT

Nothing is rewritten: ``unroll`` reads the notes and copies per evaluation only what it must.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from l2c_compile.graphs.facts import Fact
from l2c_compile.graphs.loop_graph import Binding, Dependency, ProgramGraph
from l2c_compile.passes.base import Pass, PassReport

__all__ = ["BindTimes"]


@dataclass(frozen=True)
class BindTimes(Pass):
    """Write ``meta["binding"]`` on every node from the ``meta["depends"]`` of the placeholders."""

    name: ClassVar[str] = "bind-times"
    gives: ClassVar[frozenset[Fact]] = frozenset({Fact.TIMES_BOUND})

    def run(self, program: ProgramGraph) -> PassReport:  # noqa: D102
        nodes = program.graph.nodes
        for node in nodes:
            if node.op == "output":
                continue
            if node.op != "placeholder":
                arguments = (argument.meta["depends"] for argument in node.all_input_nodes)
                node.meta["depends"] = frozenset().union(*arguments)
            node.meta["binding"] = _binding(node.meta["depends"])
        return PassReport(rewrites=0)


def _binding(depends: frozenset[Dependency]) -> Binding:
    if Dependency.LATENT in depends:
        return Binding.LATENT
    if Dependency.CONDITION not in depends:
        return Binding.CONSTANT
    return Binding.STEP if Dependency.TIME in depends else Binding.CONDITION
