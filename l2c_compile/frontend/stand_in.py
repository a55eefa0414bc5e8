"""The object that a loop is given in place of its denoiser while it is traced."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

Loop = Callable[..., object]
"""A sampler in plain PyTorch, called as ``loop(denoiser, noise, **conditions) -> latent``."""


class StandIn:
    """An object with all attributes of the denoiser, whose calls are made by ``evaluate`` while a loop runs.

    Args:
        denoiser: the module that it is taken for.
        evaluate: a function that is given ``(args, kwargs)`` of each call and returns what the denoiser would return.
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
        """Return what ``evaluate`` returns for these arguments."""
        return self.__evaluate(args, kwargs)

    forward = __call__

    def __getattr__(self, name: str) -> Any:  # noqa: ANN401 - whatever the denoiser has
        denoiser = self.__denoiser
        value = getattr(denoiser, name)
        if getattr(value, "__self__", None) is not denoiser:
            return value

        def method(*args: object, **kwargs: object) -> object:
            # The loop calls what eval() and to() return, so they must return this object, not the denoiser.
            result = value(*args, **kwargs)
            return self if result is denoiser else result

        return method
