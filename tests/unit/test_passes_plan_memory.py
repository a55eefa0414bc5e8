"""What a loop keeps: the plan, the pass that frees earlier, and the pass that makes gated outputs one sum."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import networkx as nx
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from l2c_compile import CacheSchedule, CompiledSampler, Rule, l2c_compile, run_reference
from l2c_compile.analyses.memory_plan import MemoryPlan, plan_memory
from l2c_compile.schedules.rules import HOLD, Reading, T
from tests.tiny import check_equals_reference, draw, seeded, steps

aten = torch.ops.aten
DIM = 4
VALUE_BYTES = 2 * DIM * 8


class Residuals(nn.Module):
    """``depth`` residual sublayers, gated by timestep and condition or not at all."""

    def __init__(self, depth: int, *, gated: bool) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(DIM, DIM) for _ in range(depth))
        self.gates = nn.ModuleList(nn.Linear(1, DIM) for _ in range(depth)) if gated else None

    def forward(self, x_BD: Tensor, t_B: Tensor, y_B: Tensor) -> Tensor:
        for index, layer in enumerate(self.layers):
            change = layer(torch.tanh(x_BD))
            if self.gates is not None:
                change = self.gates[index]((t_B * y_B)[:, None]) * change
            x_BD = x_BD + change
        return x_BD


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


def loop_of(count: int) -> Callable[..., Tensor]:
    def loop(denoiser: Callable[..., Tensor], noise: Tensor, y: Tensor) -> Tensor:
        x = noise
        for i in range(count):
            t_B = torch.full((x.shape[0],), float(count - i), dtype=x.dtype)
            x = x - 0.25 * denoiser(x, t_B, y)
        return x

    return loop


def compiled(
    model: nn.Module, rows: dict[str, list[int]], numerics: str = "rounding", rule: Rule = HOLD, **options: object
) -> CompiledSampler:
    generator = torch.Generator().manual_seed(0)
    model = model.double().eval()
    with torch.no_grad():
        for weight in model.parameters():
            weight.normal_(std=0.5, generator=generator)
    schedule = CacheSchedule.from_table(rows, rule=rule)
    loop = loop_of(schedule.num_evaluations)
    sampler = l2c_compile(model, schedule, loop, numerics=numerics, **options)  # type: ignore[arg-type]
    noise = torch.randn(2, DIM, generator=generator, dtype=torch.float64)
    y = torch.tensor([0.5, 0.25], dtype=torch.float64)
    got = sampler(noise, y=y)
    wanted = run_reference(model, loop, sampler.schedule, noise, {"y": y})
    assert isinstance(got, Tensor)
    assert isinstance(wanted, Tensor)
    if numerics == "bitwise":
        assert torch.equal(got, wanted)
    # A dozen values are added up in another order, each of them rounded once.
    torch.testing.assert_close(got, wanted, rtol=64 * torch.finfo(torch.float64).eps, atol=0)
    return sampler


def plan_of(sampler: CompiledSampler) -> MemoryPlan:
    assert sampler._latest is not None
    return plan_memory(sampler._latest.graph)


def kept_per_evaluation(sampler: CompiledSampler) -> list[float]:
    return [size / VALUE_BYTES for size in plan_of(sampler).cache.bytes_per_evaluation]


def report(sampler: CompiledSampler, name: str) -> tuple[int, str]:
    assert sampler._latest is not None
    (run,) = [run for run in sampler._latest.passes if run.name == name]
    return run.report.rewrites, "; ".join(run.report.left_alone.values())


def every_layer(depth: int, row: list[int]) -> dict[str, list[int]]:
    return {f"layers.{i}": row for i in range(depth)}


def test_a_value_lives_from_its_source_to_its_last_reader_and_no_longer() -> None:
    rows = {"layers.0": [1, 1, 0, 0, 1], "layers.1": [1, 1, 1, 1, 0], "layers.2": [1] * 5}
    sampler = compiled(Residuals(3, gated=False), rows, "bitwise")
    kept = {(value.made_in, value.last_read_in) for value in plan_of(sampler).kept}
    assert kept == {(1, 3), (3, 4)}
    # In evaluation 3 the first is read, and free, before the second is made.
    assert kept_per_evaluation(sampler) == [0, 1, 1, 1, 1]


def test_a_loop_that_reuses_nothing_keeps_nothing() -> None:
    plan = plan_of(compiled(Residuals(2, gated=True), every_layer(2, [1, 1, 1])))
    assert (plan.kept, plan.cache.peak_bytes, plan.slot_bytes) == ((), 0, ())


def test_buffers_are_an_optimal_coloring_of_the_interval_graph() -> None:
    rows = {f"layers.{i}": [1, *(int((i + e) % (i + 2) == 0) for e in range(9))] for i in range(5)}
    plan = plan_of(compiled(Residuals(5, gated=False), rows, "bitwise"))
    intervals = {(value.begin, value.end): value.slot for value in plan.kept}
    overlaps = nx.interval_graph(intervals)
    assert all(intervals[one] != intervals[other] for one, other in overlaps.edges)
    assert len(plan.slot_bytes) == nx.chordal_graph_treewidth(overlaps) + 1
    assert plan.buffer_bytes == plan.cache.peak_bytes


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


def test_gates_known_before_the_loop_let_a_run_be_kept_as_one_sum() -> None:
    rows = every_layer(5, [1, 0, 1, 0])
    apart = compiled(Residuals(5, gated=True), rows, without=["gate-at-source"])
    one = compiled(Residuals(5, gated=True), rows)
    assert max(kept_per_evaluation(apart)) == 5
    assert kept_per_evaluation(one) == [3, 1, 3, 1]
    assert report(one, "gate-at-source")[0] == 2


def test_a_run_that_two_evaluations_read_becomes_two_sums_if_it_has_three_terms() -> None:
    two_sums = compiled(Residuals(3, gated=True), every_layer(3, [1, 0, 0]))
    assert kept_per_evaluation(two_sums)[1:] == [2, 1]
    two_values = compiled(Residuals(2, gated=True), every_layer(2, [1, 0, 0]))
    rewrites, reasons = report(two_values, "gate-at-source")
    assert rewrites == 0
    assert "as many sums as values" in reasons


def test_gates_stay_where_a_value_is_read_alone_as_well() -> None:
    rows = {"layers.0": [1, 0, 0], "layers.1": [1, 0, 1]}
    rewrites, reasons = report(compiled(Residuals(2, gated=True), rows), "gate-at-source")
    assert rewrites == 0
    assert "is also read by" in reasons


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


class GatedByLatent(nn.Module):
    """The gate looks at the latent, so it does not exist before its evaluation."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(DIM, DIM) for _ in range(2))

    def forward(self, x_BD: Tensor, t_B: Tensor, y_B: Tensor) -> Tensor:
        gate = torch.sigmoid(x_BD)
        for layer in self.layers:
            x_BD = x_BD + gate * layer(x_BD)
        return x_BD


def test_a_gate_made_from_the_latent_stays_in_its_evaluation() -> None:
    sampler = compiled(GatedByLatent(), every_layer(2, [1, 0, 1, 0]))
    assert report(sampler, "gate-at-source")[0] == 0
    assert max(kept_per_evaluation(sampler)) == 2


def test_the_summary_counts_what_the_graph_keeps_and_what_others_would() -> None:
    summary = compiled(Residuals(5, gated=True), every_layer(5, [1, 0, 1, 0])).summary()
    assert summary.cache.peak_bytes == 3 * VALUE_BYTES
    assert summary.cache_of_schedule.peak_bytes == summary.keep_everything_bytes == 5 * VALUE_BYTES
    assert [row.cache_bytes // VALUE_BYTES for row in summary.rows] == [3, 1, 3, 1]
    assert "60% of keeping every site" in " ".join(str(summary).split())


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
