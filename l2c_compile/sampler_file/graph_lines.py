"""Write a static graph as lines of JSON, one for each node, and read it back, checking a stranger's file line by line.

    {"input": 0}
    {"tensor": "denoiser.fc.weight", "record": "data/weights/weight_0", "sha256": "...", "dtype": "float32", ...}
    {"op": "aten::linear", "args": ["%0", "%1"], "evaluation": 0, "path": "fc"}
    {"output": ["%2"]}

``%n`` is the value of line n. Nothing in a line becomes Python code: names of inputs, tensors and nodes are made here,
operators are those of ``allowed_operators.py``, the names of their arguments must be in their schema, and what they are
given is checked by ``operands.py`` and on fake tensors.
"""

from __future__ import annotations

import io
import json
import math
import operator
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeGuard

import torch
from torch import Tensor, fx, nn
from torch._ops import OpOverload
from torch.fx.node import Argument, Node

from l2c_compile.errors import FileFormatError, SaveError, VerificationError
from l2c_compile.files.documents import MAX_JSON_BYTES, parse_json
from l2c_compile.graphs.facts import Fact, check
from l2c_compile.graphs.forms import TensorForm
from l2c_compile.graphs.loop_graph import ProgramGraph
from l2c_compile.graphs.nodes import evaluation_of, module_path, output_list, root_tensor
from l2c_compile.sampler_file.allowed_operators import DTYPES, initialised, name_of, operator_named, why_refused
from l2c_compile.sampler_file.exported_program import infer_values
from l2c_compile.sampler_file.memory import check_memory
from l2c_compile.sampler_file.operands import MAX_PIECES, OperationChecker, extent_bytes, refusal

_MAX_NODES = 1_000_000
_MAX_DEPTH = 8
_MAX_DIMS = 64
_MAX_INT = 2**63 - 1

_MEMORY_FORMATS = ("contiguous_format", "preserve_format", "channels_last", "channels_last_3d")
# Quantised dtypes, those below a byte and sparse layouts have kernels that believe what they are given.
_NAMED: Mapping[str, Mapping[str, torch.dtype | torch.layout | torch.memory_format]] = {
    "dtype": {str(dtype).removeprefix("torch."): dtype for dtype in DTYPES},
    "layout": {"strided": torch.strided},
    "memory_format": {name: getattr(torch, name) for name in _MEMORY_FORMATS},
}
_FLOATS = ("inf", "-inf", "nan")
_REFERENCE = re.compile(r"%(0|[1-9][0-9]{0,7})", re.ASCII)
_DEVICE = re.compile(r"[a-z]{1,20}(:[0-9]{1,3})?", re.ASCII)
_SHA256 = re.compile(r"[0-9a-f]{64}", re.ASCII)
_GETITEM = "getitem"


@dataclass(frozen=True)
class StoredTensor:
    """The place of a tensor's values in the archive: a record that holds the bytes of a storage, and the form in it."""

    record: str
    sha256: str
    """The digest of the whole record."""
    form: TensorForm
    offset: int
    """The position of the first element in the storage, in elements."""
    requires_grad: bool = False
    """Whether the tensor is a weight that can be trained: torch multiplies with such in another order."""

    @property
    def end_bytes(self) -> int:
        """The number of bytes that the storage needs at least."""
        end = extent_bytes(self.form)
        return end and end + self.offset * self.form.dtype.itemsize


def encode_graph(program: ProgramGraph, stored: Callable[[Node], StoredTensor]) -> Iterator[str]:
    """Yield the lines of a graph.

    Args:
        program: the graph, in functional ATen, with weights and constants as ``get_attr`` nodes.
        stored: a function that returns the place of the tensor of a ``get_attr`` node.

    Raises:
        SaveError: if a node calls what a file cannot hold.
    """
    numbers: dict[Node, str] = {}
    for node in program.graph.nodes:
        line: dict[str, object]
        if node.op == "placeholder":
            line = {"input": len(numbers)}
        elif node.op == "get_attr":
            where = stored(node)
            line = {"tensor": str(node.target), "record": where.record, "sha256": where.sha256, "offset": where.offset}
            line |= encode_form(where.form, f"tensor '{node.target}'")
            if where.requires_grad:
                line["requires_grad"] = True
        elif node.op == "output":
            line = {"output": encode_literal(output_list(program.graph), "the loop's result", numbers)}
        else:
            line = _encode_call(node, numbers)
        numbers[node] = f"%{len(numbers)}"
        yield json.dumps(line, separators=(",", ":"), allow_nan=False) + "\n"


