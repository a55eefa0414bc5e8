"""Classifier-free guidance, which moves the prediction away from what the model predicts without a condition.

The formula is equation 6 of Ho and Salimans (arXiv 2207.12598).

Shapes: B batch, C channels; any shape may follow.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from l2c_compile.errors import LoopError, nearest

Denoiser = Callable[..., Tensor]
"""``denoiser(x, t_B, **conditions)`` takes latents, a timestep for each sample, and conditions; it returns at least C
channels."""


@dataclass(frozen=True)
class Guidance:
    """The settings of classifier-free guidance.

    Raises:
        LoopError: if a field makes no sense.
    """

    scale: float
    """The factor of the difference ``cond - uncond``."""
    null: Mapping[str, int | float | Tensor] = field(hash=False)
    """The conditions that stand for "none", by name. A number fills a tensor like the given condition, a tensor is
    expanded to its shape. Conditions that are not named here are the same in both predictions."""
    batched: bool = True
    """Whether one denoiser call gets a doubled batch (conditional half first); otherwise two are made (conditional
    first)."""
    channels: int | None = None
    """The number of first channels that are guided; the others keep the conditional prediction. None guides all. DiT
    guides 3 of 4."""
    base: Literal["uncond", "cond"] = "uncond"
    """The prediction that the scaled difference is added to: ``"uncond"`` (DiT and diffusers, where scale 1 is no
    guidance) or ``"cond"`` (U-ViT, where scale 0 is no guidance)."""

    def __post_init__(self) -> None:
        if isinstance(self.scale, bool) or not isinstance(self.scale, (int, float)):
            raise LoopError(f"guidance wants a number as scale, got {self.scale!r}")
        if not isinstance(self.null, Mapping) or not self.null:
            raise LoopError(f"guidance wants null conditions such as null={{'y': 1000}}, got {self.null!r}")
        for name, value in self.null.items():
            if isinstance(value, bool) or not isinstance(value, (int, float, Tensor)):
                raise LoopError(f"the null condition {name!r} must be a number or a tensor, got {value!r}")
        if not isinstance(self.batched, bool):
            raise LoopError(f"guidance is batched or not, True or False, got {self.batched!r}")
        if self.channels is not None and (type(self.channels) is not int or self.channels < 1):
            raise LoopError(f"guidance wants a positive number of channels or None, got {self.channels!r}")
        if self.base not in ("uncond", "cond"):
            raise LoopError(f"guidance adds to 'uncond' or 'cond', got {self.base!r}")
        object.__setattr__(self, "null", dict(self.null))

    @property
    def num_calls(self) -> int:
        """The number of denoiser calls for one guided prediction."""
        return 1 if self.batched else 2

    def to_dict(self) -> dict[str, Any]:
        """Return a JSON-able description.

        Raises:
            LoopError: if a null condition is a tensor of more than one element.
        """
        null: dict[str, int | float] = {}
        for name, value in self.null.items():
            if isinstance(value, Tensor):
                if value.numel() != 1:
                    raise LoopError(
                        f"the null condition {name!r} has shape {tuple(value.shape)} and cannot be described in JSON; "
                        "only numbers can"
                    )
                null[name] = value.item()
            else:
                null[name] = value
        return {
            "scale": self.scale,
            "null": null,
            "batched": self.batched,
            "channels": self.channels,
            "base": self.base,
        }

    def evaluate(self, denoiser: Denoiser, x: Tensor, timestep: float, conditions: Mapping[str, Any]) -> Tensor:
        """Return the guided prediction.

        Args:
            denoiser: the model.
            x: latents, shape (B, C, ...).
            timestep: the timestep of all samples.
            conditions: the conditions of the model, by name.

        Returns:
            The prediction, in the shape of ``x``.

        Raises:
            LoopError: if a null condition has no counterpart in ``conditions``, or a condition cannot be doubled.
        """
        nulls = {**conditions, **self._null_conditions(conditions)}
        if self.batched:
            doubled = {name: _double(name, (value, nulls[name])) for name, value in conditions.items()}
            both = evaluate(denoiser, torch.cat([x, x]), timestep, doubled)
            cond, uncond = both.chunk(2)
        else:
            cond = evaluate(denoiser, x, timestep, conditions)
            uncond = evaluate(denoiser, x, timestep, nulls)
        return self._combine(cond, uncond)

    def _combine(self, cond: Tensor, uncond: Tensor) -> Tensor:
        num_guided, num_channels = self.channels or cond.shape[1], cond.shape[1]
        if num_guided >= num_channels:
            return (uncond if self.base == "uncond" else cond) + self.scale * (cond - uncond)
        cond_part, uncond_part = cond[:, :num_guided], uncond[:, :num_guided]
        start = uncond_part if self.base == "uncond" else cond_part
        return torch.cat([start + self.scale * (cond_part - uncond_part), cond[:, num_guided:]], dim=1)

    def _null_conditions(self, conditions: Mapping[str, Any]) -> dict[str, Tensor]:
        nulls = {}
        for name, value in self.null.items():
            if name not in conditions:
                hint = nearest(name, conditions) or f"the loop was called with: {', '.join(conditions) or 'none'}"
                raise LoopError(f"guidance has a null for condition {name!r}, which was not given; {hint}")
            like = conditions[name]
            nulls[name] = value.expand_as(like) if isinstance(value, Tensor) else torch.full_like(like, value)
        return nulls


def evaluate(denoiser: Denoiser, x: Tensor, timestep: float, conditions: Mapping[str, Any]) -> Tensor:
    """Call the denoiser once.

    Args:
        denoiser: the model.
        x: latents, shape (B, C, ...).
        timestep: the timestep of all samples; an int becomes an int64 tensor, a float a float32 tensor.
        conditions: the conditions of the model, by name.

    Returns:
        The prediction, in the shape of ``x``; a learned variance, which has channels C and up, is dropped.
    """
    dtype = torch.int64 if isinstance(timestep, int) else torch.float32
    t_B = torch.full((x.shape[0],), timestep, dtype=dtype, device=x.device)
    prediction = denoiser(x, t_B, **conditions)
    num_channels = x.shape[1]
    return prediction if prediction.shape[1] == num_channels else prediction[:, :num_channels]


def _double(name: str, halves: tuple[Any, Any]) -> object:
    """Return a condition for a doubled batch, conditional half first; plain Python values hold for both halves."""
    value = halves[0]
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, (list, tuple, dict)):
        raise LoopError(
            f"batched guidance cannot double condition {name!r} of type {type(value).__name__}; pass tensors, or guide "
            "with batched=False"
        )
    return torch.cat(halves)
