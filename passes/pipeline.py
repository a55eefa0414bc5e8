"""The order of the passes, one reason a line; start here."""

from __future__ import annotations

import torch

from l2c_compile.graphs.facts import Fact
from l2c_compile.passes.base import Numerics, Pipeline
from l2c_compile.passes.batch_conditioning import BatchConditioning
from l2c_compile.passes.contiguous_layout import ContiguousLayout
from l2c_compile.passes.drop_dead import DropDead
from l2c_compile.passes.drop_no_ops import DropNoOps
from l2c_compile.passes.drop_site_marks import DropSiteMarks
from l2c_compile.passes.fold_constants import FoldConstants
from l2c_compile.passes.fuse_cached_residuals import FuseCachedResiduals
from l2c_compile.passes.gate_at_source import GateAtSource
from l2c_compile.passes.lower_cache_reads import LowerCacheReads
from l2c_compile.passes.merge_common import MergeCommon
from l2c_compile.passes.merge_deltas import MergeDeltas
from l2c_compile.passes.mix_sites import MixSites
from l2c_compile.passes.outline_regions import OutlineRegions
from l2c_compile.passes.pack_caches import PackCaches
from l2c_compile.passes.pack_weights import PackWeights
from l2c_compile.passes.plan_memory import PlanMemory
from l2c_compile.passes.prune_projections import PruneProjections
from l2c_compile.passes.read_reused_sites import ReadReusedSites
from l2c_compile.passes.return_sites import ReturnSites

SKELETON = Pipeline(
    (
        DropNoOps(keep_returned=False),  # tracing copies what it passes to the denoiser
        MergeCommon(),  # evaluations that get the same value get the same node: unroll shares by node
        DropDead(),
    )
)
"""Runs on the loop without its evaluations, before they are put in."""

EVALUATION = Pipeline(
    (
        DropNoOps(),  # first: fewer nodes for everything after, here once instead of once an evaluation
        MergeCommon(),  # copies are gone, so equal computations look equal
        DropDead(),
    ),
    assumes=frozenset({Fact.SITES_MARKED}),
)
"""Runs on each evaluation graph before it is unrolled."""

_UNCACHED = frozenset({Fact.SITES_MARKED, Fact.READS_LOWERED})

OBSERVED = Pipeline(
    (
        DropNoOps(),
        MergeCommon(),
        ReturnSites(),  # while the marks still say where the sites are
        DropSiteMarks(),
        DropDead(),
    ),
    assumes=_UNCACHED,
)
"""Runs on a copy of an evaluation graph that is to fill the caches of a search for schedules."""

MIXED = Pipeline(
    (
        DropNoOps(),
        MergeCommon(),
        ReturnSites(),  # before the mixture: what is returned is what was computed
        MixSites(),
        DropDead(),  # the marks, which nobody reads any more
        DropSiteMarks(),  # those of the inputs
        DropDead(),
    ),
    assumes=_UNCACHED,
)
"""Runs on a copy of an evaluation graph that a search for schedules differentiates."""

LOOP = Pipeline(
    (
        ReadReusedSites(),  # first: it decides what is still needed
        DropDead(),  # right after: every later pass sees only live work
        LowerCacheReads(),  # the rules become arithmetic
        DropSiteMarks(),  # nothing cuts any more, so the marks only stand in the way
        DropNoOps(),  # the loop's own copies
        MergeCommon(),  # evaluations may turn out to share work once their differences are cut
        FoldConstants(),  # what is left over timesteps and weights only
        DropDead(),
        ContiguousLayout(),  # before anything is added that would have to follow the strides
        GateAtSource(),  # right before: gated outputs can be added up once they are products at their source
        MergeDeltas(),  # kept values are plain values by now, so a run of them is a run of additions
        DropDead(),  # the additions that were merged
        PruneProjections(),  # dead code is gone, so unused means unneeded; before batching, which groups by rows
        DropDead(),
        BatchConditioning(),
        MergeCommon(),  # every projection was given its own stack of equal inputs
        DropDead(),
        FuseCachedResiduals(),  # what is kept is final, and what a kernel reads can no longer be merged or moved
        DropDead(),
        PlanMemory(),  # last: what is kept from where to where is final, and only order is left to change
    ),
    assumes=frozenset({Fact.SITES_MARKED}),
)
"""Runs on the loop graph."""

KERNELS = Pipeline((PackWeights(),), assumes=frozenset({Fact.SITES_LOWERED, Fact.NO_DEAD_NODES}))
"""Runs on a copy of the finished loop graph, before ``REGIONS``: changes that only suit the processor at hand."""

REGIONS = Pipeline(
    (OutlineRegions(),),  # last of all: nothing looks into a region any more
    assumes=frozenset({Fact.SITES_LOWERED, Fact.NO_DEAD_NODES}),
)
"""Runs on a copy of the finished loop graph, for backends that compile region by region."""

BITWISE = LOOP.within(Numerics.BITWISE)
"""The loop passes that change no bit."""

CACHE_FORMATS = {"int8": torch.int8, "fp8": torch.float8_e4m3fn}
"""How values can be kept for later evaluations, other than as they are."""


def with_packed_caches(passes: Pipeline, cache_format: str) -> Pipeline:
    """Return loop passes that pack what is kept as the last thing they do: only then it is known what that is."""
    return Pipeline((*passes.passes, PackCaches(CACHE_FORMATS[cache_format])), passes.assumes)
