"""Samplers as plain PyTorch loops that run eagerly and can be traced."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from l2c_compile.errors import LoopError, nearest
from l2c_compile.loops.base import BuiltInLoop
from l2c_compile.loops.ddim import DDIM
from l2c_compile.loops.dpm_solver import DPMSolver
from l2c_compile.loops.flow_euler import FlowEuler
from l2c_compile.loops.guidance import Denoiser, Guidance
from l2c_compile.loops.noise_schedules import LINEAR_BETAS, STABLE_DIFFUSION_BETAS, BetaSchedule

__all__ = [
    "DDIM",
    "LINEAR_BETAS",
    "STABLE_DIFFUSION_BETAS",
    "BetaSchedule",
    "BuiltInLoop",
    "DPMSolver",
    "Denoiser",
    "FlowEuler",
    "Guidance",
    "loop_from_dict",
]

_LOOPS: Mapping[str, type[BuiltInLoop]] = {loop.name: loop for loop in (DDIM, DPMSolver, FlowEuler)}


def loop_from_dict(description: Mapping[str, Any]) -> BuiltInLoop:
    """Return the loop that ``BuiltInLoop.to_dict`` described.

    Args:
        description: a JSON-able mapping; ``"name"`` says which loop it is, and the other entries are its fields.

    Raises:
        LoopError: if the name or a field is unknown, or a field is missing or makes no sense.
    """
    name = str(description.get("name"))
    if name not in _LOOPS:
        hint = nearest(name, _LOOPS) or f"known: {', '.join(_LOOPS)}"
        raise LoopError(f"no loop is called {name!r}; {hint}")
    return _LOOPS[name].from_dict(description)
