"""Hand the static graph to whatever runs it.

``eager``     the graph's own code, operation by operation.
``inductor``  the loop region by region: each distinct region (``OutlineRegions``) is compiled once, without Dynamo, and
              the loop calls it. One flat graph of 50 evaluations would keep Inductor busy for hours.
any other     ``torch.compile(graph, backend=..., fullgraph=True)`` of the flat graph.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, fx, nn

from l2c_compile.capture import TensorSpec
from l2c_compile.compile_cache import cache_folder_named
from l2c_compile.cuda_graphs import CudaRecorder, RecordedLoop, check_capturable
from l2c_compile.errors import BackendError, nearest
from l2c_compile.graph import LoopGraph
from l2c_compile.passes.base import Numerics, Pipeline
from l2c_compile.passes.pipeline import CACHE_FORMATS, KERNELS, LOOP, REGIONS, with_packed_caches
from l2c_compile.passes.read_reused_sites import ReadReusedSites

__all__ = [
    "EAGER",
    "INDUCTOR",
    "REDUCE_OVERHEAD",
    "Backend",
    "Progress",
    "check_backend",
    "check_mode",
    "kernels_for",
    "lower_to_backend",
    "num_regions",
    "passes_for",
    "silent",
]

EAGER = "eager"
INDUCTOR = "inductor"
REDUCE_OVERHEAD = "reduce-overhead"

Backend = str | Callable[..., object]
"""A name that ``torch.compile`` knows, or a backend function of its form."""

Progress = Callable[[str], None]
"""Told what the compiler is about to do, in a few words."""


def silent(what: str) -> None:
    """Tell nobody: the progress of who wants none."""


def check_backend(backend: Backend) -> None:
    """Raise ``BackendError`` for the name of a backend that torch.compile does not know."""
    known = torch._dynamo.list_backends(exclude_tags=())
    if isinstance(backend, str) and backend not in known:
        hint = nearest(backend, known) or f"there are {', '.join(known)}"
        raise BackendError(f"torch.compile knows no backend '{backend}'; {hint}")


def passes_for(backend: Backend, numerics: str | None, without: Collection[str], caches: str | None = None) -> Pipeline:
    """Return the loop passes for a backend.

    Args:
        backend: "eager" changes no bit unless ``numerics`` allows it; all others round in their own way anyway.
        numerics: "bitwise", "rounding", or None for what suits the backend.
        without: names of passes to leave out; those of ``kernels_for`` are not meant here.
        caches: "int8" or "fp8" packs what is kept for later evaluations; None keeps it as it is.

    Raises:
        ValueError: no such numerics, format of caches or pass, a pass that another one needs, or the one that applies
            the schedule.
    """
    if caches is not None and caches not in CACHE_FORMATS:
        raise ValueError(f"caches wants one of {', '.join(CACHE_FORMATS)} or None, got {caches!r}")
    if ReadReusedSites.name in without:
        raise ValueError(
            f"without names '{ReadReusedSites.name}', the pass that applies the schedule; to reuse nothing, give a"
            " schedule that computes everything: CacheSchedule.all_compute(num_evaluations)"
        )
    passes = LOOP.within(_allowed(backend, numerics))
    mine = [name for name in without if name not in _names(KERNELS)]
    return (passes if caches is None else with_packed_caches(passes, caches)).without(mine)


def kernels_for(backend: Backend, numerics: str | None, without: Collection[str]) -> Pipeline:
    """Return the passes that put kernels for the processor into the graph; arguments and errors as ``passes_for``.

    "eager" and "inductor" take them; what other backends do with a custom op is not ours to guess.
    """
    kernels = KERNELS.within(_allowed(backend, numerics)) if backend in (EAGER, INDUCTOR) else Pipeline(())
    return kernels.without([name for name in without if name in _names(kernels)])


def _allowed(backend: Backend, numerics: str | None) -> Numerics:
    words = {each.name.lower(): each for each in Numerics if each is not Numerics.APPROXIMATE}
    if numerics is not None and numerics not in words:
        raise ValueError(f"numerics wants one of {', '.join(words)}, got {numerics!r}")
    return words[numerics or ("bitwise" if backend == EAGER else "rounding")]


def _names(passes: Pipeline) -> list[str]:
    return [each.name for each in passes.passes]


def check_mode(mode: str | None) -> None:
    """Raise ``BackendError`` for a mode that there is not."""
    if mode not in (None, REDUCE_OVERHEAD):
        raise BackendError(f"mode wants '{REDUCE_OVERHEAD}' or None, got {mode!r}")


def lower_to_backend(
    graph: LoopGraph, backend: Backend, progress: Progress, kernels: Pipeline, mode: str | None = None
) -> Callable[..., Sequence[object]]:
    """Return a callable that computes what ``graph`` computes, through ``backend``.

    Args:
        graph: the finished loop graph; it is not changed.
        backend: what runs it.
        progress: told which region is compiled.
        kernels: see ``kernels_for``.
        mode: "reduce-overhead" runs what the backend made as one CUDA graph; None as it is.

    Raises:
        BackendError: a CUDA graph is asked for, and something of the loop is not on one CUDA device; or torch cannot
            write to its cache folder.
    """
    if mode == REDUCE_OVERHEAD:
        device = check_capturable(graph)
        return RecordedLoop(_lower(graph, backend, progress, kernels), graph, CudaRecorder(device))
    return _lower(graph, backend, progress, kernels)


def _lower(
    graph: LoopGraph, backend: Backend, progress: Progress, kernels: Pipeline
) -> Callable[..., Sequence[object]]:
    if backend == EAGER:
        return (_with_kernels(graph, kernels) if kernels.passes else graph).module()
    if backend == INDUCTOR:
        with cache_folder_named():
            return _compile_regions(_with_kernels(graph, kernels), progress)
    compiled: Callable[..., Sequence[object]] = torch.compile(
        graph.module_to_trace(), backend=backend, fullgraph=True, dynamic=False
    )
    return compiled


def _with_kernels(graph: LoopGraph, kernels: Pipeline) -> LoopGraph:
    """Return a copy: what is shown, saved and proven is the graph without the kernels of one machine."""
    copy = graph.copy()
    kernels.run(copy)
    return copy


def _compile_regions(graph: LoopGraph, progress: Progress) -> fx.GraphModule:
    """Compile each distinct region of a graph of one's own with Inductor; return the loop that calls them."""
    REGIONS.run(graph)
    bodies = {name: body for name, body in graph.root.named_children() if isinstance(body, fx.GraphModule)}
    with _kernels_compiled_together(_runs_on_cpu(graph)):
        for number, (name, body) in enumerate(bodies.items(), start=1):
            progress(f"compile region {number} of {len(bodies)}")
            setattr(graph.root, name, _CompiledRegion(body))
    for call in graph.graph.find_nodes(op="call_function", target=torch.ops.higher_order.invoke_subgraph):
        body, name, *operands = call.args
        with graph.graph.inserting_before(call):
            compiled_call = graph.graph.call_module(name, tuple(operands))
        call.replace_all_uses_with(compiled_call)
        graph.graph.erase_node(call)
        graph.graph.erase_node(body)
    return graph.module()


