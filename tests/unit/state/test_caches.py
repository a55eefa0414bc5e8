"""Caches of functions that hold fake tensors are emptied, others are kept."""

from __future__ import annotations

import functools

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from l2c_compile.state.caches import clear_caches_of_fakes


@functools.cache
def table(size: int) -> Tensor:
    return torch.zeros(size)


@functools.cache
def nested_table(size: int) -> tuple[Tensor, int]:
    return torch.zeros(size), size


class Model(nn.Linear):
    @functools.lru_cache(maxsize=4)  # noqa: B019 - what a user writes
    def own_table(self, size: int) -> Tensor:
        return torch.zeros(size)


def test_only_caches_that_hold_fakes_are_emptied() -> None:
    model = Model(2, 2)
    table(3)
    with FakeTensorMode():
        nested_table(3)
        model.own_table(3)
    clear_caches_of_fakes(model)
    assert table.cache_info().currsize == 1
    assert nested_table.cache_info().currsize == 0
    assert Model.own_table.cache_info().currsize == 0
    table.cache_clear()
