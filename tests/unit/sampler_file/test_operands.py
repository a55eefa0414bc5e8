"""What the operators of a file may be given: what torch's fake tensors do not see is refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from l2c_compile import load
from l2c_compile.graphs.forms import TensorForm
from l2c_compile.sampler_file.operands import extent_bytes
from tests.saved_samplers import refused, with_lines


def zeros(*shape: int, dtype: str = "float32") -> dict[str, object]:
    return {"op": "aten::zeros", "args": [list(shape)], "kwargs": {"dtype": {"dtype": dtype}}}


def call(name: str, *args: object, **kwargs: object) -> dict[str, object]:
    return {"op": f"aten::{name}", "args": list(args), "kwargs": kwargs}


N1, N2, N3, N4, N5 = (f"%next-{back}" for back in range(1, 6))
FIRST: dict[str, object] = {"op": "getitem", "args": ["%next-1", 0]}
IMAGE = zeros(2, 4, 6, 6)
NORM = (N2, N1, N1, N1, N1)
OVERLAPPING = (zeros(2, 2, 5, 4), call("as_strided", N1, [2, 2, 5, 4], [40, 1, 4, 1]))
RECURRENT = (zeros(3, 2, 4), zeros(1, 2, 5), zeros(5, 4), zeros(5, 5))
HEADS = (zeros(2, 3, 4), zeros(12, 4), zeros(12), zeros(4, 4), zeros(4))
PLAIN = (False, 1, 0.0, False, False, False)
"""A recurrent layer without biases: number of layers, dropout, training, both directions, batch first."""

REFUSED = {
    "short statistics": ([IMAGE, zeros(2), call("native_batch_norm", *NORM, False, 0.1, 1e-5)], "one number a channel"),
    "written statistics": ([IMAGE, zeros(4), call("native_batch_norm", *NORM, True, 0.1, 1e-5)], "would write running"),
    "no statistics": (
        [IMAGE, call("native_batch_norm", N1, None, None, None, None, False, 0.1, 1e-5)],
        "wants running statistics",
    ),
    "groups": ([IMAGE, call("native_group_norm", N1, None, None, 2, 4, 3600, 2, 1e-5)], "wants the sizes"),
    "norm": ([IMAGE, call("native_layer_norm", N1, [7], None, None, 1e-5)], "ends in the shape"),
    "weight of a norm": ([zeros(2, 4), zeros(3), call("layer_norm", N2, [4], N1)], "wants a weight of shape"),
    "weight norm": ([zeros(3, 4), zeros(1, 1), call("_weight_norm", N2, N1, 0)], "wants norms of shape"),
    "scale": ([IMAGE, call("upsample_nearest2d", N1, [12, 12], 1e-300, 2.0)], "wants the scale from 6 to 12"),
    "infinite scale": (
        [IMAGE, call("upsample_nearest2d.vec", N1, None, [2.0, {"float": "inf"}])],
        "finite and above 0",
    ),
    "frequencies": ([zeros(3, 5, dtype="complex64"), call("_fft_c2r", N1, [1], 0, 4096)], "wants 2049 frequencies"),
    "a dimension twice": (
        [zeros(3, 5, dtype="complex64"), call("_fft_c2c", N1, [1, 1], 0, True)],
        "different dimensions",
    ),
    "keys": (
        [zeros(2, 2, 5, 4), zeros(2, 1, 5, 4), call("_scaled_dot_product_flash_attention_for_cpu", N2, N1, N1)],
        "keys and values of one shape",
    ),
    "mask": (
        [zeros(2, 2, 5, 4), zeros(2, 2), call("_scaled_dot_product_flash_attention_for_cpu", N2, N2, N2, attn_mask=N1)],
        "a mask that broadcasts",
    ),
    "rows that overlap": (
        [*OVERLAPPING, call("scaled_dot_product_attention", N1, N2, N2)],
        "queries whose rows do not overlap",
    ),
    "heads": ([*HEADS, call("_native_multi_head_attention", N5, N5, N5, 4, 3, N4, N3, N2, N1)], "3 heads divide"),
    "weights of heads": (
        [*HEADS, call("_native_multi_head_attention", N5, N5, N5, 4, 2, N3, N4, N2, N1)],
        "wants qkv_weight of shape",
    ),
    "mask of heads": (
        [*HEADS, call("_native_multi_head_attention", N5, N5, N5, 4, 2, N4, N3, N2, N1, N2, True, True, 1)],
        "wants a mask of shape",
    ),
    "recurrent weights": (
        [*RECURRENT, call("rnn_tanh.input", N4, N3, [N1, N2], *PLAIN)],
        "wants weight 0 of shape",
    ),
    "a state": (
        [*RECURRENT[:1], zeros(1, 1, 5), *RECURRENT[2:], call("rnn_tanh.input", N4, N3, [N2, N1], *PLAIN)],
        "wants states of shape",
    ),
    "modes": ([IMAGE, zeros(2, 5, 5, 2), call("grid_sampler_2d", N2, N1, 7, 0, False)], "modes of 0 to 2"),
    "diagonal": ([zeros(4, 4), call("triu", N1, 2**62)], "a diagonal of at most"),
    "a negative view of integers": ([call("_neg_view", "%1")], "wants floats to negate"),
    "sorter": ([zeros(4), call("searchsorted.Tensor", N1, N1, sorter="%1")], "takes positions from a sorter"),
    "division by a number": ([call("remainder.Scalar", "%1", 0)], "divides integers by 0"),
    "division by what is computed": ([call("floor_divide", "%1", "%1")], "a tensor that is computed"),
    "beyond the end": ([zeros(3, 4), call("as_strided", N1, [4, 4], [4, 1])], "wants 64 bytes .* which has 48"),
    "before the beginning": ([zeros(3, 4), call("as_strided", N1, [2], [-1], 3)], "cannot be|does not take"),
    "behind an offset": ([zeros(3, 4), call("as_strided", N1, [3, 4], [4, 1], 1)], "wants 52 bytes"),
    "between strides": (
        [call("slice.Tensor", "%0", 1, 0, 6, 2), call("as_strided", N1, [8], [1])],
        "which has 0",
    ),
    "pinned memory": ([call("zeros", [4], pin_memory=True)], "pinned memory"),
    "pieces": ([zeros(2**20), call("unbind.int", N1)], "pieces"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_operands_that_a_kernel_would_believe_are_refused(saved: Path, tmp_path: Path, kind: str) -> None:
    lines, message = REFUSED[kind]
    if "norm" in str(lines[-1]) and "native" in str(lines[-1]):
        lines = [*lines, FIRST]
    refused(with_lines(saved, tmp_path / "x.pt2", *lines), message)


@pytest.mark.parametrize(
    "lines",
    [
        [IMAGE, zeros(4), call("batch_norm", *NORM, False, 0.1, 1e-5, False)],
        [IMAGE, call("upsample_nearest2d.vec", N1, None, [2.0, 2.0])],
        [IMAGE, call("upsample_nearest2d", N1, [9, 13], 1.5, 2.2)],
        [zeros(3, 5, dtype="complex64"), call("_fft_c2r", N1, [1], 0, 9)],
        [*RECURRENT, call("rnn_tanh.input", N4, N3, [N2, N1], *PLAIN), FIRST],
        [zeros(3, 4), call("as_strided", N1, [2, 3], [5, 1], 2)],
        [*HEADS, call("_native_multi_head_attention", N5, N5, N5, 4, 2, N4, N3, N2, N1), FIRST],
        [zeros(2, 2, 4, 5), call("transpose.int", N1, 2, 3), call("scaled_dot_product_attention", N1, N1, N1)],
        [zeros(3, 4), call("select.int", N1, 0, 1), call("as_strided", N1, [2, 3], [5, 1], 2)],
        [call("floor_divide.Scalar", "%1", 2)],
        [call("div.Tensor", "%1", "%1")],
        [zeros(4, 4), call("triu", N1, -1)],
    ],
)
def test_what_models_give_is_taken(saved: Path, tmp_path: Path, lines: list[object]) -> None:
    sampler = load(with_lines(saved, tmp_path / "x.pt2", *lines))
    sampler(torch.zeros(2, 6), y=torch.ones(2, dtype=torch.int64), scale=0.5)


def test_the_extent_is_that_of_the_strides() -> None:
    cpu = torch.device("cpu")
    assert extent_bytes(TensorForm((3, 4), (4, 1), torch.float32, cpu)) == 48
    assert extent_bytes(TensorForm((2**40,), (0,), torch.float32, cpu)) == 4
    assert extent_bytes(TensorForm((2, 2), (10, 1), torch.int8, cpu)) == 12
    assert extent_bytes(TensorForm((0, 2), (10, 1), torch.int8, cpu)) == 0
