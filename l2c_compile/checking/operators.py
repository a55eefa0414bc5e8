"""What an operation returns, derived from the forms of its operands; the notes on the graph are not read.

Torch is asked, on fake tensors, once for each operation and form.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch._ops import OpOverload
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensorMode,
)
from torch.fx.node import Argument, Node

from l2c_compile.errors import VerificationError
from l2c_compile.graphs.forms import TensorForm
from l2c_compile.graphs.nodes import without_torchs_log


def on_values(node: Node, values: Mapping[Node, Any]) -> tuple[tuple[object, ...], dict[str, object]]:
    """Return the arguments of a node, with values in place of its operands."""
    # fx's map_arg would make immutable lists, and wants nodes back.
    args = tuple(_mapped(argument, values) for argument in node.args)
    return args, {name: _mapped(argument, values) for name, argument in node.kwargs.items()}


def _mapped(argument: Argument, values: Mapping[Node, Any]) -> object:
    if isinstance(argument, Node):
        return values[argument]
    if isinstance(argument, (tuple, list)):
        return tuple(_mapped(element, values) for element in argument)
    return argument


def flattened(arguments: Iterable[object]) -> Iterator[Node]:
    """Yield the nodes in nested tuples."""
    for argument in arguments:
        if isinstance(argument, Node):
            yield argument
        elif isinstance(argument, tuple):
            yield from flattened(argument)


@dataclass(frozen=True)
class Inferred:
    """The form and the memory of what an operation returns."""

    forms: TensorForm | tuple[TensorForm | None, ...] | None
    """The form of one tensor, the forms of several, or None if the result is anything else."""
    shares: int | None
    """Position of the tensor operand that the result shares memory with; None if it has memory of its own."""


class Inference:
    """Derives the forms of results, and asks torch each question only once."""

    def __init__(self) -> None:
        self._known: dict[object, Inferred] = {}
        self._mode = FakeTensorMode()

    def of(self, target: OpOverload, bound: Sequence[object]) -> Inferred:
        """Return what ``target`` returns for arguments in the order of its schema, a ``TensorForm`` for each tensor.

        Raises:
            VerificationError: if torch refuses these arguments.
        """
        key = target, hashable(bound)
        if key not in self._known:
            self._known[key] = self._ask(target, bound)
        return self._known[key]

    def _ask(self, target: OpOverload, bound: Sequence[object]) -> Inferred:
        tensors: list[Tensor] = []

        def fake(form: TensorForm) -> Tensor:
            tensors.append(form.empty())
            return tensors[-1]

        schema = target._schema.arguments
        with self._mode, torch.no_grad():
            given = [replace_tensors(argument, TensorForm, fake) for argument in bound]
            args = [value for value, argument in zip(given, schema, strict=True) if not argument.kwarg_only]
            kwargs = {a.name: value for value, a in zip(given, schema, strict=True) if a.kwarg_only}
            try:
                with without_torchs_log():
                    result = target(*args, **kwargs)
            except (DynamicOutputShapeException, DataDependentOutputException) as error:
                raise VerificationError(
                    f"{name_of(target)} returns a tensor whose size depends on values, which no proof follows; use"
                    " torch.where or another operation whose result has one size"
                ) from error
            except (RuntimeError, TypeError, ValueError, IndexError, NotImplementedError) as error:
                shown = ", ".join(str(argument) for argument in bound if isinstance(argument, TensorForm))
                raise VerificationError(f"{name_of(target)} does not take ({shown}): {error}") from error
        results = result if isinstance(result, (tuple, list)) else (result,)
        storages = [tensor.untyped_storage()._cdata for tensor in tensors]
        made = next((r.untyped_storage()._cdata for r in results if isinstance(r, Tensor)), None)
        forms = tuple(TensorForm.of(r) if isinstance(r, Tensor) else None for r in results)
        shares = storages.index(made) if made in storages else None
        return Inferred(forms if isinstance(result, (tuple, list)) else forms[0], shares)


def bind(target: OpOverload, args: Sequence[object], kwargs: Mapping[str, object]) -> tuple[object, ...]:
    """Return the arguments of a call in the order of the schema, defaults included, lists as tuples.

    Raises:
        VerificationError: if an argument is missing or unknown.
    """
    schema = target._schema.arguments
    given = dict(zip((argument.name for argument in schema), args, strict=False))
    given.update(kwargs)
    num_positional = sum(not argument.kwarg_only for argument in schema)
    missing = [a.name for a in schema if a.name not in given and not a.has_default_value()]
    unknown = kwargs.keys() - {argument.name for argument in schema} if kwargs else ()
    if missing or unknown or len(args) > num_positional:
        raise VerificationError(
            f"{name_of(target)} is called with {len(args)} arguments, lacks {missing} and does not know {list(unknown)}"
        )
    return tuple(_frozen(given.get(argument.name, argument.default_value)) for argument in schema)


def replace_tensors(argument: object, kind: type, replace: Callable[..., object]) -> object:
    """Return an argument with everything of type ``kind`` replaced, also in tuples and lists."""
    if isinstance(argument, kind):
        return replace(argument)
    if isinstance(argument, (tuple, list)):
        return tuple(replace_tensors(element, kind, replace) for element in argument)
    return argument


def hashable(argument: object) -> object:
    """Return a key that is equal for two arguments iff they are interchangeable: 1, 1.0 and True are three."""
    if isinstance(argument, (tuple, list)):
        return tuple(map(hashable, argument))
    if isinstance(argument, float):
        return float, argument.hex()
    return type(argument), argument


def name_of(target: object) -> str:
    """Return the short name of an operation: ``add.Tensor``."""
    return (
        str(target).removeprefix("aten.")
        if isinstance(target, OpOverload)
        else getattr(target, "__name__", str(target))
    )


def _frozen(argument: object) -> object:
    return tuple(map(_frozen, argument)) if isinstance(argument, (tuple, list)) else argument
