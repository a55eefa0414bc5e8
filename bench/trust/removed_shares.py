"""Recompute what the published routers remove, and whether SmoothCache's copy of one agrees with the original.

``ARGS``: the folder with the files; by default ``routers`` in ``../shared`` beside the checkout (or ``$L2C_SHARED``).
The numbers are facts of the files, so any other value means that an importer reads them wrongly.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rich.progress import Progress

from bench.cases import BenchError
from bench.options import Options
from bench.report import Row
from bench.workloads import routers_folder
from l2c_compile.schedules.importers import import_l2c_dit, import_smoothcache, load_schedule_file
from l2c_compile.schedules.router import Router

_ROUTERS = ("l2c_DDIM20_router.pt", "l2c_DDIM50_router.pt", "l2c_dpm20_router.pth", "l2c_dpm50_router.pth")
_ORIGINAL, _COPY = "l2c_DDIM50_router.pt", "smoothcache_50-N-2-l2c.json"


def run(args: Sequence[str], progress: Progress) -> list[Row]:
    """Return the removed share of every router in percent, and the number of entries in which the copy agrees.

    Raises:
        BenchError: if there is more than one argument, or a file is missing.
    """
    parser = Options("removed-shares")
    parser.add_argument("folder", type=Path, nargs="?", default=routers_folder())
    folder = parser.read(args).folder
    for name in (*_ROUTERS, _COPY):
        if not (folder / name).is_file():
            raise BenchError(f"removed-shares wants {name} in {folder}; name the folder of the published files")
    task = progress.add_task("routers", total=len(_ROUTERS) + 1)
    rows = []
    for name in _ROUTERS:
        rows.append(_removed(folder / name))
        progress.advance(task)
    rows.append(_agreement(folder))
    progress.advance(task)
    return rows


def _removed(path: Path) -> Row:
    router = load_schedule_file(path)
    assert isinstance(router, Router)
    share = router.schedule().removed_share()
    return Row("removed_percent", 100 * share, "%", {"router": path.stem, "threshold": router.threshold})


def _agreement(folder: Path) -> Row:
    original = import_l2c_dit(folder / _ORIGINAL).schedule()
    copied = import_smoothcache(folder / _COPY)
    agreeing = sum(
        ours == theirs
        for site in original.sites
        for ours, theirs in zip(original.row(site), copied.row(site), strict=True)
    )
    return Row("smoothcache_agreement", agreeing, "entries", {"router": Path(_ORIGINAL).stem})
