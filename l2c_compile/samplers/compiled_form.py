"""A compiled loop for one form of input, and the check that its folded constants still fit the weights."""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor, fx, nn

from l2c_compile.backends.regions import num_regions
from l2c_compile.errors import StaleConstantsError
from l2c_compile.graphs.forms import CallSignature
from l2c_compile.graphs.loop_graph import LoopGraph
from l2c_compile.graphs.skeleton import LoopSkeleton
from l2c_compile.passes.base import PassRun
from l2c_compile.samplers.guards import Guards, packed_weights
from l2c_compile.schedules.schedule import CacheSchedule
from l2c_compile.state.probes import Probes


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
    schedule: CacheSchedule
    """The schedule that the graph follows."""
    guards: Guards
    """What the form was made from; a call that finds it changed captures anew."""
    has_packed: bool = False
    """Whether kernels keep packed copies of weights."""
    versions: dict[str, tuple[int, int, int]] = field(default_factory=dict)
    """Identity, memory and version that the weights had when constants were folded from them."""
    probes: Probes = field(default_factory=lambda: Probes(()))
    """A few elements of the weights that constants were folded from, or that are packed."""
    is_checked: bool = False
    """Whether the first call was compared with the eager loop, or need not be."""
    checked_in_s: float = 0.0
    """How long that comparison took, in seconds."""
    last_use: int = 0
    """A number that grows with each use of any form."""

    def note_weights(self) -> None:
        """Note the weights as those that constants were folded from and packed copies are made of."""
        self.versions = weight_versions(self.graph)
        paths = [*self.versions, *(packed_weights(self.graph) if self.has_packed else ())]
        self.probes = Probes([_weight(self.graph.root, path) for path in dict.fromkeys(paths)])
        self._note_folded()

    def _note_folded(self) -> None:
        folded = [_weight(self.graph.root, path) for path in self.versions]
        self._folded = [weight for weight in folded if not weight.is_inference()]
        self._folded_versions = list(map(_count, self._folded))
        self._num_snapshots = self.guards.num_snapshots

    @property
    def _surely_fresh(self) -> bool:
        """Whether no folded weight was assigned, moved or written to, as far as torch counts that."""
        known = self.guards.is_deep and self.guards.num_snapshots == self._num_snapshots
        return known and list(map(_count, self._folded)) == self._folded_versions

    @cached_property
    def module(self) -> fx.GraphModule:
        """The flat graph as a module, which is made at the first access unless the backend made it."""
        is_flat = isinstance(self.run, fx.GraphModule) and num_regions(self.run) == 0
        return self.run if is_flat else self.graph.module()  # type: ignore[return-value]

    @cached_property
    def module_to_trace(self) -> fx.GraphModule:
        """The graph as a module for ``torch.compile``, which is made at the first access."""
        return self.graph.module_to_trace()


_count: Callable[[Tensor], int] = operator.attrgetter("_version")


def weight_versions(graph: LoopGraph) -> dict[str, tuple[int, int, int]]:
    """Return identity, memory and version of each weight that constants were folded from."""
    return {path: _version(graph.root, path) for folded in graph.folded for path in folded.weights}


def _weight(root: nn.Module, path: str) -> Tensor:
    owner, _, name = path.rpartition(".")
    weight: Tensor = getattr(root.get_submodule(owner), name)
    return weight


def _version(root: nn.Module, path: str) -> tuple[int, int, int]:
    weight = _weight(root, path)
    # An assignment to .data, as in Module.to, changes only the memory.
    return id(weight), int(weight.untyped_storage()._cdata), 0 if weight.is_inference() else weight._version


def check_fresh(form: CompiledForm) -> None:
    """Raise StaleConstantsError if a weight changed since constants were folded from it.

    A packed weight that was written to behind torch's back gets a new version, so that it is packed anew.
    """
    if not form._surely_fresh:
        for path, version in form.versions.items():
            if _version(form.graph.root, path) != version:
                raise _stale(path)
        form._note_folded()
    if not form.probes.hold():
        changed = form.probes.changed()
        identities = set(map(id, changed))
        for path in form.versions:
            if id(_weight(form.graph.root, path)) in identities:
                raise _stale(path)
        torch.autograd.graph.increment_version(changed)
        form.note_weights()


def _stale(path: str) -> StaleConstantsError:
    return StaleConstantsError(
        f"weight '{path.removeprefix('denoiser.')}' changed since constants were folded from it; call refresh()"
    )
