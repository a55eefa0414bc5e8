"""Measures of quality against closed forms and independent computations."""

from __future__ import annotations

import math
import sys
import warnings

import numpy as np
import pytest
import torch
from scipy.linalg import sqrtm
from sklearn.neighbors import NearestNeighbors
from torch import Tensor
from torch.nn import functional as F

from l2c_compile.errors import QualityError
from l2c_compile.quality.measures import (
    Estimate,
    bootstrap_mean,
    frechet_distance,
    in_precision_and_recall,
    measure_quality,
    psnr,
    relative_error,
    sample_all,
    ssim,
)
from tests.tiny import draw


def test_psnr_is_that_of_each_sample() -> None:
    reference = draw(3, 1, 8, 8)
    samples = reference + torch.tensor([0.1, 0.2, 0.0])[:, None, None, None]
    wanted = [10 * math.log10(4 / 0.01), 10 * math.log10(4 / 0.04), math.inf]
    assert psnr(samples, reference, 2.0).tolist() == pytest.approx(wanted, rel=1e-5)


def test_ssim_is_wang_s_with_a_gaussian_window() -> None:
    a, b = draw(2, 3, 8, 9).clamp(-1, 1), draw(2, 3, 8, 9, seed=2).clamp(-1, 1)
    offsets = torch.arange(11) - 5.0
    line = torch.exp(-(offsets**2) / (2 * 1.5**2))
    window = torch.outer(line / line.sum(), line / line.sum()).expand(3, 1, 11, 11)

    def local(x: Tensor) -> Tensor:
        return F.conv2d(x, window, groups=3)

    a_padded, b_padded = (F.pad(x, (5, 5, 5, 5), mode="reflect") for x in (a, b))
    mean_a, mean_b = local(a_padded), local(b_padded)
    var_a, var_b = local(a_padded**2) - mean_a**2, local(b_padded**2) - mean_b**2
    covariance = local(a_padded * b_padded) - mean_a * mean_b
    c1, c2 = (0.01 * 2) ** 2, (0.03 * 2) ** 2
    likeness = (2 * mean_a * mean_b + c1) * (2 * covariance + c2)
    likeness = likeness / ((mean_a**2 + mean_b**2 + c1) * (var_a + var_b + c2))
    # Variances are differences of numbers of size 1, divided by c2.
    torch.testing.assert_close(ssim(a, b, 2.0), likeness.mean((1, 2, 3)), rtol=0, atol=64 * 1.2e-7 / c2)
    torch.testing.assert_close(ssim(a, a, 2.0), torch.ones(2))


def test_relative_errors_are_of_each_sample() -> None:
    reference, samples = torch.tensor([[3.0, 4.0], [1.0, 0.0]]), torch.tensor([[3.0, 7.0], [1.0, 0.0]])
    assert relative_error(samples, reference, 1).tolist() == pytest.approx([3 / 7, 0])
    assert relative_error(samples, reference, 2).tolist() == pytest.approx([3 / 5, 0])


def test_the_frechet_distance_is_that_of_the_formula() -> None:
    one = draw(400, 6) @ draw(6, 6, seed=2)
    other = 0.3 + draw(300, 6, seed=3) @ draw(6, 6, seed=4)
    c1, c2 = np.cov(one.double().numpy().T), np.cov(other.double().numpy().T)
    gap = (one.double().mean(0) - other.double().mean(0)).numpy()
    wanted = gap @ gap + np.trace(c1 + c2 - 2 * sqrtm(c1 @ c2).real)
    assert frechet_distance(one, other) == pytest.approx(wanted, rel=1e-9)
    assert frechet_distance(one, one) == pytest.approx(0.0, abs=1e-9)


def test_a_shift_moves_the_frechet_distance_by_its_square() -> None:
    features = draw(200, 4)
    assert frechet_distance(features + 0.5, features) == pytest.approx(4 * 0.25, rel=1e-5)


def test_a_feature_that_never_varies_is_no_problem() -> None:
    features = torch.cat([draw(200, 3), torch.zeros(200, 2)], dim=1)
    assert frechet_distance(features + 1, features) == pytest.approx(5.0, rel=1e-5)


def test_precision_and_recall_are_those_of_nearest_neighbours() -> None:
    samples, reference = draw(150, 4), 0.7 * draw(130, 4, seed=2) + 0.4
    inside, covered = in_precision_and_recall(samples, reference)
    for got, points, centers in ((inside, samples, reference), (covered, reference, samples)):
        points_np, centers_np = points.double().numpy(), centers.double().numpy()
        radii = NearestNeighbors(n_neighbors=4).fit(centers_np).kneighbors(centers_np)[0][:, -1]
        distances = np.linalg.norm(points_np[:, None] - centers_np[None], axis=2)
        assert got.tolist() == (distances <= radii).any(1).tolist()
    assert 0 < inside.float().mean() < 1


def test_precision_and_recall_of_equal_sets_are_one_and_of_distant_sets_zero() -> None:
    samples = draw(50, 3)
    assert all(part.all() for part in in_precision_and_recall(samples, samples))
    assert not any(part.any() for part in in_precision_and_recall(samples, samples + 100))


