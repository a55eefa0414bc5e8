"""A compiled loop for one form of input, and the check that its folded constants still fit the weights."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property

from torch import fx, nn

from l2c_compile.backends.regions import num_regions
from l2c_compile.errors import StaleConstantsError
from l2c_compile.graphs.forms import CallSignature
from l2c_compile.graphs.loop_graph import LoopGraph
from l2c_compile.graphs.skeleton import LoopSkeleton
from l2c_compile.passes.base import PassRun


@dataclass
class CompiledForm:
    """The compiled loop for one form of input."""

    trace: LoopSkeleton
    """The loop as it was traced, with its evaluations as they were captured; the graph was made from it."""
    graph: LoopGraph
    passes: list[PassRun]
    run: Callable[..., Sequence[object]]
    """The function that runs the graph through the backend."""
    inputs: CallSignature
    """The form of ``(noise, conditions)``."""
    weights: object
    """The dtypes and devices of the denoiser's parameters, and which parameters are tied."""
    versions: dict[str, tuple[int, int, int]] = field(default_factory=dict)
    """Identity, memory and version that the weights had when constants were folded from them."""
    last_use: int = 0
    """A number that grows with each use of any form."""

    @cached_property
    def module(self) -> fx.GraphModule:
        """The flat graph as a module, which is made at the first access unless the backend made it."""
        is_flat = isinstance(self.run, fx.GraphModule) and num_regions(self.run) == 0
        return self.run if is_flat else self.graph.module()  # type: ignore[return-value]

    @cached_property
    def module_to_trace(self) -> fx.GraphModule:
        """The graph as a module for ``torch.compile``, which is made at the first access."""
        return self.graph.module_to_trace()


def weight_versions(graph: LoopGraph) -> dict[str, tuple[int, int, int]]:
    """Return identity, memory and version of each weight that constants were folded from."""
    return {path: _version(graph.root, path) for folded in graph.folded for path in folded.weights}


def _version(root: nn.Module, path: str) -> tuple[int, int, int]:
    owner, _, name = path.rpartition(".")
    weight = getattr(root.get_submodule(owner), name)
    # An assignment to .data, as in Module.to, changes only the memory.
    return id(weight), int(weight.untyped_storage()._cdata), 0 if weight.is_inference() else weight._version


def check_fresh(form: CompiledForm) -> None:
    """Raise StaleConstantsError if a weight changed since constants were folded from it."""
    for path, version in form.versions.items():
        if _version(form.graph.root, path) != version:
            raise StaleConstantsError(
                f"weight '{path.removeprefix('denoiser.')}' changed since constants were folded from it; call refresh()"
            )
