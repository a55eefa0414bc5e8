"""What the packaged models have in common."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from l2c_compile.models import DIT_PRESETS, UVIT_PRESETS, DiT, UViT

SMALL_DIT: dict[str, Any] = {
    "input_size": 4,
    "patch_size": 2,
    "hidden_size": 16,
    "depth": 2,
    "num_heads": 2,
    "num_classes": 5,
}


SMALL_UVIT: dict[str, Any] = {"img_size": 4, "patch_size": 2, "embed_dim": 16, "depth": 2, "num_heads": 2}


def awake(model: nn.Module) -> nn.Module:
    """Draw all weights, so that no gate is zero."""
    torch.manual_seed(0)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.2)
    return model.eval().requires_grad_(False)


def test_presets_cover_every_size_and_patch() -> None:
    assert set(DIT_PRESETS) == {f"DiT-{size}/{patch}" for size in ("S", "B", "L", "XL") for patch in (2, 4, 8)}
    assert set(UVIT_PRESETS) == {"U-ViT-M/2", "U-ViT-L/2", "U-ViT-H/2"}


def test_an_unknown_preset_names_the_nearest() -> None:
    with pytest.raises(ValueError, match=r"did you mean.*'DiT-XL/2'"):
        DiT.from_preset("DiT-XL2")
    with pytest.raises(ValueError, match=r"did you mean.*'U-ViT-H/2'"):
        UViT.from_preset("UViT-H/2")


def test_a_preset_can_be_overridden() -> None:
    with torch.device("meta"):
        assert DiT.from_preset("DiT-S/8", input_size=64, depth=1).pos_embed.shape == (1, 64, 384)


@pytest.mark.parametrize("wrong", [{"patch_size": 3}, {"num_heads": 3}])
def test_sizes_that_do_not_fit_are_refused(wrong: dict[str, int]) -> None:
    with pytest.raises(ValueError, match=r"must (tile|be a multiple)"):
        DiT(**{**SMALL_DIT, **wrong})
    with pytest.raises(ValueError, match=r"must (tile|be a multiple)"):
        UViT(**{**SMALL_UVIT, **wrong})


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_models_run_in_half_precision(dtype: torch.dtype) -> None:
    x, t, y = torch.randn(2, 4, 4, 4), torch.tensor([3.0, 997.0]), torch.tensor([0, 1])
    for model in (DiT(**SMALL_DIT, learn_sigma=False), UViT(**SMALL_UVIT, num_classes=5, mlp_time_embed=True)):
        awake(model)
        wanted = model(x, t, y)
        got = model.to(dtype)(x.to(dtype), t, y)
        assert got.dtype == dtype
        assert (got.float() - wanted).abs().max() < 0.1 * wanted.abs().max()


@pytest.mark.parametrize("name", ["DiT", "UViT"])
def test_sublayers_are_called_as_modules_and_hooks_see_them(name: str) -> None:
    model = DiT(**SMALL_DIT) if name == "DiT" else UViT(**SMALL_UVIT, num_classes=5)
    blocks = ["blocks.0", "blocks.1"] if name == "DiT" else ["in_blocks.0", "mid_block", "out_blocks.0"]
    seen: list[str] = []
    for path, module in model.named_modules():
        if path.endswith((".attn", ".mlp", ".norm1", ".norm2")) and "embedder" not in path:
            module.register_forward_hook(lambda *_, path=path: seen.append(path))
    model(torch.randn(2, 4, 4, 4), torch.tensor([1, 2]), torch.tensor([0, 1]))
    assert seen == [f"{block}.{part}" for block in blocks for part in ("norm1", "attn", "norm2", "mlp")]


@pytest.mark.parametrize("name", ["DiT", "UViT"])
def test_models_export_without_writing_in_place(name: str) -> None:
    model = awake(DiT(**SMALL_DIT) if name == "DiT" else UViT(**SMALL_UVIT, num_classes=5))
    inputs = (torch.randn(2, 4, 4, 4), torch.tensor([1, 2]), torch.tensor([0, 1]))
    exported = torch.export.export(model, inputs, strict=False)
    mutating = [
        node.name
        for node in exported.graph.nodes
        if isinstance(node.target, torch._ops.OpOverload) and node.target._schema.is_mutable
    ]
    assert not mutating
    torch.testing.assert_close(exported.run_decompositions({}).module()(*inputs), model(*inputs), rtol=0, atol=0)
