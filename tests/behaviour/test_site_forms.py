"""What a site may be: each form, compiled, equals the reference bit for bit."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from bench.trust.programs.rules import Combination, Decay, FollowInput
from l2c_compile import CacheSchedule, Reuse, Rule, Site, l2c_compile, run_reference
from l2c_compile.errors import CaptureError, ScheduleError
from tests.tiny import Residual, at, check_equals_reference, draw, residual, same_bits, seeded, steps


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(4, 4), nn.Tanh())
        self.keep = nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return self.keep(x) + self.mlp(x)  # type: ignore[no-any-return]


class Stack(nn.Module):
    """Blocks, one of them shared, a module that ends with another, and one that returns a tuple."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(3))
        self.shared = Block()
        self.outer = nn.Sequential(nn.Sequential(nn.Linear(4, 4)))
        self.pair = Pair()

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        x = self.shared(self.shared(x) + t[:, None])
        x = self.outer(x)
        scale, _, extra = self.pair(x)
        return x * scale + extra["shift"]  # type: ignore[no-any-return]


class Pair(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.to_two = nn.Linear(4, 8)

    def forward(self, x: Tensor) -> tuple[Tensor, None, dict[str, Tensor]]:
        scale, shift = self.to_two(x).chunk(2, dim=-1)
        return scale, None, {"shift": shift}


@pytest.fixture(scope="module")
def stack() -> Any:  # noqa: ANN401
    return seeded(Stack())


@pytest.mark.parametrize(
    "table",
    [
        {"blocks.1": [1, 0, 1, 0]},
        {"delta(blocks.1)": [1, 0, 0, 1]},
        {"blocks.0..blocks.2": [1, 0, 1, 0]},
        {"delta(blocks.0..blocks.2)": [1, 0, 0, 0]},
        {"blocks.1..blocks.2": [1, 0, 0, 1], "blocks.0.mlp": [1, 1, 0, 0]},
        {"shared": [1, 0, 1, 0]},
        {"shared@1": [1, 0, 1, 0]},
        {"shared": [1, 0, 0, 1], "delta(shared@1)": [1, 1, 0, 0]},
        {"pair": [1, 0, 0, 1]},
        {"blocks.0.keep": [1, 0, 0, 1]},
        {"delta(blocks.0.keep)": [1, 0, 0, 1]},
        {"outer": [1, 0, 1, 1], "outer.0": [1, 1, 0, 1], "outer.0.0": [1, 1, 1, 0]},
        {"blocks.1": [1, 0, 1, 0], "blocks.1.mlp": [1, 0, 0, 1], "delta(blocks.1.mlp.0)": [1, 0, 1, 0]},
    ],
    ids=lambda table: " ".join(table),
)
def test_a_schedule_over_it_equals_the_reference(stack: Stack, table: Mapping[str, Sequence[int]]) -> None:
    sampler = check_equals_reference(stack, CacheSchedule.from_table(table), steps(4), draw(3, 4))
    computed = sum(row.num_computed for row in sampler.summary().rows)
    assert computed == sum(sampler.schedule.computed_per_evaluation())
    assert sampler.verify(draw(3, 4, seed=5)).bitwise


def test_a_run_holds_what_its_last_module_was_given_where_that_is_reused(stack: Stack) -> None:
    # Evaluation 1 reads blocks.2 from 0, so the run holds that, and evaluation 2 reads it there.
    run_of_two, last = Site.parse("blocks.1..blocks.2"), Site.parse("blocks.2")
    for sites in ((run_of_two, last), (last, run_of_two)):
        twice = CacheSchedule(3, sites, {(1, last): Reuse((0,)), (2, run_of_two): Reuse((1,))})
        once = CacheSchedule(3, (last,), {(1, last): Reuse((0,)), (2, last): Reuse((0,))})
        check_equals_reference(stack, twice, steps(3), draw(3, 4))
        results = [run_reference(stack, steps(3), each, draw(3, 4), {}) for each in (twice, once)]
        assert same_bits(*results)


class Ignores(nn.Module):
    """A module that does not look at its input, and one whose output nobody looks at."""

    def __init__(self) -> None:
        super().__init__()
        self.constant = Constant()
        self.unused = nn.Linear(4, 4)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        self.unused(x)
        return self.constant(torch.tanh(x)) + 0.1 * x + t[:, None]  # type: ignore[no-any-return]


class Constant(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.value = nn.Parameter(torch.empty(4))

    def forward(self, x: Tensor) -> Tensor:
        return self.value.expand_as(x)


def test_a_change_wants_equal_shapes() -> None:
    class Halves(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.wide = nn.Linear(4, 8)

        def forward(self, x: Tensor, t: Tensor) -> Tensor:
            first, second = self.wide(x).chunk(2, -1)
            result: Tensor = first * second
            return result

    schedule = CacheSchedule.from_table({"delta(wide)": [1, 0]})
    with pytest.raises(ScheduleError, match=r"takes \(3, 4\) and returns \(3, 8\), so its change"):
        l2c_compile(seeded(Halves()), schedule, steps(2)).capture(draw(3, 4))


@pytest.mark.parametrize("site", ["delta(constant)", "constant", "unused", "delta(unused)"])
def test_a_site_may_ignore_its_input_or_be_ignored(site: str) -> None:
    model = seeded(Ignores())
    check_equals_reference(model, CacheSchedule.from_table({site: [1, 0, 0]}), steps(3), draw(3, 4))
    schedule = CacheSchedule.from_table({"constant": [1, 0, 0]}, rule=FollowInput())
    check_equals_reference(model, schedule, steps(3), draw(3, 4))


def test_sources_may_be_of_any_age(stack: Stack) -> None:
    site = Site.parse("blocks.1.mlp")
    reuses = {(e, site): Reuse((source,)) for e, source in {2: 0, 3: 1, 4: 0, 5: 1}.items()}
    check_equals_reference(stack, CacheSchedule(6, (site,), reuses), steps(6), draw(3, 4))


@pytest.mark.parametrize("site", ["a", "delta(a)"])
@pytest.mark.parametrize(
    ("rule", "row"),
    [
        (Combination((2.0, -1.0)), [1, 1, 0, 1, 0]),
        (Combination((0.5, 0.3, 0.2)), [1, 1, 1, 0, 0]),
        (Decay(), [1, 0, 0, 1, 0]),
        (FollowInput(), [1, 0, 0, 1, 0]),
    ],
    ids=["two sources", "three sources", "reads reused values", "reads inputs"],
)
def test_a_rule_of_ones_own_equals_the_reference(site: str, rule: Rule, row: list[int]) -> None:
    schedule = CacheSchedule.from_table({site: row}, rule=rule)
    check_equals_reference(residual(), schedule, steps(5), draw(3, 4))


class Mean(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.mean().expand_as(x)


class TransposesTheMean(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.mean, self.a = Mean(), nn.Linear(4, 4)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return x + t[:, None] * self.a(self.mean(x).t())  # type: ignore[no-any-return]


def test_what_a_rule_makes_of_a_value_that_repeats_is_transposed_though_the_value_need_not_be() -> None:
    schedule = CacheSchedule.from_table({"mean": [1, 0, 1, 0]}, rule=FollowInput())
    check_equals_reference(seeded(TransposesTheMean()), schedule, steps(4), draw(4, 4))


def test_a_rule_may_read_evaluations_of_another_form() -> None:
    def loop(denoiser: Any, x: Tensor) -> Tensor:  # noqa: ANN401
        for i in range(4):
            x = x + 0.1 * denoiser(x, at(x, i), None if i % 2 else 2.0)
        return x

    schedule = CacheSchedule.from_table({"a": [1, 1, 0, 0]}, rule=Combination((2.0, -1.0)))
    check_equals_reference(residual(), schedule, loop, draw(3, 4))


class WritesLater(nn.Module):
    """Somebody writes into a reused value after the site."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.relu = nn.Linear(4, 4), nn.ReLU(inplace=True)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        h = self.a(x)
        h.mul_(2.0)
        h[:, 0] = t
        return x + self.relu(h)  # type: ignore[no-any-return]


def test_a_write_into_a_reused_value_does_not_reach_the_cache() -> None:
    schedule = CacheSchedule.from_table({"a": [1, 0, 0, 1, 0]})
    check_equals_reference(seeded(WritesLater()), schedule, steps(5), draw(3, 4))


class Stem(nn.Module):
    """A denoiser whose site shares memory with something else, in one of several ways."""

    def __init__(self, way: str) -> None:
        super().__init__()
        self.way, self.a, self.i, self.relu = way, nn.Linear(4, 4), nn.Identity(), nn.ReLU(inplace=True)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        before = self.a(x) + t[:, None]
        after = self.relu(before) if self.way == "writes input" else self.i(before)
        if self.way == "writes output":
            after.add_(1.0)
        if self.way == "writes input later":
            before.add_(1.0)
        return before + after  # type: ignore[no-any-return]


class WritesIntoWhatSharesMemory(nn.Module):
    """Outside training dropout returns its argument, so the write reaches both; so it does through ``.data``."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how, self.a, self.dropout = how, nn.Linear(4, 4), nn.Dropout(0.5)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        before = self.a(x) + t[:, None]
        match self.how:
            case "module":
                after = self.dropout(before)
            case "function":
                after = torch.nn.functional.dropout(before, training=False)
            case "torch":
                after = torch.dropout(before, 0.5, train=False)
            case "data":
                after = before.data
            case _:
                after = torch.ops.aten.dropout.default(before, 0.5, False)
        after += 1.0
        return before * after  # type: ignore[no-any-return]


@pytest.mark.parametrize("how", ["module", "function", "torch", "aten", "data"])
def test_a_write_into_what_shares_memory_reaches_both(how: str) -> None:
    schedule = CacheSchedule.from_table({"a": [1, 0, 1]})
    check_equals_reference(seeded(WritesIntoWhatSharesMemory(how)), schedule, steps(3), draw(3, 4))


class WritesIntoExpanded(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(4, 4)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        h = self.a(x)
        same = h.expand_as(x)
        same[:, 0] = 0.5 * same[:, 1]
        return h + t[:, None] * same  # type: ignore[no-any-return]


def test_a_write_into_a_value_expanded_to_its_own_shape_does_not_round() -> None:
    check_equals_reference(seeded(WritesIntoExpanded()), CacheSchedule.from_table({"a": [1] * 9}), steps(9), draw(3, 4))


def test_a_write_into_a_dropped_out_input_is_refused() -> None:
    class IntoItsInput(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.dropout = nn.Linear(4, 4), nn.Dropout(0.5)

        def forward(self, x: Tensor, t: Tensor) -> Tensor:
            kept = self.dropout(x)
            kept += 1.0
            return x + self.a(kept) * t[:, None]  # type: ignore[no-any-return]

    with pytest.raises(CaptureError, match="changes its input 'tensors_0' in place; let it clone that input first"):
        check_equals_reference(seeded(IntoItsInput()), CacheSchedule.from_table({"a": [1, 0]}), steps(2), draw(3, 4))


@pytest.mark.parametrize(
    ("way", "site", "message"),
    [
        ("writes input", "relu", "site 'relu': module 'relu' writes into its input in place"),
        ("writes input", "delta(relu)", "site 'delta\\(relu\\)': module 'relu' writes into its input in place"),
        ("writes output", "i", "site 'i': Stem writes in place into a tensor that shares memory with the site's value"),
        ("writes input later", "i", "site 'i': Stem writes in place into a tensor that shares memory"),
    ],
)
def test_a_site_whose_memory_is_written_elsewhere_is_refused(way: str, site: str, message: str) -> None:
    with pytest.raises(CaptureError, match=message):
        check_equals_reference(seeded(Stem(way)), CacheSchedule.from_table({site: [1, 0]}), steps(2), draw(3, 4))


def test_a_source_of_another_batch_is_refused() -> None:
    def loop(denoiser: Any, x: Tensor) -> Tensor:  # noqa: ANN401
        both = torch.cat([x, x])
        return denoiser(denoiser(both, at(both, 1))[:3], at(x, 0))  # type: ignore[no-any-return]

    message = r"site 'a', evaluation 1: reuses evaluation 0, where it holds \(6, 4\).* needs \(3, 4\).*equal batch"
    with pytest.raises(ScheduleError, match=message):
        check_equals_reference(residual(), CacheSchedule.from_table({"a": [1, 0]}), loop, draw(3, 4))


def test_a_source_of_another_memory_layout_is_refused() -> None:
    class Views(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.i = nn.Identity()

        def forward(self, x: Tensor, t: Tensor) -> Tensor:
            h: Tensor = self.i(x)
            return h.reshape(-1, 4).view(3, 5, 4) + t[:, None, None]

    def loop(denoiser: Any, x: Tensor) -> Tensor:  # noqa: ANN401
        return denoiser(denoiser(x.transpose(0, 1).contiguous().transpose(0, 1), at(x, 0)), at(x, 1))  # type: ignore[no-any-return]

    with pytest.raises(ScheduleError, match=r"site 'i', evaluation 1: .* with strides .*memory layout"):
        check_equals_reference(Views(), CacheSchedule.from_table({"i": [1, 0]}), loop, draw(3, 5, 4))


class Shared(nn.Module):
    """Tied weights, buffers, constants made in forward, weights of another dtype."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)
        self.b.weight = self.a.weight
        self.table, self.hidden = nn.Buffer(torch.arange(4.0)), nn.Buffer(torch.ones(4), persistent=False)
        self.plain = torch.full((4,), 0.5)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        fresh = torch.tensor([1.0, 2.0, 3.0, 4.0]) * torch.arange(4)
        x = self.b(torch.tanh(self.a(x))) + self.table + self.hidden * t[:, None] + fresh + self.plain
        return x.double().float()


def test_buffers_tied_weights_and_constants_of_forward_are_kept() -> None:
    schedule = CacheSchedule.from_table({"a": [1, 0, 1], "b": [1, 1, 0]})
    check_equals_reference(seeded(Shared()), CacheSchedule.all_compute(3, ["a", "b"]), steps(3), draw(3, 4))
    check_equals_reference(seeded(Shared()), schedule, steps(3), draw(3, 4))


def test_a_schedule_without_sites_compiles() -> None:
    assert isinstance(residual(), Residual)
    check_equals_reference(residual(), CacheSchedule.all_compute(2), steps(2), draw(3, 4))
