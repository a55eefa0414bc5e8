"""Measures of what reuse costs: samples against those of the uncached model on equal noise.

PSNR, SSIM and relative errors compare sample by sample; Frechet distance, precision and recall compare distributions
of features.

Shapes: N samples, C channels, H height, W width, D features.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from types import ModuleType

import torch
from torch import Tensor

from l2c_compile.errors import QualityError

NUM_NEIGHBOURS = 3
"""The number of neighbours in improved precision and recall, as published (arXiv 1904.06991)."""

_NUM_RESAMPLES = 200
_MIN_SSIM_PIXELS = 6
_FEW_SAMPLES = 10
_CHUNK = 1000


@dataclass(frozen=True)
class Estimate:
    """A number from a finite sample and its 95% bootstrap interval."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:.4g} [{self.low:.4g}, {self.high:.4g}]"


@dataclass(frozen=True)
class Quality:
    """How near samples are to reference samples made from equal noise."""

    num_samples: int
    psnr_db: Estimate
    """The mean PSNR over the samples, in dB; infinite where all are equal."""
    ssim: Estimate | None
    """The mean SSIM over the samples; None for samples that are no images or have fewer than 6 pixels a side."""
    relative_l1: Estimate
    """The mean over the samples of |sample - reference|_1 / |reference|_1."""
    relative_l2: Estimate
    """The same mean with L2 norms."""
    frechet: Estimate | None
    """The Frechet distance of the features; None without features. It keeps its bias at this number of samples, and its
    interval is that of the distance at this number."""
    precision: Estimate | None
    """The share of the samples whose features lie among those of the reference; None without features."""
    recall: Estimate | None
    """The share of the reference whose features lie among those of the samples; None without features."""

    def to_dict(self) -> dict[str, object]:
        """Return a JSON-able description; numbers that are not finite become None."""
        return {"num_samples": self.num_samples, **{name: _plain(estimate) for name, estimate in self.estimates()}}

    def estimates(self) -> list[tuple[str, Estimate | None]]:
        """Return the measures by name."""
        return [(item.name, getattr(self, item.name)) for item in fields(self) if item.name != "num_samples"]


def measure_quality(
    samples: Tensor,
    reference: Tensor,
    *,
    data_range: float,
    features: Tensor | None = None,
    reference_features: Tensor | None = None,
    seed: int = 0,
) -> Quality:
    """Compare samples with reference samples made from equal noise.

    Args:
        samples: the samples, shape (N, C, H, W), or any (N, ...).
        reference: the reference samples, of the same shape; sample i of both comes from one noise.
        data_range: the span of the reference's values, 2 for [-1, 1].
        features: the features (N, D) of the samples, from an extractor that was not trained with the model.
        reference_features: the features (N, D) of the reference.
        seed: the seed of the bootstrap.

    Raises:
        QualityError: if shapes differ, numbers are not finite, or there are not more samples than features.
    """
    _check_samples(samples, reference)
    large_enough = samples.dim() == 4 and min(samples.shape[2:]) >= _MIN_SSIM_PIXELS
    frechet = precision = recall = None
    if features is not None and reference_features is not None:
        frechet = _bootstrap_frechet(features, reference_features, seed)
        inside, covered = in_precision_and_recall(features, reference_features)
        precision, recall = bootstrap_mean(inside, seed), bootstrap_mean(covered, seed)
    return Quality(
        num_samples=len(samples),
        psnr_db=bootstrap_mean(psnr(samples, reference, data_range), seed),
        ssim=bootstrap_mean(ssim(samples, reference, data_range), seed) if large_enough else None,
        relative_l1=bootstrap_mean(relative_error(samples, reference, 1), seed),
        relative_l2=bootstrap_mean(relative_error(samples, reference, 2), seed),
        frechet=frechet,
        precision=precision,
        recall=recall,
    )


