"""How much memory a graph takes when it is run operation by operation, and a limit for what comes in a file."""

from __future__ import annotations

import operator
import os
from collections.abc import Iterator

import torch
from torch import Tensor, fx
from torch.fx.node import Node

from l2c_compile.errors import FileFormatError
from l2c_compile.graphs.forms import TensorForm
from l2c_compile.graphs.storages import Storages
from l2c_compile.sampler_file.operands import extent_bytes, place_of

_UNKNOWN_BYTES = 64 * 2**30
"""The limit where the system does not say how much memory there is."""


def check_memory(graph: fx.Graph, max_bytes: int | None) -> None:
    """Check that a graph, without its weights, fits into memory, and each of its tensors if it were written out.

    Args:
        graph: the graph; its nodes have their values.
        max_bytes: the most bytes; None is the memory of the devices that it names.

    Raises:
        FileFormatError: if it needs more.
    """
    limit = _memory_of_devices(graph) if max_bytes is None else max_bytes
    for node, num_bytes in _alive(graph):
        if num_bytes > limit:
            raise FileFormatError(
                f"the graph takes {num_bytes} bytes at {place_of(node)}, and may take {limit}; if you trust the file,"
                " allow more: load(path, max_bytes=...)"
            )


def _alive(graph: fx.Graph) -> Iterator[tuple[Node, int]]:
    """Yield each node with the bytes that are alive when it has run, or those of its tensors if they are more."""
    storages = Storages(graph.nodes)
    owner: dict[Node, Node] = {}
    last: dict[Node, Node] = {}
    for node in graph.nodes:
        owner[node] = owner[node.args[0]] if node.target is operator.getitem else storages.base(node)
        for used in (*node.all_input_nodes, node):
            last[owner[used]] = node
    freed: dict[Node, list[Node]] = {}
    for each, user in last.items():
        freed.setdefault(user, []).append(each)
    alive = 0
    for node in graph.nodes:
        if node.op == "output":
            continue
        if owner[node] is node:
            alive += _num_bytes(node)
        yield node, max(alive, *(each.numel() * each.element_size() for each in _tensors(node)), 0)
        alive -= sum(map(_num_bytes, freed.get(node, ())))


def _num_bytes(node: Node) -> int:
    """Return the bytes that a node makes; 0 for a weight, which is there already."""
    return 0 if node.op == "get_attr" else sum(extent_bytes(TensorForm.of(each)) for each in _tensors(node))


def _tensors(node: Node) -> list[Tensor]:
    """Return the fake tensors that a node makes, without those that have no memory."""
    value = node.meta.get("val")
    every = value if isinstance(value, (tuple, list)) else (value,)
    return [each for each in every if isinstance(each, Tensor) and each.device.type != "meta"]


def _memory_of_devices(graph: fx.Graph) -> int:
    devices = {tensor.device for node in graph.nodes for tensor in _tensors(node)}
    on_gpus = [torch.cuda.get_device_properties(each).total_memory for each in devices if each.type == "cuda"]
    return max([_memory_of_machine(), *on_gpus])


def _memory_of_machine() -> int:
    names = getattr(os, "sysconf_names", {})
    if "SC_PHYS_PAGES" not in names or "SC_PAGE_SIZE" not in names:
        return _UNKNOWN_BYTES
    return int(os.sysconf("SC_PHYS_PAGES")) * int(os.sysconf("SC_PAGE_SIZE"))
