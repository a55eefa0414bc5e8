"""The check of a form's first call: the user's own loop runs eagerly on the same inputs, and must give the same.

The compiler looks at a denoiser and a loop once, in one run of their Python. What that Python does another time it
cannot know; so the first result is held against the eager loop with hooks, the reference. Both draw the same random
numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._pytree import tree_flatten, tree_leaves

from l2c_compile.checking.comparison import Difference, differing_sites, largest_errors, own_copy, same_bits
from l2c_compile.checking.reference import run_reference
from l2c_compile.errors import FirstCallError
from l2c_compile.schedules.schedule import CacheSchedule
from l2c_compile.schedules.sites import Site
from l2c_compile.state.python_state import Change, PythonState
from l2c_compile.state.random_state import RandomState, random_state_kept

_UNITS = 64
"""The error that a graph may have which computes the same in another order, in units of its dtype an evaluation."""
_UNITS_OF_BACKENDS = 1024
"""The same for a backend that compiles it."""
_WRAPPED = (".forward", "._compiled_call_impl")
"""The attributes in which the reference wraps modules."""
_MOST = 0.5
"""The largest relative error that any of them may have."""


@dataclass(frozen=True)
class FirstCall:
    """What a form computed in its first call, and what it is judged by."""

    denoiser: nn.Module
    loop: Callable[..., object]
    schedule: CacheSchedule
    """The schedule, its patterns resolved."""
    roots: Mapping[str, object]
    """The objects that the form was made from, by name."""
    inputs: tuple[object, Mapping[str, object]]
    """Noise and conditions."""
    results: Sequence[object]
    """The flat results of the form."""
    drawn_from: RandomState
    """The random state that the form began with."""
    graph: Callable[[], fx.GraphModule]
    """A function that returns the static graph, its passes changing no bit, to be run eagerly."""
    is_bitwise: bool
    """Whether the results must be equal bit for bit."""

    def has_values(self) -> bool:
        """Return whether there is anything to compare: tensors on the meta device and fake ones have no values."""
        tensors = [*self.denoiser.parameters(), *self._tensors()]
        return not any(tensor.is_meta or isinstance(tensor, FakeTensor) for tensor in tensors)

    def check(self) -> None:
        """Run the loop eagerly and compare; what it changes in its Python state is put back.

        Raises:
            FirstCallError: if the results differ: bit for bit, or by more than rounding may explain if passes or
                backend round.
        """
        state = PythonState(self.roots)
        try:
            expected = self._reference()
            if same_bits(self.results, expected):
                return
            bound = self._bound(_UNITS_OF_BACKENDS, expected)
            got = self.results
            if not self.is_bitwise and largest_errors(got, expected)[1] <= bound:
                # What a backend rounds may hide a small error, so the graph that it was given is looked at, too.
                bound = self._bound(_UNITS, expected)
                got = self._of_graph()
                if same_bits(got, expected) or largest_errors(got, expected)[1] <= bound:
                    return
            state.restore()
            raise self._error(got, expected, 0.0 if self.is_bitwise else bound)
        except torch.OutOfMemoryError as error:
            raise FirstCallError(
                "there is not enough memory to run the loop eagerly beside the first call's result; check='structure'"
                " leaves this comparison out"
            ) from error
        finally:
            state.restore()

    def _reference(self, record: Callable[[int, Site, int, Tensor], None] | None = None) -> list[object]:
        noise, conditions = own_copy(self.inputs)
        with random_state_kept():
            self.drawn_from.put_back()
            result = run_reference(self.denoiser, self.loop, self.schedule, noise, conditions, record=record)
        return tree_flatten(result)[0]

    def _of_graph(self) -> Sequence[object]:
        with random_state_kept():
            self.drawn_from.put_back()
            results: Sequence[object] = self.graph()(*self._tensors())
        return results

    def _tensors(self) -> list[Tensor]:
        return [leaf for leaf in tree_leaves(self.inputs) if isinstance(leaf, Tensor)]

    def _bound(self, units: int, expected: Sequence[object]) -> float:
        held = [*self.denoiser.parameters(), *expected]
        dtypes = {x.dtype for x in held if isinstance(x, Tensor) and (x.is_floating_point() or x.is_complex())}
        eps = max((torch.finfo(dtype).eps for dtype in dtypes), default=0.0)
        return min(_MOST, units * eps * self.schedule.num_evaluations)

    def _error(self, got: Sequence[object], expected: Sequence[object], bound: float) -> FirstCallError:
        _, relative = largest_errors(got, expected)
        difference, changes = self._first_difference()
        allowed = f" (allowed {bound:.1g})" if bound else ""
        where = f"first, {difference}" if difference else "no site differs, so what follows them does"
        changed = (
            "; what changed in Python during the loop: " + "; ".join(map(str, changes[:3]))
            if changes
            else "; no Python state that can be seen changed"
        )
        return FirstCallError(
            f"the first call is not what the loop computes eagerly on the same inputs: relative error {relative:.2g}"
            f"{allowed}; {where}{changed}. A static graph does in each call what the loop did while it was traced: pass"
            " what changes as an argument; check='structure' leaves this comparison out"
        )

    def _first_difference(self) -> tuple[Difference | None, list[Change]]:
        """Return the first site of the graph that differs from the reference, and what changed up to there."""
        values: dict[tuple[int, str, int], Tensor] = {}
        state = PythonState(self.roots)
        changed: dict[int, list[Change]] = {}

        def record(evaluation: int, site: Site, port: int, value: Tensor) -> None:
            values[evaluation, str(site), port] = value.clone()
            if evaluation not in changed:
                changed[evaluation] = [] if state.is_untouched() else _of_user(state.changes())

        self._reference(record)
        with random_state_kept():
            self.drawn_from.put_back()
            differences = differing_sites(self.graph(), values, self._tensors())
        first = differences[0] if differences else None
        at = [changes for evaluation, changes in changed.items() if first is None or evaluation <= first.evaluation]
        latest = next((changes for changes in reversed(at) if changes), [])
        return first, latest or _of_user(state.changes())


def _of_user(changes: Sequence[Change]) -> list[Change]:
    """Return the changes without those of the reference's own wrappers."""
    return sorted((each for each in changes if not each.path.endswith(_WRAPPED)), key=str)
