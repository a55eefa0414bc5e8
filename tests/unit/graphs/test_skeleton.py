"""The loop without its evaluations: which node stands for what."""

from __future__ import annotations

from torch import Tensor

from l2c_compile import CacheSchedule
from l2c_compile.compile import trace_and_capture
from l2c_compile.graphs.skeleton import LoopSkeleton
from l2c_compile.passes.pipeline import EVALUATION, SKELETON
from tests.tiny import at, draw, residual


def two_forms(denoiser: object, noise: Tensor, y: Tensor) -> dict[str, object]:
    """Call the denoiser on the whole batch, twice, and once on a half of it."""
    x = noise - denoiser(noise, at(noise, 3), y=y)  # type: ignore[operator]
    x = x - denoiser(x, at(noise, 2), y=y)  # type: ignore[operator]
    return {"x": x, "half": denoiser(x[:1], at(noise[:1], 1)), "of": "three"}  # type: ignore[operator]


def skeleton() -> LoopSkeleton:
    schedule = CacheSchedule.all_compute(3, ["a"])
    return trace_and_capture(residual(), two_forms, schedule, draw(2, 4), {"y": draw(2, 4, seed=3)})


def test_each_node_stands_for_what_its_place_says() -> None:
    trace = skeleton()
    assert (trace.num_noise, trace.num_inputs, len(trace.calls)) == (1, 2, 3)
    noise, y = trace.input_nodes()
    assert [node.meta["val"].shape for node in (noise, y)] == [(2, 4), (2, 4)]
    assert len(trace.constant_nodes()) == len(trace.constants) == 3
    arguments = trace.argument_nodes()
    assert [len(each) for each in arguments] == [3, 3, 2]
    assert [[node.meta["val"].shape[0] for node in each] for each in arguments] == [[2] * 3, [2] * 3, [1] * 2]
    outputs = trace.output_nodes()
    assert [[node.meta["val"].shape for node in each] for each in outputs] == [[(2, 4)], [(2, 4)], [(1, 4)]]
    assert len(trace.result_nodes()) == trace.num_outputs == trace.out_spec.num_leaves == 3


def test_equal_calls_share_one_evaluation() -> None:
    trace = skeleton()
    first, second, half = (call.graph for call in trace.calls)
    assert first is second
    assert trace.evaluations() == [first, half]


def test_a_copy_is_simplified_apart_from_the_trace() -> None:
    trace = skeleton()
    before = [str(each.graph) for each in (trace, *trace.evaluations())]
    copy = trace.copy()
    SKELETON.run(copy)
    for evaluation in copy.evaluations():
        EVALUATION.run(evaluation)
    assert copy.calls[0].graph is copy.calls[1].graph
    assert [str(each.graph) for each in (trace, *trace.evaluations())] == before
    assert str(copy.graph) != before[0]
