"""Compile the regions of a loop graph one by one, without Dynamo."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, fx, nn

from l2c_compile.backends.cuda_graphs import RecordedLoop
from l2c_compile.graphs.forms import TensorForm
from l2c_compile.graphs.loop_graph import LoopGraph
from l2c_compile.passes.pipeline import REGIONS
from l2c_compile.progress import Progress


def compile_regions(graph: LoopGraph, progress: Progress) -> fx.GraphModule:
    """Compile each distinct region with Inductor and return the loop that calls them; ``graph`` is changed."""
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
    """Wait for Inductor's C++ kernels once for all regions, not after each, so that the compiler never idles.

    Inductor starts a kernel's compilation in the background and waits for it when the region's code is loaded; nothing
    needs the kernel before the first call. Only this thread's waits are put off. On other devices Inductor may run
    kernels while it compiles, so there it waits as usual.
    """
    if not enabled:
        yield
        return
    # This is imported here, because not everyone who imports the package waits for Inductor.
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
    """A region that is compiled for the shapes and strides that it was outlined with."""

    def __init__(self, body: fx.GraphModule) -> None:
        super().__init__()
        specs = [TensorForm.of(node.meta["val"]) for node in body.graph.find_nodes(op="placeholder")]
        # Memory is set to zero, because Inductor may run a kernel to choose its configuration, and indices must fit.
        example_inputs: list[Any] = [spec.empty().zero_() for spec in specs]
        with torch.no_grad():
            self.compiled = torch._inductor.compile(body, example_inputs)

    def forward(self, *operands: Tensor) -> Sequence[Tensor]:
        results: Sequence[Tensor] = self.compiled(*operands)
        return results
