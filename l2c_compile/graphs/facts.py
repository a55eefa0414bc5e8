"""The executable specification of a graph: what must hold of it, fact by fact.

A pass declares which facts it needs, gives and breaks; the pipeline runner calls ``check`` after every pass. A new
invariant is written here first, and described in ``passes/README.md`` second.
"""

from __future__ import annotations

import enum
from collections.abc import Callable, Iterable

import torch
from torch import nn
from torch.fx.node import Node

from l2c_compile.errors import VerificationError
from l2c_compile.graphs.loop_graph import EvaluationGraph, LoopGraph, ProgramGraph
from l2c_compile.graphs.marks import CACHE_READ, INPUT_PORT, SITE, cache_reads, site_marks
from l2c_compile.graphs.nodes import draws_random_numbers


class Fact(enum.Enum):
    """A statement that can hold of a graph between two passes."""

    SITES_MARKED = "every site of every evaluation is an l2c::site node"
    READS_CACHE = "every reused site is read from the cache: its own value has no user"
    NO_DEAD_NODES = "every node has a user, is an input, an output or a mark of an evaluation, or draws random numbers"
    READS_LOWERED = "no l2c::cache_read is left"
    SITES_LOWERED = "no l2c::site is left"
    OUTLINED = "every region that is called is a submodule of the root"


def check(program: ProgramGraph, facts: Iterable[Fact]) -> None:
    """Raise ``VerificationError`` at the first node that violates the graph's form or one of ``facts``."""
    _check_form(program)
    for fact in facts:
        _CHECKS[fact](program)


def _check_form(program: ProgramGraph) -> None:
    """Raise unless the graph is functional ATen in topological order, with weights by reference."""
    seen: set[Node] = set()
    for node in program.graph.nodes:
        for argument in node.all_input_nodes:
            if argument not in seen:
                raise _violation("nodes are in topological order", node, f"uses '{argument.name}', which comes later")
        seen.add(node)
        if node.op in ("call_module", "call_method"):
            raise _violation("graphs are functional ATen", node, f"is a {node.op}")
        if isinstance(node.target, torch._ops.OpOverload) and node.target._schema.is_mutable:
            raise _violation("graphs are functional ATen", node, f"{node.target} writes into an argument")
        if node.op == "get_attr" and not _has(program.root, str(node.target)):
            raise _violation("weights are attributes of the root", node, f"the root has no '{node.target}'")


def _has(root: nn.Module, path: str) -> bool:
    owner: object = root
    for name in path.split("."):
        if not hasattr(owner, name):
            return False
        owner = getattr(owner, name)
    return True


def _sites_marked(program: ProgramGraph) -> None:
    seen: set[tuple[str, int, int]] = set()
    for mark in site_marks(program.graph):
        key = (mark.site, mark.port, mark.evaluation)
        if key in seen:
            raise _violation("a site has one value an evaluation and port", mark.node, f"{key} is marked twice")
        seen.add(key)
    if isinstance(program, LoopGraph):
        marked = {(site, evaluation) for site, _, evaluation in seen}
        for evaluation, site, reuse in program.reads():
            for e in (evaluation, *reuse.sources):
                if (str(site), e) not in marked:
                    raise VerificationError(f"site '{site}' is not marked in evaluation {e}")


def _reads_cache(program: ProgramGraph) -> None:
    if not isinstance(program, LoopGraph):
        return
    reused = {(str(site), e): reuse for e, site, reuse in program.reads()}
    for mark in site_marks(program.graph):
        if mark.port != INPUT_PORT and (mark.site, mark.evaluation) in reused and mark.node.users:
            raise _violation(Fact.READS_CACHE.value, mark.node, f"is still used by {_names(mark.node.users)}")
    for read in cache_reads(program.graph):
        expected = reused.get((read.site, read.evaluation))
        if expected is None or expected.sources != tuple(read.sources):
            what = f"reads {tuple(read.sources)}, the schedule says {expected}"
            raise _violation("a cache read follows the schedule", read.node, what)


def _no_dead_nodes(program: ProgramGraph) -> None:
    for node in program.graph.nodes:
        if node.users or node.op in ("placeholder", "output") or draws_random_numbers(node):
            continue
        if node.target is not SITE or not isinstance(program, EvaluationGraph):
            raise _violation(Fact.NO_DEAD_NODES.value, node, "has no user")


def _outlined(program: ProgramGraph) -> None:
    for node in program.graph.find_nodes(op="call_function", target=torch.ops.higher_order.invoke_subgraph):
        body = node.args[0]
        region = program.root._modules.get(str(body.target)) if isinstance(body, Node) else None
        if not isinstance(region, torch.fx.GraphModule):
            raise _violation(Fact.OUTLINED.value, node, "calls something else")


def _none_left(target: torch._ops.OpOverload[..., torch.Tensor], fact: Fact) -> Callable[[ProgramGraph], None]:
    def check_none_left(program: ProgramGraph) -> None:
        for node in program.graph.find_nodes(op="call_function", target=target):
            raise _violation(fact.value, node, "is one")

    return check_none_left


_CHECKS: dict[Fact, Callable[[ProgramGraph], None]] = {
    Fact.SITES_MARKED: _sites_marked,
    Fact.READS_CACHE: _reads_cache,
    Fact.NO_DEAD_NODES: _no_dead_nodes,
    Fact.READS_LOWERED: _none_left(CACHE_READ, Fact.READS_LOWERED),
    Fact.SITES_LOWERED: _none_left(SITE, Fact.SITES_LOWERED),
    Fact.OUTLINED: _outlined,
}


def _violation(rule: str, node: Node, what: str) -> VerificationError:
    evaluation = node.meta.get("evaluation")
    place = "" if evaluation is None else f" of evaluation {evaluation}"
    return VerificationError(
        f"{rule}, but node '{node.name}'{place} {what}; {node.format_node()}; its users: {_names(node.users)}"
    )


def _names(nodes: Iterable[Node]) -> str:
    return ", ".join(node.name for node in nodes) or "none"
