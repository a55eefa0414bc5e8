"""The loop without its evaluations, as the tracer returns it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor
from torch.fx.node import Argument, Node
from torch.utils._pytree import TreeSpec

from l2c_compile.graphs.forms import CallSignature
from l2c_compile.graphs.loop_graph import Dependency, EvaluationGraph, ProgramGraph
from l2c_compile.graphs.nodes import draws_random_numbers, output_list

__all__ = ["EvaluationCall", "LoopSkeleton"]


@dataclass
class EvaluationCall:
    """One call of the denoiser."""

    signature: CallSignature
    graph: EvaluationGraph
    """Shared by all calls of equal signature."""


@dataclass
class LoopSkeleton(ProgramGraph):
    """The loop without its evaluations.

    ``graph`` is functional ATen. Its placeholders are the loop's tensor inputs, its constants, then the outputs of
    evaluation 0, 1, ...; its output is the list of tensor arguments of evaluation 0, 1, ..., then the loop's result.
    """

    calls: list[EvaluationCall]
    num_inputs: int
    num_noise: int
    """How many of the inputs, the first ones, are the noise; the others are conditions."""
    constants: dict[str, Tensor]
    """By name; a name that begins with ``denoiser.`` is the path of a weight."""
    out_spec: TreeSpec
    num_outputs: int

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

    def note_dependencies(self) -> None:
        """Write ``meta["depends"]`` on the inputs of every evaluation graph: what the loop feeds them with.

        An input that several evaluations share has what any of them needs; a constant that differs between the
        evaluations of one graph is a timestep.
        """
        depends: dict[Node, frozenset[Dependency]] = {}
        for node in self.constant_nodes():
            depends[node] = frozenset()
        for position, node in enumerate(self.input_nodes()):
            depends[node] = frozenset({Dependency.LATENT if position < self.num_noise else Dependency.CONDITION})
        for nodes in self.output_nodes():
            depends.update(dict.fromkeys(nodes, frozenset({Dependency.LATENT})))
        for node in self.graph.nodes:
            if node.op not in ("placeholder", "output"):
                own = frozenset({Dependency.LATENT}) if draws_random_numbers(node) else frozenset()
                depends[node] = own.union(*(depends[argument] for argument in node.all_input_nodes))

        fed: dict[Node, set[Node]] = {}
        for call, arguments in zip(self.calls, self.argument_nodes(), strict=True):
            for node, argument in zip(call.graph.graph.find_nodes(op="placeholder"), arguments, strict=True):
                fed.setdefault(node, set()).add(argument)
        for node, feeding in fed.items():
            varies = sum(not depends[argument] for argument in feeding) > 1
            own = frozenset({Dependency.TIME}) if varies else frozenset()
            node.meta["depends"] = own.union(*(depends[argument] for argument in feeding))

    def _placeholders(self) -> list[Node]:
        return list(self.graph.find_nodes(op="placeholder"))


def _num_tensors(leaves: Sequence[object]) -> int:
    return sum(isinstance(leaf, Tensor) for leaf in leaves)


def _split(nodes: list[Node], sizes: list[int]) -> list[list[Node]]:
    remaining = iter(nodes)
    return [[next(remaining) for _ in range(size)] for size in sizes]
