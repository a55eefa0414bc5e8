"""What a compiled form was made from, and whether a call still finds it so.

A static graph is specialised on Python state as torch.compile's is: on the attributes, hooks and forwards of the
modules, on what the loop reads, and on the objects among the conditions. Weights are read where they are; only what was
computed from them before, folded constants and packed copies, must be looked after.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping, Sequence
from typing import cast

import torch
from torch import Tensor, nn

from l2c_compile.graphs.loop_graph import LoopGraph
from l2c_compile.state.probes import Probes
from l2c_compile.state.python_state import PythonState

aten = torch.ops.aten

_version: Callable[[Tensor], int] = operator.attrgetter("_version")


class Guards:
    """Compares, before each call, what a form was made from with what is there now.

    Args:
        roots: the objects that the form was made from, by name; the denoiser is "denoiser".
        read: tensors whose values the loop read into Python, or took for constants.
        weights: a function that describes the dtypes, devices and ties of the denoiser's weights.
        is_deep: whether Python state counts; otherwise only weights and whether the denoiser trains do.
    """

    def __init__(
        self, roots: Mapping[str, object], read: Sequence[Tensor], weights: Callable[[], object], *, is_deep: bool
    ) -> None:
        self.roots = dict(roots)
        self.is_deep = is_deep
        """Whether Python state counts."""
        self.num_snapshots = 0
        """How often the state was found equal, in other objects, and noted anew."""
        self._defaults = _defaults()
        self._weights_now = weights
        self.weights = weights()
        """The dtypes and devices of the denoiser's parameters, and which parameters are tied."""
        self._read = list(read)
        # Torch does not count what is written to tensors made under inference_mode; the probes see it.
        self._counted = [tensor for tensor in read if not tensor.is_inference()]
        self._read_versions = list(map(_version, self._counted))
        self._snapshot()

    def why_not(self) -> str | None:
        """Return what changed since the form was made, None if nothing did that counts."""
        if _defaults() != self._defaults:
            return f"torch's default dtype or device is {_defaults()[0]}, {_defaults()[1]} now"
        same = self._state.holds() if self.is_deep else self._denoiser.training == self._trains
        if same and list(map(Tensor.data_ptr, self._parameters)) == self._memory:
            return self._why_not_read()
        changes = self._state.changes() if self.is_deep else []
        if changes or self._denoiser.training != self._trains:
            return (
                "; ".join(map(str, changes[:3]))
                or f"the denoiser is in {'train' if self._trains else 'eval'} mode no more"
            )
        if self._weights_now() != self.weights:
            return "the weights moved, changed their dtype or are tied otherwise"
        reason = self._why_not_read()
        if reason is None:
            self._snapshot()
        return reason

    def why_not_but_for_weights(self) -> str | None:
        """Return what changed in Python since the form was made, None if nothing did that counts."""
        changes = self._state.changes() if self.is_deep and not self._state.holds() else []
        return "; ".join(map(str, changes[:3])) or None

    def _why_not_read(self) -> str | None:
        if list(map(_version, self._counted)) == self._read_versions and self._probes.hold():
            return None
        return "a tensor that the loop reads itself, or that the graph holds as a constant, was written to"

    @property
    def _denoiser(self) -> nn.Module:
        return cast(nn.Module, self.roots["denoiser"])

    def _snapshot(self) -> None:
        self.num_snapshots += 1
        self._state = PythonState(self.roots if self.is_deep else {})
        self._probes = Probes([*self._read, *self._state.tensors])
        self._trains = self._denoiser.training
        self._parameters = list(self._denoiser.parameters())
        self._memory = list(map(Tensor.data_ptr, self._parameters))


def _defaults() -> tuple[torch.dtype, torch.device]:
    return torch.get_default_dtype(), torch.get_default_device()


def packed_weights(graph: LoopGraph) -> list[str]:
    """Return the paths of the weights that kernels may keep a packed copy of: those of linear layers."""
    weights = (node.args[1] for node in graph.graph.find_nodes(op="call_function", target=aten.linear.default))
    paths = dict.fromkeys(str(node.target) for node in weights if getattr(node, "op", "") == "get_attr")
    return [path for path in paths if path.startswith("denoiser.")]