def decode_graph(
    content: bytes,
    inputs: Sequence[TensorForm],
    num_evaluations: int,
    place: Callable[[torch.device], torch.device],
    load: Callable[[StoredTensor], Tensor],
    max_bytes: int | None = None,
) -> ProgramGraph:
    """Return the graph of ``encode_graph``'s lines, after trying every operator of it on fake tensors.

    Args:
        content: the bytes of the lines.
        inputs: the forms of the graph's inputs, on the devices where they will be.
        num_evaluations: the number of evaluations that a line may name.
        place: a function from a device of the file to one of this machine.
        load: a function that reads a tensor onto the device where it will be.
        max_bytes: the most memory that the graph may take; None is that of its devices.

    Raises:
        FileFormatError: if a line is malformed, calls anything but a function of tensors, or does not fit the other
            lines.
    """
    reader = _GraphBuilder(num_evaluations, place, load)
    stream = io.BytesIO(content)
    while line := stream.readline(MAX_JSON_BYTES + 1):
        reader.read(parse_json(line))
    return reader.finish(inputs, max_bytes)


class _GraphBuilder:
    """Builds the graph line by line."""

    def __init__(
        self,
        num_evaluations: int,
        place: Callable[[torch.device], torch.device],
        load: Callable[[StoredTensor], Tensor],
    ) -> None:
        self.num_evaluations = num_evaluations
        self.place = place
        self.load = load
        self.program = ProgramGraph(fx.Graph(), nn.Module())
        self.nodes: list[Node] = []
        self.num_inputs = 0
        self.finished = False

    def read(self, line: dict[str, object]) -> None:
        kind = next(iter(line), None)
        if self.finished or len(self.nodes) >= _MAX_NODES:
            raise self._error(f"comes after the result, or after more than {_MAX_NODES} others")
        if kind == "input":
            self._check_keys(line, {"input"})
            self.nodes.append(self.program.graph.placeholder(f"input_{self.num_inputs}"))
            self.num_inputs += 1
        elif kind == "tensor":
            self.nodes.append(self._tensor(line))
        elif kind == "op":
            self.nodes.append(self._call(line))
        elif kind == "output":
            self._check_keys(line, {"output"})
            self.nodes.append(self.program.graph.output(self._list(line["output"])))
            self.finished = True
        else:
            raise self._error(f"wants an input, a tensor, an op or the output, got {kind!r:.80}")

    def finish(self, inputs: Sequence[TensorForm], max_bytes: int | None) -> ProgramGraph:
        if not self.finished or self.num_inputs != len(inputs):
            raise FileFormatError(
                f"the graph is cut off, or has {self.num_inputs} inputs where the manifest names {len(inputs)}"
            )
        graph, root = self.program.graph, self.program.root
        forms = dict(zip(graph.find_nodes(op="placeholder"), inputs, strict=True))
        forms |= {node: TensorForm.of(root_tensor(root, node)) for node in graph.find_nodes(op="get_attr")}
        checker = OperationChecker(len(self.nodes), FileFormatError)
        try:
            # The cheap check comes first, so that no operator is tried that nothing uses.
            check(self.program, (Fact.SITES_LOWERED, Fact.READS_LOWERED, Fact.NO_DEAD_NODES))
            infer_values(graph, forms.__getitem__, checker.check)
            checker.check_whole(self.program)
            check_memory(graph, max_bytes)
        except FileFormatError:
            raise
        except VerificationError as error:
            raise FileFormatError(f"the graph is none that l2c_compile makes: {error}") from error
        except Exception as error:  # torch's operators raise whatever they like about their arguments
            raise FileFormatError(f"an operator of the graph does not take what it is given: {error!s:.300}") from error
        if not all(isinstance(n.meta["val"], Tensor) for n in graph.output_node().all_input_nodes):
            raise FileFormatError("the graph returns something else than tensors")
        return self.program

    def _tensor(self, line: dict[str, object]) -> Node:
        wanted = {"tensor", "record", "sha256", "offset", "dtype", "shape", "stride", "device"}
        self._check_keys(line, wanted, {"requires_grad"})
        record, sha256, offset = line["record"], line["sha256"], line["offset"]
        requires_grad = line.get("requires_grad", False)
        if not isinstance(record, str) or not isinstance(sha256, str) or not _SHA256.fullmatch(sha256):
            raise self._error("wants the name of a record and its sha256")
        if not _is_count(offset):
            raise self._error(f"wants an offset in elements, got {offset!r:.80}")
        form = decode_form(line, self._where)
        has_gradient = form.dtype.is_floating_point or form.dtype.is_complex
        if type(requires_grad) is not bool or (requires_grad and not has_gradient):
            raise self._error(f"wants a dtype that has gradients, or none, got {requires_grad!r:.80}")
        tensor = self.load(StoredTensor(record, sha256, form, offset))
        # The name in the file is not taken, because it would become code.
        name = f"tensor_{len(self.nodes)}"
        if requires_grad:
            self.program.root.register_parameter(name, nn.Parameter(tensor))
        else:
            self.program.root.register_buffer(name, tensor)
        return self.program.graph.create_node("get_attr", name)

    def _call(self, line: dict[str, object]) -> Node:
        self._check_keys(line, {"op", "args"}, {"kwargs", "evaluation", "path"})
        name, kwargs, evaluation, path = (line.get(key) for key in ("op", "kwargs", "evaluation", "path"))
        target = operator.getitem if name == _GETITEM else self._operator(name)
        args = self._list(line["args"])
        named = {key: self._argument(value) for key, value in kwargs.items()} if isinstance(kwargs, dict) else {}
        if isinstance(target, OpOverload):
            unknown = named.keys() - {argument.name for argument in target._schema.arguments}
            if unknown or len(args) > len(target._schema.arguments):
                raise self._error(f"gives {name} arguments that it does not have")
            target = initialised(target)
        elif named or len(args) != 2 or not isinstance(args[0], Node) or type(args[1]) is not int:
            raise self._error("wants getitem of a value and a number")
        node = self.program.graph.call_function(target, tuple(args), named)
        if evaluation is not None:
            if not _is_count(evaluation) or evaluation >= self.num_evaluations:
                raise self._error(f"wants an evaluation below {self.num_evaluations}, got {evaluation!r:.80}")
            node.meta["evaluation"] = evaluation
        if path is not None:
            if not isinstance(path, str) or not path.isprintable():
                raise self._error(f"wants a module path, got {path!r:.80}")
            node.meta["nn_module_stack"] = {path: (path, "")}
        return node

    def _operator(self, name: object) -> OpOverload[..., object]:
        if not isinstance(name, str) or "::" not in name:
            raise self._error(f"wants an operator of torch or of l2c_compile, got {name!r:.80}")
        target = operator_named(name)
        if target is None:
            raise self._error(f"calls {name!r:.80}, which torch {torch.__version__} does not have")
        reason = why_refused(target)
        if reason is not None:
            raise self._error(f"calls {name}, which {reason}")
        return target

    def _list(self, value: object) -> list[Argument]:
        if not isinstance(value, list):
            raise self._error(f"wants a list, got {type(value).__name__}")
        return [self._argument(item) for item in value]

    def _argument(self, value: object) -> Argument:
        return decode_literal(value, self._where, self.nodes, self.place)

    @property
    def _where(self) -> str:
        return f"line {len(self.nodes) + 1} of the graph"

    def _error(self, what: str) -> FileFormatError:
        return FileFormatError(f"{self._where} {what}")

    def _check_keys(self, line: dict[str, object], wanted: set[str], allowed: Iterable[str] = ()) -> None:
        if not wanted <= line.keys() <= wanted.union(allowed):
            raise self._error(f"wants {', '.join(sorted(wanted))}, got {', '.join(sorted(line))[:200]}")


