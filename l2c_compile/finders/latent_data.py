"""Latents with noise added to them, from real data: what the authors of Learning-to-Cache train on."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from l2c_compile.errors import ScheduleError
from l2c_compile.frontend.stand_in import Loop
from l2c_compile.loops import BuiltInLoop


@dataclass(frozen=True)
class LatentData:
    """Clean latents and their conditions, to be noised to the time of an evaluation.

    Raises:
        ScheduleError: if the conditions have another number of samples than the latents.
    """

    latents: Tensor
    """Shape (N, ...), floating."""
    conditions: Mapping[str, Tensor] = field(default_factory=dict)
    """Shape (N, ...) each, by the name under which the loop takes them."""
    null: Mapping[str, float] = field(default_factory=dict)
    """What a dropped condition is filled with, by name."""
    dropout: float = 0.1
    """Share of samples whose conditions in ``null`` are dropped, equally for the full evaluation, teacher and
    student."""
    noised: Callable[[Tensor, Tensor, int], Tensor] | None = None
    """``noised(clean, noise, evaluation)``: the latent as the loop would hold it there. None asks the loop, if it
    is one of ``l2c_compile.loops``."""

    def __post_init__(self) -> None:
        for name, value in self.conditions.items():
            if len(value) != len(self.latents):
                raise ScheduleError(
                    f"the data have {len(self.latents)} latents, but {len(value)} of condition {name!r}; give one each"
                )

    def draw(self, count: int, generator: torch.Generator) -> tuple[Tensor, dict[str, object]]:
        """Return noise in the form of ``count`` latents, and the conditions of some of them."""
        clean, conditions = self.draw_clean(count, generator)
        return torch.randn(clean.shape, generator=generator, dtype=clean.dtype), conditions

    def draw_clean(self, count: int, generator: torch.Generator) -> tuple[Tensor, dict[str, object]]:
        """Return ``count`` latents and their conditions, some of them dropped."""
        index = torch.randint(len(self.latents), (count,), generator=generator)
        is_dropped = torch.rand(count, generator=generator) < self.dropout
        conditions: dict[str, object] = {}
        for name, value in self.conditions.items():
            chosen = value[index].clone()
            if name in self.null:
                chosen[is_dropped] = self.null[name]
            conditions[name] = chosen
        return self.latents[index], conditions


def noised_by(loop: Loop) -> Callable[[Tensor, Tensor, int], Tensor]:
    """Return ``(clean, noise, evaluation) -> noised`` at the noise levels of a built-in loop.

    Raises:
        ScheduleError: if the loop is none of ``l2c_compile.loops``.
    """
    if not isinstance(loop, BuiltInLoop):
        raise ScheduleError(
            "how much noise a loop of your own holds at an evaluation is not known here; give LatentData(noised=...)"
        )
    levels = loop.noise_levels

    def noised(clean: Tensor, noise: Tensor, e: int) -> Tensor:
        signal, sigma = levels[e]
        return signal * clean + sigma * noise

    return noised