def test_the_interval_of_a_mean_is_that_of_the_normal_approximation() -> None:
    values = draw(4000)
    estimate = bootstrap_mean(values, num_resamples=2000)
    assert estimate.value == pytest.approx(values.double().mean().item())
    error = values.std().item() / math.sqrt(4000)
    assert (estimate.high - estimate.low) / 2 == pytest.approx(1.96 * error, rel=0.1)
    assert bootstrap_mean(torch.tensor([1.0, math.inf])) == Estimate(math.inf, math.inf, math.inf)


def test_the_interval_of_the_frechet_distance_covers_it_and_narrows() -> None:
    def measured(count: int) -> Estimate:
        latents = draw(count, 1, 8, 8)
        features = latents.flatten(1)[:, :6]
        moved = features + 0.2 * draw(count, 6, seed=5) + 0.3
        quality = measure_quality(latents + 0.1, latents, data_range=2.0, features=moved, reference_features=features)
        assert quality.frechet is not None
        return quality.frechet

    few, many = measured(100), measured(3000)
    assert few.low < few.value < few.high
    assert many.low < many.value < many.high
    assert many.high - many.low < (few.high - few.low) / 2
    # Mean 0.3 in each of 6; the standard deviation grows from 1 to sqrt(1.04).
    assert many.value == pytest.approx(6 * (0.09 + (math.sqrt(1.04) - 1) ** 2), rel=0.1)


def test_quality_says_what_it_measured() -> None:
    latents = draw(30, 1, 8, 8)
    quality = measure_quality(latents, latents, data_range=2.0)
    assert quality.psnr_db.value == math.inf
    assert quality.ssim is not None
    assert quality.ssim.value == pytest.approx(1.0)
    assert quality.relative_l1.value == quality.relative_l2.value == 0.0
    assert (quality.frechet, quality.precision, quality.recall) == (None, None, None)
    assert quality.to_dict()["psnr_db"] == {"value": None, "low": None, "high": None}
    assert quality.to_dict()["num_samples"] == 30
    assert measure_quality(draw(9, 4), draw(9, 4), data_range=2.0).ssim is None
    assert measure_quality(draw(9, 4, 5, 5), draw(9, 4, 5, 5), data_range=2.0).ssim is None


def test_too_few_samples_for_a_frechet_distance_are_refused_or_warned_of() -> None:
    with pytest.raises(QualityError, match="of 8 features wants more than 8 samples, better 80; got 8"):
        frechet_distance(draw(8, 8), draw(100, 8))
    with pytest.warns(UserWarning, match="of 8 features from 79 samples is mostly bias; take 80 or more"):
        frechet_distance(draw(100, 8), draw(79, 8))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        frechet_distance(draw(80, 8), draw(80, 8))


@pytest.mark.parametrize(
    ("samples", "reference", "message"),
    [
        (draw(3, 4), draw(2, 4), "of one shape"),
        (draw(0, 4), draw(0, 4), "of one shape"),
        (draw(3, 4) * math.nan, draw(3, 4), "3 of the 3 samples hold NaN or infinity, the first is 0"),
        (draw(3, 4), draw(3, 4) / 0.0, "3 of the 3 reference hold NaN"),
    ],
)
def test_samples_that_cannot_be_compared_are_refused(samples: Tensor, reference: Tensor, message: str) -> None:
    with pytest.raises(QualityError, match=message):
        measure_quality(samples, reference, data_range=2.0)


def test_features_of_another_width_are_refused() -> None:
    with pytest.raises(QualityError, match=r"features want shapes \(N, D\) and \(M, D\)"):
        frechet_distance(draw(30, 2), draw(30, 3))
    with pytest.raises(QualityError, match="more than 3 samples, got 3 and 9"):
        in_precision_and_recall(draw(3, 2), draw(9, 2))
    with pytest.raises(QualityError, match="SSIM wants images"):
        ssim(draw(3, 4), draw(3, 4), 2.0)


def test_batches_have_one_form_and_samples_keep_their_order() -> None:
    shapes: list[tuple[int, ...]] = []

    def sampler(noise: Tensor, *, y: Tensor, scale: float) -> Tensor:
        shapes.append(tuple(noise.shape))
        return noise * scale + y[:, None]

    noise, y = draw(7, 2), torch.arange(7)
    made = sample_all(sampler, noise, {"y": y, "scale": 2.0}, batch=3)
    assert torch.equal(made, noise * 2.0 + y[:, None])
    assert shapes == [(3, 2)] * 3


def test_a_sampler_that_returns_no_samples_is_refused() -> None:
    with pytest.raises(QualityError, match="a batch wants 1 to 4 samples, got 5"):
        sample_all(lambda noise: noise, draw(4, 2), {}, batch=5)
    with pytest.raises(QualityError, match="returns one tensor of 2 samples, got tuple"):
        sample_all(lambda noise: (noise,), draw(4, 2), {}, batch=2)


def test_without_torchmetrics_the_way_out_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torchmetrics.functional", None)
    with pytest.raises(
        QualityError, match=r"want torchmetrics, which is not installed; pip install 'l2c-compile\[train\]'"
    ):
        psnr(draw(2, 4), draw(2, 4), 2.0)
