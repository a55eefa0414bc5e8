"""U-ViT."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from l2c_compile.models import UViT

SMALL_UVIT: dict[str, Any] = {"img_size": 4, "patch_size": 2, "embed_dim": 16, "depth": 2, "num_heads": 2}


def test_uvit_loads_the_authors_state_dict(shared: Callable[[str], Path]) -> None:
    golden = torch.load(shared("golden/uvit.pt"), weights_only=True)
    UViT(**golden["config"]).load_state_dict(golden["state_dict"], strict=True)


@pytest.mark.parametrize(("name", "num_millions"), [("U-ViT-M/2", 131), ("U-ViT-L/2", 287), ("U-ViT-H/2", 501)])
def test_uvit_presets_have_the_published_number_of_parameters(name: str, num_millions: int) -> None:
    with torch.device("meta"):
        model = UViT.from_preset(name)
    assert round(sum(p.numel() for p in model.parameters()) / 1e6) == pytest.approx(num_millions, abs=1)


def test_a_uvit_without_classes_takes_no_labels() -> None:
    x, t, y = torch.randn(2, 4, 4, 4), torch.tensor([1.0, 900.0]), torch.tensor([0, 1])
    without, with_classes = UViT(**SMALL_UVIT, conv=True), UViT(**SMALL_UVIT, num_classes=5, mlp_time_embed=True)
    assert without(x, t).shape == x.shape
    assert with_classes(x, t, y).shape == x.shape
    with pytest.raises(ValueError, match="wants no labels"):
        without(x, t, y)
    with pytest.raises(ValueError, match="wants labels"):
        with_classes(x, t)
