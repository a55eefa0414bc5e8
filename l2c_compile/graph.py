"""The graphs the compiler works on, the two marker ops in them, and the notes their nodes carry.

Two kinds of graph, both functional ATen on ``torch.fx``:

``EvaluationGraph``  one call of the denoiser, as captured; placeholders are the tensors of the call.
``LoopGraph``        the whole loop, every evaluation in execution order; placeholders are the loop's tensors.

Weights are ``get_attr`` nodes named ``denoiser.<path>``: referenced, never copied. Two ops mark what a schedule can
change. Both are ordinary ops that run, so that a graph can be executed after any pass:

``l2c::site(value, site, port, evaluation)``  the value of a site (port 0, 1, ...: the module's tensor outputs; port
                                              -1: its input). An identity that outlives every rewrite of its argument.
``l2c::cache_read(history, ...)``             a value made by a rule from what the site held at earlier evaluations.
"""

from __future__ import annotations

import enum
import heapq
import json
import operator
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._ops import OpOverload
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.node import Argument, Node
from torch.utils._pytree import TreeSpec

from l2c_compile.rules import Reading, Rule, rule_from_dict
from l2c_compile.schedule import CacheSchedule, Reuse
from l2c_compile.sites import Site

__all__ = [
    "CACHE_READ",
    "INPUT_PORT",
    "SITE",
    "Binding",
    "CacheRead",
    "Dependency",
    "EvaluationGraph",
    "Expression",
    "FoldedConstants",
    "LoopGraph",
    "ProgramGraph",
    "SiteMark",
    "argument_key",
    "arguments_of",
    "cache_reads",
    "draws_random_numbers",
    "emit",
    "evaluation_of",
    "expression",
    "form_of",
    "infer",
    "is_pointwise",
    "module_path",
    "num_bytes",
    "output_list",
    "outputs_of",
    "packet_of",
    "relaid",
    "site_marks",
    "strided_copy",
    "write_into",
]

INPUT_PORT = -1
"""The port of a site's input, marked only where the site or its rule needs it."""


def strided_copy(value: Tensor) -> Tensor:
    """Return a copy with memory of its own and exactly the strides of ``value``, expanded dimensions included."""
    copy = torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device=value.device)
    write_into(copy, value)
    return copy


def write_into(target: Tensor, value: Tensor) -> None:
    """Write ``value`` into a tensor of its strides; what expanded dimensions share is written once."""
    for dim, (size, stride) in enumerate(zip(target.shape, target.stride(), strict=True)):
        if stride == 0 and size > 1:
            target, value = target.narrow(dim, 0, 1), value.narrow(dim, 0, 1)
    target.copy_(value)


@torch.library.custom_op("l2c::site", mutates_args=())
def _site(value: Tensor, site: str, port: int, evaluation: int) -> Tensor:
    # An op may not return its input, and the copy must keep the strides that the graph was captured with.
    return strided_copy(value)


@_site.register_fake
def _(value: Tensor, site: str, port: int, evaluation: int) -> Tensor:
    return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device=value.device)


@torch.library.custom_op("l2c::cache_read", mutates_args=())
def _cache_read(
    history: list[Tensor],
    inputs: list[Tensor],
    current_input: Tensor | None,
    site: str,
    port: int,
    evaluation: int,
    sources: list[int],
    rule: str,
) -> Tensor:
    reading = Reading(history=tuple(history), inputs=tuple(inputs), current_input=current_input)
    return strided_copy(rule_from_dict(json.loads(rule)).combine(reading))


@_cache_read.register_fake
def _(
    history: list[Tensor],
    inputs: list[Tensor],
    current_input: Tensor | None,
    site: str,
    port: int,
    evaluation: int,
    sources: list[int],
    rule: str,
) -> Tensor:
    reading = Reading(history=tuple(history), inputs=tuple(inputs), current_input=current_input)
    value = rule_from_dict(json.loads(rule)).combine(reading)
    return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device=value.device)


SITE: torch._ops.OpOverload[..., Tensor] = torch.ops.l2c.site.default
CACHE_READ: torch._ops.OpOverload[..., Tensor] = torch.ops.l2c.cache_read.default


class Dependency(enum.Enum):
    """What a value of the evaluation graph is made from, besides weights."""

    TIME = "time"
    """Constants of the loop that differ between evaluations."""
    CONDITION = "condition"
    """The loop's conditions."""
    LATENT = "latent"
    """The noise, a random draw, or what an evaluation returned."""


