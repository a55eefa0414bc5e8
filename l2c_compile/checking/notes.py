"""Check a graph by itself: its form, the notes on its nodes, its constants and its memory plan."""

from __future__ import annotations

import operator
from collections.abc import Collection, Iterator, Sequence
from typing import Any, cast

import networkx as nx
import torch
from torch import Tensor, fx
from torch._ops import OpOverload
from torch.fx.node import Node

from l2c_compile.analyses.memory_plan import MemoryPlan
from l2c_compile.checking.finding import Finding, finding_at
from l2c_compile.checking.operators import Inference, Inferred, bind, flattened, on_values
from l2c_compile.checking.values import content_of
from l2c_compile.errors import VerificationError
from l2c_compile.graphs.facts import Fact, check
from l2c_compile.graphs.forms import TensorForm
from l2c_compile.graphs.loop_graph import LoopGraph
from l2c_compile.graphs.nodes import draws_random_numbers, evaluation_of, root_tensor


def form_findings(graph: LoopGraph, nodes: Sequence[Node], facts: Collection[Fact]) -> Iterator[Finding]:
    """Yield what keeps the graph from being a well-formed program."""
    inside = set(nodes)
    operands = nx.DiGraph()
    operands.add_nodes_from(nodes)
    for node in nodes:
        for argument in node.all_input_nodes:
            operands.add_edge(argument, node)
            if argument not in inside:
                yield finding_at(node, "form", f"uses '{argument.name}', which is no node of the graph")
                return
            if node not in argument.users:
                yield finding_at(node, "form", f"uses '{argument.name}', which does not know of it")
        for user in node.users:
            if user not in inside or node not in user.all_input_nodes:
                yield finding_at(node, "form", f"is said to be used by '{user.name}', but is not")
    if not nx.is_directed_acyclic_graph(operands):
        cycle = [node.name for node, _ in nx.find_cycle(operands)]
        yield Finding("form", f"the nodes {', '.join(cycle)} wait for each other", node=cycle[0])
        return
    try:
        check(graph, set(facts) - {Fact.NO_DEAD_NODES})
    except VerificationError as error:
        yield Finding("form", str(error))


def constant_findings(graph: LoopGraph) -> Iterator[Finding]:
    """Yield the folded constants whose values are not what their recipe gives."""
    for folded in graph.folded:
        with torch.no_grad():
            values = fx.Interpreter(graph.root, graph=folded.recipe).run()
        for name, value in zip(folded.names, values, strict=True):
            kept = graph.root.get_buffer(name)
            if kept.dtype != value.dtype or kept.shape != value.shape or content_of(kept) != content_of(value):
                yield Finding("constants", f"'{name}' is not what its recipe gives; if weights changed, call refresh()")
                return


class NodeForms:
    """Derives forms, memory and evaluations of the nodes of a flat loop graph from its inputs."""

    def __init__(self, graph: LoopGraph) -> None:
        self.graph = graph
        self.nodes = list(graph.graph.nodes)
        self.is_flat = not any(node.target is torch.ops.higher_order.invoke_subgraph for node in self.nodes)
        self.forms: dict[Node, Any] = {}
        self.base: dict[Node, Node] = {}
        """For each node, the node that allocated its memory."""
        self.early: set[Node] = set()
        """The nodes that depend on no noise and no random draw."""
        self._inference = Inference()
        num_inputs = 0
        for node in self.nodes if self.is_flat else ():
            operands = node.all_input_nodes
            if node.op == "placeholder":
                self.forms[node], self.base[node] = TensorForm.of(node.meta["val"]), node
                if num_inputs >= graph.num_noise:
                    self.early.add(node)
                num_inputs += 1
            elif node.op == "get_attr":
                self.forms[node], self.base[node] = TensorForm.of(root_tensor(graph.root, node)), node
                self.early.add(node)
            elif node.op == "call_function":
                inferred = self._infer(node)
                self.forms[node] = inferred.forms
                self.base[node] = node if inferred.shares is None else self.base[operands[inferred.shares]]
                if not draws_random_numbers(node) and self.early.issuperset(operands):
                    self.early.add(node)

    def _infer(self, node: Node) -> Inferred:
        args, kwargs = on_values(node, self.forms)
        if node.target is operator.getitem:
            source = node.all_input_nodes[0]
            return Inferred(self.forms[source][cast(int, args[1])], None if self.base[source] is source else 0)
        target = cast(OpOverload, node.target)
        inferred = self._inference.of(target, bind(target, args, kwargs))
        if inferred.shares is None:
            return inferred
        # Operands are counted by position among the tensors of the call; all_input_nodes has each node only once.
        operands = list(flattened(bind(target, *on_values(node, {n: n for n in node.all_input_nodes}))))
        return Inferred(inferred.forms, node.all_input_nodes.index(operands[inferred.shares]))

    def findings(self) -> Iterator[Finding]:
        """Yield the first node whose notes are not true."""
        for node, form in self.forms.items():
            noted = node.meta.get("val")
            noted_forms = tuple(map(_noted, noted)) if isinstance(noted, (tuple, list)) else _noted(noted)
            if not _agree(noted_forms, form):
                yield finding_at(node, "notes", f"returns {form}, its note says {noted_forms}")
                return
            if node.op != "call_function" or node in self.early:
                continue
            own = evaluation_of(node)
            made = [e for a in node.all_input_nodes if a not in self.early and (e := evaluation_of(a)) is not None]
            if own is not None and made and max(made) > own:
                yield finding_at(node, "notes", f"reads a value of evaluation {max(made)}, which comes later")
                return


