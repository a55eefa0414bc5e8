"""Predictions: what a schedule will save, before anything is compiled."""

from __future__ import annotations

import pytest
import torch

from l2c_compile import L2CError
from l2c_compile.analyses.prediction import Prediction
from tests.uneven import DIM, sampler


def predicted(rows: dict[str, list[int]], device: str = "cpu") -> Prediction:
    return sampler(rows, device).predict(torch.zeros(64, DIM, device=device))


def test_a_schedule_that_skips_the_work_is_predicted_to_save_time() -> None:
    prediction = predicted({"heavy": [1, 0, 0, 0]})
    assert prediction.time_ratio is not None
    # A quarter of the heavy work is left; the rest is the loop's own.
    assert 0.2 < prediction.time_ratio < 0.8
    assert 0.25 < prediction.multiply_adds_kept < 0.27
    assert prediction.bytes_moved_kept is not None
    assert prediction.bytes_moved_kept < 0.5
    assert prediction.cache_bytes == 64 * DIM * 4
    assert prediction.warning is None
    assert "x" in str(prediction)


def test_a_schedule_that_reuses_nothing_is_warned_about() -> None:
    prediction = predicted({"heavy": [1, 1, 1, 1]})
    assert prediction.multiply_adds_kept == prediction.bytes_moved_kept == prediction.time_ratio == 1.0
    assert prediction.warning is not None
    assert "reuses nothing" in str(prediction)


def test_a_schedule_that_skips_next_to_nothing_is_warned_about() -> None:
    prediction = predicted({"light": [1, 0, 1, 1]}, "meta")
    assert prediction.warning is not None
    assert "no gain is to be expected" in prediction.warning


def test_without_memory_for_weights_work_is_counted_and_no_time_measured() -> None:
    prediction = predicted({"heavy": [1, 0, 0, 0]}, "meta")
    assert prediction.seconds is prediction.time_ratio is prediction.bytes_moved_kept is None
    assert prediction.multiply_adds_kept == predicted({"heavy": [1, 0, 0, 0]}).multiply_adds_kept
    assert "time" not in str(prediction)


def test_predicting_compiles_nothing() -> None:
    cached = sampler({"heavy": [1, 0, 0, 0]})
    cached.predict(torch.zeros(2, DIM))
    with pytest.raises(L2CError):
        _ = cached.graph_module