def encode_literal(value: object, what: str, numbers: Mapping[Node, str] | None = None) -> object:
    """Return the JSON form of an argument of an operator: a Python value, or a nested list of them.

    Args:
        value: the argument to encode.
        what: the name of the value in an error.
        numbers: the reference that stands for each node.

    Raises:
        SaveError: if the value has no JSON form.
    """
    if numbers is not None and isinstance(value, Node):
        return numbers[value]
    if isinstance(value, (list, tuple)):
        return [encode_literal(item, what, numbers) for item in value]
    if value is None or type(value) is bool or (type(value) is int and abs(value) <= _MAX_INT):
        return value
    if type(value) is float:
        return value if math.isfinite(value) else {"float": str(value)}
    if type(value) is str:
        return {"str": value}
    if isinstance(value, torch.device):
        return {"device": str(value)}
    for kind, names in _NAMED.items():
        for name, named in names.items():
            if value is named:
                return {kind: name}
    raise SaveError(f"{what} is {value!r:.80} of type {type(value).__name__}, which a file cannot hold")


def decode_literal(
    value: object,
    where: str,
    nodes: Sequence[Node] = (),
    place: Callable[[torch.device], torch.device] = lambda device: device,
    depth: int = _MAX_DEPTH,
) -> Argument:
    """Return the value that ``encode_literal`` encoded.

    Args:
        value: the parsed JSON.
        where: the place of the value in the file, for an error.
        nodes: the nodes that references refer to.
        place: a function from a device of the file to one of this machine.
        depth: the depth to which lists may be nested.

    Raises:
        FileFormatError: if the JSON is no such value.
    """
    if isinstance(value, str):
        match = _REFERENCE.fullmatch(value)
        if match is None or int(match[1]) >= len(nodes):
            raise FileFormatError(f"{where} refers to {value!r:.80}, which is no earlier line")
        return nodes[int(match[1])]
    if isinstance(value, list) and depth > 0 and len(value) <= MAX_PIECES:
        return [decode_literal(item, where, nodes, place, depth - 1) for item in value]
    if value is None or isinstance(value, (bool, float)):
        return value
    if isinstance(value, int) and abs(value) <= _MAX_INT:
        return value
    if isinstance(value, dict) and len(value) == 1:
        ((kind, text),) = value.items()
        if kind == "device":
            return place(_decode_device(text, where))
        if kind == "float" and text in _FLOATS:
            return float(text)
        if kind == "str" and isinstance(text, str):
            return text
        if kind in _NAMED and isinstance(text, str) and text in _NAMED[kind]:
            return _NAMED[kind][text]
    raise FileFormatError(f"{where} has the value {value!r:.80}, which is of no known form")


