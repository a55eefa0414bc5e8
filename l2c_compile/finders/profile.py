"""Profiles: how much the sites of a loop change from evaluation to evaluation, measured once, kept as data.

``take_profile`` runs the loop without reuse through the captured evaluation graphs, which return what their sites hold
(``open_evaluations.py``). Selectors are functions of the ``Profile`` alone.

Shapes: R runs of the loop, K lags, E evaluations, S sites.
"""

from __future__ import annotations

import hashlib
import os
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache

import torch
from torch import Tensor, nn

from l2c_compile.analyses.cost import MultiplyAdds
from l2c_compile.errors import FileFormatError, ProfileError
from l2c_compile.files.documents import check_header, frozen_json, honoured, plain_json
from l2c_compile.files.tensors import read_tensors, write_tensors
from l2c_compile.finders.open_evaluations import OpenDenoiser, OpenEvaluation
from l2c_compile.finders.work import Work, work_of
from l2c_compile.frontend.stand_in import Loop
from l2c_compile.loops import BuiltInLoop
from l2c_compile.schedules.schedule import MAX_CELLS
from l2c_compile.schedules.sites import Site

FORMAT = "l2c_compile.profile"
VERSION = 1

_KEYS = frozenset({"format", "version", "orientation", "sites", "branches", "loop", "model"})
_TENSORS = ("change", "evaluation_work", "growth", "site_work", "size")


