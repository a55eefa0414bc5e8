"""The whole loop as one CUDA graph: recorded once, replayed in every call.

A loop of 50 evaluations launches some ten thousand kernels; at batch 1 Python takes longer to launch them than a GPU to
run them. The loop is static, so it can be recorded as it is. A CUDA graph reads and writes fixed memory:

- inputs are copied into tensors of our own, results are copied out: the next call overwrites nothing that was returned;
- weights are read where they are. Weights changed in place are seen; after weights were replaced (``load_state_dict``
  with ``assign``, ``.data``, ``to``) the loop is recorded again. Folded constants are refreshed in place;
- what is kept between evaluations lives in the graph's own pool.

Random numbers are drawn anew in each replay: torch registers its generator with the graph.

Inductor's own ``triton.cudagraphs`` would record each region apart, which leaves thousands of launches and copies;
``torch.cuda.make_graphed_callables`` records a backward pass, too, and returns memory that the next call overwrites.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.fx.node import Node

from l2c_compile.errors import BackendError
from l2c_compile.graphs.loop_graph import LoopGraph
from l2c_compile.graphs.nodes import evaluation_of, output_list

Run = Callable[..., Sequence[object]]

_NUM_WARM_UPS = 2
"""The number of runs before the recording: the first compiles and loads kernels, the second lets allocators and
libraries settle."""


class Recorder(Protocol):
    """An object that runs functions on a device and records what they launch."""

    def warm_up(self, run: Callable[[], object]) -> None:
        """Run a function on another stream than the current one, and leave random states as they were."""

    def record(self, run: Callable[[], Sequence[object]]) -> tuple[Callable[[], None], Sequence[object]]:
        """Return a function that launches the same again, and the results, whose memory it overwrites each time."""

    def drain(self) -> None:
        """Wait until the device is idle, so that a recording may be dropped."""

    def wait_for_last(self) -> None:
        """Let the current stream wait for the end of the last call, on whichever stream that was."""

    def mark_end(self) -> None:
        """Note that all work of a call is on the current stream by now."""


class CudaRecorder:
    """Records what functions launch on one CUDA device."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._end: torch.cuda.Event | None = None

    def warm_up(self, run: Callable[[], object]) -> None:
        """Run the function twice on a separate stream, because a capture must not see lazy initialisation."""
        stream: Any = torch.cuda.Stream(self.device)  # type: ignore[no-untyped-call]
        with torch.cuda.device(self.device), torch.random.fork_rng(devices=[self.device.index or 0]):
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                for _ in range(_NUM_WARM_UPS):
                    run()
            torch.cuda.current_stream().wait_stream(stream)

    def record(self, run: Callable[[], Sequence[object]]) -> tuple[Callable[[], None], Sequence[object]]:
        """Record one run as a ``torch.cuda.CUDAGraph``.

        Raises:
            BackendError: if something in the run cannot be recorded.
        """
        graph = torch.cuda.CUDAGraph()
        try:
            # With thread_local, an allocation in another thread is no mistake of this capture.
            with torch.cuda.device(self.device), torch.cuda.graph(graph, capture_error_mode="thread_local"):
                results = run()
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            raise BackendError(
                "the loop cannot be recorded as a CUDA graph: it waits for the device, or copies to or from the host"
                f" ({error}); leave out mode='reduce-overhead'"
            ) from error
        return graph.replay, results

    def drain(self) -> None:
        """Synchronise with the device."""
        torch.cuda.synchronize(self.device)

    def wait_for_last(self) -> None:
        """Let the current stream wait for the event of the last call."""
        if self._end is not None:
            torch.cuda.current_stream(self.device).wait_event(self._end)

    def mark_end(self) -> None:
        """Record an event on the current stream."""
        if self._end is None:
            self._end = torch.cuda.Event()  # type: ignore[no-untyped-call]
        self._end.record(torch.cuda.current_stream(self.device))


class RecordedLoop:
    """A loop that is recorded in its first call, and again when the memory of a weight has moved.

    Threads take turns: there is one set of memory for inputs and results.
    """

    def __init__(self, run: Run, graph: LoopGraph, recorder: Recorder) -> None:
        self.run = run
        """The function that is recorded."""
        self.num_recordings = 0
        self._recorder = recorder
        self._read = [_TensorAddress(graph, node) for node in graph.graph.find_nodes(op="get_attr")]
        self._lock = threading.Lock()
        self._replay: Callable[[], None] | None = None
        self._inputs: list[Tensor] = []
        self._results: Sequence[object] = ()
        self._addresses: list[int] = []

    def __call__(self, *inputs: Tensor) -> Sequence[object]:
        """Return what ``run`` would return, in tensors that no later call overwrites."""
        with self._lock:
            self._recorder.wait_for_last()
            addresses = [attribute.address() for attribute in self._read]
            if self._replay is None or addresses != self._addresses:
                self._record(inputs)
                self._addresses = addresses
            for own, given in zip(self._inputs, inputs, strict=True):
                own.copy_(given)
            assert self._replay is not None
            self._replay()
            results = [result.clone() if isinstance(result, Tensor) else result for result in self._results]
            self._recorder.mark_end()
        return results

    def _record(self, inputs: Sequence[Tensor]) -> None:
        if self._replay is not None:
            # The old recording is dropped first, because two recordings need not fit into memory together.
            self._recorder.drain()
            self._replay, self._results = None, ()
        # The tensors are normal ones also if this call is under inference_mode, because later ones may not be.
        with torch.inference_mode(False), torch.no_grad():
            self._inputs = [torch.empty_like(given).copy_(given) for given in inputs]
            self._recorder.warm_up(lambda: self.run(*self._inputs))
            self._replay, self._results = self._recorder.record(lambda: self.run(*self._inputs))
        self.num_recordings += 1


class _TensorAddress:
    """The current address of a weight or constant that the graph reads."""

    def __init__(self, graph: LoopGraph, node: Node) -> None:
        owner, _, self._name = str(node.target).rpartition(".")
        self._owner = graph.root.get_submodule(owner)

    def address(self) -> int:
        tensor: Tensor = getattr(self._owner, self._name)
        return tensor.data_ptr()


def check_capturable(graph: LoopGraph) -> torch.device:
    """Return the one CUDA device that everything of a loop is on.

    Raises:
        BackendError: if something is on another device.
    """
    results = {node for node in output_list(graph.graph) if isinstance(node, Node)}
    device: torch.device | None = None
    for node in graph.graph.nodes:
        value = node.meta.get("val")
        for tensor in value if isinstance(value, (tuple, list)) else (value,):
            if not isinstance(tensor, Tensor):
                continue
            device = device or tensor.device
            if tensor.device.type != "cuda" or tensor.device != device:
                raise BackendError(_elsewhere(node, tensor.device, device, is_result=node in results))
    if device is None:
        raise BackendError("mode='reduce-overhead' wants a loop over tensors on a CUDA device, got one without tensors")
    return device


def _elsewhere(node: Node, found: torch.device, wanted: torch.device, *, is_result: bool) -> str:
    evaluation = evaluation_of(node)
    place = "the loop" if evaluation is None else f"evaluation {evaluation}"
    what = "an input" if node.op == "placeholder" else f"'{node.name}' of {place}"
    other = "" if found == wanted else f", while the first input is on {wanted}"
    return (
        f"mode='reduce-overhead' records a CUDA graph, which wants everything on one CUDA device, but {what}"
        f"{', a result,' if is_result else ''} is on {found}{other}; move it there, or leave out mode"
    )
