"""Show that a loop's own Python state does not change what it does: not between its evaluations, not in a later call.

A static graph is made of one run of the loop. So the denoiser must be in every evaluation what it was in the first,
and whatever the loop leaves behind, in its scheduler, its closure or its globals, must not change its next run. If a
run left anything, the loop is traced a second time in that state; captures are shared, so this takes little.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import cast

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from l2c_compile.errors import LoopTraceError
from l2c_compile.frontend.compiled_parts import taken_apart
from l2c_compile.frontend.loop_tensor import LoopTensor
from l2c_compile.frontend.restore import left_as_it_was
from l2c_compile.frontend.stand_in import Loop
from l2c_compile.frontend.trace import trace_loop
from l2c_compile.frontend.written_state import FromEarlierRun, Run, StateEffect, check_later_runs_are_alike
from l2c_compile.graphs.forms import CallSignature
from l2c_compile.graphs.loop_graph import EvaluationGraph
from l2c_compile.graphs.skeleton import LoopSkeleton
from l2c_compile.state.python_state import PythonState


def state_roots(denoiser: nn.Module, loop: Loop, noise: object, conditions: Mapping[str, object]) -> dict[str, object]:
    """Return the objects that a static graph is made from, by name; tensors that are its inputs are none."""
    static = [leaf for leaf in tree_leaves((noise, dict(conditions))) if not isinstance(leaf, Tensor)]
    return {"denoiser": denoiser, "loop": loop, "conditions": static}


def trace_without_effects(
    loop: Loop,
    denoiser: nn.Module,
    noise: object,
    conditions: Mapping[str, object],
    capture_call: Callable[[CallSignature], EvaluationGraph],
) -> LoopSkeleton:
    """Trace a loop as ``trace_loop`` does, and leave all that it can reach as it was.

    Raises:
        LoopTraceError: if the loop cannot be traced, changes the denoiser between evaluations, or leaves a state that
            changes its next run.
    """
    roots = state_roots(denoiser, loop, noise, conditions)

    first_watch: list[_DenoiserWatch] = []

    def trace() -> Run:
        watch = _DenoiserWatch(denoiser, *first_watch)
        first_watch[:] = first_watch or [watch]

        def watched(signature: CallSignature) -> EvaluationGraph:
            watch.begin_evaluation()
            return capture_call(signature)

        before = PythonState(roots)
        skeleton = trace_loop(loop, denoiser, noise, conditions, watched)
        watch.end()
        return Run(skeleton, StateEffect.since(before))

    with taken_apart(denoiser), left_as_it_was(roots):
        first = trace()
        check_later_runs_are_alike("the loop", first, trace, _replaced, _are_alike, LoopTraceError)
    return cast(LoopSkeleton, first.result)


class _DenoiserWatch:
    """Compares the denoiser at the beginning of each evaluation with what it was in the first one."""

    def __init__(self, denoiser: nn.Module, earlier: _DenoiserWatch | None = None) -> None:
        self._denoiser = denoiser
        self._earlier = earlier
        self._weights = _weights_of(denoiser)
        self._state: PythonState | None = None
        self._num_begun = 0

    def begin_evaluation(self) -> None:
        self._check_weights()
        if self._state is None:
            self._state = PythonState({"denoiser": self._denoiser})
            self._check_begins_like_the_earlier_run()
        elif not self._state.holds():
            changes = self._state.changes()
            if changes:
                what = "; ".join(map(str, changes[:3]))
                what = "; ".join(map(str, changes[:3]))
                raise LoopTraceError(
                    f"the loop changes the denoiser before evaluation {self._num_begun}: {what}; a static graph has one"
                    " denoiser for all evaluations, so pass what changes as an argument of the call, or change it"
                    " before the loop begins"
                )
        self._num_begun += 1

    def _check_begins_like_the_earlier_run(self) -> None:
        before = self._earlier._state if self._earlier is not None else None
        changes = before.changes() if before is not None and not before.holds() else []
        if changes:
            raise LoopTraceError(
                f"the loop leaves the denoiser changed for its next run: {'; '.join(map(str, changes[:3]))}; change it"
                " before the sampler is called, or pass what changes as an argument of the call"
            )

    def end(self) -> None:
        self._check_weights()

    def _check_weights(self) -> None:
        for path, weight in _weights_of(self._denoiser).items():
            if self._weights.get(path) != weight:
                raise LoopTraceError(
                    f"the loop changes the weight '{path}' of the denoiser before evaluation {self._num_begun};"
                    " a static graph reads weights where they are, so swap them in before the sampler is called"
                )


def _weights_of(denoiser: nn.Module) -> dict[str, tuple[int, int, int]]:
    """Return identity, memory and version of each weight and buffer."""
    named = [*denoiser.named_parameters(), *denoiser.named_buffers()]
    # Below the modes of the trace, which would look at each of these questions.
    with torch._C.DisableTorchFunction():
        return {
            path: (id(weight), int(weight.untyped_storage()._cdata), 0 if weight.is_inference() else weight._version)
            for path, weight in named
        }


def _replaced(run: Run) -> dict[int, object]:
    """Return what stands, in a second trace, for the loop's tensors that the first one left behind."""
    stored = run.effect.stored if run.effect is not None else {}
    return {id(tensor): FromEarlierRun(path) for path, tensor in stored.items() if isinstance(tensor, LoopTensor)}


def _are_alike(one: Run, other: Run) -> bool:
    a, b = cast(LoopSkeleton, one.result), cast(LoopSkeleton, other.result)
    return (
        str(a.graph) == str(b.graph)
        and [(call.signature, id(call.graph)) for call in a.calls] == [(c.signature, id(c.graph)) for c in b.calls]
        and a.constants.keys() == b.constants.keys()
        and all(_same(tensor, b.constants[name]) for name, tensor in a.constants.items())
    )


def _same(one: Tensor, other: Tensor) -> bool:
    alike = (one.shape, one.dtype, one.device) == (other.shape, other.dtype, other.device)
    return one is other or (alike and (one.is_meta or torch.equal(one, other)))
