"""Which sites cover which, and where each reuse takes its value from."""

from __future__ import annotations

import pytest

from l2c_compile import Site
from l2c_compile.errors import ScheduleError
from l2c_compile.schedules.coverage import COMPUTED, HIDDEN, REUSED, covering_sites, derive_sources, entry_states
from l2c_compile.schedules.rules import HOLD
from tests.behaviour.test_site_forms import Combination


def sites(*names: str) -> list[Site]:
    return [Site.parse(name) for name in names]


def test_what_lies_in_a_reused_whole_is_hidden_there() -> None:
    whole, part, inner, other = sites("blocks.0..blocks.1", "blocks.0", "blocks.0.attn", "blocks.2")
    states = entry_states(3, [whole, part, inner, other], [(1, whole), (2, part), (1, inner), (1, other)])
    assert states[whole] == bytes([COMPUTED, REUSED, COMPUTED])
    assert states[part] == bytes([COMPUTED, HIDDEN, REUSED])
    assert states[inner] == bytes([COMPUTED, HIDDEN, HIDDEN])
    assert states[other] == bytes([COMPUTED, REUSED, COMPUTED])


def test_runs_that_share_modules_may_not_both_be_reused_at_once() -> None:
    one, other = sites("blocks.0..blocks.1", "blocks.1..blocks.2")
    assert entry_states(2, [one, other], [(1, one)])[other] == bytes([COMPUTED, HIDDEN])
    with pytest.raises(ScheduleError, match=r"overlap, neither contains the other.*compute one of them at 1"):
        entry_states(2, [one, other], [(1, one), (1, other)])


def test_calls_of_a_shared_module_are_apart() -> None:
    first, second = sites("shared", "shared@1")
    assert entry_states(2, [first, second], [(1, first)])[second] == bytes([COMPUTED, COMPUTED])


def test_the_sites_that_cover_a_site() -> None:
    whole, part, inner, change = sites("blocks.0..blocks.1", "blocks.0", "blocks.0.attn", "delta(blocks.1)")
    covering = covering_sites([whole, part, inner, change])
    assert set(covering[inner]) == {whole, part}
    assert (covering[part], covering[change], covering[whole]) == ((whole,), (whole,), ())
    with pytest.raises(ScheduleError, match="overlap and neither contains the other; leave one out"):
        covering_sites(sites("blocks.0..blocks.1", "blocks.1..blocks.2"))


def test_sources_are_the_latest_of_the_same_branch_newest_first() -> None:
    rule = Combination((2.0, -1.0))
    states = bytes([COMPUTED, COMPUTED, COMPUTED, COMPUTED, REUSED, REUSED])
    assert derive_sources(states, {4: rule, 5: HOLD}, branches=1) == {4: (3, 2), 5: (3,)}
    assert derive_sources(states, {4: rule, 5: HOLD}, branches=2) == {4: (2, 0), 5: (3,)}


def test_a_reuse_without_enough_before_it_has_no_sources() -> None:
    states = bytes([COMPUTED, REUSED, HIDDEN])
    rules = {1: Combination((2.0, -1.0)), 2: HOLD}
    assert derive_sources(states, rules, branches=1) == {2: ()}


def test_schedules_of_runs_that_overlap_everywhere_are_refused() -> None:
    runs = [Site.parse(f"blocks.{i}..blocks.{j}") for i in range(40) for j in range(i + 1, 60)]
    with pytest.raises(ScheduleError, match="overlap too much"):
        entry_states(2, runs, [])
