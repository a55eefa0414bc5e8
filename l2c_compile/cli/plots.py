"""Pictures of schedules and routers: evaluations from left to right, sites from top to bottom.

The terminal map needs rich only; a PNG needs matplotlib, and takes the place of an older one when it is complete.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from rich.console import Console
from rich.text import Text

from l2c_compile.errors import L2CError
from l2c_compile.files.documents import replaced_at_once
from l2c_compile.finders import Profile
from l2c_compile.schedules.router import Router
from l2c_compile.schedules.schedule import CacheSchedule
from l2c_compile.schedules.sites import Site

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

HIDDEN = -1
"""The age of a site that has no value in an evaluation, because a site over it is reused."""

_LEGEND = "# computed   1-9 reused, that many evaluations old (+ is more)   . part of a reused site"

_MAX_LABELS = 60


class PlotError(L2CError, RuntimeError):
    """A picture that cannot be drawn here."""


def source_ages(schedule: CacheSchedule) -> list[list[int]]:
    """Return a row for each site: 0 computed, n > 0 reused from n evaluations before, ``HIDDEN`` neither."""
    return [[_age(schedule, e, index) for e in range(schedule.num_evaluations)] for index in range(len(schedule.sites))]


def show_heat_map(schedule: CacheSchedule) -> None:
    """Print the map of a schedule, and what its characters mean."""
    console = Console()
    for line in terminal_heat_map(schedule, width=console.width):
        console.print(line, no_wrap=True, overflow="ignore", crop=False)
    console.print(Text(_LEGEND, style="dim"), soft_wrap=True)


def terminal_heat_map(schedule: CacheSchedule, *, width: int = 120) -> Iterator[Text]:
    """Yield the lines of a map of the schedule, each at most ``width`` wide if that leaves room for the site names.

    The map is readable without colours. Loops of more evaluations than fit are continued below.
    """
    names = list(map(str, schedule.sites))
    shares = list(schedule.computed_share_per_site().values())
    ages = source_ages(schedule)
    margin = max(map(len, names), default=0)
    # Two spaces on either side of the map, and the share: " 100%".
    num_columns = max(10, width - margin - 8)
    for first in range(0, schedule.num_evaluations, num_columns):
        last = min(first + num_columns, schedule.num_evaluations)
        yield Text(" " * (margin + 2) + _ruler(first, last), style="dim")
        for name, row, share in zip(names, ages, shares, strict=True):
            line = Text(f"{name:<{margin}}  ")
            for age in row[first:last]:
                line.append(*_cell(age))
            yield line.append(f"  {share:4.0%}")


def save_heat_map(schedule: CacheSchedule, path: str | os.PathLike[str], *, router: Router | None = None) -> None:
    """Write a PNG of the schedule, and of the scores of the router it comes from if there is one.

    Raises:
        PlotError: if matplotlib is not installed, or there are no sites to draw.
        OSError: if the file cannot be written.
    """
    if not schedule.sites:
        raise PlotError("a picture wants at least one site, the schedule has none")
    num_panels = 1 if router is None else 2
    figure = new_figure(8.0 * num_panels, _height(len(schedule.sites)))
    panels = figure.subplots(1, num_panels, squeeze=False)[0]
    _draw_ages(figure, panels[0], schedule)
    if router is not None:
        _draw_scores(figure, panels[1], router)
    for axes in panels:
        _label(axes, schedule.sites)
    save_figure(figure, path)


def save_profile_plot(profile: Profile, path: str | os.PathLike[str]) -> None:
    """Write a PNG of a profile: relative change at lag 1 (over the later value) and magnitude ratio.

    Raises:
        PlotError: if matplotlib is not installed.
        OSError: if the file cannot be written.
    """
    import numpy as np

    figure = new_figure(16.0, _height(len(profile.sites)))
    change = profile.relative_change(1).T.numpy()
    growth = profile.growth.double().mean(0).T.numpy()
    # The first evaluation of each branch has no earlier one to be compared with.
    change[:, : profile.branches] = growth[:, : profile.branches] = np.nan
    furthest = float(np.nanmax(np.abs(growth - 1), initial=1e-3))
    panels = figure.subplots(1, 2, squeeze=False)[0]
    shown = (
        (change, "relative change (L1) from the evaluation before", {"cmap": "viridis", "vmin": 0.0}),
        (growth, "magnitude ratio", {"cmap": "RdBu_r", "vmin": 1 - furthest, "vmax": 1 + furthest}),
    )
    for axes, (values, title, colors) in zip(panels, shown, strict=True):
        axes.set_facecolor("0.85")
        image = axes.imshow(values, aspect="auto", interpolation="nearest", **colors)
        figure.colorbar(image, ax=axes)
        axes.set_title(title)
        _label(axes, profile.sites)
    save_figure(figure, path)


def save_figure(figure: Figure, path: str | os.PathLike[str]) -> None:
    """Write a figure as a PNG.

    Raises:
        OSError: if the file cannot be written.
    """
    with replaced_at_once(path) as temporary:
        figure.savefig(temporary, format="png", dpi=120)


def new_figure(width: float, height: float) -> Figure:
    """Return an empty figure of that size in inches.

    Raises:
        PlotError: if matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError as error:
        raise PlotError("pictures want matplotlib, which is not installed; pip install matplotlib") from error
    return Figure(figsize=(width, height), layout="constrained")


