"""Make the calls of a denoiser by another function while a loop runs.

The loop is given the denoiser itself, so that its type, attributes, length and other methods are what they are. Only
``forward`` is exchanged: ``denoiser(x)``, ``denoiser.forward(x)`` and every method that calls one of them end there,
after the hooks of the denoiser, which run as part of the loop.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NoReturn

from torch import nn

Loop = Callable[..., object]
"""A sampler in plain PyTorch, called as ``loop(denoiser, noise, **conditions) -> latent``."""


class StandIn:
    """A context in which ``evaluate`` makes the calls of a denoiser.

    Args:
        denoiser: the module whose ``forward`` is exchanged; the context puts it back as it was.
        evaluate: a function that is given ``(args, kwargs)`` of each call and returns what the denoiser would return.
        refuse_copy: a function that raises if the denoiser is copied; None lets it be copied.
    """

    def __init__(
        self,
        denoiser: nn.Module,
        evaluate: Callable[[tuple[object, ...], dict[str, object]], object],
        refuse_copy: Callable[[], NoReturn] | None = None,
    ) -> None:
        self.forward: Callable[..., object] = denoiser.forward
        """The denoiser's own ``forward``."""
        self._attributes = vars(denoiser)
        # A forward that Module.compile made would be called before the one that is exchanged.
        exchanged: dict[str, object] = {"forward": _Method(denoiser.forward, self._call), "_compiled_call_impl": None}
        if refuse_copy is not None:
            exchanged["__getstate__"] = refuse_copy
        self._exchanged = exchanged
        self._evaluate = evaluate
        self._is_open = False

    def __enter__(self) -> None:
        self._own = {name: self._attributes[name] for name in self._exchanged if name in self._attributes}
        self._attributes.update(self._exchanged)
        self._is_open = True

    def __exit__(self, *error: object) -> None:
        self._is_open = False
        for name, value in self._exchanged.items():
            # What the loop itself has put there is the loop's to answer for.
            if self._attributes.get(name, self) is not value:
                continue
            if name in self._own:
                self._attributes[name] = self._own[name]
            else:
                del self._attributes[name]

    @contextmanager
    def put_away(self) -> Iterator[None]:
        """Give the denoiser its own ``forward`` while the context is open."""
        # This may be a forward that the loop has put around the exchanged one, of which the evaluation is only a part.
        now = {name: self._attributes.pop(name) for name in self._exchanged if name in self._attributes}
        self._attributes.update(self._own)
        try:
            yield
        finally:
            self._attributes.update(now)

    def _call(self, args: tuple[object, ...], kwargs: dict[str, object]) -> object:
        # The loop may have kept the exchanged forward, and call it later.
        return self._evaluate(args, kwargs) if self._is_open else self.forward(*args, **kwargs)


class _Method:
    """A method that is called elsewhere; whatever else is asked of it, the real one answers."""

    __slots__ = ("_call", "_method")

    def __init__(
        self,
        method: Callable[..., object],
        call: Callable[[tuple[object, ...], dict[str, object]], object],
    ) -> None:
        self._method = method
        self._call = call

    def __getattribute__(self, name: str) -> Any:  # noqa: ANN401 - whatever the method has
        return getattr(object.__getattribute__(self, "_method"), name)

    def __call__(self, *args: object, **kwargs: object) -> object:
        return object.__getattribute__(self, "_call")(args, kwargs)


_AROUND_FORWARD = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")


@contextmanager
def without_hooks_of(denoiser: nn.Module) -> Iterator[None]:
    """Let ``nn.Module.__call__`` of a denoiser run its ``forward`` only, because its hooks belong to the loop."""
    own = vars(denoiser)
    before = dict(own)
    own.update({name: OrderedDict() for name in _AROUND_FORWARD if name in own}, _compiled_call_impl=None)
    try:
        yield
    finally:
        own.update({name: before[name] for name in _AROUND_FORWARD if name in before})
        if "_compiled_call_impl" in before:
            own["_compiled_call_impl"] = before["_compiled_call_impl"]
        else:
            own.pop("_compiled_call_impl", None)
