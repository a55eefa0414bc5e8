"""Write a static graph as lines of JSON, one for each node, and read it back, checking a stranger's file line by line.

    {"input": 0}
    {"tensor": "denoiser.fc.weight", "record": "data/weights/weight_0", "sha256": "...", "dtype": "float32", ...}
    {"op": "aten::linear", "args": ["%0", "%1"], "evaluation": 0, "path": "fc"}
    {"output": ["%2"]}

``%n`` is the value of line n. Nothing in a line becomes Python code: names of inputs, tensors and nodes are made here,
operators are looked up among torch's own and must be functions that return tensors, and the names of their arguments
must be in their schema.
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
from torch._ops import OpOverload, OpOverloadPacket
from torch.fx.node import Argument, Node

from l2c_compile.errors import FileFormatError, SaveError, VerificationError
from l2c_compile.files.documents import MAX_JSON_BYTES, parse_json
from l2c_compile.graphs.facts import Fact, check
from l2c_compile.graphs.forms import TensorForm
from l2c_compile.graphs.loop_graph import ProgramGraph
from l2c_compile.graphs.nodes import evaluation_of, module_path, output_list
from l2c_compile.sampler_file.exported_program import infer_values

_MAX_NODES = 1_000_000
_MAX_DEPTH = 8
_MAX_DIMS = 64
# The most tensors in a list that is an argument or a result.
_MAX_PIECES = 10_000
_MAX_INT = 2**63 - 1

_NAMED: Mapping[str, Mapping[str, torch.dtype | torch.layout | torch.memory_format]] = {
    kind: {str(value).removeprefix("torch."): value for value in vars(torch).values() if isinstance(value, known)}
    for kind, known in (("dtype", torch.dtype), ("layout", torch.layout), ("memory_format", torch.memory_format))
}
_FLOATS = ("inf", "-inf", "nan")
_OPERATOR = re.compile(r"(aten|prims|l2c)::([A-Za-z0-9_]+)(?:\.([A-Za-z0-9_]+))?", re.ASCII)
_REFERENCE = re.compile(r"%(0|[1-9][0-9]{0,7})", re.ASCII)
_DEVICE = re.compile(r"[a-z]{1,20}(:[0-9]{1,3})?", re.ASCII)
_SHA256 = re.compile(r"[0-9a-f]{64}", re.ASCII)
_GETITEM = "getitem"

aten = torch.ops.aten

# The operators that return a list, either of as many tensors as they are given or of as many as _check_pieces counts.
_CUTS = frozenset(
    {aten.split, aten.split_with_sizes, aten.unsafe_split, aten.unsafe_split_with_sizes, aten.unbind, aten.chunk}
    | {aten.unsafe_chunk, aten.tensor_split, aten.hsplit, aten.vsplit, aten.dsplit, aten.meshgrid}
    | {aten.broadcast_tensors, aten.atleast_1d, aten.atleast_2d, aten.atleast_3d}
)


class OperationBudget:
    """Limits how many different operations a graph may have, because each is tried on fake tensors when it is read.

    Evaluations are copies of one another, so a loop has few different operations: 1500, and one for every 8 lines, are
    enough for any loop, and a hostile file then takes no longer to read than an honest one of its size.
    """

    def __init__(self, num_lines: int, error: type[SaveError] | type[FileFormatError]) -> None:
        self._limit = 1500 + num_lines // 8
        self._error = error
        self._num_spent = 0

    def spend(self, node: Node) -> None:
        """Count one operation.

        Raises:
            SaveError: if there are too many, and the budget was made with this error.
            FileFormatError: if there are too many, and the budget was made with this error.
        """
        self._num_spent += 1
        if self._num_spent > self._limit:
            raise self._error(
                f"the graph has more than {self._limit} different operations, which a file does not hold; compile fewer"
                " evaluations"
            )


@dataclass(frozen=True)
class StoredTensor:
    """The place of a tensor's values in the archive: a record that holds the bytes of a storage, and the form in it."""

    record: str
    sha256: str
    """The digest of the whole record."""
    form: TensorForm
    offset: int
    """The position of the first element in the storage, in elements."""

    @property
    def end_bytes(self) -> int:
        """The number of bytes that the storage needs at least."""
        if 0 in self.form.shape:
            return 0
        steps = zip(self.form.shape, self.form.stride, strict=True)
        return (self.offset + sum((size - 1) * step for size, step in steps) + 1) * self.form.dtype.itemsize


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
            form = encode_form(where.form)
            line = {"tensor": str(node.target), "record": where.record, "sha256": where.sha256, "offset": where.offset}
            line |= form
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
) -> ProgramGraph:
    """Return the graph of ``encode_graph``'s lines, after trying every operator of it on fake tensors.

    Args:
        content: the bytes of the lines.
        inputs: the forms of the graph's inputs, on the devices where they will be.
        num_evaluations: the number of evaluations that a line may name.
        place: a function from a device of the file to one of this machine.
        load: a function that reads a tensor onto the device where it will be.

    Raises:
        FileFormatError: if a line is malformed, calls anything but a function of tensors, or does not fit the other
            lines.
    """
    reader = _GraphBuilder(num_evaluations, place, load)
    stream = io.BytesIO(content)
    while line := stream.readline(MAX_JSON_BYTES + 1):
        reader.read(parse_json(line))
    return reader.finish(inputs)


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

    def finish(self, inputs: Sequence[TensorForm]) -> ProgramGraph:
        if not self.finished or self.num_inputs != len(inputs):
            raise FileFormatError(
                f"the graph is cut off, or has {self.num_inputs} inputs where the manifest names {len(inputs)}"
            )
        graph, root = self.program.graph, self.program.root
        forms = dict(zip(graph.find_nodes(op="placeholder"), inputs, strict=True))
        forms |= {node: TensorForm.of(root.get_buffer(str(node.target))) for node in graph.find_nodes(op="get_attr")}
        budget = OperationBudget(len(self.nodes), FileFormatError)

        def before(node: Node) -> None:
            budget.spend(node)
            _check_pieces(node)

        try:
            # The cheap check comes first, so that no operator is tried that nothing uses.
            check(self.program, (Fact.SITES_LOWERED, Fact.READS_LOWERED, Fact.NO_DEAD_NODES))
            infer_values(graph, forms.__getitem__, before)
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
        self._check_keys(line, {"tensor", "record", "sha256", "offset", "dtype", "shape", "stride", "device"})
        record, sha256, offset = line["record"], line["sha256"], line["offset"]
        if not isinstance(record, str) or not isinstance(sha256, str) or not _SHA256.fullmatch(sha256):
            raise self._error("wants the name of a record and its sha256")
        if not _is_count(offset):
            raise self._error(f"wants an offset in elements, got {offset!r:.80}")
        tensor = self.load(StoredTensor(record, sha256, decode_form(line, self._where), offset))
        # The name in the file is not taken, because it would become code.
        name = f"tensor_{len(self.nodes)}"
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
        match = _OPERATOR.fullmatch(name) if isinstance(name, str) else None
        if match is None:
            raise self._error(f"wants an operator of torch or of l2c_compile, got {name!r:.80}")
        namespace, base, overload = match.groups()
        packet = getattr(getattr(torch.ops, namespace), base, None)
        target = getattr(packet, overload or "default", None) if isinstance(packet, OpOverloadPacket) else None
        if not isinstance(target, OpOverload):
            raise self._error(f"calls {name}, which torch {torch.__version__} does not have")
        reason = _why_refused(target)
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
    if isinstance(value, list) and depth > 0 and len(value) <= _MAX_PIECES:
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


