"""Which sites hide which, and where a reuse takes its value from."""

from __future__ import annotations

import pytest

from l2c_compile.errors import ScheduleError
from l2c_compile.schedules.coverage import COMPUTED, HIDDEN, REUSED, covering_sites, derive_sources, entry_states
from l2c_compile.schedules.rules import HOLD
from l2c_compile.schedules.sites import Site

WHOLE, PART, RUN, OTHER = map(Site.parse, ("b.0", "b.0.attn", "b.0..b.2", "b.2..b.3"))


def test_a_reused_whole_hides_its_parts() -> None:
    states = entry_states(3, [PART, WHOLE], [(1, WHOLE), (1, PART), (2, PART)])
    assert list(states[WHOLE]) == [COMPUTED, REUSED, COMPUTED]
    assert list(states[PART]) == [COMPUTED, HIDDEN, REUSED]


def test_sites_that_overlap_hide_each_other_and_are_not_reused_together() -> None:
    states = entry_states(3, [RUN, OTHER], [(1, RUN), (2, OTHER)])
    assert list(states[RUN]) == [COMPUTED, REUSED, HIDDEN]
    assert list(states[OTHER]) == [COMPUTED, HIDDEN, REUSED]
    with pytest.raises(ScheduleError, match="both are reused at evaluation 1; compute one of them at 1"):
        entry_states(3, [RUN, OTHER], [(1, RUN), (1, OTHER)])


def test_a_site_is_covered_by_all_that_contain_it() -> None:
    assert covering_sites([PART, WHOLE, RUN]) == {PART: (WHOLE, RUN), WHOLE: (RUN,), RUN: ()}
    with pytest.raises(ScheduleError, match=r"b\.0\.\.b\.2 and b\.2\.\.b\.3 overlap and neither contains the other"):
        covering_sites([RUN, OTHER])


def test_sources_are_the_latest_of_the_branch() -> None:
    row = bytes([COMPUTED, COMPUTED, REUSED, REUSED, COMPUTED, REUSED])
    rules = dict.fromkeys((2, 3, 5), HOLD)
    assert derive_sources(row, rules, 1) == {2: (1,), 3: (1,), 5: (4,)}
    assert derive_sources(row, rules, 2) == {2: (0,), 3: (1,), 5: (1,)}


def test_a_hidden_entry_has_no_source_and_one_without_enough_has_no_entry() -> None:
    assert derive_sources(bytes([REUSED, COMPUTED, HIDDEN]), {0: HOLD, 2: HOLD}, 1) == {2: ()}


def test_too_much_overlap_is_refused() -> None:
    runs = [Site(f"b.{i}", "b.2000") for i in range(1500)]
    with pytest.raises(ScheduleError, match="overlap too much"):
        covering_sites(runs)
