"""Attention is captured as the fused operator that eager torch calls."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from l2c_compile import CacheSchedule, l2c_compile
from l2c_compile.errors import CaptureError
from l2c_compile.frontend.fast_path import fast_path_as_in_eager_torch
from tests.tiny import check_equals_reference, draw, seeded, steps


class Encoder(nn.Module):
    def __init__(self, **options: Any) -> None:  # noqa: ANN401
        super().__init__()
        layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, **options)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=not options)
        self.out = nn.Linear(8, 8)

    def forward(self, x: Tensor, t: Tensor, **masks: Any) -> Tensor:  # noqa: ANN401
        result: Tensor = self.out(self.encoder(x + t[:, None, None], **masks))
        return result


class Attention(nn.Module):
    def __init__(self, need_weights: bool) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.out = nn.Linear(8, 8)
        self.need_weights = need_weights

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        y, weights = self.attention(x, x, x, need_weights=self.need_weights)
        if not self.need_weights:
            assert weights is None
        result: Tensor = self.out(x + y)
        return result if weights is None else result + weights.mean()


@pytest.mark.parametrize(
    "model", [Encoder(), Encoder(norm_first=True, activation="gelu"), Attention(True), Attention(False)]
)
def test_without_caching_it_is_the_eager_loop_bit_for_bit(model: nn.Module) -> None:
    fused = check_equals_reference(seeded(model), CacheSchedule.all_compute(2), steps(2), draw(2, 6, 8))
    called = {str(node.target) for node in fused.graph_module.graph.nodes}
    assert called & {"aten._transformer_encoder_layer_fwd.default", "aten._native_multi_head_attention.default"}


@pytest.mark.parametrize(
    "site", ["out", "encoder", "encoder.layers.0", "delta(encoder.layers.1)", "encoder.layers.0.self_attn"]
)
def test_a_site_in_or_around_a_layer_is_that_of_the_reference(site: str) -> None:
    schedule = CacheSchedule.from_table({site: [1, 0, 1]})
    check_equals_reference(seeded(Encoder()), schedule, steps(3), draw(2, 6, 8))


def test_a_hook_of_the_users_keeps_its_layer_apart_and_no_other() -> None:
    model = seeded(Encoder())
    model.encoder.layers[0].self_attn.register_forward_hook(lambda *_: None)
    check_equals_reference(model, CacheSchedule.all_compute(2), steps(2), draw(2, 6, 8))


def test_a_denoiser_that_is_one_layer_is_fused() -> None:
    layer = seeded(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True))

    def loop(denoiser: nn.Module, x: Tensor) -> Tensor:
        return torch.sub(x, denoiser(x), alpha=0.5)

    check_equals_reference(layer, CacheSchedule.all_compute(1), loop, draw(2, 6, 8))


@pytest.mark.parametrize(
    ("masks", "message"),
    [
        (
            {"src_key_padding_mask": torch.zeros(2, 6, dtype=torch.bool)},
            "module 'encoder', .*use_nested_tensor to False",
        ),
        ({"mask": nn.Transformer.generate_square_subsequent_mask(6)}, "module 'encoder', .* is_causal=True or False"),
    ],
)
def test_an_encoder_that_looks_into_its_mask_is_refused(masks: dict[str, Tensor], message: str) -> None:
    sampler = l2c_compile(seeded(Encoder()), CacheSchedule.all_compute(2), steps(2))
    with pytest.raises(CaptureError, match=message):
        sampler(draw(2, 6, 8), **masks)


def test_the_ways_out_are_taken() -> None:
    model = seeded(Encoder())
    causal = {"mask": nn.Transformer.generate_square_subsequent_mask(6), "is_causal": False}
    check_equals_reference(model, CacheSchedule.all_compute(2), steps(2), draw(2, 6, 8), **causal)
    model.encoder.use_nested_tensor = False
    padding = torch.tensor([[False] * 6, [False] * 4 + [True] * 2])
    check_equals_reference(model, CacheSchedule.all_compute(2), steps(2), draw(2, 6, 8), src_key_padding_mask=padding)


def test_another_thread_and_the_time_after_see_torch_as_it_is() -> None:
    original, seen = torch.overrides.has_torch_function, list[bool]()
    with fast_path_as_in_eager_torch(nn.Linear(1, 1)):
        thread = threading.Thread(target=lambda: seen.append(torch.overrides.has_torch_function((Loud(),))))
        thread.start()
        thread.join()
        seen.append(torch.overrides.has_torch_function((Loud(),)))
        seen.append(torch.overrides.has_torch_function((torch.ones(1), None)))
    assert seen == [True, True, False]
    assert torch.overrides.has_torch_function is original


class Loud:
    @classmethod
    def __torch_function__(cls, *_: object) -> None:
        raise AssertionError