@dataclass(frozen=True, eq=False)
class Profile:
    """What the sites of a loop did in some runs without reuse. Immutable: never write to its tensors.

    Lags count evaluations that share caches: at lag k, evaluation e is compared with e - k * ``branches``.

    Raises:
        ProfileError: if shapes do not fit together, or a number is not finite or is negative.
    """

    change: Tensor
    """(R, K, E, S) float32: the L1 norm of the site's value at e minus that at lag k, row k - 1; 0 where there is no
    evaluation at that lag."""
    size: Tensor
    """(R, E, S) float32: the L1 norm of the site's value."""
    growth: Tensor
    """(R, E, S) float32: the L2 norm of each vector along the last dimension over its norm at lag 1, the mean over all
    vectors (MagCache's magnitude ratio); 1 where there is no evaluation at lag 1."""
    work: Work
    """Multiply-adds of the evaluations, and of each site in them."""
    sites: tuple[Site, ...]
    """What the last axis counts."""
    branches: int = 1
    """Evaluations e with equal ``e % branches`` share caches: 2 for guidance in two separate calls."""
    loop: Mapping[str, object] | None = None
    """A JSON description of the loop, if it has one. Read-only."""
    model: Mapping[str, object] = field(default_factory=dict)
    """Which denoiser it was: class, number of parameters and sha256 of its weights. Read-only."""

    def __post_init__(self) -> None:
        set_field = object.__setattr__
        set_field(self, "sites", tuple(self.sites))
        set_field(self, "loop", None if self.loop is None else frozen_json(self.loop, "loop"))
        set_field(self, "model", frozen_json(self.model, "model"))
        _check(self)

    @property
    def num_runs(self) -> int:
        """How often the loop ran, R."""
        return self.change.shape[0]

    @property
    def num_lags(self) -> int:
        """The longest lag, K."""
        return self.change.shape[1]

    @property
    def num_evaluations(self) -> int:
        """The number of evaluations, E."""
        return self.change.shape[2]

    def relative_change(self, lag: int) -> Tensor:
        """Return the change at a lag over the size of the later value, both summed over the runs: (E, S) float64.

        0 where nothing changes, infinite where the later value is zero and the earlier was not.

        Raises:
            ProfileError: if the profile does not hold this lag.
        """
        if not 1 <= lag <= self.num_lags:
            raise ProfileError(f"the profile holds lags 1..{self.num_lags}, not {lag}; profile with more lags")
        change_ES = self.change[:, lag - 1].double().sum(0)
        return torch.where(change_ES == 0, 0.0, change_ES / self.size.double().sum(0))

    def __repr__(self) -> str:
        return (
            f"Profile({self.num_runs} runs, lags 1..{self.num_lags}, {self.num_evaluations} evaluations x "
            f"{len(self.sites)} sites)"
        )

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write a safetensors file: the statistics as tensors, the rest as versioned JSON metadata. Atomic."""
        document = {
            "format": FORMAT,
            "version": VERSION,
            "orientation": "execution",
            "sites": list(map(str, self.sites)),
            "branches": self.branches,
            "loop": plain_json(self.loop),
            "model": plain_json(self.model),
        }
        tensors = {
            "change": self.change,
            "size": self.size,
            "growth": self.growth,
            "evaluation_work": torch.tensor(self.work.evaluations),
            "site_work": torch.tensor([self.work.sites[site] for site in self.sites]),
        }
        write_tensors(path, document, tensors)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Profile:
        """Read a file written by ``save``.

        Raises:
            FileFormatError: if it is not such a file, is of a newer version, or its parts do not fit together.
            OSError: if it cannot be read.
        """
        document, tensors = read_tensors(path, "profile", names=_TENSORS)
        with honoured("profile"):
            return _from_document(document, tensors)


def take_profile(
    denoiser: nn.Module,
    loop: Loop,
    sites: Iterable[Site | str],
    runs: Iterable[tuple[object, Mapping[str, object]]],
    *,
    lags: int = 3,
    branches: int = 1,
    on_run: Callable[[], None] = lambda: None,
) -> Profile:
    """Run the loop without reuse and measure how its sites change.

    Only the last ``lags * branches`` evaluations of site values are kept at any time.

    Args:
        denoiser: the model; it gets no hooks, one evaluation of it is captured as in ``l2c_compile``.
        loop: the sampler.
        sites: what to measure; a ``*`` stands for a path component.
        runs: ``(noise, conditions)`` of each run. Methods that average over samples take each run as one: give runs
            of batch 1 (Block Caching, InvarDiff), or one run with a batch (SmoothCache sums over it).
        lags: the most evaluations to look back.
        branches: 2 for guidance in two separate calls: every second evaluation shares caches.
        on_run: called after each run, for progress.

    Raises:
        UnknownSiteError: if a site names no module.
        CaptureError: if the denoiser cannot be captured.
        ProfileError: if there is no run, runs differ in their evaluations, or a site holds numbers that are not finite.
    """
    if type(lags) is not int or lags < 1 or type(branches) is not int or branches < 1:
        raise ProfileError(f"a profile wants lags and branches of at least 1, got {lags!r} and {branches!r}")
    sites = tuple(sites)
    if not sites:
        raise ProfileError("a profile wants at least one site")
    opened = OpenDenoiser(denoiser, sites)

    @cache
    def work_in(evaluation: OpenEvaluation) -> tuple[int, dict[Site, int]]:
        return work_of(evaluation.captured, MultiplyAdds().of)

    runs_done: list[_RunStatistics] = []
    for noise, conditions in runs:
        run = _RunStatistics(opened.sites, lags, branches)

        def on_evaluation(e: int, evaluation: OpenEvaluation, tensors: list[Tensor]) -> list[Tensor]:
            outputs, values = evaluation.observe(tensors)
            run.note(values, evaluation.columns, work_in(evaluation))  # noqa: B023 - called before the next turn
            return outputs

        with torch.no_grad():
            opened.run(loop, noise, conditions, on_evaluation)
        run.check_finite()
        if runs_done and run.work != runs_done[0].work:
            raise ProfileError(
                "the runs of a profile want the same evaluations, but their number or their size differs; give inputs "
                "of one shape to a loop that always makes the same calls"
            )
        run.forget_values()
        runs_done.append(run)
        on_run()
    if not runs_done:
        raise ProfileError("a profile wants at least one run of a loop that calls the denoiser")
    work = runs_done[0].work
    return Profile(
        change=torch.stack([run.change() for run in runs_done]),
        size=torch.stack([torch.stack(run.size) for run in runs_done]),
        growth=torch.stack([torch.stack(run.growth) for run in runs_done]),
        work=Work(tuple(total for total, _ in work), {s: tuple(saved[s] for _, saved in work) for s in opened.sites}),
        sites=opened.sites,
        branches=branches,
        loop=loop.to_dict() if isinstance(loop, BuiltInLoop) else None,
        model=_identity(denoiser),
    )


class _RunStatistics:
    """The statistics of one run of the loop, evaluation by evaluation."""

    def __init__(self, sites: tuple[Site, ...], lags: int, branches: int) -> None:
        self.sites = sites
        self.lags = lags
        self.branches = branches
        self.size: list[Tensor] = []
        self.growth: list[Tensor] = []
        self.work: list[tuple[int, dict[Site, int]]] = []
        self._change: list[Tensor] = []
        self._kept: deque[Mapping[Site, list[Tensor]]] = deque(maxlen=lags * branches)

    def note(self, held: Sequence[Tensor], columns: Sequence[int], work: tuple[int, dict[Site, int]]) -> None:
        """Take what the sites hold at the next evaluation, the column of the site for each value, and the work."""
        e = len(self.size)
        values: dict[Site, list[Tensor]] = {site: [] for site in self.sites}
        for column, value in zip(columns, held, strict=True):
            values[self.sites[column]].append(value)
        earlier = [self._kept[-lag] for lag in range(self.branches, len(self._kept) + 1, self.branches)]
        for kept in earlier:
            self._check_form(e, kept, values)
        self.work.append(work)
        self.size.append(torch.stack([_l1(values[site]) for site in self.sites]).cpu())
        change_KS = torch.zeros(self.lags, len(self.sites))
        for k, kept in enumerate(earlier):
            rows = [_l1(map(_difference, values[site], kept[site])) for site in self.sites]
            change_KS[k] = torch.stack(rows).cpu()
        self._change.append(change_KS)
        growth = [_growth(values[site], earlier[0][site]) if earlier else torch.tensor(1.0) for site in self.sites]
        self.growth.append(torch.stack(growth).cpu())
        self._kept.append(values)

    def change(self) -> Tensor:
        """Return the change by lag, evaluation and site (K, E, S)."""
        return torch.stack(self._change, dim=1)

    def forget_values(self) -> None:
        """Let go of what the sites held."""
        self._kept.clear()

    def check_finite(self) -> None:
        """Refuse a run in which a site overflowed."""
        for e, size_S in enumerate(self.size):
            if not torch.isfinite(size_S).all():
                site = self.sites[int((~torch.isfinite(size_S)).nonzero()[0, 0])]
                raise ProfileError(
                    f"site {site} holds NaN or infinity at evaluation {e}; check the model, its dtype and the inputs"
                )

    def _check_form(self, e: int, kept: Mapping[Site, list[Tensor]], values: Mapping[Site, list[Tensor]]) -> None:
        for site in self.sites:
            before, after = [tuple(v.shape) for v in kept[site]], [tuple(v.shape) for v in values[site]]
            if before != after:
                raise ProfileError(
                    f"site {site}, evaluation {e}: holds {after} where an evaluation of the same branch held {before}, "
                    "so they cannot be compared; say how many branches the loop has"
                )


def _l1(values: Iterable[Tensor]) -> Tensor:
    # In float32 at least: sums over half precision would lose what is to be measured.
    norms = [torch.linalg.vector_norm(value, 1, dtype=_wide(value)) for value in values]
    return torch.stack(norms).sum().float()


def _difference(value: Tensor, kept: Tensor) -> Tensor:
    return value.to(_wide(value)) - kept.to(_wide(kept))


def _growth(values: Sequence[Tensor], kept: Sequence[Tensor]) -> Tensor:
    ratios = [
        (_vector_norms(value) / (_vector_norms(earlier) + _MAGCACHE_EPS)).flatten()
        for value, earlier in zip(values, kept, strict=True)
    ]
    return torch.cat(ratios).mean().float()


_MAGCACHE_EPS = 1e-8
"""What MagCache adds to the norm it divides by."""


def _vector_norms(value: Tensor) -> Tensor:
    return torch.linalg.vector_norm(value, dim=-1, dtype=_wide(value)) if value.dim() else value.abs()


def _wide(value: Tensor) -> torch.dtype:
    return torch.promote_types(value.dtype, torch.float32)


def _identity(denoiser: nn.Module) -> dict[str, object]:
    digest = hashlib.sha256()
    for name, weight in sorted(denoiser.state_dict().items()):
        digest.update(f"{name} {tuple(weight.shape)} {weight.dtype}".encode())
        digest.update(weight.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return {
        "class": type(denoiser).__name__,
        "num_parameters": sum(weight.numel() for weight in denoiser.parameters()),
        "sha256": digest.hexdigest(),
    }


def _from_document(document: Mapping[str, object], tensors: Mapping[str, Tensor]) -> Profile:
    check_header(document, "profile", FORMAT, VERSION, _KEYS)
    names, branches, loop, model = (document[key] for key in ("sites", "branches", "loop", "model"))
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise FileFormatError("sites wants a list of site names")
    if type(branches) is not int or not isinstance(loop, (dict, type(None))) or not isinstance(model, dict):
        raise FileFormatError("branches wants a number, loop and model want objects")
    evaluations, site_work = tensors["evaluation_work"], tensors["site_work"]
    if evaluations.dtype != torch.int64 or site_work.dtype != torch.int64 or evaluations.dim() != 1:
        raise FileFormatError("the multiply-adds of a profile want whole numbers, one an evaluation")
    sites = tuple(map(Site.parse, names))
    if site_work.shape != (len(sites), len(evaluations)):
        raise FileFormatError(f"site_work wants shape ({len(sites)}, {len(evaluations)}), got {tuple(site_work.shape)}")
    work = Work(tuple(evaluations.tolist()), dict(zip(sites, map(tuple, site_work.tolist()), strict=True)))
    return Profile(tensors["change"], tensors["size"], tensors["growth"], work, sites, branches, loop, model)


def _check(profile: Profile) -> None:
    statistics = {"change": profile.change, "size": profile.size, "growth": profile.growth}
    for name, tensor in statistics.items():
        if not isinstance(tensor, Tensor) or tensor.dtype != torch.float32:
            raise ProfileError(f"{name} wants a float32 tensor")
    if profile.change.dim() != 4 or 0 in profile.change.shape:
        raise ProfileError(f"change wants shape (runs, lags, evaluations, sites), got {tuple(profile.change.shape)}")
    num_runs, _, num_evaluations, num_sites = profile.change.shape
    wanted = (num_runs, num_evaluations, num_sites)
    for name in ("size", "growth"):
        if statistics[name].shape != wanted:
            raise ProfileError(f"{name} wants shape {wanted}, got {tuple(statistics[name].shape)}")
    if len(profile.sites) != num_sites or len(set(profile.sites)) != num_sites:
        raise ProfileError(f"a profile wants {num_sites} different sites, got {len(set(profile.sites))}")
    if num_evaluations * num_sites > MAX_CELLS:
        raise ProfileError(f"{num_evaluations} evaluations x {num_sites} sites are more than {MAX_CELLS} entries")
    if type(profile.branches) is not int or not 1 <= profile.branches <= num_evaluations:
        raise ProfileError(f"branches wants a number from 1 to {num_evaluations}, got {profile.branches!r}")
    for name, tensor in statistics.items():
        bad = ~(torch.isfinite(tensor) & (tensor >= 0))
        if bad.any():
            *_, e, s = bad.nonzero()[0].tolist()
            raise ProfileError(
                f"{name} of site {profile.sites[s]} at evaluation {e} wants a finite number from 0, got "
                f"{tensor[bad][0].item()}; check the model, its dtype and the inputs"
            )
    work = profile.work
    if len(work.evaluations) != num_evaluations or set(work.sites) != set(profile.sites):
        raise ProfileError("the multiply-adds of a profile want its evaluations and sites")
    if min(work.evaluations) < 0 or any(min(row) < 0 or len(row) != num_evaluations for row in work.sites.values()):
        raise ProfileError("the multiply-adds of a profile want numbers from 0, one an evaluation")