def _height(num_sites: int) -> float:
    return min(20.0, max(3.0, 1.5 + 0.16 * num_sites))


def _label(axes: Axes, sites: Sequence[Site]) -> None:
    from matplotlib.ticker import MaxNLocator

    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_xlabel("evaluation, in execution order")
    stride = -(-len(sites) // _MAX_LABELS)
    ticks = range(0, len(sites), stride)
    axes.set_yticks(ticks, [str(sites[index]) for index in ticks], fontsize=6)


def _age(schedule: CacheSchedule, e: int, index: int) -> int:
    site = schedule.sites[index]
    if schedule.computes(e, site):
        return 0
    entry = schedule.active(e, site)
    return HIDDEN if entry is None else e - entry.sources[0]


def _draw_ages(figure: Figure, axes: Axes, schedule: CacheSchedule) -> None:
    import matplotlib
    import numpy as np
    from matplotlib.colors import ListedColormap

    ages = np.array(source_ages(schedule), dtype=np.float32).reshape(len(schedule.sites), schedule.num_evaluations)
    oldest = max(1, int(ages.max(initial=1)))
    reused = matplotlib.colormaps["YlOrRd"](np.linspace(0.25, 0.95, oldest))
    # Grey where there is no value, dark blue where it is computed, then the older the redder.
    colors = ListedColormap([(0.85, 0.85, 0.85, 1.0), (0.10, 0.20, 0.40, 1.0), *map(tuple, reused)])
    image = axes.imshow(ages, cmap=colors, vmin=-1.5, vmax=oldest + 0.5, aspect="auto", interpolation="nearest")
    bar = figure.colorbar(image, ax=axes)
    shown = sorted({1, oldest, *range(5, oldest, 5)})
    bar.set_ticks([-1, 0, *shown], labels=["no value", "computed", *(f"age {age}" for age in shown)])
    axes.set_title(f"{schedule.computed_share():.1%} computed")


def _draw_scores(figure: Figure, axes: Axes, router: Router) -> None:
    import numpy as np

    scores = np.full((len(router.sites), router.num_evaluations), np.nan, dtype=np.float32)
    cacheable = list(router.cacheable)
    scores[:, cacheable] = router.scores[cacheable].numpy().T
    axes.set_facecolor("0.85")
    image = axes.imshow(scores, cmap="viridis", vmin=0.0, vmax=1.0, aspect="auto", interpolation="nearest")
    figure.colorbar(image, ax=axes)
    axes.set_title(f"scores where reuse is allowed; computed above {router.threshold:g}")


def _cell(age: int) -> tuple[str, str]:
    """Return the character of a cell and its style."""
    if age == HIDDEN:
        return ".", "dim"
    if age == 0:
        return "#", "bold blue"
    style = "yellow" if age == 1 else "dark_orange" if age <= 4 else "red"
    return (str(age) if age <= 9 else "+"), style


def _ruler(first: int, last: int) -> str:
    """Return the evaluation numbers over their columns, at the start and at every tenth."""
    line = ""
    for e in range(first, last):
        # A number may not touch the one before it.
        if (e == first or e % 10 == 0) and (not line or len(line) < e - first):
            line = line.ljust(e - first) + str(e)
    return line
