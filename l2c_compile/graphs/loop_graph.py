"""The graphs that the compiler works on, the two marker ops in them, and the notes on their nodes.

There are two kinds of graph, both functional ATen on ``torch.fx``:

``EvaluationGraph``  one call of the denoiser, as captured; placeholders are the tensors of the call.
``LoopGraph``        the whole loop, every evaluation in execution order; placeholders are the loop's tensors.

Weights are ``get_attr`` nodes named ``denoiser.<path>``: referenced, never copied. Two ops mark what a schedule can
change. Both are ordinary ops that run, so that a graph can be executed after any pass:

``l2c::site(value, site, port, evaluation)``  the value of a site (port 0, 1, ...: the module's tensor outputs; port
                                              -1: its input). An identity that outlives every rewrite of its argument.
``l2c::cache_read(history, ...)``             a value made by a rule from what the site held at earlier evaluations.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, fx, nn
from torch.fx.node import Node
from torch.utils._pytree import TreeSpec

from l2c_compile.graphs.nodes import draws_random_numbers
from l2c_compile.graphs.site_results import SiteResult
from l2c_compile.schedules.schedule import CacheSchedule, Reuse
from l2c_compile.schedules.sites import Site


@dataclass
class FoldedConstants:
    """How the folded constants of a loop graph were made, so that they can be made again."""

    recipe: fx.Graph
    """A graph without inputs over the same weights; its output is the tuple of the folded values."""
    names: tuple[str, ...]
    """For each value, the name of the attribute of ``LoopGraph.root`` that holds it."""
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
            # GraphModule copies the attributes that it needs; the live child follows a weight that is assigned anew.
            setattr(module, name, child)
        return module


@dataclass
class EvaluationGraph(ProgramGraph):
    """The graph of one evaluation of the denoiser, with flat tensor inputs and flat tensor outputs."""

    sites: tuple[Site, ...] = ()
    """The sites that are marked in the graph."""
    out_spec: TreeSpec | None = None
    """The structure that the denoiser returns."""
    out_leaves: tuple[object, ...] = ()
    """The leaves of that structure: a fake tensor for each output of the graph, anything else as it is."""
    stored: tuple[str, ...] = ()
    """Where the denoiser stored tensors during the call: "denoiser.features", "global TABLES[4]"."""
    results: Mapping[str, SiteResult] = field(default_factory=dict)
    """What the module of each site returned, by the site's text; a site that was not called has none."""

    def copy(self) -> EvaluationGraph:
        """Return a copy that can be rewritten without changing this graph; tensors and submodules are shared."""
        return replace(self, graph=copy_of(self.graph))


@dataclass(frozen=True)
class EvaluationPrice:
    """The price of one evaluation that computes everything."""

    multiply_adds: int
    site_bytes: Mapping[str, int]
    """The size in bytes of the value of each site, by the site's text."""


@dataclass
class LoopGraph(ProgramGraph):
    """The graph of a whole sampling loop, unrolled."""

    schedule: CacheSchedule
    num_noise: int
    """Number of inputs that are the noise; they come first, and the others are conditions."""
    out_spec: TreeSpec
    """The structure that the loop returns; the graph's output is the flat list of its leaves."""
    prices: tuple[EvaluationPrice, ...] = ()
    """The price of each evaluation without caching; empty if the loop was captured as a whole or read from a file."""
    folded: list[FoldedConstants] = field(default_factory=list)

    def copy(self) -> LoopGraph:
        """Return a copy that can be rewritten without changing this graph; tensors and submodules are shared."""
        root = nn.Module()
        for name, child in self.root.named_children():
            root.add_module(name, child)
        for name, weight in self.root.named_parameters(recurse=False, remove_duplicate=False):
            root.register_parameter(name, weight)
        for name, tensor in self.root.named_buffers(recurse=False, remove_duplicate=False):
            root.register_buffer(name, tensor, persistent=False)
        return replace(self, graph=copy_of(self.graph), root=root, folded=list(self.folded))

    def module_to_trace(self) -> fx.GraphModule:
        """Return the graph as a module for a caller that traces it again, as ``torch.compile`` does.

        Torch may then choose another attention kernel, which returns other strides, so no view may depend on the
        strides of the capture.
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
        """The number of times that the loop calls the denoiser."""
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


def copy_of(graph: fx.Graph) -> fx.Graph:
    """Return a copy of a graph; the notes of its nodes are shared."""
    copy = fx.Graph()
    copies: dict[Node, Node] = {}
    for node in graph.nodes:
        copies[node] = copy.node_copy(node, copies.__getitem__)
    return copy
