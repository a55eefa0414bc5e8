"""DiT."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from l2c_compile.models import DiT

SMALL_DIT: dict[str, Any] = {
    "input_size": 4,
    "patch_size": 2,
    "hidden_size": 16,
    "depth": 2,
    "num_heads": 2,
    "num_classes": 5,
}


def awake(model: nn.Module) -> nn.Module:
    """Draw all weights, so that no gate is zero."""
    torch.manual_seed(0)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.2)
    return model.eval().requires_grad_(False)


def test_dit_loads_the_authors_state_dict(shared: Callable[[str], Path]) -> None:
    golden = torch.load(shared("golden/dit.pt"), weights_only=True)
    model = DiT(**golden["config"])
    fresh_positions = model.pos_embed.clone()
    model.load_state_dict(golden["state_dict"], strict=True)
    torch.testing.assert_close(fresh_positions, model.pos_embed, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("name", "num_millions"), [("DiT-S/2", 33), ("DiT-B/4", 130), ("DiT-L/2", 458), ("DiT-XL/2", 675)]
)
def test_dit_presets_have_the_published_number_of_parameters(name: str, num_millions: int) -> None:
    with torch.device("meta"):
        model = DiT.from_preset(name)
    assert round(sum(p.numel() for p in model.parameters()) / 1e6) == pytest.approx(num_millions, abs=1)


@pytest.mark.parametrize("learn_sigma", [False, True])
def test_dit_returns_noise_and_variance_channels(learn_sigma: bool) -> None:
    model = awake(DiT(**SMALL_DIT, learn_sigma=learn_sigma))
    out = model(torch.randn(3, 4, 4, 4), torch.tensor([0, 5, 999]), torch.tensor([0, 4, 5]))
    assert out.shape == (3, 8 if learn_sigma else 4, 4, 4)


def test_a_fresh_dit_predicts_zero_and_its_blocks_are_the_identity() -> None:
    model = DiT(**SMALL_DIT)
    tokens, conditioning = torch.randn(2, 4, 16), torch.randn(2, 16)
    torch.testing.assert_close(model.blocks[0](tokens, conditioning), tokens, rtol=0, atol=0)
    assert model(torch.randn(2, 4, 4, 4), torch.tensor([3, 4]), torch.tensor([0, 1])).abs().max() == 0


def test_a_fresh_dit_learns() -> None:
    torch.manual_seed(0)
    model = DiT(**SMALL_DIT, learn_sigma=False)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=3e-3)
    x, t, y = torch.randn(8, 4, 4, 4), torch.arange(8) * 100, torch.arange(8) % 5
    losses = []
    for _ in range(60):
        loss = nn.functional.mse_loss(model(x, t, y), x)
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.3 * losses[0]


def test_an_attention_hook_sees_the_value_before_the_gate() -> None:
    model = DiT(**SMALL_DIT)
    seen: list[Tensor] = []
    model.get_submodule("blocks.0.attn").register_forward_hook(lambda _module, _args, out: seen.append(out))
    model(torch.randn(2, 4, 4, 4), torch.tensor([1, 2]), torch.tensor([0, 1]))
    assert seen[0].abs().max() > 0, "the gate of a fresh block is zero; its attention is not"
