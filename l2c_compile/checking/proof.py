"""The structural proof: a static graph computes what its loop and schedule say, shown without running it.

The loop as traced and the evaluations as captured, before any pass, are interpreted on values (``values.py``) instead
of tensors: a reused site gets what its rule makes of the site's values at the sources, as the schedule says. So every
site of every evaluation, and the result, is one expression. The finished graph is interpreted likewise, and must come
to the same results. Nothing is shared with the passes, ``unroll`` or the pipeline.

What is proven:

form        the graph is closed, acyclic and functional; users and operands agree
values      its results are the expressions that loop, denoiser and schedule say, so every cache read descends from the
            right site of the right evaluation through the right operations
sites       so is every value that the graph notes as a site's
work        every operation is one that a result needs, and none is done more often than in the loop itself: nothing of
            a skipped site remains
draws       the random numbers of the loop are drawn, each once, in order
constants   what was folded is, bit for bit, what its recipe gives
notes       forms, evaluations and site notes on the nodes are true
memory      the plan frees no kept value before its last reader, keeps none longer, leaves none out, and gives no two
            that are alive together one slot

For which pipeline: after ``BITWISE`` passes equal means bit for bit (``exact``). After ``ROUNDING`` passes it means the
same formula, up to the rules of ``values.py``: batched and pruned projections are resolved to rows of input and weight,
sums are multisets. There, what those passes themselves add (concatenations, batched projections, partial sums) counts
as needed work if it is read completely. Regions are read through their calls.

What is taken as given: ``torch.export`` and the tracer say truly what denoiser and loop do, and torch's operators do
what their schemas say. Weights count by identity, other constants by content; on the meta device constants have none.
"""

from __future__ import annotations

import io
from collections.abc import Collection
from dataclasses import asdict, dataclass

import torch
from rich.console import Console, ConsoleOptions, RenderResult
from rich.table import Table
from rich.text import Text
from torch import nn

from l2c_compile.analyses.memory_plan import MemoryPlan, plan_memory
from l2c_compile.checking.differences import Comparison
from l2c_compile.checking.expected import ExpectedValues
from l2c_compile.checking.finding import Finding
from l2c_compile.checking.found import FoundValues
from l2c_compile.checking.notes import NodeForms, constant_findings, form_findings, memory_findings
from l2c_compile.checking.values import Leaves, ValueTable, needed_for
from l2c_compile.errors import VerificationError
from l2c_compile.graphs.facts import Fact
from l2c_compile.graphs.loop_graph import LoopGraph
from l2c_compile.graphs.skeleton import LoopSkeleton

aten = torch.ops.aten

FINISHED = frozenset({Fact.READS_LOWERED, Fact.SITES_LOWERED, Fact.NO_DEAD_NODES})
"""The facts that hold after a whole pipeline."""

_CHECKS = ("form", "values", "sites", "work", "draws", "constants", "notes", "memory")


@dataclass(frozen=True)
class Proof:
    """The outcome of ``prove``; ``print`` shows it."""

    findings: tuple[Finding, ...]
    exact: bool
    """Whether equal means bit for bit in eager mode; otherwise it means the same formula, rounded elsewhere."""
    num_evaluations: int
    num_nodes: int
    num_computed_sites: int
    """Number of site values (evaluation, site, port) that are computed and needed, each one expression of the graph."""
    num_reads: int
    """Number of site values that are read and needed, each of them what the rule makes of the right sources."""
    num_kept: int
    """Number of values in the memory plan."""
    not_covered: tuple[str, ...] = ()
    """Passes that run after the proof; it says nothing of the kernels and packed caches that they insert."""

    @property
    def holds(self) -> bool:
        """Whether the graph is proven right."""
        return not self.findings

    def to_dict(self) -> dict[str, object]:
        """Return the proof in JSON types."""
        return {"holds": self.holds, **asdict(self), "findings": [asdict(finding) for finding in self.findings]}

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        how = "bit for bit" if self.exact else "up to rounding"
        if self.not_covered:
            how += f", before {' and '.join(self.not_covered)}"
        if self.holds:
            yield Text(
                f"structure proven {how}: {self.num_nodes} operations, {self.num_computed_sites} site values computed,"
                f" {self.num_reads} read from the cache, {self.num_kept} kept in memory"
            )
            return
        table = Table(title=f"structure not proven {how}", title_justify="left")
        for heading in ("check", "evaluation", "node", "what"):
            table.add_column(heading)
        for each in self.findings:
            where = "" if each.evaluation is None else str(each.evaluation)
            table.add_row(each.check, where, Text(each.node or ""), Text(each.message))
        yield table

    def __str__(self) -> str:
        text = io.StringIO()
        Console(file=text, width=110).print(self)
        return text.getvalue().rstrip("\n")


def prove(
    graph: LoopGraph,
    skeleton: LoopSkeleton,
    denoiser: nn.Module,
    *,
    exact: bool,
    facts: Collection[Fact] = FINISHED,
    plan: MemoryPlan | None = None,
) -> Proof:
    """Show that ``graph`` computes what ``skeleton`` says under the graph's schedule, or find where it does not.

    This takes time linear in evaluations x sites. Nothing is run but the recipes of folded constants.

    Args:
        graph: the loop graph after the passes.
        skeleton: the same loop as ``trace_loop`` returns it, with captured evaluations, before any pass.
        denoiser: the module that both were made from.
        exact: whether equal means bit for bit; otherwise it means up to rounding.
        facts: the facts that the passes promise of the graph.
        plan: the memory plan; None takes what ``plan_memory`` finds.
    """
    nodes = list(graph.graph.nodes)
    findings = list(form_findings(graph, nodes, facts))
    expected = read = None
    num_kept = 0
    if not findings:
        table = ValueTable(exact=exact)
        leaves = Leaves(table, denoiser)
        expected = ExpectedValues(skeleton, graph.schedule, table, leaves)
        try:
            read = FoundValues(graph, table, leaves)
            node_forms = NodeForms(graph)
            plan = plan_memory(graph) if plan is None else plan
        except VerificationError as error:
            findings.append(Finding("form", str(error)))
        else:
            num_kept = len(plan.kept)
            comparison = Comparison(graph, expected, read, table, Fact.NO_DEAD_NODES not in facts)
            findings += [*comparison.findings(), *constant_findings(graph), *node_forms.findings()]
            findings += memory_findings(node_forms, plan)
    needed = needed_for(expected.results) if expected is not None else set()
    findings.sort(key=lambda finding: _CHECKS.index(finding.check))
    return Proof(
        findings=tuple(findings),
        exact=exact,
        num_evaluations=graph.num_evaluations,
        num_nodes=sum(node.op == "call_function" for node in nodes),
        num_computed_sites=0 if expected is None else sum(value in needed for value in expected.computed.values()),
        num_reads=0 if expected is None else sum(value in needed for value in expected.reads.values()),
        num_kept=num_kept,
    )


def examine(graph: LoopGraph, facts: Collection[Fact] = FINISHED) -> tuple[Finding, ...]:
    """Return what is wrong with a graph by itself, whatever it should compute: form, notes, constants, memory plan."""
    findings = list(form_findings(graph, list(graph.graph.nodes), facts))
    if not findings:
        forms = NodeForms(graph)
        findings += [*constant_findings(graph), *forms.findings(), *memory_findings(forms, plan_memory(graph))]
    return tuple(findings)
