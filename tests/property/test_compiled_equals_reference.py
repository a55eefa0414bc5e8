"""Over drawn models, loops and schedules: compiled equals the reference, and exactly the computed sites remain.

Captures are the expensive part: there are few models, each captured once for every form of call; schedules are drawn.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from bench.trust.programs.rules import Combination, Decay
from l2c_compile import CacheSchedule, Rule, run_reference
from l2c_compile.compile import build_loop_graph
from l2c_compile.graphs.loop_graph import LoopGraph
from l2c_compile.graphs.nodes import evaluation_of
from l2c_compile.loops import DDIM, DPMSolver
from l2c_compile.passes.base import Pipeline
from l2c_compile.passes.drop_dead import DropDead
from l2c_compile.passes.drop_no_ops import DropNoOps
from l2c_compile.passes.merge_common import MergeCommon
from l2c_compile.schedules.rules import HOLD
from tests.tiny import draw, run, same_bits, seeded, steps


class Sublayer(nn.Module):
    def __init__(self, normed: bool) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(4) if normed else nn.Identity()
        self.linear = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.linear(self.norm(x)))


class Layer(nn.Module):
    def __init__(self, gated: bool, normed: bool) -> None:
        super().__init__()
        self.one, self.two = Sublayer(normed), Sublayer(not normed)
        self.gates = nn.Linear(4, 8) if gated else None

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        if self.gates is None:
            x = x + self.one(x)
            return x + self.two(x)  # type: ignore[no-any-return]
        first, second = self.gates(c).chunk(2, -1)
        x = x + first * self.one(x)
        return x + second * self.two(x)  # type: ignore[no-any-return]


class Network(nn.Module):
    def __init__(self, *gated: bool) -> None:
        super().__init__()
        self.time = nn.Linear(1, 4)
        self.layers = nn.ModuleList(Layer(g, normed=i % 2 == 0) for i, g in enumerate(gated))

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        c = torch.sin(self.time(t[:, None].float()))
        for layer in self.layers:
            x = layer(x, c)
        return x


MODELS = {
    "one gated layer": seeded(Network(True)),
    "one plain layer": seeded(Network(False), 1),
    "two layers": seeded(Network(True, False), 2),
}
LOOPS: dict[str, Callable[[int], Any]] = {
    "euler": steps,
    "ddim that draws": lambda e: DDIM(max(2, e), eta=1.0),
    "dpm-solver": lambda e: DPMSolver(e, order=2),
}
RULES: list[Rule] = [HOLD, Combination((2.0, -1.0)), Decay()]


def sites_of(model: Network) -> list[str]:
    """Return sites of every form: sublayers, layers around them, the run of all, and changes."""
    layers = [f"layers.{i}" for i in range(len(model.layers))]
    run_of_all = [f"delta({layers[0]}..{layers[-1]})"] if len(layers) > 1 else []
    return [f"{layer}.{part}" for layer in layers for part in ("one", "two")] + layers[:1] + run_of_all


@st.composite
def cases(draw: st.DrawFn) -> tuple[Network, Any, CacheSchedule]:
    model = MODELS[draw(st.sampled_from(sorted(MODELS)))]
    loop = LOOPS[draw(st.sampled_from(sorted(LOOPS)))](draw(st.integers(2, 5)))
    evaluations = getattr(loop, "num_evaluations", None) or count(loop)
    rule = draw(st.sampled_from(RULES))
    rows = {
        site: [1] * min(rule.num_sources, evaluations)
        + draw(st.lists(st.integers(0, 1), min_size=evaluations - rule.num_sources, max_size=evaluations))[
            : max(0, evaluations - rule.num_sources)
        ]
        for site in sites_of(model)
    }
    return model, loop, schedule_of(rows, rule)


def count(loop: Any) -> int:  # noqa: ANN401
    calls: list[int] = []

    def denoiser(x: Tensor, t: Tensor) -> Tensor:
        calls.append(1)
        return x

    loop(denoiser, torch.zeros(1, 4))
    return len(calls)


def schedule_of(rows: dict[str, list[int]], rule: Rule) -> CacheSchedule:
    """Return the schedule of a table in which a reuse that has nothing to read is computed instead."""
    fixed = {site: list(row) for site, row in rows.items()}
    for e in range(len(next(iter(rows.values())))):
        for site in rows:
            if not fixed[site][e]:
                try:
                    CacheSchedule.from_table({s: row[: e + 1] for s, row in _up_to(fixed, site, e).items()}, rule=rule)
                except ValueError:
                    fixed[site][e] = 1
    return CacheSchedule.from_table(fixed, rule=rule)


def _up_to(rows: dict[str, list[int]], site: str, e: int) -> dict[str, list[int]]:
    """Return the rows with everything after ``site`` at ``e`` computed."""
    later = list(rows)[list(rows).index(site) + 1 :]
    return {s: [*row[:e], 1 if s in later else row[e]] for s, row in rows.items()}


def compiled(case: tuple[Network, Any, CacheSchedule]) -> LoopGraph:
    model, loop, schedule = case
    graph, _ = build_loop_graph(model, loop, schedule, draw(2, 4), {})
    return graph


@given(cases())
@settings(max_examples=max(60, settings().max_examples))
def test_the_compiled_loop_equals_the_reference_bit_for_bit(case: tuple[Network, Any, CacheSchedule]) -> None:
    model, loop, schedule = case
    graph = compiled(case)
    torch.manual_seed(5)
    got = run(graph, draw(2, 4))
    torch.manual_seed(5)
    assert same_bits(got, [run_reference(model, loop, schedule, draw(2, 4), {})])


@given(cases())
def test_a_second_run_of_the_simplifiers_rewrites_nothing(case: tuple[Network, Any, CacheSchedule]) -> None:
    graph = compiled(case)
    again = Pipeline((DropNoOps(), MergeCommon(), DropDead())).run(graph)
    assert [each.report.rewrites for each in again] == [0, 0, 0]


@given(cases())
def test_exactly_the_computed_sites_remain(case: tuple[Network, Any, CacheSchedule]) -> None:
    model, _, schedule = case
    remaining = {
        (evaluation_of(node), str(node.args[1].target).removeprefix("denoiser.").removesuffix(".linear.weight"))
        for node in compiled(case).graph.find_nodes(op="call_function", target=torch.ops.aten.linear.default)
        if str(node.args[1].target).endswith(".linear.weight")
    }
    assert remaining == needed(model, schedule)


def needed(model: Network, schedule: CacheSchedule) -> set[tuple[int, str]]:
    """Return (evaluation, sublayer) for each sublayer that some result still depends on, from the table alone."""
    layers = range(len(model.layers))
    whole = f"delta(layers.0..layers.{len(layers) - 1})" if len(layers) > 1 else None
    found = set()
    for e in range(schedule.num_evaluations):
        if whole is not None and schedule.active(e, whole):
            continue
        for i in layers:
            if i == 0 and schedule.active(e, "layers.0"):
                continue
            found |= {(e, f"layers.{i}.{p}") for p in ("one", "two") if schedule.computes(e, f"layers.{i}.{p}")}
    return found
