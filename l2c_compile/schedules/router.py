"""Routers, which are learned scores that a threshold turns into a schedule.

Learning-to-Cache (arXiv 2406.01733, section 3.3) learns one number in (0, 1) for each evaluation and site; a site is
computed where its number exceeds a threshold. Rows are in execution order, whatever the order of the original file.

Shapes: E evaluations, S sites. scores_ES is float32.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from l2c_compile.errors import FileFormatError, ScheduleError
from l2c_compile.files.documents import MAX_JSON_BYTES, check_header, frozen_json, honoured, plain_json
from l2c_compile.files.tensors import read_tensors, write_tensors
from l2c_compile.schedules.schedule import MAX_CELLS, CacheSchedule
from l2c_compile.schedules.sites import Site, as_site

FORMAT = "l2c_compile.router"
VERSION = 1

_KEYS = frozenset({"format", "version", "orientation", "sites", "cacheable", "threshold", "branches", "loop", "info"})
# A file holds float32 scores, the metadata, and that metadata once more as an escaped string.
_MAX_FILE_BYTES = 4 * MAX_CELLS + 2 * MAX_JSON_BYTES


@dataclass(frozen=True, eq=False)
class Router:
    """Learned scores, and the threshold above which a site is computed; immutable, so never write to ``scores``.

    Raises:
        ScheduleError: if shapes, scores, sites, evaluations or the threshold do not fit together.
    """

    scores: Tensor
    """The scores, (E, S) float32 in [0, 1]; row e is evaluation e in execution order. It is a private copy on the CPU,
    without a gradient."""
    sites: tuple[Site, ...]
    """The sites that the columns score."""
    cacheable: tuple[int, ...]
    """The evaluations in which a site may be reused; in all others every site is computed, whatever its score."""
    threshold: float
    """The score above which a site is computed."""
    branches: int = 1
    """Number of branches, 2 for guidance in two separate calls; evaluations e with equal ``e % branches`` share
    caches."""
    loop: Mapping[str, object] | None = None
    """The JSON description of the loop that the router was learned for, read-only."""
    info: Mapping[str, object] = field(default_factory=dict)
    """Information on where the router comes from, read-only."""

    def __post_init__(self) -> None:
        set_field = object.__setattr__
        set_field(self, "sites", tuple(map(as_site, self.sites)))
        set_field(self, "cacheable", tuple(sorted(self.cacheable)))
        set_field(self, "loop", None if self.loop is None else frozen_json(self.loop, "loop"))
        set_field(self, "info", frozen_json(self.info, "info"))
        _check(self)
        set_field(self, "scores", self.scores.detach().to("cpu", copy=True).contiguous())

    @property
    def num_evaluations(self) -> int:
        """The number of evaluations, E."""
        return self.scores.shape[0]

    def schedule(self, threshold: float | None = None) -> CacheSchedule:
        """Return the schedule that computes a site where its score is above the threshold or reuse is not allowed.

        Args:
            threshold: the threshold in place of the router's own.

        Raises:
            ScheduleError: if a site would be reused before it was ever computed.
        """
        limit = self.threshold if threshold is None else _checked_threshold(threshold)
        # The scores are compared in float32, as the authors do.
        computed_ES = self.scores > limit
        always = torch.ones(self.num_evaluations, dtype=torch.bool)
        always[list(self.cacheable)] = False
        computed_ES |= always[:, None]
        rows = computed_ES.T.tolist()
        return CacheSchedule.from_table(
            dict(zip(self.sites, rows, strict=True)),
            branches=self.branches,
            cacheable=self.cacheable,
            loop=self.loop,
            info={**self.info, "threshold": limit},
        )

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Router):
            return NotImplemented
        return self._document() == other._document() and torch.equal(self.scores, other.scores)

    def __hash__(self) -> int:
        return hash((self.sites, self.cacheable, self.threshold, self.branches))

    def __repr__(self) -> str:
        return (
            f"Router({self.num_evaluations} evaluations x {len(self.sites)} sites, {len(self.cacheable)} cacheable, "
            f"threshold {self.threshold:g})"
        )

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the scores and versioned JSON metadata as a safetensors file, at once or not at all."""
        write_tensors(path, self._document(), {"scores": self.scores})

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Router:
        """Read a file that ``save`` wrote.

        Raises:
            FileFormatError: if the file is not of this form, is of a newer version, or its parts do not fit together.
            OSError: if the file cannot be read.
        """
        document, tensors = read_tensors(path, "router", names=("scores",), max_bytes=_MAX_FILE_BYTES)
        with honoured("router"):
            return cls._from_document(document, tensors["scores"])

    def _document(self) -> dict[str, object]:
        return {
            "format": FORMAT,
            "version": VERSION,
            "orientation": "execution",
            "sites": list(map(str, self.sites)),
            "cacheable": list(self.cacheable),
            "threshold": self.threshold,
            "branches": self.branches,
            "loop": plain_json(self.loop),
            "info": plain_json(self.info),
        }

    @classmethod
    def _from_document(cls, document: Mapping[str, object], scores: Tensor) -> Router:
        check_header(document, "router", FORMAT, VERSION, _KEYS)
        sites, cacheable, threshold = document["sites"], document["cacheable"], document["threshold"]
        branches, loop, info = document["branches"], document["loop"], document["info"]
        if not isinstance(sites, list) or not all(isinstance(site, str) for site in sites):
            raise FileFormatError("sites wants a list of site names")
        if not isinstance(cacheable, list) or not all(type(e) is int for e in cacheable):
            raise FileFormatError("cacheable wants a list of evaluations")
        if not isinstance(threshold, (int, float)) or type(branches) is not int:
            raise FileFormatError("threshold and branches want numbers")
        if not isinstance(loop, (dict, type(None))) or not isinstance(info, dict):
            raise FileFormatError("loop and info want objects")
        return cls(scores, tuple(map(Site.parse, sites)), tuple(cacheable), threshold, branches, loop, info)