class Binding(enum.Enum):
    """When a value of the evaluation graph is known (its binding time)."""

    CONSTANT = "constant"
    """From weights and timesteps alone: known at compile time."""
    CONDITION = "condition"
    """From the conditions (labels, prompts): known once a call."""
    STEP = "step"
    """From timestep and condition, not the latent: known before the loop starts, for every evaluation."""
    LATENT = "latent"
    """From the latent: known only when its evaluation runs."""


@dataclass
class FoldedConstants:
    """How the folded constants of a loop graph were made, so that they can be made again."""

    recipe: fx.Graph
    """A graph without inputs over the same weights; its output is the tuple of the folded values."""
    names: tuple[str, ...]
    """The attribute of ``LoopGraph.root`` that holds each value."""
    weights: tuple[str, ...]
    """The weights (``denoiser.<path>``) that the values were made from."""


@dataclass
class ProgramGraph:
    """A functional ATen graph and the module that its ``get_attr`` nodes refer to."""

    graph: fx.Graph
    root: nn.Module

    def module(self) -> fx.GraphModule:
        """Return the graph as an ``nn.Module``; weights are shared with the denoiser, also after they are replaced."""
        module = fx.GraphModule(self.root, self.graph, class_name=type(self).__name__)
        for name, child in self.root.named_children():
            # GraphModule copies the leaves it needs; the live child follows a weight that is assigned anew.
            setattr(module, name, child)
        return module


@dataclass
class EvaluationGraph(ProgramGraph):
    """One evaluation of the denoiser: flat tensor inputs, flat tensor outputs."""

    sites: tuple[Site, ...] = ()
    """The sites marked in the graph."""
    out_spec: TreeSpec | None = None
    """The structure that the denoiser returns."""
    out_leaves: tuple[object, ...] = ()
    """Its leaves: a fake tensor for each output of the graph, anything else as it is."""

    def copy(self) -> EvaluationGraph:
        """Return an evaluation graph to be rewritten apart from this one; tensors and submodules are shared."""
        return replace(self, graph=_copy_of(self.graph))


@dataclass
class LoopGraph(ProgramGraph):
    """A whole sampling loop, unrolled."""

    schedule: CacheSchedule
    num_noise: int
    """How many of the inputs, the first ones, are the noise; the others are conditions."""
    forms: list[EvaluationGraph]
    """The evaluation graph that each evaluation is a copy of; evaluations with equal calls share one. Empty where the
    loop was captured as a whole."""
    out_spec: TreeSpec
    """The structure that the loop returns; the graph's output is the flat list of its leaves."""
    folded: list[FoldedConstants] = field(default_factory=list)

    def copy(self) -> LoopGraph:
        """Return a loop graph to be rewritten apart from this one; tensors and submodules are shared."""
        root = nn.Module()
        for name, child in self.root.named_children():
            root.add_module(name, child)
        for name, tensor in self.root.named_buffers(recurse=False):
            root.register_buffer(name, tensor, persistent=False)
        return replace(self, graph=_copy_of(self.graph), root=root, folded=list(self.folded))

    def module_to_trace(self) -> fx.GraphModule:
        """Return the graph as a module for who traces it again, as torch.compile does.

        Torch may choose another attention kernel then, which returns other strides, so no view may insist on those of
        the capture.
        """
        copy = self.copy()
        for node in copy.graph.find_nodes(op="call_function", target=torch.ops.aten.view.default):
            node.target = torch.ops.aten.reshape.default
        return copy.module()

    def new_region(self, body: fx.GraphModule) -> str:
        """Store the body of a region as a submodule of the root and return its name."""
        name = f"region_{sum(name.startswith('region_') for name in self.root._modules)}"
        self.root.add_module(name, body)
        return name

    @property
    def num_evaluations(self) -> int:
        """How often the loop calls the denoiser."""
        return self.schedule.num_evaluations

    def reads(self) -> Iterator[tuple[int, Site, Reuse]]:
        """Yield (evaluation, site, entry) for every reuse that takes effect, in execution order."""
        for evaluation, site in sorted(self.schedule.reuses, key=operator.itemgetter(0)):
            reuse = self.schedule.active(evaluation, site)
            if reuse is not None:
                yield evaluation, site, reuse

    def known_before_the_loop(self) -> set[Node]:
        """Return the nodes that depend on no noise and no random draw: on weights, timesteps and conditions alone."""
        known: set[Node] = set()
        num_placeholders = 0
        for node in self.graph.nodes:
            if node.op == "placeholder":
                num_placeholders += 1
                if num_placeholders > self.num_noise:
                    known.add(node)
            elif node.op == "get_attr" or (
                node.op == "call_function" and not draws_random_numbers(node) and known.issuperset(node.all_input_nodes)
            ):
                known.add(node)
        return known

    def new_constant(self, value: Tensor, prefix: str = "_constant") -> str:
        """Store ``value`` as a buffer of the root under a fresh name and return the name."""
        number = len(self.root._buffers)
        name = f"{prefix}_{number}"
        self.root.register_buffer(name, value, persistent=False)
        return name