def encode_form(form: TensorForm, what: str) -> dict[str, object]:
    """Return a tensor's form in JSON types.

    Raises:
        SaveError: if the dtype is one that a file cannot hold; the message begins with ``what``.
    """
    dtype = str(form.dtype).removeprefix("torch.")
    if dtype not in _NAMED["dtype"]:
        raise SaveError(f"{what} is of dtype {dtype}, which a file cannot hold; convert it to one that torch adds in")
    return {"dtype": dtype, "shape": list(form.shape), "stride": list(form.stride), "device": str(form.device)}


def decode_form(document: Mapping[str, object], where: str) -> TensorForm:
    """Return the form that ``encode_form`` encoded.

    Raises:
        FileFormatError: if the document describes no tensor.
    """
    name, shape, stride = document.get("dtype"), document.get("shape"), document.get("stride")
    dtype = _NAMED["dtype"].get(name) if isinstance(name, str) else None
    if not isinstance(dtype, torch.dtype):
        raise FileFormatError(f"{where} wants a dtype, got {name!r:.80}")
    if not isinstance(shape, list) or not isinstance(stride, list) or not len(shape) == len(stride) <= _MAX_DIMS:
        raise FileFormatError(f"{where} wants a shape and a stride of equal length")
    if not all(_is_count(size) for size in [*shape, *stride]) or math.prod(shape) > _MAX_INT:
        raise FileFormatError(f"{where} wants a shape and a stride of counts, got {shape!r:.80} and {stride!r:.80}")
    return TensorForm(tuple(shape), tuple(stride), dtype, _decode_device(document.get("device"), where))


def _encode_call(node: Node, numbers: Mapping[Node, str]) -> dict[str, object]:
    if node.target is operator.getitem:
        name = _GETITEM
    else:
        reason = why_refused(node.target)
        if reason is not None:
            raise SaveError(refusal(node, reason))
        assert isinstance(node.target, OpOverload)
        name = name_of(node.target)
    what = f"an argument of {name}"
    line: dict[str, object] = {"op": name, "args": encode_literal(node.args, what, numbers)}
    if node.kwargs:
        line["kwargs"] = {key: encode_literal(value, what, numbers) for key, value in node.kwargs.items()}
    if evaluation_of(node) is not None:
        line["evaluation"] = evaluation_of(node)
    if "nn_module_stack" in node.meta:
        line["path"] = module_path(node)
    return line


def _decode_device(text: object, where: str) -> torch.device:
    if isinstance(text, str) and _DEVICE.fullmatch(text):
        try:
            return torch.device(text)
        except RuntimeError as error:
            raise FileFormatError(f"{where} names the device {text!r}, which torch does not know") from error
    raise FileFormatError(f"{where} names the device {text!r:.80}, which torch does not know")


def _is_count(value: object) -> TypeGuard[int]:
    return type(value) is int and 0 <= value <= _MAX_INT
