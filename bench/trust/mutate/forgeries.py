"""Saved samplers with forged graphs: every checksum is right, and the operators are given whatever a draw says.

A graph calls one to three operators on tensors of the file and on its inputs. An operator is one of ``calls.py``, with
arguments that it takes, or any of torch's with arguments drawn by its schema until they suit its shapes. Most calls are
then changed: numbers, sizes, strides, indices, dtypes, positions, or the operator itself.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from functools import cache
from typing import Any

import torch
from torch._ops import OpOverload

from bench.trust.mutate.calls import CALLS
from bench.trust.mutate.raw import Draw
from bench.trust.mutate.zips import Records, zipped
from l2c_compile.sampler_file.allowed_operators import ALLOWED, name_of, operator_named, why_refused

_OURS = "archive/data/extra/l2c_compile/"
_DTYPES = {"f": torch.float32, "c": torch.complex64, "b": torch.bool, "i": torch.int64}
_OTHER_DTYPES = (
    "float64",
    "float16",
    "bfloat16",
    "int32",
    "uint8",
    "bool",
    "int64",
    "complex64",
    "float8_e5m2",
    "quint8",
)
_INTEGERS = (0, 1, 2, 3, 4, 5, 7, 16, 100, 4096, 2**31 - 1, 2**31, 2**32, 2**40, 2**62, 2**63 - 1)
_FLOATS = (0.0, -1.0, 0.5, 3.0, 1e-300, 1e300, 1e30, {"float": "nan"}, {"float": "inf"}, {"float": "-inf"})
_HOSTILE_FLOATS = (math.nan, math.inf, -math.inf, 3e38, -3e38, 1e10, -1e10, 1e-40)
_TEXTS = ("none", "sum", "mean", "max", "constant", "reflect", "floor", "trunc", "tanh", "same", "right", "x" * 30)
_SPECS = ("f2,4", "f3,4", "f4", "f2,3,4", "f4,4", "f2,4,6,6", "f1", "i3,4<4", "i4<3", "b3,4", "c3,4", "f0,4", "f")

_Json = Any
"""What JSON can hold."""


class _Graph:
    """The lines of a forged graph, and the records of its tensors."""

    def __init__(self, draw: Draw, inputs: int) -> None:
        self.draw = draw
        self.lines: list[dict[str, _Json]] = [{"input": 0} for _ in range(inputs)]
        self.records: dict[str, bytes] = {}
        self.results: list[str] = []

    def add(self, line: dict[str, _Json]) -> str:
        """Add a line and return the reference to it."""
        self.lines.append(line)
        return f"%{len(self.lines) - 1}"

    def tensor(self, spec: str) -> str:
        """Add a tensor of the file and return the reference to it."""
        sizes, _, below = spec[1:].partition("<")
        shape = [int(size) for size in sizes.split(",") if size]
        dtype = _DTYPES[spec[0]]
        shape = self._shape(shape)
        generator = torch.Generator().manual_seed(self.draw.randrange(2**31))
        numel = max(1, math.prod(shape)) + self.draw.choice((0, 0, 0, 5))
        if dtype == torch.int64:
            values = torch.randint(0, int(below or 4), (numel,), generator=generator)
            if self.draw.random() < 0.3:
                values[self.draw.randrange(numel)] = self.draw.choice(_INTEGERS) * self.draw.choice((1, 1, -1))
        elif dtype == torch.bool:
            values = torch.rand(numel, generator=generator) < 0.5
        else:
            values = torch.randn(numel, generator=generator, dtype=dtype)
            if self.draw.random() < 0.15:
                values[self.draw.randrange(numel)] = self.draw.choice(_HOSTILE_FLOATS)
        content = values.view(torch.uint8).numpy().tobytes()
        record = f"data/constants/tensor_{len(self.records)}"
        self.records["archive/" + record] = content
        stride = list(torch.empty(shape, device="meta").stride())
        offset = 0
        name = str(dtype).removeprefix("torch.")
        if self.draw.random() < 0.04:
            stride = [self.draw.choice((0, 1, 2, step, step)) for step in stride]
        if self.draw.random() < 0.02:
            offset = self.draw.choice((1, 2, 5, numel, 2**40))
        if self.draw.random() < 0.02:
            name = self.draw.choice(_OTHER_DTYPES)
        return self.add(
            {"tensor": record, "record": record, "sha256": hashlib.sha256(content).hexdigest(), "offset": offset}
            | {"dtype": name, "shape": shape, "stride": stride, "device": "cpu"}
            | ({"requires_grad": True} if name == "float32" and self.draw.random() < 0.1 else {})
        )

    def _shape(self, shape: list[int]) -> list[int]:
        chance = self.draw.random()
        if chance > 0.1:
            return shape
        at = self.draw.randrange(len(shape) + 1)
        if chance < 0.02:
            return [*shape[:at], self.draw.choice((0, 1, 2)), *shape[at:]]
        if chance < 0.04:
            return [*shape[:at], *shape[at + 1 :]]
        if at < len(shape):
            shape[at] = self.draw.choice((0, 1, shape[at] + 1, max(0, shape[at] - 1), 2 * shape[at]))
        return shape

    def call(self) -> None:
        """Add a call and its results."""
        name, args, kwargs = self._valid_call()
        if self.draw.random() < 0.08:
            name = self.draw.choice(_names(self.draw.random() < 0.7))
        args, kwargs = self._placed(args), {key: self._placed(value) for key, value in kwargs.items()}
        if self.draw.random() < 0.5:
            for _ in range(self.draw.choice((1, 1, 1, 2))):
                args = self._changed(args)
        if self.draw.random() < 0.1:
            kwargs = self._changed(kwargs)
        if self.draw.random() < 0.02:
            unasked = self.draw.choice(("memory_format", "layout", "pin_memory", "dtype", "out", "generator"))
            kwargs[unasked] = self._value()
        line: dict[str, _Json] = {"op": name, "args": args}
        if kwargs:
            line["kwargs"] = kwargs
        reference = self.add(line)
        target = operator_named(name)
        count = 1 if target is None else len(target._schema.returns)
        is_list = target is not None and str(target._schema).endswith("[]")
        if count == 1 and not is_list:
            self.results.append(reference)
            return
        for index in range(self.draw.choice((1, 2)) if is_list or not count else count):
            self.results.append(self.add({"op": "getitem", "args": [reference, index]}))

    def unread(self) -> list[str]:
        """Return the tensors that no call reads; what nobody reads is refused for that alone."""
        read = json.dumps([[line.get("args"), line.get("kwargs")] for line in self.lines])
        every = [f"%{number}" for number, line in enumerate(self.lines) if "op" not in line]
        return [each for each in every if f'"{each}"' not in read]

    def _valid_call(self) -> tuple[str, _Json, dict[str, _Json]]:
        if self.draw.random() < 0.6:
            name, args = self.draw.choice(CALLS)
            return name, args, {}
        allowed = self.draw.random() < 0.9
        name = self.draw.choice(_names(allowed))
        target = operator_named(name)
        assert target is not None
        args, kwargs = self._arguments(target)
        for _ in range(25):
            # What no file may call is not tried here, either.
            if not allowed or _suits(target, args, kwargs):
                break
            args, kwargs = self._arguments(target)
        return name, args, kwargs

    def _arguments(self, target: OpOverload) -> tuple[list[_Json], dict[str, _Json]]:
        args: list[_Json] = []
        kwargs: dict[str, _Json] = {}
        for argument in target._schema.arguments:
            if argument.has_default_value() and self.draw.random() < 0.6:
                if not argument.kwarg_only:
                    break
                continue
            value = self._argument(str(argument.real_type))
            if argument.kwarg_only:
                kwargs[argument.name] = value
            else:
                args.append(value)
        return args, kwargs

    def _argument(self, kind: str) -> _Json:
        if kind.startswith("Optional["):
            return None if self.draw.random() < 0.5 else self._argument(kind[9:-1])
        if kind.startswith("List["):
            return [self._argument(kind[5:-1]) for _ in range(self.draw.choice((1, 2, 2, 3)))]
        drawn: dict[str, tuple[_Json, ...]] = {
            "Tensor": _SPECS,
            "int": (0, 1, 1, 2, 3, -1),
            "float": (0.5, 1.0, 2.0),
            "number": (1, 2, 0.5),
            "bool": (True, False),
            "str": tuple({"str": text} for text in _TEXTS),
            "Device": ({"device": "cpu"},),
            "ScalarType": ({"dtype": "float32"}, {"dtype": "int64"}, {"dtype": "bool"}),
            "MemoryFormat": ({"memory_format": "contiguous_format"}, {"memory_format": "channels_last"}),
        }
        return self.draw.choice(drawn.get(kind, (None,)))

    def _placed(self, argument: _Json) -> _Json:
        if isinstance(argument, str):
            if argument == "f2,4" and self.draw.random() < 0.5:
                return self.draw.choice(("%0", "%1", *self.results))
            return self.tensor(argument)
        if isinstance(argument, list):
            return [self._placed(each) for each in argument]
        return argument

    def _changed(self, arguments: _Json) -> _Json:
        """Return arguments with one of them changed."""
        if isinstance(arguments, dict) and arguments:
            key = self.draw.choice(sorted(arguments))
            return {**arguments, key: self._other(arguments[key])}
        if isinstance(arguments, list) and arguments:
            at = self.draw.randrange(len(arguments))
            return [*arguments[:at], self._other(arguments[at]), *arguments[at + 1 :]]
        return arguments

    def _other(self, value: _Json) -> _Json:
        if isinstance(value, bool):
            return not value
        if isinstance(value, int):
            near = (value + 1, value - 1, -value, 2 * value, 0)
            return self.draw.choice((*near, *_INTEGERS)) * self.draw.choice((1, 1, 1, -1))
        if isinstance(value, float):
            return self.draw.choice(_FLOATS)
        if isinstance(value, list):
            if value and self.draw.random() < 0.7:
                return self._changed(value)
            return self.draw.choice(([], value[:-1], [*value, *value], [*value, self._value()]))
        return self._value() if value is not None or self.draw.random() < 0.5 else None

    def _value(self) -> _Json:
        return self.draw.choice(
            (
                *(None, True, self.draw.choice(_INTEGERS), self.draw.choice(_FLOATS), [1, 1], []),
                *(f"%{self.draw.randrange(len(self.lines))}", {"str": self.draw.choice(_TEXTS)}, self._placed("f2,4")),
                *(self.tensor(self.draw.choice(_SPECS)), {"dtype": self.draw.choice(_OTHER_DTYPES)}),
                *({"layout": "sparse_coo"}, {"memory_format": "channels_last"}, {"device": "meta"}),
            )
        )


def forged(draw: Draw, valid: Records) -> bytes:
    """Return a saved sampler that calls what nobody compiled, and whose checksums are right.

    Args:
        draw: the draw that decides everything.
        valid: the records of a valid sampler, whose inputs stay.
    """
    schedule = valid[_OURS + "schedule.json"]
    manifest = json.loads(valid[_OURS + "manifest.json"])
    graph = _Graph(draw, inputs=2)
    for _ in range(draw.choice((1, 1, 1, 2, 3))):
        graph.call()
    lines = [*graph.lines, {"output": [*graph.results, *graph.unread()]}]
    content = b"".join(json.dumps(line).encode() + b"\n" for line in lines)
    if draw.random() < 0.15:
        _change_input(draw, manifest)
    manifest["result"] = {"list": [{"leaf": number} for number in range(len(lines[-1]["output"]))]}
    hashed = {"graph": content, "schedule": schedule}
    manifest["sha256"] = {name: hashlib.sha256(each).hexdigest() for name, each in hashed.items()}
    ours = {"manifest.json": json.dumps(manifest).encode(), "graph.jsonl": content, "schedule.json": schedule}
    return zipped({**graph.records, **{_OURS + name: each for name, each in ours.items()}})


def _change_input(draw: Draw, manifest: dict[str, _Json]) -> None:
    """Give one of the inputs another form, or the summary another number."""
    if draw.random() < 0.2:
        key = draw.choice(sorted(manifest["summary"]))
        manifest["summary"][key] = draw.choice((-1, 2**63, [2**40], [], None))
        return
    form = draw.choice((manifest["noise"], manifest["conditions"]["y"]))["tensor"]
    change = draw.choice(("shape", "stride", "dtype", "both"))
    if change == "dtype":
        form["dtype"] = draw.choice(_OTHER_DTYPES)
    if change in ("shape", "both"):
        form["shape"] = draw.choice(([2, 5], [0, 4], [3, 4], [1, 4], [2, 2**20], [2**30, 4]))
    if change in ("stride", "both"):
        form["stride"] = draw.choice(([1, 2], [0, 1], [0, 0], [1, 1], [5, 1], [8, 2], [2**40, 1]))


@cache
def _names(allowed: bool) -> tuple[str, ...]:
    """Return the operators of torch that a file may call, or all of ATen's."""
    if not allowed:
        return tuple(sorted(name for name in torch._C._dispatch_get_all_op_names() if operator_named(name) is not None))
    packets = (getattr(getattr(torch.ops, name.split("::")[0]), name.split("::")[1]) for name in sorted(ALLOWED))
    targets = [getattr(packet, overload) for packet in packets for overload in packet.overloads()]
    return tuple(name_of(target) for target in targets if why_refused(target) is None)


def _suits(target: OpOverload, args: list[_Json], kwargs: Mapping[str, _Json]) -> bool:
    """Return whether the operator takes such shapes."""
    try:
        target(*map(_on_meta, args), **{key: _on_meta(value) for key, value in kwargs.items()})
    except Exception:  # torch's operators raise whatever they like
        return False
    return True


def _on_meta(argument: _Json) -> object:
    if isinstance(argument, str):
        shape = [int(size) for size in argument[1:].partition("<")[0].split(",") if size]
        return torch.empty(shape, dtype=_DTYPES[argument[0]], device="meta")
    if isinstance(argument, list):
        return [_on_meta(each) for each in argument]
    if isinstance(argument, dict):
        ((kind, text),) = argument.items()
        return text if kind == "str" else torch.device(text) if kind == "device" else getattr(torch, text)
    return argument
