"""Value numbering: programs as expressions, in a normal form in which equal values are one object.

Programs are interpreted on ``Value`` instead of tensors, in one ``ValueTable``. An expression that was met before is
the same object again (hash consing), so two results are equal iff they are identical, and whole graphs are compared in
time linear in their nodes: for expressions, this is what graph isomorphism means.

What counts as equal is written here, not in the passes, and shares no code with them.

In every table
    A site mark is its argument, a cache read is its rule. Copies and views that change neither shape, strides, dtype
    nor device are their argument; so is dropout outside training. A part of a split is a slice, a slice of a slice is
    one slice. Arguments left out are the defaults of the schema.
Bit for bit (``exact``)
    Besides, arithmetic that IEEE 754 rounds correctly does not see the memory layout of its operands, only that of its
    result.
Up to rounding
    Nothing sees a layout. A slice of a projection is a projection by slices of its weight and bias, or of a slice of
    its input; a slice of a concatenation is a slice of the part it lies in; a slice of an unsqueezed tensor is an
    unsqueezed slice. Additions of tensors of one form are the multiset of their terms, kept as the sum of random
    128-bit tags of the terms: so a chain of additions stays linear, and two different multisets are taken for one with
    a probability of 2**-128.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import operator
import random
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch._ops import OpOverload

from l2c_compile.checking.operators import Inference, bind, hashable, name_of, replace_tensors
from l2c_compile.errors import VerificationError
from l2c_compile.graphs.forms import TensorForm
from l2c_compile.graphs.marks import CACHE_READ, SITE
from l2c_compile.schedules.rules import Reading, Rule, rule_from_dict


class Leaves:
    """Makes the values of tensors that a program refers to: weights by identity, other constants by content."""

    def __init__(self, table: ValueTable, denoiser: nn.Module) -> None:
        self._table = table
        self.weights: dict[str, Tensor] = {}
        """Parameters and buffers of the denoiser by their paths, tied ones by each of them."""
        self._paths: dict[int, str] = {}
        self._constants: dict[int, tuple[Tensor, Value]] = {}
        for named in (denoiser.named_parameters, denoiser.named_buffers):
            for path, tensor in named(remove_duplicate=False):
                self.weights[path] = tensor
                self._paths.setdefault(id(tensor), path)

    def of(self, tensor: Tensor) -> Value:
        """Return the value of a tensor that a program refers to."""
        if id(tensor) in self._paths:
            return self._table.leaf("weight", self._paths[id(tensor)], TensorForm.of(tensor))
        if id(tensor) not in self._constants:
            value = self._table.leaf("constant", content_of(tensor), TensorForm.of(tensor))
            # The tensor is kept so that no other can get its id.
            self._constants[id(tensor)] = tensor, value
        return self._constants[id(tensor)][1]


def content_of(tensor: Tensor) -> str:
    """Return a digest of the elements of a tensor; on the meta device all tensors have the same."""
    if tensor.device.type == "meta":
        return "without content"
    plain = tensor.detach().cpu().contiguous().reshape(-1)
    return hashlib.sha256(plain.view(torch.uint8).numpy().tobytes()).hexdigest()[:16]


def values_in(arguments: Iterable[object]) -> Iterator[Value]:
    """Yield the values in nested tuples."""
    for argument in arguments:
        if isinstance(argument, Value):
            yield argument
        elif isinstance(argument, tuple):
            yield from values_in(argument)


def needed_for(results: Iterable[object]) -> set[Value]:
    """Return every value that the results are made from, themselves included."""
    found: set[Value] = set()
    stack = [value for value in results if isinstance(value, Value)]
    while stack:
        value = stack.pop()
        if value not in found:
            found.add(value)
            stack += value.operands()
    return found


aten = torch.ops.aten

Place = tuple[int | None, str]
"""The evaluation (None outside of all evaluations) and the module path."""


@dataclass(eq=False, slots=True)
class Value:
    """An expression. Two expressions of one table are equal iff they are the same object."""

    target: object
    """The operation; for a leaf, the word for its kind."""
    arguments: tuple[object, ...]
    """The arguments in the order of the schema; there are Values among them, also inside tuples."""
    form: TensorForm | tuple[TensorForm | None, ...] | None
    tag: int
    """A random number of 128 bits; for a sum, the sum of the tags of its terms."""
    place: Place
    """The place where the expression was first met."""

    def operands(self) -> list[Value]:
        """Return the values that the expression is made from."""
        found: list[Value] = []
        for argument in self.arguments:
            if isinstance(argument, Value):
                found.append(argument)
            elif isinstance(argument, tuple):
                found += [element for element in argument if isinstance(element, Value)]
        return found

    def __str__(self) -> str:
        if not isinstance(self.target, str):
            return name_of(self.target)
        return _SUM if self.target == _SUM else f"{self.target} {self.arguments[0]}"


_SUM = "sum"

_COPIES = frozenset(
    {aten.clone, aten.alias, aten.detach, aten.lift_fresh, aten.lift_fresh_copy, aten.contiguous, aten._to_copy}
    | {aten.to}
)
_VIEWS = frozenset(
    {aten.view, aten._unsafe_view, aten.reshape, aten.expand, aten.permute, aten.transpose, aten.t, aten.squeeze}
    | {aten.unsqueeze, aten.flatten, aten.unflatten, aten.movedim, aten.narrow}
)
_RESHAPES = frozenset({aten.view, aten._unsafe_view, aten.reshape, aten.flatten, aten.unflatten})
_SPLITS = frozenset({aten.split.Tensor, aten.split_with_sizes.default, aten.chunk.default})
# These round each element correctly by itself, so it is the same whichever loop over the elements computes it.
_CORRECTLY_ROUNDED = frozenset({aten.add.Tensor, aten.sub.Tensor, aten.mul.Tensor, aten.div.Tensor, aten.neg.default})


class ValueTable:
    """Makes values, and each of them only once."""

    def __init__(self, *, exact: bool) -> None:
        self.exact = exact
        """Whether equal means bit for bit; otherwise it means up to rounding."""
        self.place: Place = (None, "")
        """The place that is noted on values that are new."""
        self.times_made: Counter[Value] = Counter()
        """How often each operation was asked for."""
        self._known: dict[object, Value] = {}
        self._boxed: dict[Value, int] = {}
        self._inference = Inference()
        self._random = random.Random(0)

    def leaf(self, kind: str, identity: object, form: TensorForm) -> Value:
        """Return the value of an input, a weight or a constant; two are equal where kind and identity are."""
        return self._intern(kind, (identity,), self._normal(form))

    def draw(self, number: int, target: OpOverload, args: Sequence[object], kwargs: Mapping[str, object]) -> Value:
        """Return the ``number``-th random draw of a program; no other draw is equal to it."""
        bound = bind(target, args, kwargs)
        return self._intern("draw", (number, target, *bound), self._infer(target, bound))

    def call(self, target: object, args: Sequence[object], kwargs: Mapping[str, object]) -> Value:
        """Return the value of an operation in normal form.

        Raises:
            VerificationError: if the operation does not take these operands.
        """
        if target is operator.getitem:
            return self._item(*args)  # type: ignore[arg-type]
        if not isinstance(target, OpOverload):
            raise VerificationError(f"{name_of(target)} is no operation of a static graph")
        bound = bind(target, args, kwargs)
        if target is SITE:
            return cast(Value, bound[0])
        if target is CACHE_READ:
            history, inputs, current, *_, rule = bound
            return self.apply_rule(rule_from_dict(json.loads(str(rule))), history, inputs, current)  # type: ignore[arg-type]
        raw = self._raw(target, bound)
        source = bound[0] if bound and isinstance(bound[0], Value) else None
        if source is not None and self._is_identity(target, bound, source, raw):
            return source
        value = self._rewritten(target, bound, raw)
        self.times_made[value] += 1
        return value

    def apply_rule(self, rule: Rule, history: Iterable[Value], inputs: Iterable[Value], current: Value | None) -> Value:
        """Return what a rule makes of values, by running its own ``combine`` on them."""
        reading: Reading[Any] = Reading(
            history=tuple(_SymbolicOperand(self, value) for value in history),
            inputs=tuple(_SymbolicOperand(self, value) for value in inputs),
            current_input=None if current is None else _SymbolicOperand(self, current),
        )
        result: _SymbolicOperand = rule.combine(reading)
        return result.value

    def without_copies(self, value: Value) -> Value:
        """Return the value that this one copies into another memory layout, or the value itself if it is no copy."""
        while self._is_copy(value.target, value.form, value.operands()[0] if value.operands() else None):
            value = value.operands()[0]
        return value

    def _rewritten(self, target: OpOverload, bound: tuple[object, ...], raw: object) -> Value:
        form = self._normal(raw)
        if target is aten.slice.Tensor:
            source, dim, start, end, step = bound
            assert isinstance(source, Value)
            if step == 1:
                return self._slice(source, dim, start, end)  # type: ignore[arg-type]
        if self.exact:
            if target in _CORRECTLY_ROUNDED and bound[2:] in ((), (1,)):
                bound = tuple(replace_tensors(argument, Value, self.without_copies) for argument in bound)
            return self._intern(target, bound, form)
        packet = target.overloadpacket
        if packet is aten.as_strided:
            raise VerificationError(
                f"{name_of(target)} reads elements by where they lie in memory, which is not followed up to rounding;"
                " compile with numerics='bitwise', or leave as_strided out of denoiser and loop"
            )
        if (
            packet in _RESHAPES
            and isinstance(form, TensorForm)
            and isinstance(bound[0], Value)
            and _same_dtype(bound[0], form)
        ):
            return self._intern(aten.reshape.default, (bound[0], form.shape), form)
        if target is aten.add.Tensor and isinstance(bound[1], Value) and bound[2] == 1 and isinstance(form, TensorForm):
            return self._sum(cast(Value, bound[0]), bound[1], form)
        return self._intern(target, bound, form)

    def _is_identity(self, target: OpOverload, bound: Sequence[object], source: Value, raw: object) -> bool:
        packet = target.overloadpacket
        if packet is aten.dropout:
            return not (bound[1] and bound[2])
        if packet in _VIEWS:
            return raw == source.form
        return packet in _COPIES and (raw == source.form or (not self.exact and self._is_copy(target, raw, source)))

    def _is_copy(self, target: object, form: object, source: Value | None) -> bool:
        if not isinstance(target, OpOverload) or target.overloadpacket not in _COPIES or source is None:
            return False
        return (
            isinstance(form, TensorForm)
            and isinstance(source.form, TensorForm)
            and _elements(form) == _elements(source.form)
        )

    def _item(self, source: Value, index: int) -> Value:
        if not isinstance(source.form, tuple) or not -len(source.form) <= index < len(source.form):
            raise VerificationError(f"{source} has no result number {index}")
        index %= len(source.form)
        if source.target not in _SPLITS:
            return self._intern("result", (index, source), source.form[index])
        whole, _, dim = source.arguments
        assert isinstance(whole, Value)
        assert isinstance(dim, int)
        ends = list(itertools.accumulate(form.shape[dim] for form in source.form if form is not None))
        return self._slice(whole, dim, ([0, *ends])[index], ends[index])

    def _slice(self, source: Value, dim: int, start: int | None, end: int | None) -> Value:
        """Return elements start to end of a dimension, taken as near to the leaves as the normal form says."""
        assert isinstance(source.form, TensorForm)
        rank = len(source.form.shape)
        dim %= rank
        start, end, _ = slice(start, end).indices(source.form.shape[dim])
        end = max(start, end)
        if (start, end) == (0, source.form.shape[dim]):
            return source
        if source.target is aten.slice.Tensor and source.arguments[1] == dim and source.arguments[4] == 1:
            whole, _, first, *_ = source.arguments
            return self._slice(cast(Value, whole), dim, cast(int, first) + start, cast(int, first) + end)
        pushed = None if self.exact else self._pushed_slice(source, rank, dim, start, end)
        if pushed is not None:
            return pushed
        bound = (source, dim, start, end, 1)
        return self._intern(aten.slice.Tensor, bound, self._infer(aten.slice.Tensor, bound))

    def _pushed_slice(self, source: Value, rank: int, dim: int, start: int, end: int) -> Value | None:
        if source.target is aten.unsqueeze.default:
            inner, at = source.arguments
            assert isinstance(inner, Value)
            assert isinstance(at, int)
            at %= rank
            if dim != at:
                return self.call(source.target, (self._slice(inner, dim - (dim > at), start, end), at), {})
        if source.target is aten.linear.default:
            x, weight, bias = source.arguments
            assert isinstance(x, Value)
            assert isinstance(weight, Value)
            if dim < rank - 1:
                return self.call(source.target, (self._slice(x, dim, start, end), weight, bias), {})
            rows = self._slice(weight, 0, start, end)
            return self.call(
                source.target, (x, rows, self._slice(bias, 0, start, end) if isinstance(bias, Value) else None), {}
            )
        if source.target is aten.cat.default:
            parts, along = source.arguments
            assert isinstance(parts, tuple)
            assert isinstance(along, int)
            begin = 0
            for part in parts if along % rank == dim else ():
                size = part.form.shape[dim]
                if begin <= start and end <= begin + size:
                    return self._slice(part, dim, start - begin, end - begin)
                begin += size
        return None

    def _sum(self, a: Value, b: Value, form: TensorForm) -> Value:
        tag = (self._tag_in_sum(a, form) + self._tag_in_sum(b, form)) % 2**128
        key = _SUM, tag, form
        if key not in self._known:
            self._known[key] = Value(_SUM, (a, b), form, tag, self.place)
        return self._known[key]

    def _tag_in_sum(self, term: Value, form: TensorForm) -> int:
        """Return the tag of a term; a sum of another form, which is broadcast, counts as one term."""
        if term.target != _SUM or term.form == form:
            return term.tag
        return self._boxed.setdefault(term, self._random.getrandbits(128))

    def _intern(self, target: object, arguments: tuple[object, ...], form: object) -> Value:
        key = target, hashable(arguments), form
        if key not in self._known:
            self._known[key] = Value(target, arguments, form, self._random.getrandbits(128), self.place)  # type: ignore[arg-type]
        return self._known[key]

    def _raw(self, target: OpOverload, bound: Sequence[object]) -> Any:  # noqa: ANN401 - what Value.form is
        return self._inference.of(target, [replace_tensors(a, Value, operator.attrgetter("form")) for a in bound]).forms

    def _infer(self, target: OpOverload, bound: Sequence[object]) -> Any:  # noqa: ANN401
        return self._normal(self._raw(target, bound))

    def _normal(self, form: object) -> object:
        """Return a form, without its layout where layouts do not count."""
        if self.exact or form is None:
            return form
        if isinstance(form, tuple):
            return tuple(map(self._normal, form))
        assert isinstance(form, TensorForm)
        strides = [math.prod(max(size, 1) for size in form.shape[i + 1 :]) for i in range(len(form.shape))]
        return TensorForm(form.shape, tuple(strides), form.dtype, form.device)


class _SymbolicOperand:
    """A value as an operand of torch operators, because rules are written with these."""

    def __init__(self, table: ValueTable, value: Value) -> None:
        self.table = table
        self.value = value

    @classmethod
    def __torch_function__(
        cls,
        func: Callable[..., object],
        types: object,
        args: Sequence[object] = (),
        kwargs: Mapping[str, object] | None = None,
    ) -> object:
        table = next(a for a in (*args, *(kwargs or {}).values()) if isinstance(a, _SymbolicOperand)).table
        values = [replace_tensors(argument, _SymbolicOperand, operator.attrgetter("value")) for argument in args]
        named = {
            k: replace_tensors(v, _SymbolicOperand, operator.attrgetter("value")) for k, v in (kwargs or {}).items()
        }
        return _SymbolicOperand(table, table.call(func, values, named))


def _elements(form: TensorForm) -> object:
    return form.shape, form.dtype, form.device


def _same_dtype(source: Value, form: TensorForm) -> bool:
    return isinstance(source.form, TensorForm) and source.form.dtype == form.dtype
