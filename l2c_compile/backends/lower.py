"""Hand the static graph to whatever runs it.

``eager``     the graph's own code, operation by operation.
``inductor``  the loop region by region: each distinct region (``OutlineRegions``) is compiled once, without Dynamo, and
              the loop calls it. One flat graph of 50 evaluations would keep Inductor busy for hours.
any other     ``torch.compile(graph, backend=..., fullgraph=True)`` of the flat graph.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from l2c_compile.backends.choice import EAGER, INDUCTOR, REDUCE_OVERHEAD, Backend
from l2c_compile.backends.cuda_graphs import CudaRecorder, RecordedLoop, check_capturable
from l2c_compile.backends.regions import compile_regions
from l2c_compile.files.torch_cache import cache_folder_named
from l2c_compile.graphs.loop_graph import LoopGraph
from l2c_compile.passes.base import Pipeline
from l2c_compile.progress import Progress

__all__ = ["lower_to_backend"]


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
            return compile_regions(_with_kernels(graph, kernels), progress)
    compiled: Callable[..., Sequence[object]] = torch.compile(
        graph.module_to_trace(), backend=backend, fullgraph=True, dynamic=False
    )
    return compiled


def _with_kernels(graph: LoopGraph, kernels: Pipeline) -> LoopGraph:
    """Return a copy: what is shown, saved and proven is the graph without the kernels of one machine."""
    copy = graph.copy()
    kernels.run(copy)
    return copy
