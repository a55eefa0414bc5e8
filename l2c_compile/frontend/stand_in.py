"""What a loop is given in place of its denoiser while it is traced."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

__all__ = ["Loop", "StandIn"]

Loop = Callable[..., object]
"""``loop(denoiser, noise, **conditions) -> latent``: plain PyTorch that runs a sampler."""


class StandIn:
    """Stands for the denoiser while a loop runs: has all that it has, but calls are made by ``evaluate``.

    Args:
        denoiser: what it passes for.
        evaluate: given ``(args, kwargs)`` of each call; returns what the denoiser would.
    """

    def __init__(
        self, denoiser: nn.Module, evaluate: Callable[[tuple[object, ...], dict[str, object]], object]
    ) -> None:
        self.__denoiser = denoiser
        self.__evaluate = evaluate

    @property  # type: ignore[misc]
    def __class__(self) -> type:
        return type(self.__denoiser)

    def __call__(self, *args: object, **kwargs: object) -> object:
        """Return what ``evaluate`` does."""
        return self.__evaluate(args, kwargs)

    forward = __call__

    def __getattr__(self, name: str) -> Any:  # noqa: ANN401 - whatever the denoiser has
        denoiser = self.__denoiser
        value = getattr(denoiser, name)
        if getattr(value, "__self__", None) is not denoiser:
            return value

        def method(*args: object, **kwargs: object) -> object:
            # What eval() and to() return is called next.
            result = value(*args, **kwargs)
            return self if result is denoiser else result

        return method
