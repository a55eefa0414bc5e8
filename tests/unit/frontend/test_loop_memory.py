"""Which tensors of a loop keep their values, and which lose them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from l2c_compile.frontend.capture import capture
from l2c_compile.frontend.loop_memory import LoopMemory, data_of, memory_of, name_of, writes_in_place, written_by
from l2c_compile.frontend.loop_tensor import LoopTensor
from l2c_compile.frontend.trace import trace_loop
from l2c_compile.graphs.skeleton import LoopSkeleton
from tests.tiny import at, draw, residual, targets

MODEL = residual()


def traced(loop: Callable[..., object], **conditions: object) -> LoopSkeleton:
    return trace_loop(loop, MODEL, draw(3, 4), conditions, lambda signature: capture(MODEL, signature, ()))


def assert_known(tensor: Tensor, *values: float) -> None:
    assert type(tensor) is Tensor
    assert tensor.flatten().tolist() == list(values)


def test_what_takes_only_the_form_of_the_latent_has_values() -> None:
    def loop(denoiser: Any, x: Tensor) -> Tensor:  # noqa: ANN401
        x = x.double()
        for made in (torch.ones(2).to(x), torch.ones(2).type_as(x), x.new_ones(2), x.new_tensor([1, 1])):
            assert_known(made, 1, 1)
            assert made.dtype is torch.float64
        assert_known(torch.ones(4).expand_as(x[0]), 1, 1, 1, 1)
        assert_known(torch.ones(4).view_as(x[:1]), 1, 1, 1, 1)
        assert_known(torch.full_like(input=x[0, :2], fill_value=3), 3, 3)
        assert_known(x.new_empty(1), 0)
        assert x.new_zeros(2).sum() == 0
        assert type(x.to(torch.ones(1))) is type(x.new_ones(2) * x[0, 0]) is LoopTensor
        result: Tensor = denoiser(x.float(), at(x, 1).float())
        return result

    traced(loop)


def test_what_is_made_of_a_weight_follows_the_weight() -> None:
    def loop(denoiser: Any, x: Tensor) -> Any:  # noqa: ANN401
        assert type(denoiser.a.bias.to(x)) is type(denoiser.a.bias[None].expand_as(x)) is LoopTensor
        return denoiser(x, at(x, 1)) + denoiser.a.bias.expand_as(x)

    assert "denoiser.a.bias" in traced(loop).constants


def test_a_tensor_of_the_latents_form_is_recorded_as_the_call_that_made_it() -> None:
    def loop(denoiser: Any, x: Tensor) -> Any:  # noqa: ANN401
        zeros, ones = torch.zeros_like(x), x.new_ones(4)
        ones *= 2
        return denoiser(x + zeros, at(x, 1)) * ones

    skeleton = traced(loop)
    assert any("zeros" in target for target in targets(skeleton))
    assert [value.tolist() for value in skeleton.constants.values() if value.shape == (4,)] == [[2.0] * 4]


def test_memory_loses_its_values_with_the_first_write_that_has_none() -> None:
    def loop(denoiser: Any, x: Tensor) -> Any:  # noqa: ANN401
        out = torch.zeros(2, 3, 4)
        first, flat, others = out[0], out.view(-1), torch.zeros(3)
        out[1] = 3.0
        assert flat[-1] == 3
        out[0] = x
        assert type(first + 0) is type(flat[-1] + 0) is LoopTensor
        assert type(out) is Tensor
        assert others.sum() == 0
        return denoiser(first, at(x, 1)), flat

    traced(loop)


def test_memory_of_zeros_is_no_constant_of_the_graph() -> None:
    def loop(denoiser: Any, x: Tensor) -> Any:  # noqa: ANN401
        unwritten, negative = torch.empty(2, 3, 4), torch.full((3, 4), -0.0)
        unwritten[0] = x
        negative += x
        return denoiser(x, at(x, 1)), unwritten, negative

    # An empty tensor holds what no program may depend on; a negative zero is not a zero.
    (constant,) = [value for value in traced(loop).constants.values() if value.ndim == 2]
    assert torch.signbit(constant).all()


def test_tensors_that_other_code_may_read_elsewhere_are_not_taken() -> None:
    memory = LoopMemory.__new__(LoopMemory)
    memory._made = {}
    with torch.no_grad():
        array = torch.ones(2)
        memory._note_made(torch.asarray, (array.numpy(),), {}, array)
        memory._note_made(vars(torch._C.TensorBase)["grad"].__get__, (draw(1),), {}, array)
        assert memory._made == {}
        memory._note_made(torch.ones, (2,), {}, array)
        memory._note_made(Tensor.view, (array, -1), {}, array.view(-1))
    assert list(memory._made) == [memory_of(array)]


@pytest.mark.parametrize(
    ("func", "kwargs", "wanted"),
    [
        (Tensor.add_, {}, True),
        (Tensor.__iadd__, {}, True),
        (Tensor.__setitem__, {}, True),
        (torch.add, {"out": torch.ones(1)}, True),
        (torch.ops.aten.add_.Tensor, {}, True),
        (Tensor.add, {}, False),
        (torch.add, {"out": None}, False),
        (Tensor.__add__, {}, False),
        (torch.ops.aten.add.Tensor, {}, False),
    ],
)
def test_writes_are_known_by_name(func: Callable[..., object], kwargs: dict[str, object], wanted: bool) -> None:
    assert writes_in_place(func, kwargs) is wanted


def test_the_written_tensor_is_out_or_the_first_argument() -> None:
    one, two = torch.ones(1), torch.ones(1)
    assert written_by((one, two), {}) is written_by((two,), {"out": one}) is written_by((), {"tensor": one}) is one


def test_functions_have_the_name_of_their_operator() -> None:
    assert [name_of(f) for f in (torch.add, Tensor.add_, torch.ops.aten.add_.Tensor)] == ["add", "add_", "add_"]


def test_the_data_of_a_call_are_the_arguments_with_values_that_matter() -> None:
    assert data_of(Tensor.type_as, (1, 2), {}) == (1,)
    assert data_of(torch.full_like, (1, 2), {"dtype": 3}) == ((2,), {"dtype": 3})
    assert data_of(torch.add, (1, 2), {}) == ((1, 2), {})


def test_memory_is_the_same_for_views_and_nothing_for_what_has_none() -> None:
    tensor = torch.ones(3)
    assert memory_of(tensor) == memory_of(tensor[1:]) != memory_of(tensor.clone())
    assert memory_of(1) == memory_of(torch.eye(2).to_sparse()) == 0
