"""Compare a compiled loop with the reference, and find where they first differ."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from typing import Any

import torch
from rich.console import Console, ConsoleOptions, RenderResult
from rich.table import Table
from torch import Tensor, fx, nn
from torch.fx.node import Node
from torch.utils._pytree import tree_flatten, tree_map

from l2c_compile.checking.proof import Proof
from l2c_compile.checking.reference import Recorder, run_reference
from l2c_compile.schedules.schedule import CacheSchedule
from l2c_compile.schedules.sites import Site


@dataclass(frozen=True)
class Difference:
    """A site whose value differs from the reference's."""

    evaluation: int
    site: str
    port: int
    max_error: float
    """The largest |compiled - reference|."""
    relative_error: float
    """The largest |compiled - reference| over the largest |reference|."""

    def to_dict(self) -> dict[str, object]:
        """Return the difference in JSON types; an error that is not finite is None."""
        errors = {"max_error": finite(self.max_error), "relative_error": finite(self.relative_error)}
        return {**asdict(self), **errors}

    def __str__(self) -> str:
        return f"site '{self.site}' of evaluation {self.evaluation} differs by {self.max_error:.3g}"


@dataclass(frozen=True)
class VerifyReport:
    """Whether a static graph is right, and how far its results are from the reference's; ``print`` shows it."""

    bitwise: bool
    """Whether the result is the reference's bit for bit: structure, shapes, dtypes, values and signs of zeros."""
    max_error: float
    """The largest |compiled - reference|; infinite where the results are of other forms."""
    relative_error: float
    """The largest |compiled - reference| over the largest |reference|."""
    num_compared_sites: int
    """Number of computed site values that were compared one by one; 0 if the results agree bit for bit."""
    differences: tuple[Difference, ...]
    """The site values, in order, that differ in some bit when the static graph runs in eager mode."""
    proof: Proof
    """The proof that the graph computes what loop, denoiser and schedule say, whatever the input."""
    wants_bitwise: bool
    """Whether no pass changes a bit and the graph runs eagerly, so that the results have to be equal bit for bit."""

    @property
    def first_difference(self) -> Difference | None:
        """The first site that differs from the reference; None if none does."""
        return self.differences[0] if self.differences else None

    @property
    def holds(self) -> bool:
        """Whether the structure is proven and the numbers are right.

        Right numbers are equal bit for bit where ``wants_bitwise``, and otherwise finite: how far rounding may take
        them depends on model and dtype, so ``relative_error`` is for the caller to judge.
        """
        return self.proof.holds and (self.bitwise if self.wants_bitwise else math.isfinite(self.max_error))

    def to_dict(self) -> dict[str, object]:
        """Return the report in JSON types; an error that is not finite is None."""
        return {
            "holds": self.holds,
            "bitwise": self.bitwise,
            "max_error": finite(self.max_error),
            "relative_error": finite(self.relative_error),
            "num_compared_sites": self.num_compared_sites,
            "differences": [difference.to_dict() for difference in self.differences],
            "wants_bitwise": self.wants_bitwise,
            "proof": self.proof.to_dict(),
        }

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        yield self.proof
        yield self._numbers()
        if self.differences:
            yield self._table()

    def __str__(self) -> str:
        return self._numbers() if self.proof.holds else f"{self._numbers()}; {self.proof}"

    def _numbers(self) -> str:
        if self.bitwise:
            return "equal to the reference bit for bit"
        where = self.first_difference or "no site of the static graph differs, so what follows them or the backend does"
        return f"max error {self.max_error:.3g}, relative {self.relative_error:.3g}; {where}"

    def _table(self) -> Table:
        title = "sites that differ from the reference"
        if not self.wants_bitwise:
            title += " in some bit, as they may where passes or the backend round otherwise"
        table = Table(title=title, title_justify="left")
        for heading in ("evaluation", "sites", "first", "worst", "error", "relative"):
            table.add_column(heading, overflow="fold")
        for evaluation in dict.fromkeys(difference.evaluation for difference in self.differences):
            here = [difference for difference in self.differences if difference.evaluation == evaluation]
            worst = max(here, key=lambda difference: difference.max_error)
            errors = f"{worst.max_error:.2g}", f"{worst.relative_error:.2g}"
            table.add_row(str(evaluation), str(len(here)), here[0].site, worst.site, *errors)
        return table


