"""The loop as one CUDA graph, on a GPU."""

from __future__ import annotations

import pytest
import torch

from l2c_compile import CacheSchedule, l2c_compile
from tests.tiny import draw, residual, same_bits, steps

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


def test_a_cuda_graph_gives_the_bits_of_the_loop() -> None:
    schedule = CacheSchedule.from_table({"a": [1, 0, 1], "b": [1, 0, 0]})
    model = residual().cuda()
    plain = l2c_compile(model, schedule, steps(3))
    graphed = l2c_compile(model, schedule, steps(3), mode="reduce-overhead")
    for seed in range(3):
        noise = draw(2, 4, seed=seed).cuda()
        assert same_bits(graphed(noise), plain(noise))