def _noted(value: object) -> TensorForm | None:
    return TensorForm.of(value) if isinstance(value, Tensor) else None


def _agree(noted: object, derived: object) -> bool:
    if isinstance(noted, tuple) and isinstance(derived, tuple):
        return len(noted) == len(derived) and all(map(_agree, noted, derived))
    if not isinstance(noted, TensorForm) or not isinstance(derived, TensorForm):
        return noted is None and derived is None
    strides = zip(noted.shape, noted.stride, derived.stride, strict=True) if noted.shape == derived.shape else ()
    equal = (noted.shape, noted.dtype, noted.device) == (derived.shape, derived.dtype, derived.device)
    return equal and all(a == b for size, a, b in strides if size > 1)


def memory_findings(nodes: NodeForms, plan: MemoryPlan) -> Iterator[Finding]:
    """Yield where a memory plan is not what the graph needs."""
    if not nodes.is_flat:
        return
    position = {node: index for index, node in enumerate(nodes.nodes)}
    by_name = {node.name: node for node in nodes.nodes}
    readers: dict[Node, list[Node]] = {}
    for node in nodes.nodes:
        for operand in node.all_input_nodes:
            base = nodes.base[operand]
            if nodes.base.get(node) is not base:
                readers.setdefault(base, []).append(node)
    planned = {by_name[value.name]: value for value in plan.kept if value.name in by_name}
    if len(planned) < len(plan.kept):
        yield Finding("memory", "the plan keeps a value that the graph does not have, or one twice")
    for base, reading in readers.items():
        made = evaluation_of(base)
        read_later = any((evaluation_of(reader) or 0) > made for reader in reading) if made is not None else False
        if read_later and base not in planned and base not in nodes.early and base.op == "call_function":
            yield finding_at(base, "memory", "is read by a later evaluation, and the plan does not keep it")
            return
    for base, value in planned.items():
        last = max((position[reader] for reader in readers.get(base, ())), default=-1)
        if value.end < last:
            yield finding_at(
                base, "memory", f"is freed at {value.end} and read by '{nodes.nodes[last].name}' at {last}"
            )
        elif value.end > last:
            yield finding_at(base, "memory", f"is kept until {value.end}, and read for the last time at {last}")
        elif value.begin < position[base] or (value.last_read_in > value.made_in and value.begin != position[base]):
            yield finding_at(base, "memory", f"is made at {position[base]}, and the plan begins at {value.begin}")
        elif value.num_bytes < _bytes(nodes.forms[base]) or plan.slot_bytes[value.slot] < value.num_bytes:
            yield finding_at(base, "memory", f"does not fit into its slot of {plan.slot_bytes[value.slot]} bytes")
    busy: dict[int, tuple[int, str]] = {}
    for value in sorted(plan.kept, key=lambda each: each.begin):
        until, name = busy.get(value.slot, (-1, ""))
        if value.begin <= until:
            yield Finding("memory", f"'{value.name}' and '{name}' are alive together in slot {value.slot}", value.name)
        busy[value.slot] = value.end, value.name


def _bytes(form: object) -> int:
    """Return the size in bytes of the memory that forms span; 0 where there is no form."""
    if isinstance(form, tuple):
        return sum(map(_bytes, form))
    if not isinstance(form, TensorForm) or 0 in form.shape:
        return 0
    extent = 1 + sum((size - 1) * stride for size, stride in zip(form.shape, form.stride, strict=True))
    return extent * form.dtype.itemsize
