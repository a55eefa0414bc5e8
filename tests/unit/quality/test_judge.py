"""The judge compares samples with and without caching on equal noise."""

from __future__ import annotations

import pytest
import torch

from l2c_compile import CacheSchedule
from l2c_compile.errors import QualityError
from l2c_compile.models.named import NamedModel, named_model
from l2c_compile.quality.judge import Judge


@pytest.fixture(scope="module")
def digits() -> NamedModel:
    return named_model("digits")


@pytest.fixture(scope="module")
def judge(digits: NamedModel) -> Judge:
    return Judge(digits, digits.loop(2), num_samples=66, batch=33)


@pytest.mark.filterwarnings("ignore:a Frechet distance")
def test_nothing_reused_is_nothing_lost(judge: Judge, digits: NamedModel) -> None:
    loop = digits.loop(2)
    verdict = judge.judge(CacheSchedule.all_compute(2, digits.sublayers), loop)
    assert (judge.num_batches, len(judge.reference)) == (2, 66)
    assert verdict.multiply_adds == judge.multiply_adds
    assert verdict.multiply_adds_kept == 1.0
    assert verdict.quality.relative_l2.value < 1e-5
    assert verdict.as_asked == judge.reference_as_asked


@pytest.mark.filterwarnings("ignore:a Frechet distance")
def test_what_is_reused_is_counted_and_a_reference_may_be_given(judge: Judge, digits: NamedModel) -> None:
    loop, batches = digits.loop(2), list[None]()
    given = (judge.reference, judge.multiply_adds)
    again = Judge(digits, loop, num_samples=66, batch=33, reference=given, on_batch=lambda: batches.append(None))
    assert batches == []
    row = {site: [1, 0] for site in digits.sublayers}
    schedule = CacheSchedule.from_table(row).resolve([path for path, _ in digits.denoiser.named_modules()])
    verdict = again.judge(schedule, loop)
    assert len(batches) == 2
    assert 0.5 < verdict.multiply_adds_kept < 0.6
    assert verdict.quality.relative_l2.value > 0.001
    assert torch.equal(again.noise, judge.noise)


def test_too_few_samples_are_refused_before_any_is_made(digits: NamedModel) -> None:
    batches: list[None] = []
    with pytest.raises(QualityError):
        Judge(digits, digits.loop(2), num_samples=60, batch=60, on_batch=lambda: batches.append(None))
    assert batches == []
