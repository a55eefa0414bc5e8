"""What tests of learned finders share: inputs, settings, models, and what is seen of the updates."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from l2c_compile.finders.training import Learner
from l2c_compile.methods import L2CSettings
from l2c_compile.models import DiT
from tests.tiny import seeded

SITES = ("a", "b")


DIT_SITES = ("blocks.*.attn", "blocks.*.mlp")


def draw_latents(count: int, generator: torch.Generator) -> tuple[Tensor, dict[str, object]]:
    return torch.randn(count, 4, generator=generator), {}


def draw_images(count: int, generator: torch.Generator) -> tuple[Tensor, dict[str, object]]:
    noise = torch.randn(count, 4, 4, 4, generator=generator)
    return noise, {"y": torch.randint(0, 5, (count,), generator=generator)}


def settings(**changes: Any) -> L2CSettings:  # noqa: ANN401
    given: dict[str, Any] = {"rounds": 3, "batch_size": 4}
    if "budget" not in changes:
        given["penalty"] = 1e-3
    return L2CSettings(**{**given, **changes})


Step = tuple[dict[int, Tensor], Tensor, dict[int, Tensor]]


@pytest.fixture
def training_steps(monkeypatch: pytest.MonkeyPatch) -> list[Step]:
    """Collect (logits before, loss, gradients) of every update."""
    seen: list[Step] = []
    original = Learner.loss

    def spy(self: Learner, distances: Mapping[int, Tensor]) -> tuple[Tensor, dict[int, Tensor]]:
        before = {e: self.logits[e].detach().clone() for e in distances}
        loss, gradients = original(self, distances)
        seen.append((before, loss, {e: g.clone() for e, g in gradients.items()}))
        return loss, gradients

    monkeypatch.setattr(Learner, "loss", spy)
    return seen


class Hooks:
    """Plain forward hooks on the sublayers of a DiT: keep their outputs, or mix them with kept ones."""

    def __init__(self, model: nn.Module, paths: list[str]) -> None:
        self.kept: dict[str, Tensor] = {}
        self.scores: Tensor | None = None
        for column, path in enumerate(paths):
            model.get_submodule(path).register_forward_hook(self.hook(column, path))

    def hook(self, column: int, path: str) -> Callable[..., Tensor | None]:
        def run(module: nn.Module, args: object, output: Tensor) -> Tensor | None:
            if self.scores is None:
                self.kept[path] = output.detach()
                return None
            return self.scores[column] * output + (1 - self.scores[column]) * self.kept[path]

        return run


def many_tokens() -> DiT:
    """Return a model whose sublayers are most of its work, as in models of real size."""
    model = DiT(input_size=16, patch_size=2, hidden_size=16, depth=3, num_heads=2, num_classes=5)
    return seeded(model)  # type: ignore[no-any-return]


def draw_large_images(count: int, generator: torch.Generator) -> tuple[Tensor, dict[str, object]]:
    return torch.randn(count, 4, 16, 16, generator=generator), {"y": torch.zeros(count, dtype=torch.int64)}
