"""packed_linear: the linear layer it stands for, whatever happens to the weight."""

from __future__ import annotations

import gc

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from l2c_compile.errors import KernelError
from l2c_compile.kernels import packed_linear as module
from l2c_compile.kernels.packed_linear import ACTIVATIONS, can_pack, packed_linear_op

pytestmark = pytest.mark.skipif(not can_pack(torch.zeros(2, 2)), reason="this build of torch has no oneDNN")


def close(a: Tensor, x: Tensor, layer: nn.Linear) -> bool:
    """Return whether ``a`` is as near to the exact product as float32 allows.

    Both add K products and a bias in float32, each in its own order: |error| <= (K + 1) eps sum of |terms|.
    """
    weight, bias = layer.weight.double(), None if layer.bias is None else layer.bias.double()
    exact = nn.functional.linear(x.double(), weight, bias)
    size = nn.functional.linear(x.double().abs(), weight.abs(), None if bias is None else bias.abs())
    eps = torch.finfo(x.dtype).eps
    bound = (x.shape[-1] + 1) * torch.finfo(torch.float32).eps * size + eps * exact.abs()
    return bool(((a.double() - exact).abs() <= bound).all())


@torch.no_grad()
@pytest.mark.parametrize("shape", [(1, 7), (32, 7), (2, 5, 7), (2, 3, 4, 7), (7,)])
@pytest.mark.parametrize("bias", [False, True])
def test_it_is_the_linear_layer(shape: tuple[int, ...], bias: bool) -> None:
    x, layer = torch.randn(shape), nn.Linear(7, 9, bias=bias)
    result = packed_linear_op(x, layer.weight, layer.bias)
    assert result.shape == (*shape[:-1], 9)
    assert result.is_contiguous()
    assert close(result, x, layer)


@torch.no_grad()
def test_bfloat16_where_the_processor_has_it() -> None:
    layer = nn.Linear(16, 8).to(torch.bfloat16)
    if not can_pack(layer.weight):
        pytest.skip("this processor has no bfloat16")
    x = torch.randn(4, 16).to(torch.bfloat16)
    assert close(packed_linear_op(x, layer.weight, layer.bias), x, layer)


@torch.no_grad()
@pytest.mark.parametrize("act", ACTIVATIONS)
def test_an_activation_follows(act: str) -> None:
    x, layer = 4.0 * torch.randn(32, 16), nn.Linear(16, 48)
    result = packed_linear_op(x, layer.weight, layer.bias, act)
    wanted = ACTIVATIONS[act].plain(functional.linear(x.double(), layer.weight.double(), layer.bias.double()))
    # The product is off by at most 17 eps of about 30; slopes are at most 1.13, and each formula adds a few eps.
    torch.testing.assert_close(result.double(), wanted, rtol=1e-6, atol=17 * torch.finfo(x.dtype).eps * 30)
    empty = packed_linear_op(x[:0], layer.weight, layer.bias, act)
    assert empty.shape == (0, 48)
    with torch.inference_mode():
        weight = layer.weight.clone()
        torch.testing.assert_close(packed_linear_op(x, weight, layer.bias, act), result, rtol=1e-6, atol=1e-4)


@torch.no_grad()
def test_strided_inputs() -> None:
    layer = nn.Linear(6, 4)
    x = torch.randn(2, 6, 5).transpose(1, 2)
    assert close(packed_linear_op(x, layer.weight, layer.bias), x, layer)


@torch.no_grad()
@pytest.mark.parametrize("how", ["in place", "state dict", "data"])
def test_a_weight_that_changes_is_packed_anew(how: str) -> None:
    x, layer, other = torch.randn(32, 8), nn.Linear(8, 8), nn.Linear(8, 8)
    packed_linear_op(x, layer.weight, layer.bias)
    if how == "in place":
        layer.weight.mul_(2.0)
    elif how == "state dict":
        layer.load_state_dict(other.state_dict())
    else:
        layer.weight.data = other.weight.data.clone()
    assert close(packed_linear_op(x, layer.weight, layer.bias), x, layer)


@torch.no_grad()
def test_copies_go_with_their_weight() -> None:
    gc.collect()
    before = len(module._copies)
    layer = nn.Linear(8, 8)
    for rows in (16, 32):
        packed_linear_op(torch.randn(rows, 8), layer.weight, layer.bias)
        packed_linear_op(torch.randn(rows, 8), layer.weight, layer.bias)
    assert len(module._copies) == before + 2
    del layer
    gc.collect()
    assert len(module._copies) == before


@torch.no_grad()
def test_an_empty_batch_and_an_inference_weight() -> None:
    layer = nn.Linear(4, 3)
    assert packed_linear_op(torch.zeros(0, 4), layer.weight, layer.bias).shape == (0, 3)
    with torch.inference_mode():
        weight = torch.randn(3, 4)
        first = packed_linear_op(torch.ones(2, 4), weight, None)
        weight.mul_(2.0)
        assert torch.equal(packed_linear_op(torch.ones(2, 4), weight, None), 2.0 * first)


@torch.no_grad()
def test_what_does_not_fit_is_refused() -> None:
    x, weight = torch.randn(2, 4), torch.randn(3, 4)
    for arguments in (
        (torch.randn(2, 5), weight, None),
        (x, weight, torch.zeros(4)),
        (x, weight.double(), None),
        (x.double(), weight.double(), None),
        (x, weight, None, "tanh"),
    ):
        with pytest.raises(KernelError):
            packed_linear_op(*arguments)


def test_there_is_no_gradient() -> None:
    layer = nn.Linear(4, 3)
    with pytest.raises(KernelError, match="no gradient"):
        packed_linear_op(torch.randn(2, 4), layer.weight, layer.bias)


def test_opcheck() -> None:
    arguments = torch.randn(2, 3, 4), torch.randn(5, 4), torch.randn(5)
    torch.library.opcheck(packed_linear_op, arguments)
    torch.library.opcheck(packed_linear_op, (*arguments[:2], None))
    torch.library.opcheck(packed_linear_op, (*arguments, "gelu_tanh"))