def compare_with_reference(
    denoiser: nn.Module,
    loop: Callable[..., object],
    schedule: CacheSchedule,
    module: fx.GraphModule,
    run: Callable[..., Sequence[object]],
    noise: object,
    conditions: Mapping[str, object],
    proof: Proof,
    *,
    wants_bitwise: bool,
) -> VerifyReport:
    """Run ``run`` and the reference from the same random state; if they differ, compare site by site.

    Args:
        denoiser: the denoiser that was compiled.
        loop: the loop that was compiled.
        schedule: the schedule, its patterns resolved.
        module: the static graph, its nodes marked with the sites that they hold (``DropSiteMarks``).
        run: the function that is judged: the static graph through its backend.
        noise: the noise that the sampler is given.
        conditions: the conditions that the sampler is given.
        proof: the proof of the static graph, which goes into the report.
        wants_bitwise: whether passes and backend change no bit.
    """
    inputs = [leaf for leaf in tree_flatten((noise, dict(conditions)))[0] if isinstance(leaf, Tensor)]

    def reference(record: Recorder | None = None) -> object:
        # A loop may write into its inputs.
        own_noise, own_conditions = own_copy((noise, dict(conditions)))
        return run_reference(denoiser, loop, schedule, own_noise, own_conditions, record=record)

    with torch.no_grad():
        with _same_random_numbers(inputs):
            compiled = run(*inputs)
        with _same_random_numbers(inputs):
            expected = reference()
        results = tree_flatten(expected)[0]
        bitwise = same_bits(compiled, results)
        if bitwise:
            return VerifyReport(True, 0.0, 0.0, 0, (), proof, wants_bitwise)
        max_error, relative_error = largest_errors(compiled, results)
        values: dict[tuple[int, str, int], Tensor] = {}

        def record(evaluation: int, site: Site, port: int, value: Tensor) -> None:
            values[evaluation, str(site), port] = value.clone()

        with _same_random_numbers(inputs):
            reference(record)
        watcher = _ComparingInterpreter(module, values)
        with _same_random_numbers(inputs):
            watcher.run(*inputs)
    return VerifyReport(
        bitwise, max_error, relative_error, watcher.num_compared, tuple(watcher.differences), proof, wants_bitwise
    )


def differing_sites(
    module: fx.GraphModule, expected: Mapping[tuple[int, str, int], Tensor], inputs: Sequence[Tensor]
) -> list[Difference]:
    """Run a static graph and return the sites that differ from the expected values, in execution order."""
    watcher = _ComparingInterpreter(module, expected)
    with torch.no_grad():
        watcher.run(*inputs)
    return watcher.differences


class _ComparingInterpreter(fx.Interpreter):
    """Runs the static graph and compares each site that it computes with the reference's."""

    def __init__(self, module: fx.GraphModule, expected: Mapping[tuple[int, str, int], Tensor]) -> None:
        super().__init__(module)
        self.expected = expected
        self.num_compared = 0
        self.differences: list[Difference] = []

    def run_node(self, n: Node) -> object:
        value = super().run_node(n)
        for key in n.meta.get("sites", ()):
            wanted = self.expected.get(key)
            if wanted is not None and isinstance(value, Tensor):
                self.num_compared += 1
                if not same_bits([value], [wanted]):
                    evaluation, site, port = key
                    self.differences.append(Difference(evaluation, site, port, *largest_errors([value], [wanted])))
        return value


def own_copy(tree: object) -> Any:  # noqa: ANN401 - a tree of the same structure
    """Return a copy of a tree of tensors in which a tensor that stands in several places is one tensor still."""
    copies: dict[int, Tensor] = {}
    return tree_map(lambda x: copies.setdefault(id(x), x.clone()) if isinstance(x, Tensor) else x, tree)


def _same_random_numbers(inputs: list[Tensor]) -> AbstractContextManager[None]:
    devices = sorted({x.device.index or 0 for x in inputs if x.device.type == "cuda"})
    context: AbstractContextManager[None] = torch.random.fork_rng(devices=devices)
    return context


def finite(number: float) -> float | None:
    """Return the number as JSON can hold it: None if it is infinite or NaN."""
    return number if math.isfinite(number) else None


def same_bits(got: Sequence[object], wanted: Sequence[object]) -> bool:
    """Return whether two lists of results are equal: shapes, dtypes, values, signs of zeros and places of NaNs."""
    return len(got) == len(wanted) and all(map(_is_same, got, wanted))


def _is_same(got: object, wanted: object) -> bool:
    if not isinstance(got, Tensor) or not isinstance(wanted, Tensor):
        return type(got) is type(wanted) and got == wanted
    if (got.shape, got.dtype, got.device) != (wanted.shape, wanted.dtype, wanted.device):
        return False
    a, b = (torch.view_as_real(each.resolve_conj()) if each.is_complex() else each for each in (got, wanted))
    equal = a == b
    if a.is_floating_point():
        equal = (equal & (torch.signbit(a) == torch.signbit(b))) | (a.isnan() & b.isnan())
    return bool(equal.all())


def largest_errors(got: Sequence[object], wanted: Sequence[object]) -> tuple[float, float]:
    """Return the largest absolute error, and its ratio to the largest magnitude.

    Both are infinite where the results are of other forms, or not finite in other places; an infinity or a NaN that
    both have in one place is no error. Complex numbers count by their magnitude.
    """
    if len(got) != len(wanted):
        return math.inf, math.inf
    worst = scale = 0.0
    for a, b in zip(got, wanted, strict=True):
        if not isinstance(a, Tensor) or not isinstance(b, Tensor):
            worst = worst if _is_same(a, b) else math.inf
        elif (a.shape, a.dtype, a.device) != (b.shape, b.dtype, b.device):
            worst = math.inf
        elif b.numel():
            wide = torch.complex128 if b.is_complex() else torch.float64
            error = (a.to(wide) - b.to(wide)).abs()
            error = error.masked_fill((a == b) | (a.isnan() & b.isnan()), 0.0).nan_to_num(math.inf)
            worst = max(worst, float(error.max()))
            magnitudes = b.to(wide).abs()
            scale = max(scale, float(magnitudes.masked_fill(~magnitudes.isfinite(), 0.0).max()))
    return worst, (worst / scale if scale else (math.inf if worst else 0.0))