def _copy_of(graph: fx.Graph) -> fx.Graph:
    copy = fx.Graph()
    copies: dict[Node, Node] = {}
    for node in graph.nodes:
        copies[node] = copy.node_copy(node, copies.__getitem__)
    return copy


_INFERENCE = FakeTensorMode()


def emit(
    graph: fx.Graph,
    target: OpOverload,
    args: tuple[Argument, ...],
    evaluation: int | None,
    kwargs: Mapping[str, Argument] | None = None,
) -> Node:
    """Insert a call of ``target`` at the graph's insert point and note what it returns and where it belongs."""
    node = graph.call_function(target, args, dict(kwargs or {}))
    node.meta.update(val=infer(target, args, kwargs or {}), evaluation=evaluation)
    return node


def outputs_of(node: Node) -> tuple[Node, ...]:
    """Insert, right behind a node that returns several tensors, a node for each of them."""
    outputs: list[Node] = []
    for index, value in enumerate(node.meta["val"]):
        with node.graph.inserting_after(outputs[-1] if outputs else node):
            outputs.append(node.graph.call_function(operator.getitem, (node, index)))
        outputs[-1].meta.update(val=value, evaluation=evaluation_of(node))
    return tuple(outputs)


def infer(
    target: object,
    args: Sequence[Argument],
    kwargs: Mapping[str, Argument],
    value: Callable[[Node], Any] = lambda node: node.meta["val"],
) -> Any:  # noqa: ANN401
    """Return what ``target`` gives for these nodes, without values: fake tensors of the right form.

    ``value`` says what a node stands for.
    """
    fakes: Any = fx.node.map_arg((tuple(args), dict(kwargs)), lambda argument: _fake(value(argument)))
    assert callable(target)
    with _INFERENCE, torch.no_grad():
        return target(*fakes[0], **fakes[1])


def relaid(changed: Mapping[Node, Any], without: Collection[Node] = ()) -> dict[Node, Any] | None:
    """Return what each node makes once some nodes make tensors of the same shape in another memory layout.

    Args:
        changed: what these nodes will make.
        without: users that will be gone.

    Returns:
        The new fake value of every node whose value changes, those of ``changed`` included; None if an operation does
        not take the new layout (a view of it is no view any more) or the graph would return another one.
    """
    values = dict(changed)
    waiting = [user for node in changed for user in node.users]
    heapq.heapify(waiting)
    known: Node | None = None
    while waiting:
        node = heapq.heappop(waiting)
        if node is known or node in values or node in without:
            continue
        known = node
        if node.op == "output" or packet_of(node) is torch.ops.aten.as_strided:
            return None
        try:
            value = infer(node.target, node.args, node.kwargs, lambda a: values.get(a, a.meta["val"]))
        except (RuntimeError, ValueError):
            return None
        if _strides(value) != _strides(node.meta["val"]):
            values[node] = value
            for user in node.users:
                heapq.heappush(waiting, user)
    return values


def _strides(value: Any) -> object:  # noqa: ANN401 - whatever a node returns
    return tuple(map(_strides, value)) if isinstance(value, (tuple, list)) else value.stride()


def _fake(value: Any) -> Any:  # noqa: ANN401 - a fake tensor, or what a node returns that is none
    # The parts of a loop graph were captured under different fake modes; torch mixes none of them.
    if isinstance(value, (tuple, list)):
        return tuple(map(_fake, value))
    if not isinstance(value, Tensor):
        return value
    with _INFERENCE:
        return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device=value.device)


def evaluation_of(node: Node) -> int | None:
    """Return the evaluation that a node of a loop graph belongs to, None for the loop's own arithmetic."""
    return node.meta.get("evaluation")


@dataclass(frozen=True)
class SiteMark:
    """An ``l2c::site`` node, its arguments by name."""

    node: Node
    value: Node
    site: str
    port: int
    evaluation: int

    @classmethod
    def of(cls, node: Node) -> SiteMark:
        """Read the node."""
        return cls(node, *node.args)  # type: ignore[arg-type]


