"""Writes that torch does not count are seen in a few elements."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from l2c_compile.state.probes import NUM_ELEMENTS, Probes


@pytest.mark.parametrize(
    "tensor",
    [
        torch.zeros(4),
        torch.zeros(64, 64),
        torch.zeros(8, 16).t(),
        torch.zeros(4, 6)[:, ::2],
        torch.zeros(()),
        torch.zeros(3, 5, dtype=torch.bfloat16),
        torch.zeros(9, dtype=torch.complex64),
        torch.zeros(5, dtype=torch.int64),
        nn.Parameter(torch.full((7,), float("nan"))),
        torch.zeros(1, 3).expand(4, 3),
    ],
    ids=lambda tensor: f"{tensor.dtype}{list(tensor.shape)}{list(tensor.stride())}",
)
def test_a_write_of_all_elements_is_seen_whatever_the_layout(tensor: Tensor) -> None:
    probes = Probes([torch.zeros(3), tensor])
    assert probes.hold()
    assert probes.changed() == []
    tensor.detach().data.fill_(1)
    assert not probes.hold()
    assert [each is tensor for each in probes.changed()] == [True]


def test_elements_are_spread_over_the_memory() -> None:
    weight = torch.zeros(NUM_ELEMENTS * 10)
    probes = Probes([weight])
    weight[-10] = 1
    assert not probes.hold()


def test_tensors_without_elements_that_can_be_read_are_left_out() -> None:
    probes = Probes([torch.zeros(3, device="meta"), torch.zeros(0), torch.eye(3).to_sparse()])
    assert probes.hold()
    assert probes.changed() == []
