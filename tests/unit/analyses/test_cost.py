"""What an operation costs."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.modules import module

from l2c_compile import CacheSchedule, l2c_compile
from l2c_compile.analyses import cost
from l2c_compile.analyses.cost import MultiplyAdds, NodeTimes, bytes_moved
from l2c_compile.graphs.nodes import infer
from tests.uneven import DIM, WIDE, sampler


def test_a_form_is_measured_once_whatever_its_numbers() -> None:
    cached = sampler({"heavy": [1, 1, 1, 1]})
    nodes = cached.capture(torch.zeros(2, DIM)).graph.graph.nodes
    times = NodeTimes(torch.device("cpu"), rounds=1)
    times.measure(nodes)
    heavy = [node for node in nodes if "linear" in node.name]
    assert len(heavy) == 16
    # From 4 to 256, from 256 to 256, back to 4, and the light one.
    assert len({times.of(node) for node in heavy}) == 4
    assert times.total(nodes) >= times.total(heavy) > 0
    with pytest.raises(KeyError):
        NodeTimes(torch.device("cpu")).of(heavy[0])


def test_a_view_moves_no_bytes_and_a_product_reads_its_weight() -> None:
    nodes = sampler({"heavy": [1] * 4}).capture(torch.zeros(2, DIM)).graph.graph.nodes
    middle = next(node for node in nodes if "linear" in node.name and node.meta["val"].shape == (2, WIDE))
    assert bytes_moved(middle) == 4 * (2 * DIM + DIM * WIDE + WIDE + 2 * WIDE)
    assert all(bytes_moved(node) == 0 for node in nodes if "unsqueeze" in node.name or node.op != "call_function")


def test_counting_hooks_no_module_that_another_thread_may_run(monkeypatch: pytest.MonkeyPatch) -> None:
    graph = sampler({"heavy": [1, 1, 1, 1]}).capture(torch.zeros(2, DIM)).graph.graph
    hooks: list[int] = []

    def watched(*args: Any) -> object:  # noqa: ANN401
        hooks.append(len(module._global_forward_pre_hooks) + len(module._global_forward_hooks))
        return infer(*args)

    monkeypatch.setattr(cost, "infer", watched)
    assert MultiplyAdds().total(graph.nodes) > 0
    assert set(hooks) == {0}


def test_fused_attention_costs_what_its_parts_do() -> None:
    num_samples, num_tokens, width, hidden = 2, 6, 8, 16
    layer = nn.TransformerEncoderLayer(width, 2, hidden, batch_first=True).eval()
    attention = nn.MultiheadAttention(width, 2, batch_first=True).eval()
    tokens = num_samples * num_tokens
    of_attention = tokens * (4 * width * width + 2 * num_tokens * width)
    for model, wanted in ((layer, of_attention + tokens * 2 * width * hidden), (attention, of_attention)):
        count = 1 if model is layer else 3

        def loop(denoiser: Any, x: torch.Tensor, count: int = count) -> object:  # noqa: ANN401
            return denoiser(*[x] * count)

        whole = l2c_compile(model, CacheSchedule.all_compute(1), loop)
        whole(torch.ones(num_samples, num_tokens, width))
        assert whole.summary().multiply_adds == wanted
