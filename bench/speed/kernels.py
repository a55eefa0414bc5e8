"""Time the kernels against a copy, eager torch and Inductor: share of the memory bandwidth reached.

``python -m bench kernels --device cuda``, all cases or those that ``--cases`` names. A kernel that reads and writes n
bytes is held against a device-to-device copy that moves as many in the same rounds: ``share_of_copy`` is the copy's
time over the kernel's.
``over_inductor`` and ``over_eager`` say how many times longer the same expression takes there.

On CUDA each side is a CUDA graph over several sets of tensors, which together are larger than the L2 cache, so that
neither Python nor cached data is in the figures. ``--device cpu`` runs tiny shapes to see that the script works, with
aot_eager in the place of Inductor; its figures mean nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import torch
from rich.progress import Progress
from torch import Tensor

from bench.cases import BenchError
from bench.measure import compare, ratio, synchronizer
from bench.options import Options
from bench.report import Condition, Row
from l2c_compile.errors import nearest
from l2c_compile.kernels.cached_residual import cached_residual
from l2c_compile.kernels.cached_residual_norm import cached_residual_norm
from l2c_compile.kernels.packed_cache import pack_cache

Result: TypeAlias = "Tensor | tuple[Tensor, ...]"
Function: TypeAlias = Callable[..., Result]

ROTATION_BYTES = 512 * 2**20
"""The least size of all sets of tensors of one side together: ten times the L2 cache of an H100."""


@dataclass(frozen=True)
class Case:
    """One expression over one stream."""

    model: str
    """The model that the shape is from."""
    shape: tuple[int, int, int]
    """The sizes: batch, tokens, channels."""
    terms: int
    """The number of cached terms."""
    kernel: str = "cached_residual"
    """The op; ``packed`` is cached_residual over fp8 caches."""
    dtype: torch.dtype = torch.bfloat16
    """The dtype of the stream, the caches and the gates."""

    @property
    def name(self) -> str:
        """The name of the case for ``--cases``."""
        return f"{self.kernel}:{'x'.join(map(str, self.shape))}:{self.terms}"

    def conditions(self) -> dict[str, Condition]:
        """Return the conditions of its rows."""
        batch, tokens, dim = self.shape
        named: dict[str, Condition] = {"kernel": self.kernel, "model": self.model, "batch": batch, "tokens": tokens}
        return {**named, "dim": dim, "terms": self.terms, "dtype": str(self.dtype).removeprefix("torch.")}


DIT = tuple(
    Case("DiT-XL/2", (batch, 256, 1152), terms, kernel)
    for batch in (2, 16, 64)
    for kernel, counts in (
        ("cached_residual", (1, 2, 7, 28, 56)),
        ("cached_residual_norm", (1, 7, 56)),
        ("packed", (28,)),
    )
    for terms in counts
)
VIDEO = tuple(
    Case("video", (1, 75_000, 5120), terms, kernel)
    for kernel, counts in (("cached_residual", (1, 4)), ("cached_residual_norm", (1,)), ("packed", (4,)))
    for terms in counts
)
SMOKE = tuple(
    Case("smoke", (2, 4, 16), 2, kernel, torch.float32)
    for kernel in ("cached_residual", "cached_residual_norm", "packed")
)


@dataclass(frozen=True)
class Inputs:
    """One set of tensors."""

    x: Tensor
    caches: list[Tensor]
    gates: list[Tensor]
    token_scales: list[Tensor]
    shift: Tensor
    scale: Tensor

    def num_bytes(self, num_outputs: int) -> int:
        """Return what an op must move at least: every operand once, and its outputs."""
        operands = (
            self.x,
            *self.caches,
            *self.gates,
            *self.token_scales,
            *(self.shift, self.scale)[: num_outputs * 2 - 2],
        )
        return sum(map(_num_bytes, operands)) + num_outputs * _num_bytes(self.x)


def run(args: Sequence[str], progress: Progress) -> list[Row]:
    """Time the cases on one device."""
    parser = Options("kernels")
    parser.add_device("cpu", "cuda", required=True)
    parser.add_argument("--cases", nargs="+", metavar="CASE")
    options = parser.read(args)
    known = {case.name: case for case in (SMOKE if options.device == "cpu" else (*DIT, *VIDEO))}
    for name in options.cases or ():
        if name not in known:
            raise BenchError(f"kernels has no case {name!r} there; {nearest(name, known) or ', '.join(known)}")
    cases = [known[name] for name in options.cases or known]
    rounds = 3 if options.device == "cpu" else 20
    task = progress.add_task(f"kernels on {options.device}", total=len(cases) * rounds)
    rows: list[Row] = []
    with torch.inference_mode():
        for case in cases:
            rows += _time_case(case, options.device, rounds, lambda: progress.advance(task))
    return rows


def _time_case(case: Case, device: str, rounds: int, on_round: Callable[[], None]) -> Iterator[Row]:
    """Yield the rows of one expression: the sides' times, the bandwidth, the ratios."""
    torch.manual_seed(0)
    num_outputs = 2 if case.kernel == "cached_residual_norm" else 1
    sets = [_draw(case, device)]
    num_bytes = sets[0].num_bytes(num_outputs)
    count = 1 if device == "cpu" else max(1, -(-ROTATION_BYTES // num_bytes))
    sets += [_draw(case, device) for _ in range(count - 1)]
    # A copy of n bytes moves 2 n.
    sources = [torch.ones(num_bytes // 2, dtype=torch.uint8, device=device) for _ in sets]
    targets = [torch.empty_like(source) for source in sources]

    # Each case is another expression to compile, not a recompilation of the last.
    torch.compiler.reset()
    backend = "aot_eager" if device == "cpu" else "inductor"
    compiled = torch.compile(_expression(case), dynamic=False, backend=backend)
    ours, eager = _op(case), _expression(case)
    _check_same(ours(sets[0]), eager(sets[0]), case)
    sides = {
        "kernel": lambda: [ours(inputs) for inputs in sets],
        backend: lambda: [compiled(inputs) for inputs in sets],
        "eager": lambda: [eager(inputs) for inputs in sets],
        "copy": lambda: [target.copy_(source) for target, source in zip(targets, sources, strict=True)],
    }
    timings = compare(
        {name: _replayed(side, device) for name, side in sides.items()},
        rounds=rounds,
        sync=synchronizer(device),
        on_round=on_round,
    )
    conditions = {**case.conditions(), "sets": count}
    for name, timing in timings.items():
        yield Row.timed(name, timing, conditions, device=device)
    bytes_a_second = num_bytes * count / (timings["kernel"].median_ms / 1e3)
    yield Row("kernel_gigabytes_a_second", bytes_a_second / 1e9, "GB/s", conditions, device=device)
    for metric, side in (("share_of_copy", "copy"), (f"over_{backend}", backend), ("over_eager", "eager")):
        yield Row.ratio(metric, ratio(timings[side], timings["kernel"]), conditions, device=device)


def _replayed(side: Callable[[], object], device: str) -> Callable[[], object]:
    """Return a function that replays a side as a CUDA graph; on a CPU the side itself."""
    if device == "cpu":
        return side
    stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        # These runs compile, and let allocators and libraries settle, none of which a capture may contain.
        for _ in range(2):
            side()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        side()
    return graph.replay


def _draw(case: Case, device: str) -> Inputs:
    batch, tokens, dim = case.shape

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, device=device, dtype=case.dtype)

    # As in a DiT: shift, scale and gate are chunks of one projection.
    projections = [normal(batch, 6 * dim).chunk(6, dim=1) for _ in range(max(case.terms, 1))]
    caches = [normal(batch, tokens, dim) for _ in range(case.terms)]
    token_scales: list[Tensor] = []
    if case.kernel == "packed":
        packed = [pack_cache(cache, torch.float8_e4m3fn) for cache in caches]
        caches, token_scales = [q for q, _ in packed], [scale for _, scale in packed]
    shift, scale = projections[0][:2]
    return Inputs(normal(batch, tokens, dim), caches, [chunks[2] for chunks in projections], token_scales, shift, scale)


def _op(case: Case) -> Callable[[Inputs], Result]:
    """Return our op."""
    if case.kernel == "cached_residual_norm":
        return lambda inputs: cached_residual_norm(
            inputs.x, inputs.caches, inputs.gates, mod_scale=inputs.scale, mod_shift=inputs.shift
        )
    return lambda inputs: cached_residual(
        inputs.x, inputs.caches, inputs.gates, token_scales=inputs.token_scales or None
    )


def _expression(case: Case) -> Callable[[Inputs], Result]:
    """Return the expression as a model writes it."""

    def expression(inputs: Inputs) -> Result:
        x = inputs.x
        for index, (cache, gate) in enumerate(zip(inputs.caches, inputs.gates, strict=True)):
            value = cache
            if inputs.token_scales:
                value = (cache.float() * inputs.token_scales[index].unsqueeze(-1)).to(x.dtype)
            x = x + gate.unsqueeze(1) * value
        if case.kernel != "cached_residual_norm":
            return x
        normed = torch.nn.functional.layer_norm(x, x.shape[-1:], eps=1e-6)
        return x, normed * (1 + inputs.scale.unsqueeze(1)) + inputs.shift.unsqueeze(1)

    return expression


def _check_same(got: Result, wanted: Result, case: Case) -> None:
    # Eager torch rounds twice a term, so its own error is the larger: half an eps for each of 2 * terms + 8 roundings.
    eps = torch.finfo(case.dtype).eps * (case.terms + 4)
    for a, b in zip(_flat(got), _flat(wanted), strict=True):
        off = (a.float() - b.float()).abs().max() / b.float().abs().max()
        if not off <= eps:
            raise BenchError(
                f"{case.kernel} with {case.terms} terms is off by {off:.3g} of the largest value, not timed"
            )


def _flat(result: Result) -> tuple[Tensor, ...]:
    return (result,) if isinstance(result, Tensor) else result


def _num_bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()
