"""Functions that read a property of a node, and functions that make nodes."""

from __future__ import annotations

import logging
import operator
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._ops import OpOverload
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.node import Argument, Node

from l2c_compile.files.torch_cache import cache_folder_named

# Imports Dynamo, which makes torch's cache folder.
with cache_folder_named():
    _INFERENCE = FakeTensorMode()


def emit(
    graph: fx.Graph,
    target: OpOverload,
    args: tuple[Argument, ...],
    evaluation: int | None = None,
    kwargs: Mapping[str, Argument] | None = None,
    *,
    like: Node | None = None,
) -> Node:
    """Insert a call of ``target`` at the graph's insert point and note what it returns and where it belongs.

    Args:
        graph: the graph that gets the node.
        target: what to call.
        args: the node's arguments.
        evaluation: the evaluation it belongs to; None: to the loop itself.
        kwargs: the node's keyword arguments.
        like: a node that it belongs with, in place of an evaluation.
    """
    node = graph.call_function(target, args, dict(kwargs or {}))
    node.meta.update(val=infer(target, args, kwargs or {}), evaluation=evaluation)
    if like is not None:
        put_with(node, like)
    return node


def put_with(node: Node, other: Node) -> None:
    """Note that a node belongs where another one does: to its evaluation and to its module, if it is of any."""
    node.meta["evaluation"] = evaluation_of(other)
    node.meta.pop("nn_module_stack", None)
    if "nn_module_stack" in other.meta:
        node.meta["nn_module_stack"] = other.meta["nn_module_stack"]


def outputs_of(node: Node) -> tuple[Node, ...]:
    """Insert a node for each tensor that a node returns, right behind it, and return these nodes."""
    outputs: list[Node] = []
    for index, value in enumerate(node.meta["val"]):
        with node.graph.inserting_after(outputs[-1] if outputs else node):
            outputs.append(node.graph.call_function(operator.getitem, (node, index)))
        outputs[-1].meta.update(val=value, evaluation=evaluation_of(node))
    return tuple(outputs)


def infer(
    target: object,
    args: Sequence[Argument],
    kwargs: Mapping[str, Argument],
    value: Callable[[Node], Any] = lambda node: node.meta["val"],
) -> Any:  # noqa: ANN401
    """Return what ``target`` returns for these nodes, as fake tensors: they have the form, but no values.

    ``value`` is a function that returns the fake tensor, or other value, of a node.
    """
    fakes: Any = fx.node.map_arg((tuple(args), dict(kwargs)), lambda argument: _fake(value(argument)))
    assert callable(target)
    with _INFERENCE, torch.no_grad():
        return target(*fakes[0], **fakes[1])


def _fake(value: Any) -> Any:  # noqa: ANN401 - a fake tensor, or what a node returns that is none
    # The parts of a loop graph were captured under different fake modes, and torch refuses to mix these.
    if isinstance(value, (tuple, list)):
        return tuple(map(_fake, value))
    if not isinstance(value, Tensor):
        return value
    with _INFERENCE:
        return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device=value.device)


def evaluation_of(node: Node) -> int | None:
    """Return the evaluation that a node of a loop graph belongs to; None for the loop's own arithmetic."""
    return node.meta.get("evaluation")


def own_evaluation(node: Node) -> int:
    """Return the evaluation of a node that belongs to one."""
    evaluation = evaluation_of(node)
    assert evaluation is not None
    return evaluation


def output_list(graph: fx.Graph) -> list[Argument]:
    """Return the results of a graph, which are always a flat list."""
    (results,) = graph.output_node().args
    assert isinstance(results, (list, tuple))
    return list(results)


def packet_of(node: Node) -> object:
    """Return the operator of a node without its overload (``aten.clone``); None if it calls no torch operator."""
    return node.target.overloadpacket if isinstance(node.target, torch._ops.OpOverload) else None