def encode_form(form: TensorForm) -> dict[str, object]:
    """Return a tensor's form in JSON types."""
    dtype = str(form.dtype).removeprefix("torch.")
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
        reason = _why_refused(node.target) if isinstance(node.target, OpOverload) else "is no operator of torch"
        if reason is not None:
            path = module_path(node)
            raise SaveError(
                f"{node.target}{f' in module {path!r}' if path else ''} cannot be saved, because it {reason}; use"
                " functions of torch in its place"
            )
        assert isinstance(node.target, OpOverload)
        name = _name(node.target)
    what = f"an argument of {name}"
    line: dict[str, object] = {"op": name, "args": encode_literal(node.args, what, numbers)}
    if node.kwargs:
        line["kwargs"] = {key: encode_literal(value, what, numbers) for key, value in node.kwargs.items()}
    if evaluation_of(node) is not None:
        line["evaluation"] = evaluation_of(node)
    if "nn_module_stack" in node.meta:
        line["path"] = module_path(node)
    return line


def _why_refused(target: OpOverload[..., object]) -> str | None:
    """Return why a file may not call an operator; None if it may."""
    schema = target._schema
    if not _OPERATOR.fullmatch(_name(target)):
        return "is an operator of another library"
    if schema.is_mutable:
        return "writes into an argument"
    if any(argument.name == "filename" for argument in schema.arguments):
        return "touches files"
    types = {str(result.type) for result in schema.returns}
    if types != {"Tensor"} and not (types == {"List[Tensor]"} and target.overloadpacket in _CUTS):
        return "returns something else than a fixed number of tensors"
    return None


def _check_pieces(node: Node) -> None:
    """Raise ``ValueError`` if the node would cut a tensor into so many pieces that they alone fill the memory."""
    if not isinstance(node.target, OpOverload) or node.target.overloadpacket not in _CUTS:
        return
    given = dict(zip((argument.name for argument in node.target._schema.arguments), node.args, strict=False))
    given.update(node.kwargs)
    value, dim = given.get("self"), given.get("dim", 0)
    if not isinstance(value, Node) or not isinstance(dim, int) or any(isinstance(v, list) for v in given.values()):
        return  # as many pieces as the list has entries
    num_pieces = given.get("sections", given.get("chunks"))
    if num_pieces is None:
        size = given.get("split_size", 1)
        num_pieces = value.meta["val"].shape[dim] // max(1, size if isinstance(size, int) else 1)
    if not isinstance(num_pieces, int) or num_pieces > _MAX_PIECES:
        raise ValueError(f"{node.target} makes {num_pieces} pieces, at most {_MAX_PIECES} are read")


def _name(target: OpOverload[..., object]) -> str:
    return str(target.name())  # type: ignore[no-untyped-call]


def _decode_device(text: object, where: str) -> torch.device:
    if isinstance(text, str) and _DEVICE.fullmatch(text):
        try:
            return torch.device(text)
        except RuntimeError as error:
            raise FileFormatError(f"{where} names the device {text!r}, which torch does not know") from error
    raise FileFormatError(f"{where} names the device {text!r:.80}, which torch does not know")


def _is_count(value: object) -> TypeGuard[int]:
    return type(value) is int and 0 <= value <= _MAX_INT
