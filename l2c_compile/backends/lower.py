"""Hand the static graph to the backend that runs it.

``eager``     the graph's own code, operation by operation.
``inductor``  the loop region by region: each distinct region (``OutlineRegions``) is compiled once, without Dynamo, and
              the loop calls it. One flat graph of 50 evaluations would keep Inductor busy for hours.
any other     ``torch.compile(graph, backend=..., fullgraph=True)`` of the flat graph, in one thread at a time.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Sequence

import torch

from l2c_compile.backends.cuda_graphs import CudaRecorder, RecordedLoop, check_capturable
from l2c_compile.backends.options import EAGER, INDUCTOR, REDUCE_OVERHEAD, Options
from l2c_compile.backends.regions import compile_regions
from l2c_compile.files.torch_cache import cache_folder_named
from l2c_compile.graphs.loop_graph import LoopGraph
from l2c_compile.passes.base import Pipeline
from l2c_compile.progress import Progress, silent


def lower_to_backend(
    graph: LoopGraph, options: Options, progress: Progress = silent
) -> Callable[..., Sequence[object]]:
    """Return a callable that computes what ``graph`` computes, through the backend of the options.

    Args:
        graph: the finished loop graph; it is not changed.
        options: the backend, its kernels, and whether the result runs as one CUDA graph.
        progress: a function that is told which region is compiled.

    Raises:
        BackendError: if a CUDA graph is asked for and not all of the loop is on one CUDA device, or if torch cannot
            write to its cache folder.
    """
    if options.mode == REDUCE_OVERHEAD:
        device = check_capturable(graph)
        return RecordedLoop(_lower(graph, options, progress), graph, CudaRecorder(device))
    return _lower(graph, options, progress)


def _lower(graph: LoopGraph, options: Options, progress: Progress) -> Callable[..., Sequence[object]]:
    if options.backend == EAGER:
        return (_with_kernels(graph, options.kernels) if options.kernels.passes else graph).module()
    if options.backend == INDUCTOR:
        with cache_folder_named():
            return compile_regions(_with_kernels(graph, options.kernels), progress)
    compiled: Callable[..., Sequence[object]] = torch.compile(
        graph.module_to_trace(), backend=options.backend, fullgraph=True, dynamic=False
    )

    def one_at_a_time(*inputs: object) -> Sequence[object]:
        with _running:
            return compiled(*inputs)

    return one_at_a_time


_running = threading.RLock()
"""Held while torch.compile's code runs: with fullgraph torch 2.13 counts what it ran in one number for all threads, and
calls that overlap end in "found no compiled frames"."""


def _begin_anew() -> None:
    # The thread that held the old lock is not in the child.
    global _running
    _running = threading.RLock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_begin_anew)


def _with_kernels(graph: LoopGraph, kernels: Pipeline) -> LoopGraph:
    """Return a copy with kernels; what is shown, saved and proven stays the graph without those of one machine."""
    copy = graph.copy()
    kernels.run(copy)
    return copy