def _runs_on_cpu(graph: LoopGraph) -> bool:
    return all(node.meta["val"].device.type == "cpu" for node in graph.graph.find_nodes(op="placeholder"))


@contextmanager
def _kernels_compiled_together(enabled: bool) -> Iterator[None]:
    """Wait for Inductor's C++ kernels once for all regions, not after each: the compiler then never idles.

    Inductor starts a kernel's compilation in the background and waits for it when the region's code is loaded; nothing
    needs the kernel before the first call. Only this thread's waits are put off. On other devices Inductor may run
    kernels while it compiles, so there it waits as usual.
    """
    if not enabled:
        yield
        return
    # Imported here: not everyone who imports the package waits for Inductor.
    from torch._inductor.async_compile import AsyncCompile

    waiting: list[tuple[AsyncCompile, dict[str, Any]]] = []
    wait, owner = AsyncCompile.wait, threading.get_ident()

    def put_off(self: AsyncCompile, scope: dict[str, Any]) -> None:
        if threading.get_ident() == owner:
            waiting.append((self, scope))
        else:
            wait(self, scope)

    AsyncCompile.wait = put_off  # type: ignore[method-assign]
    try:
        yield
    finally:
        AsyncCompile.wait = wait  # type: ignore[method-assign]
    for compiler, scope in waiting:
        wait(compiler, scope)


def num_regions(run: object) -> int:
    """Return how many distinct regions a lowered loop calls; 0 if it was not lowered region by region."""
    run = run.run if isinstance(run, RecordedLoop) else run
    return sum(isinstance(child, _CompiledRegion) for child in run.children()) if isinstance(run, nn.Module) else 0


class _CompiledRegion(nn.Module):
    """A region, compiled for the shapes and strides that it was outlined with."""

    def __init__(self, body: fx.GraphModule) -> None:
        super().__init__()
        specs = [TensorSpec.of(node.meta["val"]) for node in body.graph.find_nodes(op="placeholder")]
        # Zeros, not uninitialised memory: Inductor may run a kernel to choose its configuration, and indices must fit.
        example_inputs: list[Any] = [spec.empty().zero_() for spec in specs]
        with torch.no_grad():
            self.compiled = torch._inductor.compile(body, example_inputs)

    def forward(self, *operands: Tensor) -> Sequence[Tensor]:
        results: Sequence[Tensor] = self.compiled(*operands)
        return results
