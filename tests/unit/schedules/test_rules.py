"""Rules: one body for tensors and fx proxies, and a new rule is one subclass."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import ClassVar, Literal

import pytest
import torch
from torch import Tensor

from l2c_compile.errors import FileFormatError
from l2c_compile.schedules.rules import HOLD, Hold, Reading, Rule, T, rule_from_dict
from l2c_compile.schedules.schedule import CacheSchedule


@dataclass(frozen=True)
class LinearCombination(Rule):
    """The values at the sources, weighted and summed."""

    name: ClassVar[str] = "test-linear-combination"
    weights: tuple[float, ...]

    def __post_init__(self) -> None:
        if not self.weights:
            raise ValueError("a linear combination wants at least one weight")

    @property
    def num_sources(self) -> int:
        return len(self.weights)

    def combine(self, reading: Reading[T]) -> T:
        first, *others = (
            torch.ops.aten.mul.Scalar(value, weight)
            for value, weight in zip(reading.history, self.weights, strict=True)
        )
        total: T = first
        for value in others:
            total = torch.ops.aten.add.Tensor(total, value)
        return total


@dataclass(frozen=True)
class Extrapolation(LinearCombination):
    """The same over values of any origin."""

    name: ClassVar[str] = "test-extrapolation"
    history: ClassVar[Literal["computed", "held"]] = "held"


def test_hold_returns_the_value_at_the_source() -> None:
    value = torch.ones(2)
    assert HOLD.combine(Reading((value,))) is value
    assert HOLD.num_sources == 1
    assert Hold() == HOLD


def test_a_rule_is_the_same_on_tensors_and_on_proxies() -> None:
    rule = LinearCombination((2.0, -1.0))

    class Module(torch.nn.Module):
        def forward(self, new: Tensor, old: Tensor) -> Tensor:
            return rule.combine(Reading((new, old)))

    new, old = torch.randn(3, 4), torch.randn(3, 4)
    graph = torch.fx.symbolic_trace(Module())
    targets = [node.target for node in graph.graph.nodes if node.op == "call_function"]
    aten = torch.ops.aten
    assert targets == [aten.mul.Scalar, aten.mul.Scalar, aten.add.Tensor]
    torch.testing.assert_close(graph(new, old), rule.combine(Reading((new, old))), rtol=0, atol=0)


@pytest.mark.parametrize("rule", [HOLD, LinearCombination((2.0, -1.0)), Extrapolation((0.5,))])
def test_a_rule_comes_back_from_its_json_form(rule: Rule) -> None:
    assert rule_from_dict(json.loads(json.dumps(rule.to_dict()))) == rule


@pytest.mark.parametrize(
    "document",
    [
        {},
        {"name": "hodl"},
        {"name": 3},
        {"name": "hold", "extra": 1},
        {"name": "test-linear-combination"},
        {"name": "test-linear-combination", "weights": []},
    ],
)
def test_an_unknown_rule_or_field_is_refused(document: dict[str, object]) -> None:
    with pytest.raises(FileFormatError):
        rule_from_dict(document)


def test_two_rules_may_not_share_a_name() -> None:
    with pytest.raises(TypeError, match="already taken by Hold"):
        type("Other", (Rule,), {"name": "hold"})


def test_a_schedule_derives_saves_and_loads_entries_of_a_new_rule() -> None:
    schedule = CacheSchedule.from_table({"a": [1, 1, 0, 1, 0]}, rule=LinearCombination((2.0, -1.0)))
    reuses = [schedule.reuse(e, "a") for e in (2, 4)]
    assert [reuse.sources for reuse in reuses if reuse] == [(1, 0), (3, 1)]
    assert CacheSchedule.from_json(schedule.to_json()) == schedule
    assert '"sources":{}' in schedule.to_json().replace(" ", "")


def test_a_trace_rule_reads_reused_values_too() -> None:
    schedule = CacheSchedule.from_table({"a": [1, 0, 0]}, rule=Extrapolation((1.0,)))
    reuses = [schedule.reuse(e, "a") for e in (1, 2)]
    assert [reuse.sources for reuse in reuses if reuse] == [(0,), (1,)]
    assert CacheSchedule.from_json(schedule.to_json()) == schedule
