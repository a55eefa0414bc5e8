"""Segments of a loop: from a latent in the middle of it to a later evaluation, by the loop's own arithmetic.

A traced loop is a graph in which the outputs of evaluations are inputs (``LoopSkeleton``). A segment that begins at
evaluation b cuts that graph at the loop's state: the one value from which, with the outputs of evaluations b and later,
everything follows that evaluations b to m are given. No solver is known here.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx.node import Node
from torch.utils._pytree import tree_flatten

from l2c_compile.errors import LoopTraceError
from l2c_compile.finders.open_evaluations import OnEvaluation, OpenDenoiser, OpenEvaluation
from l2c_compile.frontend.stand_in import Loop
from l2c_compile.frontend.trace import trace_loop
from l2c_compile.graphs.forms import CallSignature, tensors_in
from l2c_compile.graphs.loop_graph import EvaluationGraph
from l2c_compile.graphs.skeleton import LoopSkeleton
from l2c_compile.passes.pipeline import SKELETON


@dataclass(frozen=True)
class _Part:
    """One evaluation of a segment."""

    number: int
    evaluation: OpenEvaluation
    nodes: tuple[Node, ...]
    """What is computed for its arguments and was not computed before, in order."""
    arguments: tuple[Node, ...]
    outputs: tuple[Node, ...]


@dataclass(frozen=True)
class Segment:
    """The evaluations ``start`` to ``end`` of a loop, given its state at ``start``."""

    start: int
    end: int
    skeleton: LoopSkeleton
    state: Node
    parts: tuple[_Part, ...]

    def run(self, state: Tensor, conditions: Mapping[str, object], on_evaluation: OnEvaluation) -> None:
        """Give ``on_evaluation`` every evaluation of the segment in turn.

        Args:
            state: the latent at ``start``.
            conditions: the conditions of the loop, in the form it was traced with.
            on_evaluation: a function that returns the outputs with which the loop goes on.
        """
        skeleton = self.skeleton
        env: dict[Node, Any] = dict(zip(skeleton.constant_nodes(), skeleton.constants.values(), strict=True))
        env.update(zip(skeleton.input_nodes()[skeleton.num_noise :], tensors_in(dict(conditions)), strict=True))
        env[self.state] = state
        for part in self.parts:
            for node in part.nodes:
                env[node] = _value(node, skeleton.root, env)
            outputs = on_evaluation(part.number, part.evaluation, [env[argument] for argument in part.arguments])
            env.update(zip(part.outputs, outputs, strict=True))


def segments(
    denoiser: OpenDenoiser,
    loop: Loop,
    noise: object,
    conditions: Mapping[str, object],
    pairs: Iterable[tuple[int, int]],
) -> list[Segment]:
    """Return for each pair (s, m) the shortest segment that begins at s or before and ends with m.

    Raises:
        LoopTraceError: if the loop cannot be traced, or has more than one latent.
    """
    by_graph: dict[int, OpenEvaluation] = {}

    def capture_call(signature: CallSignature) -> EvaluationGraph:
        evaluation = denoiser.evaluation(signature)
        by_graph[id(evaluation.captured)] = evaluation
        return evaluation.captured

    if len(tree_flatten(noise)[0]) != 1 or not isinstance(noise, Tensor):
        raise LoopTraceError(
            "a data set of latents wants a loop whose noise is one tensor; let the model sample the trajectories"
        )
    skeleton = trace_loop(loop, denoiser.model, noise, conditions, capture_call)
    SKELETON.run(skeleton)
    finder = _SegmentFinder(skeleton, [by_graph[id(call.graph)] for call in skeleton.calls], noise)
    return [finder.segment(s, m) for s, m in pairs]


class _SegmentFinder:
    """Finds where the graph of a loop can be cut for each segment."""

    def __init__(self, skeleton: LoopSkeleton, evaluations: Sequence[OpenEvaluation], noise: Tensor) -> None:
        self.skeleton = skeleton
        self.evaluations = evaluations
        self.noise = noise
        self.order = {node: position for position, node in enumerate(skeleton.graph.nodes)}
        self.arguments = skeleton.argument_nodes()
        self.outputs = skeleton.output_nodes()
        self.given = {*skeleton.constant_nodes(), *skeleton.input_nodes()[skeleton.num_noise :]}
        self.owner = {node: e for e, nodes in enumerate(self.outputs) for node in nodes}

    def segment(self, s: int, m: int) -> Segment:
        for start in range(s, -1, -1):
            for state in self._candidates(start):
                parts = self._parts(start, m, state)
                if parts is not None:
                    return Segment(start, m, self.skeleton, state, parts)
        raise LoopTraceError(
            f"what the loop gives evaluation {m} does not follow from one latent at an earlier evaluation; let the"
            " model sample the trajectories instead of giving a data set"
        )

    def _candidates(self, start: int) -> list[Node]:
        """Return the values in the form of the latent that are known before evaluation ``start``, latest first."""
        latest: dict[Node, int] = {}
        for node in self.skeleton.graph.nodes:
            known = [latest[argument] for argument in node.all_input_nodes]
            latest[node] = self.owner.get(node, max(known, default=-1))
        known_before = [n for n in latest if latest[n] < start and n.op != "output" and n not in self.given]
        form = self.noise.shape, self.noise.dtype
        return [n for n in reversed(known_before) if _form(n) == form]

    def _parts(self, start: int, end: int, state: Node) -> tuple[_Part, ...] | None:
        """Return the evaluations of a segment, or None if they need more than the state."""
        known = {*self.given, state}
        parts: list[_Part] = []
        for e in range(start, end + 1):
            nodes = self._needed(self.arguments[e], known)
            if nodes is None:
                return None
            known.update(nodes, self.outputs[e])
            parts.append(_Part(e, self.evaluations[e], nodes, tuple(self.arguments[e]), tuple(self.outputs[e])))
        return tuple(parts)

    def _needed(self, wanted: Iterable[Node], known: set[Node]) -> tuple[Node, ...] | None:
        needed: set[Node] = set()
        waiting = [node for node in wanted if node not in known]
        while waiting:
            node = waiting.pop()
            if node.op == "placeholder":
                return None
            if node not in needed:
                needed.add(node)
                waiting.extend(argument for argument in node.all_input_nodes if argument not in known)
        return tuple(sorted(needed, key=self.order.__getitem__))


def _value(node: Node, root: nn.Module, env: Mapping[Node, Any]) -> Any:  # noqa: ANN401 - whatever the node returns
    if node.op == "get_attr":
        return root.get_buffer(str(node.target))
    args, kwargs = fx.node.map_arg((node.args, node.kwargs), env.__getitem__)
    assert callable(node.target)
    return node.target(*args, **kwargs)


def _form(node: Node) -> tuple[torch.Size, torch.dtype] | None:
    value = node.meta.get("val")
    return (value.shape, value.dtype) if isinstance(value, Tensor) else None
