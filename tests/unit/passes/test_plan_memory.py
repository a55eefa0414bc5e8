"""plan-memory: values that wait for a later evaluation wait in the smallest form."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from l2c_compile import CacheSchedule, Rule
from l2c_compile.schedules.rules import Reading, T
from tests.residual_loops import (
    DIM,
    Residuals,
    compiled,
    every_layer,
    kept_per_evaluation,
    report,
)
from tests.tiny import check_equals_reference, draw, seeded, steps

aten = torch.ops.aten


class Part(nn.Module):
    """Gives the first of three parts of one projection: a view."""

    def __init__(self, width: int = 3 * DIM) -> None:
        super().__init__()
        self.project = nn.Linear(DIM, width)

    def forward(self, x_BD: Tensor) -> Tensor:
        # A view in any case, also of the whole.
        result: Tensor = self.project(x_BD)[None][0][:, :DIM]
        return result


class OnePart(nn.Module):
    def __init__(self, *, matrix_reads: bool = False, width: int = 3 * DIM) -> None:
        super().__init__()
        self.part = Part(width)
        self.matrix_reads = matrix_reads

    def forward(self, x_BD: Tensor, t_B: Tensor, y_B: Tensor) -> Tensor:
        part_BD: Tensor = self.part(x_BD)
        return x_BD + (part_BD @ (x_BD.T @ x_BD) if self.matrix_reads else part_BD * t_B[:, None])


@dataclass(frozen=True)
class Slope(Rule):
    """Twice the newest value less the one before."""

    name: ClassVar[str] = "test-slope"

    @property
    def num_sources(self) -> int:
        return 2

    def combine(self, reading: Reading[T]) -> T:
        new, old = reading.history
        doubled: T = aten.mul.Tensor(new, 2.0)
        result: T = aten.sub.Tensor(doubled, old)
        return result


def test_a_sum_of_kept_values_is_made_as_soon_as_its_terms_are_there() -> None:
    rows = every_layer(6, [1, 0, 1, 0])
    late = compiled(Residuals(6, gated=False), rows, without=["plan-memory"])
    soon = compiled(Residuals(6, gated=False), rows)
    assert max(kept_per_evaluation(late)) >= 5
    assert max(kept_per_evaluation(soon)) <= 3
    assert report(soon, "plan-memory")[0] >= 4


def test_moves_change_no_bit() -> None:
    rows = every_layer(6, [1, 0, 1, 0])
    noise, y = torch.full((2, DIM), 0.3, dtype=torch.float64), torch.tensor([0.5, 0.25], dtype=torch.float64)
    results = [
        compiled(Residuals(6, gated=True), rows, without=without)(noise, y=y) for without in ([], ["plan-memory"])
    ]
    assert isinstance(results[0], Tensor)
    assert isinstance(results[1], Tensor)
    assert torch.equal(results[0], results[1])


def test_a_combination_of_kept_values_is_made_at_the_source_where_one_then_waits_instead_of_two() -> None:
    rows = {"layers.0": [1, 1, 1, 1, 0], "layers.1": [1, 1, 0, 1, 1]}
    rule = Slope()
    before = compiled(Residuals(2, gated=False), rows, "bitwise", rule, without=["plan-memory"])
    after = compiled(Residuals(2, gated=False), rows, "bitwise", rule)
    assert kept_per_evaluation(before) == [1, 2, 3, 2, 2]
    # While a combination is made there are three values: what it is made of and itself.
    assert kept_per_evaluation(after) == [1, 3, 2, 3, 1]
    assert report(after, "plan-memory")[0] == 2


def test_a_combination_stays_where_another_evaluation_still_reads_its_terms() -> None:
    sampler = compiled(Residuals(1, gated=False), {"layers.0": [1, 1, 0, 0]}, "bitwise", Slope())
    # Both evaluations combine the same two values: one combination serves both, and is made at the source.
    assert kept_per_evaluation(sampler) == [1, 3, 1, 1]
    rows = {"layers.0": [1, 1, 0, 0], "layers.1": [1, 1, 1, 1]}
    both = compiled(Residuals(2, gated=False), rows, "bitwise", Slope(), without=["merge-common"])
    rewrites, reasons = report(both, "plan-memory")
    assert rewrites == 0
    assert "would free" in reasons


def test_the_kept_part_of_a_larger_tensor_is_copied() -> None:
    rows = {"part": [1, 0, 1, 0]}
    whole = compiled(OnePart(), rows, "bitwise", without=["plan-memory"])
    copied = compiled(OnePart(), rows, "bitwise")
    assert max(kept_per_evaluation(whole)) == 3
    assert max(kept_per_evaluation(copied)) == 1
    assert report(copied, "plan-memory")[0] == 2


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        (OnePart(matrix_reads=True), "could round differently on a copy"),
        (OnePart(width=DIM), "save nothing"),
    ],
)
def test_a_part_is_not_copied_where_that_could_round_or_saves_nothing(model: nn.Module, reason: str) -> None:
    sampler = compiled(model, {"part": [1, 0, 1, 0]}, "bitwise")
    rewrites, reasons = report(sampler, "plan-memory")
    assert rewrites == 0
    assert reason in reasons


class Restart(nn.Module):
    """What follows the first sublayer looks at its output only."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(DIM, DIM)
        self.second = nn.Linear(DIM, DIM)
        self.third = nn.Linear(DIM, DIM)

    def forward(self, x_BD: Tensor, t_B: Tensor, y_B: Tensor) -> Tensor:
        a_BD = self.first(x_BD)
        result: Tensor = x_BD - self.third(t_B[:, None] * a_BD + self.second(a_BD))
        return result


def test_a_matrix_product_stays_in_its_evaluation_even_if_its_operands_were_kept() -> None:
    sampler = compiled(Restart(), {"first": [1, 0], "second": [1, 0]}, "bitwise")
    assert sampler._latest is not None
    products = sampler._latest.graph.graph.find_nodes(op="call_function", target=aten.linear.default)
    assert [node.meta["evaluation"] for node in products] == [0, 0, 0, 1]


def test_planning_twice_changes_nothing() -> None:
    from l2c_compile.passes.plan_memory import PlanMemory

    sampler = compiled(Residuals(6, gated=True), every_layer(6, [1, 0, 1, 0]))
    assert sampler._latest is not None
    assert PlanMemory().run(sampler._latest.graph).rewrites == 0


class HalfRead(nn.Module):
    """A site that is half of a larger tensor, read by a function that torch rounds as its memory layout is."""

    def __init__(self, read: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.part = Half()
        self.read = read

    def forward(self, x_BD: Tensor, t_B: Tensor) -> Tensor:
        return self.read(self.part(x_BD), x_BD) + x_BD * t_B[:, None]


class Half(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(13, 26)

    def forward(self, x_BD: Tensor) -> Tensor:
        return self.linear(x_BD)[:, :13]  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    ("read", "copied"),
    [
        (torch.atan2, 0),
        (torch.logaddexp, 0),
        (torch.mul, 1),
        (lambda half, x: functional.gelu(half) * x, 0),
    ],
    ids=["atan2", "logaddexp", "mul", "gelu"],
)
def test_only_correctly_rounded_arithmetic_reads_a_copy(read: Callable[[Tensor, Tensor], Tensor], copied: int) -> None:
    sampler = check_equals_reference(
        seeded(HalfRead(read)), CacheSchedule.from_table({"part": [1, 0, 0]}), steps(3), draw(7, 13)
    )
    assert report(sampler, "plan-memory")[0] == copied
