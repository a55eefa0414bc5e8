"""Put the evaluations into the loop, which makes one graph of the skeleton and the evaluation graphs.

Before, there is the skeleton, in which the input ``prediction_e`` stands for what evaluation e returns:

    x = mul(noise, c);  [x, t]  ->  (evaluation 0)  ->  prediction_0;  y = sub(x, prediction_0) ...

After, there is one graph in execution order, with a copy of the evaluation graph in the place of each prediction. What
does not depend on the latent (the noise, a random draw, or what an evaluation returned) is emitted once for all
evaluations that share it.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import fx, nn
from torch.fx.node import Node

from l2c_compile.graphs.loop_graph import EvaluationGraph, LoopGraph
from l2c_compile.graphs.marks import SITE
from l2c_compile.graphs.nodes import Expression, draws_random_numbers, expression, output_list
from l2c_compile.graphs.skeleton import LoopSkeleton
from l2c_compile.graphs.storages import base_of
from l2c_compile.schedules.schedule import CacheSchedule


def unroll(skeleton: LoopSkeleton, denoiser: nn.Module, schedule: CacheSchedule) -> LoopGraph:
    """Return the loop graph: every evaluation in execution order, every site marked, nothing skipped yet.

    Args:
        skeleton: the traced loop.
        denoiser: the module that the weights belong to; it becomes a child of the graph's root.
        schedule: the schedule, its patterns resolved, of as many evaluations as the skeleton; kept for the passes.
    """
    return _LoopGraphBuilder(skeleton, denoiser, schedule).run()


class _LoopGraphBuilder:
    """Builds the loop graph node by node, in execution order."""

    def __init__(self, skeleton: LoopSkeleton, denoiser: nn.Module, schedule: CacheSchedule) -> None:
        self.skeleton = skeleton
        self.schedule = schedule
        self.root = nn.Module()
        self.root.denoiser = denoiser
        self.graph = fx.Graph()
        self.latent = _latent_nodes(skeleton)
        self.shared: dict[Expression, Node] = {}
        self.attributes: dict[object, Node] = {}

    def run(self) -> LoopGraph:
        skeleton = self.skeleton
        values: dict[Node, Node] = {}
        for node in skeleton.input_nodes():
            values[node] = self.graph.placeholder(node.name)
            values[node].meta = dict(node.meta)
        for name, tensor in skeleton.root.named_buffers():
            self.root.register_buffer(name, tensor, persistent=False)
        for name, tensor in skeleton.constants.items():
            if not name.startswith("denoiser."):
                self.root.register_buffer(name, tensor, persistent=False)
        for node, name in zip(skeleton.constant_nodes(), skeleton.constants, strict=True):
            values[node] = self._attribute(name, name, node)

        owners = {node: e for e, nodes in enumerate(skeleton.output_nodes()) for node in nodes}
        pending = list(zip(skeleton.argument_nodes(), skeleton.output_nodes(), strict=True))
        num_done = 0

        def evaluate_up_to(last: int) -> None:
            nonlocal num_done
            while num_done <= last:
                arguments, predictions = pending[num_done]
                outputs = self._evaluate(num_done, [values[a] for a in arguments])
                values.update(zip(predictions, outputs, strict=True))
                num_done += 1

        for node in skeleton.graph.nodes:
            if node.op not in ("placeholder", "output"):
                for argument in node.all_input_nodes:
                    if argument in owners:
                        evaluate_up_to(owners[argument])
                values[node] = self.graph.node_copy(node, values.__getitem__)
        evaluate_up_to(len(pending) - 1)
        results = [self._own(values[r]) if isinstance(r, Node) else r for r in skeleton.result_nodes()]
        self.graph.output(results)
        return LoopGraph(
            graph=self.graph,
            root=self.root,
            schedule=self.schedule,
            num_noise=skeleton.num_noise,
            out_spec=skeleton.out_spec,
        )

    def _own(self, result: Node) -> Node:
        """Return a node for a result of the loop that shares no memory with an input, a weight or a constant."""
        if base_of(result).op not in ("placeholder", "get_attr"):
            return result
        copy = self.graph.call_function(torch.ops.aten.clone.default, (result,))
        copy.meta = {"val": result.meta["val"]}
        return copy

    def _evaluate(self, evaluation: int, arguments: Sequence[Node]) -> list[Node]:
        """Copy one evaluation graph to the end of the loop graph; return the nodes of its outputs."""
        source = self.skeleton.calls[evaluation].graph
        values: dict[Node, Node] = {}
        inputs = iter(arguments)
        for node in source.graph.nodes:
            if node.op == "placeholder":
                values[node] = next(inputs)
            elif node.op == "get_attr":
                values[node] = self._evaluation_attribute(source, node)
            elif node.op == "output":
                return [values[n] for n in output_list(source.graph) if isinstance(n, Node)]
            elif node.target is SITE:
                values[node] = self._copy(node, values, evaluation)
                values[node].update_arg(3, evaluation)
            elif node in self.latent:
                values[node] = self._copy(node, values, evaluation)
            else:
                key = expression(node, values.__getitem__)
                if key not in self.shared:
                    self.shared[key] = self._copy(node, values, evaluation)
                values[node] = self.shared[key]
        raise AssertionError("an evaluation graph without an output node")

    def _copy(self, node: Node, values: dict[Node, Node], evaluation: int) -> Node:
        copy = self.graph.node_copy(node, values.__getitem__)
        copy.meta["evaluation"] = evaluation
        return copy

    def _evaluation_attribute(self, source: EvaluationGraph, node: Node) -> Node:
        name = str(node.target)
        if name.startswith("denoiser."):
            return self._attribute(name, name, node)
        # This is a constant of the denoiser's own code; another evaluation graph may hold another one of that name.
        tensor = source.root.get_buffer(name)
        target = f"_evaluation{name}_{len(self.root._buffers)}"
        if id(tensor) not in self.attributes:
            self.root.register_buffer(target, tensor, persistent=False)
        return self._attribute(id(tensor), target, node)

    def _attribute(self, key: object, target: str, like: Node) -> Node:
        if key not in self.attributes:
            node = self.graph.create_node("get_attr", target)
            node.meta = dict(like.meta)
            self.attributes[key] = node
        return self.attributes[key]


def _latent_nodes(skeleton: LoopSkeleton) -> set[Node]:
    """Return the nodes of the loop and of its evaluation graphs that depend on the latent.

    An input of an evaluation graph that several evaluations share depends on it if the argument of any of them does.
    """
    latent = set(skeleton.input_nodes()[: skeleton.num_noise]).union(*skeleton.output_nodes())
    _add_dependent(latent, skeleton.graph)
    for call, arguments in zip(skeleton.calls, skeleton.argument_nodes(), strict=True):
        inputs = call.graph.graph.find_nodes(op="placeholder")
        latent.update(node for node, argument in zip(inputs, arguments, strict=True) if argument in latent)
    for evaluation in skeleton.evaluations():
        _add_dependent(latent, evaluation.graph)
    return latent


def _add_dependent(latent: set[Node], graph: fx.Graph) -> None:
    for node in graph.nodes:
        if draws_random_numbers(node) or not latent.isdisjoint(node.all_input_nodes):
            latent.add(node)