def sample_all(
    sampler: Callable[..., object],
    noise: Tensor,
    conditions: Mapping[str, object],
    batch: int,
    on_batch: Callable[[], None] = lambda: None,
) -> Tensor:
    """Return the samples for all of the noise, made batch by batch.

    All batches have one form, so that a compiled sampler is captured once: the last is filled up with the first rows.

    Args:
        sampler: the sampler, called as ``sampler(noise, **conditions) -> latent``.
        noise: the noise, shape (N, ...).
        conditions: the conditions; a tensor of N rows is split as the noise is, anything else is given to every batch.
        batch: the number of samples in a call, at most N.
        on_batch: a function that is called after each batch, to show progress.

    Raises:
        QualityError: if the batch is not from 1 to N, or the sampler does not return one tensor with a row for each
            sample.
    """
    count = len(noise)
    if not 1 <= batch <= count:
        raise QualityError(f"a batch wants 1 to {count} samples, got {batch}")
    done: list[Tensor] = []
    for start in range(0, count, batch):
        rows = torch.arange(start, start + batch) % count
        here = {
            name: value[rows] if isinstance(value, Tensor) and value.dim() and len(value) == count else value
            for name, value in conditions.items()
        }
        made = sampler(noise[rows], **here)
        if not isinstance(made, Tensor) or made.dim() == 0 or len(made) != batch:
            got = tuple(made.shape) if isinstance(made, Tensor) else type(made).__name__
            raise QualityError(f"quality wants a sampler that returns one tensor of {batch} samples, got {got}")
        done.append(made)
        on_batch()
    return torch.cat(done)[:count]


def check_num_samples(num_samples: int, num_features: int) -> None:
    """Raise ``QualityError`` unless there are enough samples to fit a Gaussian to their features."""
    if num_samples <= num_features:
        raise QualityError(
            f"a Frechet distance of {num_features} features wants more than {num_features} samples, better "
            f"{_FEW_SAMPLES * num_features}; got {num_samples}"
        )


def psnr(samples: Tensor, reference: Tensor, data_range: float) -> Tensor:
    """Return the peak signal-to-noise ratio of each sample in dB, (N,); infinite where it equals the reference."""
    axes = tuple(range(1, samples.dim()))
    metrics = _image_metrics()
    ratio = metrics.peak_signal_noise_ratio(samples, reference, data_range=data_range, reduction="none", dim=axes)
    assert isinstance(ratio, Tensor)
    return ratio


def ssim(samples: Tensor, reference: Tensor, data_range: float) -> Tensor:
    """Return the structural similarity of each image, (N,), with the usual Gaussian window of 11 (Wang et al. 2004).

    Raises:
        QualityError: if the samples are no images, or are smaller than the reflection at their borders.
    """
    if samples.dim() != 4 or min(samples.shape[2:]) < _MIN_SSIM_PIXELS:
        raise QualityError(
            f"SSIM wants images (N, C, H, W) of {_MIN_SSIM_PIXELS} pixels a side, got {tuple(samples.shape)}"
        )
    metrics = _image_metrics()
    similarity = metrics.structural_similarity_index_measure(
        samples, reference, data_range=data_range, reduction="none"
    )
    assert isinstance(similarity, Tensor)
    return similarity


def relative_error(samples: Tensor, reference: Tensor, order: int) -> Tensor:
    """Return the norm of the difference over that of the reference, sample by sample, (N,)."""
    difference = torch.linalg.vector_norm((samples - reference).flatten(1), order, dim=1)
    size = torch.linalg.vector_norm(reference.flatten(1), order, dim=1)
    return torch.div(difference, size)


def frechet_distance(features: Tensor, reference: Tensor) -> float:
    """Return the squared Frechet distance of two Gaussians fitted to features (Heusel et al., arXiv 1706.08500).

    Args:
        features: the features of one set, shape (N, D).
        reference: the features of the other set, shape (M, D).

    Raises:
        QualityError: if one of them has no more rows than columns, so that its covariance is not determined.

    Warns:
        UserWarning: if there are fewer than 10 samples for each feature: the distance is then mostly bias.
    """
    _check_features(features, reference)
    return _frechet(features.double(), reference.double())


def in_precision_and_recall(
    features: Tensor, reference: Tensor, neighbours: int = NUM_NEIGHBOURS
) -> tuple[Tensor, Tensor]:
    """Return the samples that improved precision and recall count (Kynkaanniemi et al., arXiv 1904.06991, equation 1).

    Args:
        features: the features of the samples, shape (N, D).
        reference: the features of the reference, shape (M, D).
        neighbours: the number k; a row stands for a ball that reaches its k-th neighbour in its own set.

    Returns:
        Two bool tensors: (N,), which samples lie in a ball of the reference (the mean is precision), and (M,), which
        of the reference lie in a ball of the samples (the mean is recall).

    Raises:
        QualityError: if a set has no more rows than neighbours.
    """
    if min(len(features), len(reference)) <= neighbours:
        raise QualityError(
            f"precision and recall want more than {neighbours} samples, got {len(features)} and {len(reference)}"
        )
    features, reference = features.double(), reference.double()
    return (
        _inside(features, reference, _radii(reference, neighbours)),
        _inside(reference, features, _radii(features, neighbours)),
    )