def is_pointwise(node: Node) -> bool:
    """Return whether each element of the result depends on one element of each argument only."""
    return isinstance(node.target, torch._ops.OpOverload) and torch.Tag.pointwise in node.target.tags


def draws_random_numbers(node: Node) -> bool:
    """Return whether the node draws from a random number generator, so that it may be neither removed nor merged."""
    if node.op != "call_function" or not isinstance(node.target, torch._ops.OpOverload):
        return False
    if torch.Tag.nondeterministic_seeded not in node.target.tags:
        return False
    # Attention, recurrent layers and dropout can draw, but do not at rate 0 or outside training.
    given = arguments_of(node)
    if given.get("train") is False or given.get("training") is False:
        return False
    rate = "p" if "dropout" in node.target.overloadpacket.__name__ else "dropout"
    return bool(given.get("dropout_p") != 0 and given.get(rate) != 0 and given.get("num_layers") != 1)


def arguments_of(node: Node) -> dict[str, Argument]:
    """Return the node's arguments by name, defaults included."""
    schema = node.target._schema.arguments  # type: ignore[union-attr]
    given = {argument.name: argument.default_value for argument in schema if argument.has_default_value()}
    given.update(zip((argument.name for argument in schema), node.args, strict=False))
    given.update(node.kwargs)
    return given


def fits(node: Node, other: Node) -> bool:
    """Return whether two nodes make tensors of equal shape, dtype and device, whatever the strides."""
    return _without_strides(node) == _without_strides(other)


def _without_strides(node: Node) -> object:
    value = node.meta.get("val")
    return (value.shape, value.dtype, value.device) if isinstance(value, Tensor) else None


def num_bytes(node: Node) -> int:
    """Return the size in bytes of the tensors that a node produces; 0 where the graph does not note it."""
    value = node.meta.get("val")
    tensors = value if isinstance(value, (tuple, list)) else (value,)
    return sum(t.numel() * t.element_size() for t in tensors if isinstance(t, Tensor))


Expression = tuple[object, ...]
"""A hashable value for what a node computes, equal for two nodes of one graph iff they compute the same."""


def expression(node: Node, rename: Callable[[Node], object] = lambda argument: argument) -> Expression:
    """Return the key under which two pure nodes are the same computation.

    Args:
        node: the ``call_function`` or ``get_attr`` node.
        rename: a function from each argument node to the value that stands for it in the key.
    """
    kwargs = tuple(sorted((name, argument_key(value, rename)) for name, value in node.kwargs.items()))
    return (node.op, node.target, argument_key(node.args, rename), kwargs)


def argument_key(argument: Argument, rename: Callable[[Node], object]) -> object:
    """Return a hashable value that is equal for two arguments iff they are interchangeable."""
    if isinstance(argument, Node):
        return rename(argument)
    if isinstance(argument, (tuple, list)):
        return tuple(argument_key(element, rename) for element in argument)
    if isinstance(argument, float):
        # 1 == 1.0 == True and 0.0 == -0.0 in Python, but they differ in type promotion and division.
        return float, argument.hex()
    return type(argument), argument


def module_path(node: Node) -> str:
    """Return the path in the denoiser of the module whose forward made the node; "" where there is none."""
    stack = node.meta.get("nn_module_stack") or {}
    path = next((str(path) for path, _ in reversed(stack.values())), "")
    return path.removeprefix("L['self'].").removeprefix("denoiser").removeprefix(".")


def root_tensor(root: nn.Module, node: fx.Node) -> Tensor:
    """Return the tensor that a ``get_attr`` node names."""
    owner, _, name = str(node.target).rpartition(".")
    tensor = getattr(root.get_submodule(owner), name)
    assert isinstance(tensor, Tensor)
    return tensor


@contextmanager
def without_torchs_log() -> Iterator[None]:
    """Keep torch from logging a traceback of an error that is raised inside."""
    logger = logging.getLogger("torch._subclasses.fake_tensor")
    disabled, logger.disabled = logger.disabled, True
    try:
        yield
    finally:
        logger.disabled = disabled
