"""``l2c demo``: the trained digits model with and without caching, in the eager loop and compiled.

Shapes: B batch, C channels, H height, W width.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Annotated, Literal

import torch
import typer
from rich.table import Table
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from l2c_compile import CacheSchedule, CompiledSampler, Router, l2c_compile, run_reference
from l2c_compile.backends.options import EAGER
from l2c_compile.cli.files import output_path
from l2c_compile.cli.options import Force
from l2c_compile.cli.plots import new_figure, save_figure
from l2c_compile.cli.terminal import bar, say, show
from l2c_compile.loops import DDIM, BuiltInLoop, Guidance
from l2c_compile.methods import uniform_interval
from l2c_compile.models.digits import GUIDANCE_SCALE, load_digit_classifier, load_digits_dit
from l2c_compile.models.named import tolerance

_NUM_CLASSES = 10
_LABELS_B = torch.arange(_NUM_CLASSES)
_MAX_SHOWN = 3


@dataclass
class Side:
    """One way to run the loop, and what came of it."""

    caching: str
    how: str
    sample: Callable[[Tensor], Tensor]
    """Takes noise, shape (B, C, H, W), one sample a class; returns images in [-1, 1] of the same shape."""
    multiply_adds: int = 0
    """Multiply-adds of one run."""
    times_s: list[float] = field(default_factory=list)
    images: list[Tensor] = field(default_factory=list)
    """The images that each run returned."""

    @property
    def median_s(self) -> float:
        """The median time of a run."""
        return statistics.median(self.times_s)


def learned_router(num_evaluations: int) -> Router | None:
    """Return the packaged router for the digits model and a DDIM of that many evaluations, or None if there is none.

    Its ``info`` holds the command that learned it.

    Raises:
        FileFormatError: if the installed file is damaged.
    """
    file = resources.files("l2c_compile") / "data" / f"digits_router_{num_evaluations}.safetensors"
    if not file.is_file():
        return None
    with resources.as_file(file) as path:
        return Router.load(path)


@torch.no_grad()
def command(
    out: Annotated[Path, typer.Option(metavar="DIR", file_okay=False, help="Where the picture goes.")] = Path(
        "out/demo"
    ),
    steps: Annotated[Literal["20", "50"], typer.Option(help="DDIM steps; each is one evaluation of the model.")] = "20",
    per_class: Annotated[
        int, typer.Option(metavar="N", min=1, help="Samples of each digit, and timed runs of each side.")
    ] = 10,
    backend: Annotated[
        str,
        typer.Option(metavar="NAME", help="What runs the static graphs: eager, aot_eager, inductor (slow to compile)."),
    ] = EAGER,
    force: Force = False,
) -> None:
    """Draw digits with a trained model, with and without caching, eagerly and compiled; compare time and pictures.

    Exits with 1 if a static graph differs from the eager loop by more than rounding.
    """
    out.mkdir(parents=True, exist_ok=True)
    picture = output_path(out / "digits.png", ".png", force=force)
    model = load_digits_dit()
    loop = DDIM(steps=int(steps), guidance=Guidance(GUIDANCE_SCALE, null={"y": _NUM_CLASSES}))
    router = learned_router(loop.steps)
    odd_reuse = uniform_interval(loop.steps, ("blocks.*.attn", "blocks.*.mlp"), 2)
    schedule = (odd_reuse if router is None else router.schedule()).resolve([path for path, _ in model.named_modules()])
    all_compute = CacheSchedule.all_compute(loop.steps, schedule.sites)
    num_millions = sum(weight.numel() for weight in model.parameters()) / 1e6
    say(f"DiT of {num_millions:.1f} M parameters; DDIM, {steps} evaluations, guidance {GUIDANCE_SCALE:g}")
    say(f"schedule: {_described(router)}")

    with bar("compile") as update:

        def on_stage(what: str) -> None:
            update(description=what)

        uncached = l2c_compile(model, all_compute, loop, backend=backend, progress=on_stage)
        cached = l2c_compile(model, schedule, loop, backend=backend, progress=on_stage)
        start_s = time.perf_counter()
        cached.capture(_noise(0), y=_LABELS_B)
        graph_s = time.perf_counter() - start_s
        sides = _sides(model, loop, schedule, uncached, cached)
        _warm_up(sides, on_stage)
        update(description="sample", total=per_class * len(sides))
        _sample_in_turn(sides, per_class, on_run=lambda: update(advance=1))

    sides[1].multiply_adds = uncached.summary().multiply_adds
    sides[3].multiply_adds = cached.summary().multiply_adds
    say(f"\n{_NUM_CLASSES} digits a run, float32, CPU, {torch.get_num_threads()} threads, backend {backend};")
    say(f"median of {per_class} runs in turn; ratio to the first row; errors against the eager loop above it\n")
    show(_table(sides))
    num_nodes = len(cached.graph_module.graph.nodes)
    say(f"\nthe cached loop as one static graph: {num_nodes} nodes, made in {graph_s:.1f} s;")
    for total in cached.summary().in_short().split("; "):
        say(f"  {total}")
    change = float((torch.cat(sides[3].images) - torch.cat(sides[1].images)).abs().mean())
    say(f"caching moves a pixel by {change:.3f} on average, on a scale from -1 to 1")
    save_digit_grid(picture, sides[1].images, sides[3].images, schedule)
    say(f"picture written to {picture}")
    if not _agree(sides, (uncached, cached), loop.steps):
        raise typer.Exit(1)


def save_digit_grid(path: Path, uncached: Sequence[Tensor], cached: Sequence[Tensor], schedule: CacheSchedule) -> None:
    """Write a PNG: uncached samples above, cached ones of equal noise below, one column a class.

    Args:
        path: the file to write.
        uncached: samples without caching, one tensor a run, shape (10, 1, 8, 8), in [-1, 1].
        cached: samples with caching, in the same form.
        schedule: the schedule of the cached samples, for the titles.
    """
    num_shown = min(_MAX_SHOWN, len(uncached))
    figure = new_figure(7.0, 1.4 + 1.4 * num_shown)
    figure.set_layout_engine("constrained", h_pad=0.12)
    figure.suptitle(f"Digits drawn by a diffusion transformer in {schedule.num_evaluations} evaluations", fontsize=13)
    titles = (
        "without caching: all of them compute every block",
        f"with caching, same noise: {1 - schedule.computed_share():.0%} of what the blocks give is reused",
    )
    for axes, images, title in zip(figure.subplots(2, 1), (uncached, cached), titles, strict=True):
        mosaic_HW = _mosaic(images[:num_shown])
        axes.imshow(mosaic_HW.numpy(), cmap="gray_r", vmin=-1.0, vmax=1.0, interpolation="nearest")
        axes.set_title(title, fontsize=10)
        axes.set_xticks([10 * label + 4.5 for label in range(_NUM_CLASSES)], list(map(str, range(_NUM_CLASSES))))
        axes.set_yticks([])
        axes.tick_params(length=0)
        axes.spines[:].set_visible(False)
    axes.set_xlabel("digit asked for")
    save_figure(figure, path)


def _described(router: Router | None) -> str:
    if router is None:
        return "odd evaluations reuse every attn and mlp output; fixed in advance, no learned router"
    return (
        f"a learned router; odd evaluations compute {1 - router.schedule().removed_share():.0%} of the attn and mlp"
        " outputs and reuse the others"
    )


def _sides(
    model: nn.Module, loop: BuiltInLoop, schedule: CacheSchedule, uncached: CompiledSampler, cached: CompiledSampler
) -> list[Side]:
    def hooks(noise: Tensor) -> Tensor:
        images = run_reference(model, loop, schedule, noise, {"y": _LABELS_B})
        assert isinstance(images, Tensor)
        return images

    return [
        Side("uncached", "eager", lambda noise: loop(model, noise, y=_LABELS_B)),
        Side("uncached", "compiled", lambda noise: uncached(noise, y=_LABELS_B)),
        Side("cached", "eager, hooks", hooks),
        Side("cached", "compiled", lambda noise: cached(noise, y=_LABELS_B)),
    ]


def _warm_up(sides: Sequence[Side], on_stage: Callable[[str], None]) -> None:
    """Run every side once: compile what is compiled, count the multiply-adds of the eager ones."""
    for side in sides:
        on_stage(f"first run: {side.caching}, {side.how}")
        if side.how == "compiled":
            side.sample(_noise(0))
            continue
        with FlopCounterMode(display=False) as counter:
            side.sample(_noise(0))
        side.multiply_adds = int(counter.get_total_flops()) // 2


def _sample_in_turn(sides: Sequence[Side], num_runs: int, on_run: Callable[[], None]) -> None:
    """Run all sides on equal noise, each run one side later than the one before, so that none is always first."""
    for run in range(num_runs):
        first = run % len(sides)
        for side in [*sides[first:], *sides[:first]]:
            start_s = time.perf_counter()
            images = side.sample(_noise(run))
            side.times_s.append(time.perf_counter() - start_s)
            side.images.append(images)
            on_run()


def _table(sides: Sequence[Side]) -> Table:
    classifier = load_digit_classifier()
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for heading in ("caching", "loop"):
        table.add_column(heading, no_wrap=True)
    for heading in ("time", "ratio", "multiply-\nadds kept", "max\nerror", "relative\nerror", "drawn\nas asked"):
        table.add_column(heading, justify="right", vertical="bottom", no_wrap=True)
    eager = sides[0]
    for side, reference in zip(sides, (None, sides[0], None, sides[2]), strict=True):
        drawn = classifier(torch.cat(side.images)).argmax(dim=1)
        num_right = int((drawn == _LABELS_B.repeat(len(side.images))).sum())
        table.add_row(
            side.caching,
            side.how,
            f"{side.median_s * 1e3:.0f} ms",
            f"{side.median_s / eager.median_s:.2f}",
            f"{side.multiply_adds / eager.multiply_adds:.1%}",
            *(("-", "-") if reference is None else [f"{error:.1g}" for error in _errors(side, reference)]),
            f"{num_right}/{len(drawn)}",
        )
    return table


def _errors(side: Side, reference: Side) -> tuple[float, float]:
    """Return max |side - reference|, and that over max |reference|, over all runs."""
    got, wanted = torch.cat(side.images), torch.cat(reference.images)
    max_error = float((got - wanted).abs().max())
    return max_error, max_error / float(wanted.abs().max())


def _agree(sides: Sequence[Side], samplers: tuple[CompiledSampler, CompiledSampler], steps: int) -> bool:
    """Return whether both static graphs are within the tolerance; print where one is not."""
    allowed = tolerance(steps)
    agree = True
    for side, reference, sampler in zip((sides[1], sides[3]), (sides[0], sides[2]), samplers, strict=True):
        _, relative = _errors(side, reference)
        # Not `>`: an error that is not a number is no agreement.
        if not relative <= allowed:
            agree = False
            report = sampler.verify(_noise(0), y=_LABELS_B)
            say(f"{side.caching} static graph: relative error {relative:.1e} is above {allowed:.1e}; {report}")
    if agree:
        say(f"both static graphs agree with the eager loops (relative error at most {allowed:.1e} allowed)")
    return agree


def _mosaic(images: Sequence[Tensor]) -> Tensor:
    """Return one picture: a row for each tensor of images, a column for each image, white lines between."""
    framed = [torch.nn.functional.pad(batch[:, 0].clamp(-1.0, 1.0), (1, 1, 1, 1), value=-1.0) for batch in images]
    return torch.cat([torch.cat(list(batch), dim=1) for batch in framed], dim=0)


def _noise(run: int) -> Tensor:
    """Return standard normal noise, one sample a class; equal for equal runs."""
    return torch.randn(_NUM_CLASSES, 1, 8, 8, generator=torch.Generator().manual_seed(run))