@dataclass(frozen=True)
class CacheRead:
    """An ``l2c::cache_read`` node, its arguments by name."""

    node: Node
    history: Sequence[Node]
    inputs: Sequence[Node]
    current_input: Node | None
    site: str
    port: int
    evaluation: int
    sources: Sequence[int]
    rule_json: str

    @classmethod
    def of(cls, node: Node) -> CacheRead:
        """Read the node."""
        return cls(node, *node.args)  # type: ignore[arg-type]

    @property
    def rule(self) -> Rule:
        """The rule that makes the value."""
        return rule_from_dict(json.loads(self.rule_json))


def site_marks(graph: fx.Graph) -> list[SiteMark]:
    """Return the ``l2c::site`` nodes of a graph in order."""
    return [SiteMark.of(node) for node in graph.find_nodes(op="call_function", target=SITE)]


def cache_reads(graph: fx.Graph) -> list[CacheRead]:
    """Return the ``l2c::cache_read`` nodes of a graph in order."""
    return [CacheRead.of(node) for node in graph.find_nodes(op="call_function", target=CACHE_READ)]


def output_list(graph: fx.Graph) -> list[Argument]:
    """Return what a graph of ours returns: always a flat list."""
    (results,) = graph.output_node().args
    assert isinstance(results, (list, tuple))
    return list(results)


def packet_of(node: Node) -> object:
    """Return the operator of a node whatever its overload (``aten.clone``), None where it calls no torch operator."""
    return node.target.overloadpacket if isinstance(node.target, torch._ops.OpOverload) else None


def is_pointwise(node: Node) -> bool:
    """Tell whether each element of the result depends on one element of each argument only."""
    return isinstance(node.target, torch._ops.OpOverload) and torch.Tag.pointwise in node.target.tags


def draws_random_numbers(node: Node) -> bool:
    """Tell whether the node draws from a random number generator, so that it may be neither removed nor merged."""
    if node.op != "call_function" or not isinstance(node.target, torch._ops.OpOverload):
        return False
    if torch.Tag.nondeterministic_seeded not in node.target.tags:
        return False
    # Attention and dropout can draw, but do not at rate 0 or outside training.
    given = arguments_of(node)
    return bool(given.get("dropout_p") != 0 and given.get("train") is not False)


def arguments_of(node: Node) -> dict[str, Argument]:
    """Return the node's arguments by name, defaults included."""
    schema = node.target._schema.arguments  # type: ignore[union-attr]
    given = {argument.name: argument.default_value for argument in schema if argument.has_default_value()}
    given.update(zip((argument.name for argument in schema), node.args, strict=False))
    given.update(node.kwargs)
    return given


def form_of(node: Node) -> object:
    """Return shape, dtype and device of the tensor that a node makes; None where it makes none."""
    value = node.meta.get("val")
    return (value.shape, value.dtype, value.device) if isinstance(value, Tensor) else None


def num_bytes(node: Node) -> int:
    """Return the size in bytes of the tensors that a node produces, 0 where the graph does not say."""
    value = node.meta.get("val")
    tensors = value if isinstance(value, (tuple, list)) else (value,)
    return sum(t.numel() * t.element_size() for t in tensors if isinstance(t, Tensor))


Expression = tuple[object, ...]
"""What a node computes, as a hashable value: equal for two nodes of one graph iff they compute the same."""


def expression(node: Node, rename: Callable[[Node], object] = lambda argument: argument) -> Expression:
    """Return the key under which two pure nodes are the same computation.

    Args:
        node: a ``call_function`` or ``get_attr`` node.
        rename: maps each argument node to what stands for it.
    """
    kwargs = tuple(sorted((name, argument_key(value, rename)) for name, value in node.kwargs.items()))
    return (node.op, node.target, argument_key(node.args, rename), kwargs)


def argument_key(argument: Argument, rename: Callable[[Node], object]) -> object:
    """Return a hashable value that is equal for two arguments iff they are interchangeable."""
    if isinstance(argument, Node):
        return rename(argument)
    if isinstance(argument, (tuple, list)):
        return tuple(argument_key(element, rename) for element in argument)
    if isinstance(argument, float):
        # 1 == 1.0 == True and 0.0 == -0.0 for Python, not for type promotion and division.
        return float, argument.hex()
    return type(argument), argument


def module_path(node: Node) -> str:
    """Return the path, in the denoiser, of the module whose forward made the node; "" where there is none."""
    stack = node.meta.get("nn_module_stack") or {}
    path = next((str(path) for path, _ in reversed(stack.values())), "")
    return path.removeprefix("L['self'].").removeprefix("denoiser").removeprefix(".")
