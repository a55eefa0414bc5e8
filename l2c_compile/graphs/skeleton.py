"""The loop without its evaluations, as the tracer returns it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from torch import Tensor
from torch.fx.node import Argument, Node
from torch.utils._pytree import TreeSpec

from l2c_compile.graphs.forms import CallSignature
from l2c_compile.graphs.loop_graph import EvaluationGraph, ProgramGraph, copy_of
from l2c_compile.graphs.nodes import output_list


@dataclass
class EvaluationCall:
    """One call of the denoiser, with the graph of what it computes."""

    signature: CallSignature
    graph: EvaluationGraph
    """The evaluation graph, which all calls of equal signature share."""


@dataclass
class LoopSkeleton(ProgramGraph):
    """The loop without its evaluations.

    ``graph`` is functional ATen. Its placeholders are the loop's tensor inputs, its constants, then the outputs of
    evaluation 0, 1, ...; its output is the list of tensor arguments of evaluation 0, 1, ..., then the loop's result.
    """

    calls: list[EvaluationCall]
    num_inputs: int
    num_noise: int
    """Number of inputs that are the noise; they come first, and the others are conditions."""
    constants: dict[str, Tensor]
    """The loop's constants by name; a name that begins with ``denoiser.`` is the path of a weight."""
    out_spec: TreeSpec
    num_outputs: int
    read: tuple[Tensor, ...] = ()
    """The weights whose values the loop read itself, so that the graph holds what they were."""

    def input_nodes(self) -> list[Node]:
        """Return the placeholders of the loop's tensor inputs."""
        return self._placeholders()[: self.num_inputs]

    def constant_nodes(self) -> list[Node]:
        """Return the placeholders of the loop's constants."""
        return self._placeholders()[self.num_inputs : self.num_inputs + len(self.constants)]

    def output_nodes(self) -> list[list[Node]]:
        """Return, for each evaluation, the placeholders of its outputs."""
        return _split(
            self._placeholders()[self.num_inputs + len(self.constants) :],
            [_num_tensors(call.graph.out_leaves) for call in self.calls],
        )

    def argument_nodes(self) -> list[list[Node]]:
        """Return, for each evaluation, the nodes of its tensor arguments."""
        sizes = [len(call.signature.tensor_forms()) for call in self.calls]
        return _split([n for n in output_list(self.graph)[: sum(sizes)] if isinstance(n, Node)], sizes)

    def result_nodes(self) -> list[Argument]:
        """Return the flat result of the loop."""
        results = output_list(self.graph)
        return results[len(results) - self.num_outputs :]

    def evaluations(self) -> list[EvaluationGraph]:
        """Return the distinct evaluation graphs, in the order of their first calls."""
        return list({id(call.graph): call.graph for call in self.calls}.values())

    def copy(self) -> LoopSkeleton:
        """Return a copy, evaluations included, that can be rewritten without changing this one; tensors are shared."""
        copies = {id(evaluation): evaluation.copy() for evaluation in self.evaluations()}
        calls = [replace(call, graph=copies[id(call.graph)]) for call in self.calls]
        return replace(self, graph=copy_of(self.graph), calls=calls)

    def _placeholders(self) -> list[Node]:
        return list(self.graph.find_nodes(op="placeholder"))


def _num_tensors(leaves: Sequence[object]) -> int:
    return sum(isinstance(leaf, Tensor) for leaf in leaves)


def _split(nodes: list[Node], sizes: list[int]) -> list[list[Node]]:
    remaining = iter(nodes)
    return [[next(remaining) for _ in range(size)] for size in sizes]
