"""Check, for each site that is reused, that what its source holds can stand for what its module would return."""

from __future__ import annotations

from l2c_compile.errors import ScheduleError, UnknownSiteError
from l2c_compile.graphs.site_results import SiteResult
from l2c_compile.graphs.skeleton import LoopSkeleton
from l2c_compile.schedules.schedule import CacheSchedule
from l2c_compile.schedules.sites import Site


def check_reused_sites(skeleton: LoopSkeleton, schedule: CacheSchedule) -> None:
    """Raise if a site is not called where it is reused or read, or would return other Python values.

    Args:
        skeleton: the traced loop, its evaluations as they were captured.
        schedule: the schedule, its patterns resolved, of as many evaluations.

    Raises:
        UnknownSiteError: if an evaluation does not call a site that it reuses, or that a later one reads from it.
        ScheduleError: if the results differ in their containers or in a Python value.
    """
    results = [call.graph.results for call in skeleton.calls]
    for (e, site), reuse in schedule.reuses.items():
        if schedule.active(e, site) is None:
            continue
        own = results[e].get(str(site))
        if own is None:
            raise UnknownSiteError(f"site '{site}', evaluation {e}: is reused, but {_not_called(site, e)}; compute it")
        for source in reuse.sources:
            held = results[source].get(str(site))
            if held is None:
                raise UnknownSiteError(
                    f"site '{site}', evaluation {e}: reuses evaluation {source}, but {_not_called(site, source)};"
                    " choose another source"
                )
            _check_fits(site, e, own, source, held, is_newest=source == reuse.sources[0])


def _not_called(site: Site, evaluation: int) -> str:
    return f"evaluation {evaluation} does not call it (call number {site.call} of module '{site.last or site.path}')"


def _check_fits(site: Site, e: int, own: SiteResult, source: int, held: SiteResult, *, is_newest: bool) -> None:
    what = f"site '{site}', evaluation {e}: reuses evaluation {source}, where its module returns"
    if not held.fits(own):
        raise ScheduleError(
            f"{what} {held}, and {own} where it is reused; choose a source that returns the same structure"
        )
    # A rule makes tensors. The reference takes all else from the newest source.
    differing = held.first_other_value(own) if is_newest else None
    if differing is not None:
        raise ScheduleError(
            f"{what} the Python value {differing[0]!r:.40} beside tensors, and {differing[1]!r:.40} where it is reused;"
            " a static graph keeps tensors only: let the module return a tensor, or choose a source with an equal value"
        )