def schedule_of(router: object, threshold: float | None = None) -> CacheSchedule:
    """Return the schedule that a ``Router`` or ``CacheSchedule`` stands for.

    Raises:
        ScheduleError: if ``router`` is neither, or is a schedule and a threshold is given.
    """
    if isinstance(router, Router):
        return router.schedule(threshold)
    if not isinstance(router, CacheSchedule):
        raise ScheduleError(
            f"l2c_compile wants a Router or a CacheSchedule, got {type(router).__name__};"
            " load_schedule_file reads one from a file"
        )
    if threshold is not None:
        raise ScheduleError("a schedule has no scores for a threshold to cut; give the router it came from")
    return router


def _check(router: Router) -> None:
    scores, sites = router.scores, router.sites
    if not isinstance(scores, Tensor) or scores.dtype != torch.float32 or scores.layout != torch.strided:
        got = f"{scores.dtype} tensor" if isinstance(scores, Tensor) else type(scores).__name__
        raise ScheduleError(f"scores wants a float32 tensor, got a {got}")
    if scores.dim() != 2 or scores.shape[1] != len(sites) or not 1 <= scores.numel() <= MAX_CELLS:
        raise ScheduleError(
            f"scores wants shape (evaluations, {len(sites)} sites), 1 to {MAX_CELLS} entries, got {tuple(scores.shape)}"
        )
    bad_ES = ~((scores >= 0) & (scores <= 1))
    if bad_ES.any():
        e, column = bad_ES.nonzero()[0].tolist()
        raise ScheduleError(
            f"site {sites[column]} at evaluation {e} wants a score in [0, 1], got {scores[e, column].item()}; "
            "logits go through a sigmoid first"
        )
    if len(set(sites)) != len(sites):
        raise ScheduleError("a site occurs twice among the sites of the router")
    num_evaluations = scores.shape[0]
    for e in router.cacheable:
        if type(e) is not int or not 0 <= e < num_evaluations:
            raise ScheduleError(f"cacheable names evaluation {e!r}; the router has 0..{num_evaluations - 1}")
    if len(set(router.cacheable)) != len(router.cacheable):
        raise ScheduleError("cacheable names an evaluation twice")
    if type(router.branches) is not int or not 1 <= router.branches <= num_evaluations:
        raise ScheduleError(f"branches wants a number from 1 to {num_evaluations}, got {router.branches!r}")
    _checked_threshold(router.threshold)


def _checked_threshold(threshold: float) -> float:
    if isinstance(threshold, bool) or not isinstance(threshold, (int, float)) or not math.isfinite(threshold):
        raise ScheduleError(f"threshold wants a number in [0, 1], got {threshold!r}")
    if not 0 <= threshold <= 1:
        raise ScheduleError(f"threshold wants a number in [0, 1], got {threshold}; scores lie in [0, 1]")
    return threshold
