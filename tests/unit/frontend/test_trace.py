"""What the tracer records, and what it answers without recording. Whole loops are in test_user_loops."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import handle_torch_function

from l2c_compile import CacheSchedule, l2c_compile
from l2c_compile.errors import LoopTraceError
from l2c_compile.frontend.capture import capture
from l2c_compile.frontend.loop_tensor import LoopTensor
from l2c_compile.frontend.trace import trace_loop
from l2c_compile.graphs.forms import CallSignature
from l2c_compile.graphs.loop_graph import EvaluationGraph
from l2c_compile.graphs.nodes import draws_random_numbers
from l2c_compile.graphs.skeleton import LoopSkeleton
from tests.tiny import at, check_equals_reference, draw, residual, targets

MODEL = residual()
FORMS: dict[CallSignature, EvaluationGraph] = {}


def traced(loop: Callable[..., object], noise: object = None, **conditions: object) -> LoopSkeleton:
    def capture_call(signature: CallSignature) -> EvaluationGraph:
        if signature not in FORMS:
            FORMS[signature] = capture(MODEL, signature, ())
        return FORMS[signature]

    return trace_loop(loop, MODEL, draw(3, 4) if noise is None else noise, conditions, capture_call)


def test_equal_calls_share_a_form_and_each_is_recorded() -> None:
    def loop(denoiser: Any, x: Tensor) -> Any:  # noqa: ANN401
        for i in range(3):
            x = denoiser(x, at(x, i))
        return denoiser(x, at(x, 0), 2.0)

    skeleton = traced(loop)
    assert len(skeleton.calls) == 4
    assert len({id(call.graph) for call in skeleton.calls}) == 2
    assert [len(nodes) for nodes in skeleton.argument_nodes()] == [2, 2, 2, 2]
    assert [len(nodes) for nodes in skeleton.output_nodes()] == [1, 1, 1, 1]


def test_arithmetic_on_the_schedule_leaves_no_trace() -> None:
    def loop(denoiser: Any, x: Tensor) -> Any:  # noqa: ANN401
        sigmas = torch.linspace(1, 0, 8).cumsum(0)
        return x * float(sigmas[3].sqrt()) + denoiser(x, at(x, int(sigmas.argmax())))

    names = {target for target in targets(traced(loop)) if not target.startswith("clone")}
    assert names == {"mul.Tensor", "add.Tensor"}


def test_a_constant_is_taken_as_it_is_at_each_use() -> None:
    def loop(denoiser: Any, x: Tensor) -> Any:  # noqa: ANN401
        scale = torch.ones(4)
        x = denoiser(x * scale, at(x, 1)) + x * scale
        scale.mul_(3.0)
        return x * scale

    skeleton = traced(loop)
    kept = [value for value in skeleton.constants.values() if value.shape == (4,)]
    assert [value.tolist() for value in kept] == [[1.0] * 4, [3.0] * 4]


def test_weights_in_the_loop_are_referenced() -> None:
    skeleton = traced(lambda d, x: d(x, at(x, 1)) + d.a.bias)
    assert skeleton.constants["denoiser.a.bias"] is MODEL.a.bias


def test_draws_are_recorded_in_order_used_or_not() -> None:
    def loop(denoiser: Any, x: Tensor) -> Any:  # noqa: ANN401
        torch.randn(2)
        return denoiser(x + torch.rand(3, 4) + torch.randn_like(x), at(x, 1)) + torch.empty_like(x).normal_()

    drawn = [n for n in traced(loop).graph.nodes if draws_random_numbers(n)]
    assert len(drawn) == 4


def test_noise_is_counted_apart_from_conditions() -> None:
    skeleton = traced(lambda d, xs, y: d(xs[0], at(xs[0], 1)) + xs[1] * y, (draw(3, 4), draw(3, 4)), y=draw(4))
    assert (skeleton.num_inputs, skeleton.num_noise) == (3, 2)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_the_callers_grad_mode_does_not_matter(mode: Callable[[], Any]) -> None:
    with mode():
        assert len(traced(lambda d, x: d(x, at(x, 1)) * torch.ones(4)).calls) == 1


def test_numbers_assigned_to_a_part_are_kept() -> None:
    def loop(denoiser: Any, x: Tensor) -> Any:  # noqa: ANN401
        x = x.clone()
        x[:, 0] = 7.0
        x[1] = 2
        return denoiser(x, at(x, 1))

    skeleton = traced(loop)
    assert {float(value) for value in skeleton.root.buffers()} <= {7.0, 2.0}


def test_a_refusal_that_the_loop_catches_is_raised_when_it_returns() -> None:
    def loop(denoiser: Any, x: Tensor) -> Tensor:  # noqa: ANN401
        with contextlib.suppress(Exception):
            if x.mean() > 0:
                x = x * 2
        result: Tensor = denoiser(x, at(x, 0))
        return result

    with pytest.raises(LoopTraceError, match=r"branches on a value .* at .*test_trace\.py:\d+, after 0 evaluations"):
        traced(loop, draw(3, 4))


def test_a_tensor_of_a_capture_is_no_value_of_the_loop() -> None:
    with FakeTensorMode():
        stored = torch.ones(3, 4)

    def computes(denoiser: Any, x: Tensor) -> Any:  # noqa: ANN401
        return denoiser(x, at(x, 1)) + stored

    def returns(denoiser: Any, x: Tensor) -> Any:  # noqa: ANN401
        return denoiser(x, at(x, 1)), stored

    for loop in (computes, returns):
        with pytest.raises(LoopTraceError, match=r"a tensor that the denoiser, or a hook in it, has stored.*return it"):
            traced(loop)


def test_a_tensor_of_an_earlier_trace_is_refused_and_can_be_looked_at() -> None:
    kept: list[Tensor] = []

    def loop(denoiser: Any, x: Tensor) -> Any:  # noqa: ANN401
        kept.append(x)
        return denoiser(kept[0], at(x, 1))

    traced(loop)
    assert kept[0].shape == (3, 4)
    assert "without values" in repr(kept[0])
    with pytest.raises(LoopTraceError, match="was kept when a loop was traced before"):
        _ = kept[0] + 1


def test_writes_between_overlapping_parts_are_refused() -> None:
    def loop(denoiser: Any, x: Tensor) -> Any:  # noqa: ANN401
        x[:, 2:] = x[:, :2]
        x[0] = x[1]
        x[:, 1:] = x[:, :-1]
        return denoiser(x, at(x, 1))

    with pytest.raises(LoopTraceError, match=r"an overlapping part of it \(__setitem__\) at .*; clone what is read"):
        traced(loop)


def test_a_call_that_cannot_be_lowered_is_named_with_its_place() -> None:
    def loop(denoiser: Any, x: Tensor) -> Any:  # noqa: ANN401
        _NOT_LOWERED(x)
        return denoiser(x, at(x, 1))

    with pytest.raises(LoopTraceError, match=r"calls stops_later at .*test_trace\.py:\d+, .*KeyError: 'later'"):
        traced(loop)


class _StopsLater:
    """A function that runs on the tensors of a trace once, and then no more."""

    __name__ = "stops_later"
    __module__ = "torch"

    def __init__(self) -> None:
        self.was_called = False

    def __call__(self, x: Tensor) -> object:
        if isinstance(x, LoopTensor):
            return handle_torch_function(self, (x,), x)
        if self.was_called:
            raise KeyError("later")
        self.was_called = True
        return torch.sin(x)


_NOT_LOWERED = _StopsLater()


def test_a_denoiser_called_from_another_thread_is_an_error_and_no_deadlock() -> None:
    def loop(denoiser: Any, x: Tensor) -> Tensor:  # noqa: ANN401
        with ThreadPoolExecutor(1) as pool:
            result: Tensor = pool.submit(denoiser, x, at(x, 0)).result()
        return result

    sampler = l2c_compile(residual(), CacheSchedule.all_compute(1), loop)
    with pytest.raises(LoopTraceError, match=r"from another thread at .*; call it in the thread that runs the loop"):
        sampler(draw(3, 4))


@pytest.mark.parametrize("function", [torch.quantile, torch.nanquantile])
def test_what_torch_makes_of_operators_that_write_is_functional(function: Callable[..., Tensor]) -> None:
    def thresholded(denoiser: Any, x: Tensor) -> Tensor:  # noqa: ANN401
        for i in range(2):
            x = x - 0.25 * denoiser(x, at(x, i))
            bound = function(x.abs().flatten(1), 0.9, dim=1).clamp(min=0.1)[:, None]
            x = x.clamp(-bound, bound) / bound
            x[:, 0] = 0.5
        return x

    check_equals_reference(residual(), CacheSchedule.from_table({"a": [1, 0]}), thresholded, draw(3, 4))
