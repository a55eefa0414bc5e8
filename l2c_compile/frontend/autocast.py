"""Autocast, which a static graph would ignore: the operators in it were chosen when it was traced."""

from __future__ import annotations

import torch

from l2c_compile.errors import LoopTraceError


def is_autocast_on() -> bool:
    """Return whether autocast is on in this thread."""
    return torch.is_autocast_enabled("cpu") or torch.is_autocast_enabled("cuda")


def check_no_autocast() -> None:
    """Raise ``LoopTraceError`` if autocast is on where a sampler is compiled or called."""
    if is_autocast_on():
        raise LoopTraceError(
            "autocast is on where the sampler is compiled or called, and a static graph would ignore it; call the"
            " sampler outside of it, and enter it inside the denoiser's forward, or cast the model"
        )
