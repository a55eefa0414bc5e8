"""Make a ``torch.export`` program of a loop graph, which ``torch.export.save`` and AOTInductor take.

The program is made of the nodes of the graph; tracing the graph again would take minutes for 50 evaluations.
Weights and constants become inputs that the program's signature binds; the loop's tensors stay inputs, flat and in
order, and the result is the flat list of the loop's results.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.export import ExportedProgram
from torch.export.graph_signature import (
    ConstantArgument,
    ExportGraphSignature,
    InputKind,
    InputSpec,
    OutputKind,
    OutputSpec,
    TensorArgument,
)
from torch.utils._pytree import tree_map, tree_structure

from l2c_compile.errors import BackendError
from l2c_compile.graphs.forms import TensorForm
from l2c_compile.graphs.loop_graph import ProgramGraph
from l2c_compile.graphs.nodes import (
    argument_key,
    expression,
    is_pointwise,
    output_list,
    root_tensor,
    without_torchs_log,
)


def to_exported_program(
    program: ProgramGraph, before: Callable[[fx.Node], None] = lambda node: None
) -> ExportedProgram:
    """Return the graph as an ``ExportedProgram``; weights are shared.

    Args:
        program: the graph, whose nodes are operators, ``getitem`` and ``get_attr`` of tensors.
        before: a function that is told each different operation of ``program`` before it is tried on fake tensors.
    """
    graph = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    inputs: list[InputSpec] = []
    state: dict[str, Tensor] = {}
    constants: dict[str, Any] = {}
    attributes = [node for node in program.graph.nodes if node.op == "get_attr"]
    placeholders = [node for node in program.graph.nodes if node.op == "placeholder"]
    # torch wants parameters, buffers, constants and the user's inputs in this order.
    for node in sorted(attributes, key=lambda node: _ORDER.index(_kind(program.root, node))):
        target, tensor = str(node.target), root_tensor(program.root, node)
        kind = _kind(program.root, node)
        copies[node] = graph.placeholder(f"{_PREFIX[kind]}_{len(inputs)}")
        (constants if kind is InputKind.CONSTANT_TENSOR else state)[target] = tensor
        persistent = True if kind is InputKind.BUFFER else None
        inputs.append(InputSpec(kind, TensorArgument(copies[node].name), target, persistent))
    for node in placeholders:
        copies[node] = graph.placeholder(node.name)
        inputs.append(InputSpec(InputKind.USER_INPUT, TensorArgument(copies[node].name), None))
    for node in program.graph.nodes:
        if node.op == "call_function":
            copies[node] = graph.node_copy(node, copies.__getitem__)
            copies[node].meta = {}
    results = [copies[r] if isinstance(r, fx.Node) else r for r in output_list(program.graph)]
    graph.output(tuple(results))
    # The parts of a loop graph were captured under different fake modes, and torch takes one.
    originals = {copy: node for node, copy in copies.items()}
    infer_values(graph, lambda copy: _form(program, originals[copy]), lambda copy: before(originals[copy]))
    outputs = [
        OutputSpec(
            OutputKind.USER_OUTPUT,
            TensorArgument(r.name) if isinstance(r, fx.Node) else ConstantArgument(f"output_{i}", r),  # type: ignore[arg-type]
            None,
        )
        for i, r in enumerate(results)
    ]
    flat: Any = torch.export.ModuleCallSignature(
        inputs=[],
        outputs=[],
        in_spec=tree_structure((tuple(range(len(placeholders))), {})),
        out_spec=tree_structure(list(range(len(results)))),
    )
    return ExportedProgram(
        root=nn.Module(),
        graph=graph,
        graph_signature=ExportGraphSignature(inputs, outputs),
        state_dict=state,
        range_constraints={},
        module_call_graph=[torch.export.ModuleCallEntry(fqn="", signature=flat)],
        constants=constants,
    )


def compile_ahead_of_time(program: ProgramGraph, path: str | os.PathLike[str]) -> None:
    """Compile with AOTInductor into a package that ``torch._inductor.aoti_load_package`` runs.

    The package is native code with the weights in it. Inductor compiles the graph as a whole, which takes a minute for
    3 evaluations of 2 blocks, and hours for 50 evaluations of 28. Where the loop draws noise, the package draws other
    numbers than torch does eagerly.

    Raises:
        BackendError: if the graph calls regions (``invoke_subgraph``), which AOTInductor's C++ wrapper cannot call.
    """
    if program.graph.find_nodes(op="call_function", target=torch.ops.higher_order.invoke_subgraph):
        raise BackendError(
            "AOTInductor cannot take a graph of regions: its C++ wrapper has no invoke_subgraph; give it the flat"
            " graph, or save without aot_inductor and load with backend='inductor', which compiles region by region"
        )
    exported = to_exported_program(program)
    # AOTInductor wants examples; a saved program has none, because torch pickles them.
    placeholders = program.graph.find_nodes(op="placeholder")
    zeros = tuple(TensorForm.of(node.meta["val"]).empty().zero_() for node in placeholders)
    exported._example_inputs = (zeros, {})
    with warnings.catch_warnings():
        # torch warns of its own copying of specs.
        warnings.filterwarnings("ignore", r".*isinstance\(treespec, LeafSpec\)", FutureWarning)
        torch._inductor.aoti_compile_and_package(exported, package_path=os.fspath(path))


def infer_values(
    graph: fx.Graph,
    known: Callable[[fx.Node], TensorForm],
    before: Callable[[fx.Node], None] = lambda node: None,
) -> None:
    """Note ``meta["val"]`` on every node by running the graph on fake tensors, all of one fake mode.

    Equal operations on equal forms run once, so 50 evaluations cost little more than one. Nodes of equal form share
    their fake tensor. Pointwise operations that differ only in a float count as equal, because it changes no form.

    Args:
        graph: the graph, in functional ATen.
        known: a function that returns the form of the tensor of a placeholder or ``get_attr`` node.
        before: a function that is told each node before it is run, when its arguments have their values.
    """
    # For an operator without a fake kernel, torch would run the real one on memory of the claimed size. AOTInductor
    # continues in this mode, with constants that are not fake.
    mode = FakeTensorMode(allow_fallback_kernels=False, allow_non_fake_inputs=True)
    values: dict[fx.Node, Any] = {}
    by_form: dict[TensorForm, Tensor] = {}
    by_operation: dict[object, Any] = {}

    def shared(value: Any) -> Any:  # noqa: ANN401 - whatever an operator returns
        return by_form.setdefault(TensorForm.of(value), value) if isinstance(value, Tensor) else value

    with mode, torch.no_grad(), without_torchs_log():
        for node in graph.nodes:
            if node.op == "output":
                continue
            if node.op == "call_function":
                key = _operation(node, lambda argument: id(values[argument]))
                if key not in by_operation:
                    before(node)
                    args, kwargs = fx.node.map_arg((node.args, node.kwargs), values.__getitem__)
                    by_operation[key] = tree_map(shared, node.target(*args, **kwargs))
                values[node] = by_operation[key]
            else:
                values[node] = shared(known(node).empty())
            node.meta["val"] = values[node]


def _operation(node: fx.Node, rename: Callable[[fx.Node], object]) -> object:
    if not is_pointwise(node):
        return expression(node, rename)
    args, kwargs = fx.node.map_aggregate((node.args, node.kwargs), lambda a: float if type(a) is float else a)  # type: ignore[arg-type, return-value]
    return node.target, argument_key(args, rename), argument_key(tuple(sorted(kwargs.items())), rename)


_ORDER = (InputKind.PARAMETER, InputKind.BUFFER, InputKind.CONSTANT_TENSOR)
_PREFIX = {InputKind.PARAMETER: "p", InputKind.BUFFER: "b", InputKind.CONSTANT_TENSOR: "c"}


def _kind(root: nn.Module, node: fx.Node) -> InputKind:
    if "." not in str(node.target):
        return InputKind.CONSTANT_TENSOR
    return InputKind.PARAMETER if isinstance(root_tensor(root, node), nn.Parameter) else InputKind.BUFFER


def _form(program: ProgramGraph, node: fx.Node) -> TensorForm:
    return TensorForm.of(root_tensor(program.root, node) if node.op == "get_attr" else node.meta["val"])