def bootstrap_mean(values: Tensor, seed: int = 0, num_resamples: int = _NUM_RESAMPLES) -> Estimate:
    """Return the mean of independent values with its 95% percentile bootstrap interval."""
    values = values.double()
    mean = values.mean().item()
    if not torch.isfinite(values).all():
        return Estimate(mean, mean, mean)
    means = values[_resamples(len(values), num_resamples, seed)].mean(1)
    low, high = torch.quantile(means, torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return Estimate(mean, low, high)


def _image_metrics() -> ModuleType:
    try:
        from torchmetrics.functional import image
    except ModuleNotFoundError as error:
        raise QualityError(
            "PSNR and SSIM want torchmetrics, which is not installed; pip install 'l2c-compile[train]'"
        ) from error
    return image


def _bootstrap_frechet(features: Tensor, reference: Tensor, seed: int) -> Estimate:
    """Return the distance with its bootstrap interval; pairs are resampled, since sample i of both has one noise."""
    value = frechet_distance(features, reference)
    features, reference = features.double(), reference.double()
    drawn = [_frechet(features[rows], reference[rows]) for rows in _resamples(len(features), _NUM_RESAMPLES, seed)]
    distances = torch.tensor(drawn, dtype=torch.float64)
    low, high = torch.quantile(distances, torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    # Resampling adds as much bias again as the sample has, so the interval is moved back by that much.
    bias = distances.mean().item() - value
    return Estimate(value, max(0.0, low - bias), high - bias)


def _frechet(features: Tensor, reference: Tensor) -> float:
    gap = features.mean(0) - reference.mean(0)
    one, other = torch.cov(features.T), torch.cov(reference.T)
    values, vectors = torch.linalg.eigh(other)
    root = (vectors * values.clamp_min(0).sqrt()) @ vectors.T
    # The eigenvalues of one @ other are those of this symmetric matrix.
    mixed = torch.linalg.eigvalsh(root @ one @ root).clamp_min(0).sqrt().sum()
    return max(0.0, float(gap @ gap + one.trace() + other.trace() - 2 * mixed))


def _radii(points: Tensor, neighbours: int) -> Tensor:
    """Return the distance of each point to its k-th neighbour in its own set."""
    # The nearest neighbour is the point itself.
    return torch.cat(
        [torch.cdist(rows, points).kthvalue(neighbours + 1).values for rows in torch.split(points, _CHUNK)]
    )


def _inside(points: Tensor, centers: Tensor, radii: Tensor) -> Tensor:
    return torch.cat([(torch.cdist(rows, centers) <= radii).any(1) for rows in torch.split(points, _CHUNK)])


def _resamples(count: int, num_resamples: int, seed: int) -> Tensor:
    return torch.randint(count, (num_resamples, count), generator=torch.Generator().manual_seed(seed))


def _check_samples(samples: Tensor, reference: Tensor) -> None:
    if samples.shape != reference.shape or samples.dim() < 2 or not len(samples):
        raise QualityError(
            f"quality wants samples and reference of one shape (N, ...), got {tuple(samples.shape)} and "
            f"{tuple(reference.shape)}"
        )
    for name, tensor in (("samples", samples), ("reference", reference)):
        if not torch.isfinite(tensor).all():
            bad = (~torch.isfinite(tensor)).flatten(1).any(1)
            raise QualityError(
                f"{int(bad.sum())} of the {len(bad)} {name} hold NaN or infinity, the first is {bad.int().argmax()}"
            )


def _check_features(features: Tensor, reference: Tensor) -> None:
    if features.dim() != 2 or reference.dim() != 2 or features.shape[1] != reference.shape[1]:
        raise QualityError(
            f"features want shapes (N, D) and (M, D), got {tuple(features.shape)} and {tuple(reference.shape)}"
        )
    fewest, num_features = min(len(features), len(reference)), features.shape[1]
    check_num_samples(fewest, num_features)
    if fewest < _FEW_SAMPLES * num_features:
        warnings.warn(
            f"a Frechet distance of {num_features} features from {fewest} samples is mostly bias; take "
            f"{_FEW_SAMPLES * num_features} or more",
            stacklevel=3,
        )


def _plain(estimate: Estimate | None) -> dict[str, float | None] | None:
    if estimate is None:
        return None
    numbers = {"value": estimate.value, "low": estimate.low, "high": estimate.high}
    return {name: number if abs(number) < float("inf") else None for name, number in numbers.items()}
