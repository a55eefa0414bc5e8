"""``load``, which reads a sampler from a file, and ``LoadedSampler``, which it returns."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from typing import Literal

import torch
from torch import Tensor, fx, nn
from torch.utils._pytree import keystr, tree_flatten, tree_flatten_with_path, tree_unflatten

from l2c_compile.analyses.summary import Summary
from l2c_compile.backends.lower import lower_to_backend
from l2c_compile.backends.options import EAGER, Backend, Options
from l2c_compile.errors import InputFormError, L2CError, OperandError
from l2c_compile.frontend.autocast import check_no_autocast
from l2c_compile.graphs.forms import CallSignature, TensorForm, signature_of
from l2c_compile.graphs.loop_graph import LoopGraph
from l2c_compile.progress import Progress, silent
from l2c_compile.sampler_file.manifest import (
    decode_numbers,
    describe_input,
    list_of,
)
from l2c_compile.sampler_file.operands import place_of
from l2c_compile.sampler_file.read import (
    MapLocation,
    read_sampler,
)


def load(
    path: str | os.PathLike[str],
    *,
    backend: Backend = EAGER,
    map_location: MapLocation = None,
    mode: Literal["reduce-overhead"] | None = None,
    max_bytes: int | None = None,
    progress: Progress | None = None,
) -> LoadedSampler:
    """Load a sampler that ``CompiledSampler.save`` wrote; the model's class is not needed.

    Args:
        path: the file. It may come from a stranger: nothing of it is unpickled or run as code.
        backend: what runs the graph: "eager", "aot_eager", "inductor" or any other backend that ``torch.compile``
            takes.
        map_location: the device, or devices, for tensors that were saved on another device.
        mode: "reduce-overhead" runs the loop as one CUDA graph, as in ``l2c_compile``.
        max_bytes: the most memory that the graph may take when it runs; None is all that the devices have.
        progress: a function that is told what is compiled.

    Raises:
        FileFormatError: if the file is damaged, hostile, too large, of a newer version, or something else.
        BackendError: if there is no such backend, or a device of the file is neither on this machine nor mapped.
        OSError: if the file cannot be read.
    """
    options = Options(backend, mode=mode)
    manifest, inputs, graph = read_sampler(path, map_location, max_bytes)
    module = graph.module()
    run = lower_to_backend(graph, options, progress or silent)
    return LoadedSampler(manifest, inputs, graph, module, run)


class LoadedSampler(nn.Module):
    """A sampler from a file, which is called as the saved one was, with inputs of the form that it was saved for.

    It holds no state between calls, and runs under ``torch.no_grad``. Its weights are its own; to follow a model whose
    weights change, save that again.
    """

    def __init__(
        self,
        manifest: Mapping[str, object],
        inputs: CallSignature,
        graph: LoopGraph,
        module: fx.GraphModule,
        run: Callable[..., Sequence[object]],
    ) -> None:
        super().__init__()
        self.graph_module = module
        """The static graph, which takes flat tensors and returns a flat list of results."""
        self.schedule = graph.schedule
        self.denoiser = str(manifest["denoiser"])
        """The name of the class that was compiled."""
        self.passes = tuple(map(str, list_of(manifest["passes"], "passes")))
        """The passes that made the graph."""
        self.versions = {name: str(manifest[name]) for name in ("l2c_compile", "torch")}
        """The versions of this package and of torch that saved the file."""
        loop = manifest["loop"]
        self.loop: Mapping[str, object] | None = loop if isinstance(loop, dict) else None
        """The description of the loop; None if the loop was a function of the user's."""
        self._summary: Summary = decode_numbers(manifest["summary"], Summary)
        self.inputs = inputs
        """The form of ``(noise, conditions)``."""
        self.loop_graph = graph
        """The static graph as the compiler knows it."""
        self._names = _names(inputs)
        self._out_spec = graph.out_spec
        # A function, so that it is no submodule: it has the weights of graph_module.
        self._run: Callable[..., Sequence[object]] = lambda *tensors: run(*tensors)
        self.eval()

    def forward(self, noise: object, **conditions: object) -> object:
        """Sample a batch of latents.

        Args:
            noise: the noise, of the shape, dtype and device that was saved. A tensor of other strides is copied into
                the saved ones.
            **conditions: the conditions; the same holds for tensors. Python values must be equal to the saved ones,
                which are part of the graph.

        Raises:
            InputFormError: if the inputs are of another form.
            OperandError: if an operator does not take the values that it is given.
            LoopTraceError: if autocast is on.
        """
        check_no_autocast()
        tensors = self._tensors(noise, conditions)
        with torch.no_grad():
            try:
                leaves = self._run(*tensors)
            except (RuntimeError, IndexError, ValueError, TypeError, ArithmeticError) as error:
                if isinstance(error, (L2CError, torch.OutOfMemoryError)):
                    raise
                raise self._refusal(error, tensors) from error
        return tree_unflatten(list(leaves), self._out_spec)

    def summary(self) -> Summary:
        """Return what each evaluation computes, reads and keeps; ``print`` shows it."""
        return self._summary

    def print_readable(self) -> str:
        """Print the code of the static graph and return it."""
        return self.graph_module.print_readable()

    def extra_repr(self) -> str:
        """Return a description of the sampler in one line."""
        inputs = ", ".join(
            f"{name}: {describe_input(leaf)}" for name, leaf in zip(self._names, self.inputs.leaves, strict=True)
        )
        return f"denoiser={self.denoiser}, num_evaluations={self.schedule.num_evaluations}, inputs=({inputs})"

    def _refusal(self, error: Exception, tensors: Sequence[Tensor]) -> OperandError:
        """Return the error that names the operator which fails: the first that does when they run one by one."""
        where = "the sampler's graph"
        with torch.random.fork_rng(devices=[]):
            interpreter = _NoteKeeper(self.graph_module)
            try:
                interpreter.run(*tensors)
            except (RuntimeError, IndexError, ValueError, TypeError, ArithmeticError):
                where = place_of(interpreter.current)
        reason = " ".join(str(error).split())
        return OperandError(
            f"{where} does not take the values that it is given: {reason:.300}; give conditions in the range that the"
            " denoiser was made for"
        )

    def _tensors(self, noise: object, conditions: Mapping[str, object]) -> list[Tensor]:
        saved = tree_unflatten(list(self.inputs.leaves), self.inputs.spec)[1]
        if conditions.keys() != saved.keys():
            names = [", ".join(map(repr, each)) or "none" for each in (saved, conditions)]
            raise InputFormError(f"the sampler was saved with conditions {names[0]}, got {names[1]}")
        leaves, spec = tree_flatten((noise, {name: conditions[name] for name in saved}))
        if spec != self.inputs.spec:
            raise InputFormError(
                f"the sampler was saved with the inputs {', '.join(self._names)}, got others; give the same containers"
            )
        tensors = []
        given_forms = signature_of(*tree_unflatten(leaves, spec)).leaves
        for what, leaf, given, wanted in zip(self._names, leaves, given_forms, self.inputs.leaves, strict=True):
            if isinstance(given, TensorForm) and isinstance(wanted, TensorForm) and given.fits(wanted):
                tensors.append(leaf if given == wanted else _copied(leaf, wanted, what))
            elif given != wanted:
                raise InputFormError(
                    f"{what} was saved as {describe_input(wanted)}, got {describe_input(given)}; compile for this"
                    " form and save that, too"
                )
        return tensors


class _NoteKeeper(fx.Interpreter):
    """Runs a graph node by node and knows at which it is."""

    current: fx.Node

    def run_node(self, n: fx.Node) -> object:
        """Run a node."""
        self.current = n
        return super().run_node(n)


def _copied(tensor: Tensor, form: TensorForm, what: str) -> Tensor:
    """Return a copy with the strides of a form.

    Raises:
        InputFormError: if elements of the form share memory, as in an expanded tensor.
    """
    try:
        return form.empty().copy_(tensor)
    except RuntimeError as error:
        raise InputFormError(
            f"{what} was saved with strides {list(form.stride)}, in which a tensor with strides {list(tensor.stride())}"
            " has no copy; expand it likewise"
        ) from error


def _names(inputs: CallSignature) -> list[str]:
    """Return the name of each leaf of the inputs for a message."""
    noise, conditions = tree_unflatten(list(inputs.leaves), inputs.spec)
    names = ["noise" + keystr(path) for path, _ in tree_flatten_with_path(noise)[0]]
    for name, value in conditions.items():
        names += [f"condition '{name}'" + keystr(path) for path, _ in tree_flatten_with_path(value)[0]]
    return names
