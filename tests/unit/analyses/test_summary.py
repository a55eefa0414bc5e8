"""The summary of a loop graph."""

from __future__ import annotations

from typing import Any

import pytest

from l2c_compile import CompiledSampler
from tests.residual_graphs import sampler_of
from tests.tiny import draw, residual


@pytest.fixture
def sampler() -> Any:  # noqa: ANN401
    return sampler_of(residual())


def test_the_summary_of_a_small_case_is_as_counted_by_hand(sampler: CompiledSampler) -> None:
    sampler(draw(3, 4))
    summary = sampler.summary()
    # Batch 3, width 4: a and b cost 3 * 4 * 4 = 48 multiply-adds each, the embedding of time 3 * 1 * 4 = 12; it is
    # folded. A value of a site has 3 * 4 * 4 = 48 bytes: a lives through evaluations 0 and 1, b through 1 and 2.
    assert [row.num_computed for row in summary.rows] == [2, 1, 1]
    assert [row.num_read for row in summary.rows] == [0, 1, 1]
    assert [row.sources for row in summary.rows] == [(), (0,), (1,)]
    assert [row.multiply_adds for row in summary.rows] == [96, 48, 48]
    assert [row.multiply_adds_uncached for row in summary.rows] == [108] * 3
    # Evaluation 1 reads a before it makes b, so the graph never holds both; counted by evaluation they overlap.
    assert [row.cache_bytes for row in summary.rows] == [48, 48, 48]
    assert summary.cache_of_schedule.bytes_per_evaluation == (48, 96, 48)
    assert (summary.num_sites, summary.shared_multiply_adds, summary.cache.peak_bytes) == (2, 0, 48)
    assert summary.computed_share == pytest.approx(4 / 6)
    assert summary.multiply_adds_kept == pytest.approx(192 / 324)
    assert "66.7% of the sites computed, 59.3% of the multiply-adds kept; cache 48 B at most" in str(summary)
