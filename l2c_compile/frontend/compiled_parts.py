"""Run what ``torch.compile`` made of parts of a denoiser or a loop as the Python that it was made of, and name it."""

from __future__ import annotations

import inspect
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

_lock = threading.Lock()
_num_open = 0
_forced: Any = None


@contextmanager
def run_eagerly() -> Iterator[None]:
    """Let no code run that ``torch.compile`` made, in any thread, while the context is open."""
    global _num_open, _forced
    # Torch's stance is one for all threads, so the first who enters sets it and the last who leaves puts it back.
    with _lock:
        if not _num_open:
            _forced = torch.compiler.set_stance("force_eager")
            _forced.__enter__()
        _num_open += 1
    try:
        yield
    finally:
        with _lock:
            _num_open -= 1
            if not _num_open:
                _forced.__exit__(None, None, None)


@contextmanager
def taken_apart(denoiser: nn.Module) -> Iterator[None]:
    """Run compiled parts eagerly while the context is open, and warn of those that ran when it ends.

    Warns:
        UserWarning: if a compiled part ran, because what ``torch.compile`` makes may round in another way.
    """
    finder = _PartFinder()
    if vars(denoiser).get("_compiled_call_impl") is not None:
        finder.found[denoiser] = None
    with run_eagerly(), finder:
        yield
    if finder.found:
        paths = {module: path for path, module in denoiser.named_modules()}
        names = [_name_of(part, paths) for part in finder.found]
        warnings.warn(
            f"torch.compile made code of {', '.join(names)}; the sampler takes the Python that this was made of, so its"
            " result may differ in the last bits. Compile the sampler instead, with backend='inductor'",
            stacklevel=2,
        )


class _PartFinder(TorchFunctionMode):
    """Notes the compiled functions and modules in which torch is called."""

    def __init__(self) -> None:
        super().__init__()
        self.found: dict[object, None] = {}

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: object,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:  # noqa: ANN401 - whatever torch returns
        frame: FrameType | None = sys._getframe(1)
        while frame is not None:
            if frame.f_code.co_name == "compile_wrapper" and frame.f_globals.get("__name__") == _DYNAMO:
                part = inspect.unwrap(frame.f_locals["fn"])
                part = getattr(part, "__self__", part)
                self.found[getattr(part, "_orig_mod", part)] = None
            frame = frame.f_back
        return func(*args, **(kwargs or {}))


_DYNAMO = "torch._dynamo.eval_frame"


def _name_of(part: object, paths: dict[nn.Module, str]) -> str:
    if isinstance(part, nn.Module):
        path = paths.get(part)
        return f"module '{path}'" if path else f"the module {type(part).__name__}"
    return f"function {getattr(part, '__module__', '')}.{getattr(part, '__qualname__', repr(part))}"
