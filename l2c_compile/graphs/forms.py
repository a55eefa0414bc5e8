"""The forms of tensors and of calls, which are all that a capture knows of its inputs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from decimal import Decimal
from enum import Enum
from fractions import Fraction

import numpy as np
import torch
from torch import Tensor
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten


@dataclass(frozen=True)
class TensorForm:
    """All properties of a tensor but its elements; a static graph is specialised on them."""

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device

    @classmethod
    def of(cls, tensor: Tensor) -> TensorForm:
        """Return the form of ``tensor``."""
        return cls(tuple(tensor.shape), tuple(tensor.stride()), tensor.dtype, tensor.device)

    def empty(self) -> Tensor:
        """Return an uninitialised tensor of this form (a fake one under a fake tensor mode)."""
        return torch.empty_strided(self.shape, self.stride, dtype=self.dtype, device=self.device)

    def of_copy(self) -> TensorForm:
        """Return the form of a copy of such a tensor: its strides have neither gaps nor overlaps."""
        copy = torch.empty_strided(self.shape, self.stride, dtype=self.dtype, device="meta").clone()
        return replace(self, stride=copy.stride())

    def fits(self, other: TensorForm) -> bool:
        """Return whether shape, dtype and device are equal, whatever the strides."""
        return (self.shape, self.dtype, self.device) == (other.shape, other.dtype, other.device)

    def __str__(self) -> str:
        return f"{str(self.dtype).removeprefix('torch.')}{list(self.shape)}, strides {list(self.stride)}"


def form_of(value: object) -> object:
    """Return the form of a tensor, nested tuples of forms for nested tensors, and anything else as it is."""
    if isinstance(value, (tuple, list)):
        return tuple(map(form_of, value))
    return TensorForm.of(value) if isinstance(value, Tensor) else value


@dataclass(frozen=True)
class StaticValue:
    """A Python value that a static graph is specialised on."""

    value: object = field(compare=False)
    key: object
    """The type and the exact value: 1, 1.0 and True are three keys, 0.0 and -0.0 are two, in containers, too."""

    @classmethod
    def of(cls, value: object) -> StaticValue:
        """Return the description of ``value``, which is hashable."""
        return cls(value, _exact(value))


def _exact(value: object) -> object:
    """Return a key that is equal for two values only if no code can tell them apart by their contents."""
    kind = type(value)
    if isinstance(value, float):
        return kind, value.hex()
    if isinstance(value, complex):
        return kind, value.real.hex(), value.imag.hex()
    if isinstance(value, np.generic):
        return kind, value.tobytes()
    if isinstance(value, (Decimal, Fraction)):
        return kind, str(value)
    if isinstance(value, tuple):
        return kind, tuple(map(_exact, value))
    if isinstance(value, frozenset):
        return kind, frozenset(map(_exact, value))
    compares_content = kind.__eq__ is not object.__eq__ and not isinstance(value, (Enum, str, bytes, int))
    if compares_content and hasattr(value, "__dict__") and not isinstance(value, type):
        # Such an object may be equal to one that differs in what its __eq__ leaves out.
        return kind, value, frozenset((name, _exact(held)) for name, held in vars(value).items() if _has_hash(held))
    return kind, value


def _has_hash(value: object) -> bool:
    try:
        hash(value)
    except TypeError:
        return False
    return True


@dataclass(frozen=True)
class CallSignature:
    """The form of one call ``denoiser(*args, **kwargs)``; calls of equal form share one evaluation graph."""

    spec: TreeSpec
    leaves: tuple[object, ...]
    """A ``TensorForm`` for each tensor, a ``StaticValue`` for anything else, in the order of ``spec``."""
    overlaps: frozenset[tuple[int, int]] = frozenset()
    """The pairs of tensors, by position, that share memory: a write into one of them reaches the other."""
    repeats: tuple[int, ...] = ()
    """For each tensor the position of the first that is the same object; empty if no tensor is given twice."""

    def tensor_forms(self) -> tuple[TensorForm, ...]:
        """Return the forms of the tensors, in order: the inputs of the evaluation graph."""
        return tuple(leaf for leaf in self.leaves if isinstance(leaf, TensorForm))

    def unflatten(self, tensors: Sequence[Tensor]) -> tuple[tuple[object, ...], dict[str, object]]:
        """Return the ``(args, kwargs)`` of the call with ``tensors`` in the places of its tensors."""
        remaining = iter([tensors[position] for position in self.repeats] or tensors)
        leaves = [leaf.value if isinstance(leaf, StaticValue) else next(remaining) for leaf in self.leaves]
        args, kwargs = tree_unflatten(leaves, self.spec)
        return args, kwargs


def repeats_of(tensors: Sequence[Tensor]) -> tuple[int, ...]:
    """Return for each tensor the position of the first that is the same object; nothing if all are different."""
    first: dict[int, int] = {}
    positions = tuple(first.setdefault(id(tensor), position) for position, tensor in enumerate(tensors))
    return positions if len(first) < len(tensors) else ()


def tensors_in(tree: object) -> list[Tensor]:
    """Return the tensors of a nested container, in order."""
    return [leaf for leaf in tree_flatten(tree)[0] if isinstance(leaf, Tensor)]


def signature_of(*arguments: object) -> CallSignature:
    """Return the form of nested arguments, without their overlaps; Dynamo can trace this."""
    leaves, spec = tree_flatten(arguments)
    return CallSignature(spec, tuple(TensorForm.of(x) if isinstance(x, Tensor) else StaticValue.of(x) for x in leaves))


def overlaps_of(tensors: Sequence[Tensor]) -> frozenset[tuple[int, int]]:
    """Return the pairs of tensors, by position, whose elements lie in one stretch of one memory."""
    if len(tensors) < 2:
        return frozenset()
    stretches = [_stretch(tensor) for tensor in tensors]
    return frozenset(
        (i, j)
        for j, (memory, begin, end) in enumerate(stretches)
        for i, (other, other_begin, other_end) in enumerate(stretches[:j])
        if memory == other and memory is not None and begin < other_end and other_begin < end
    )


def _stretch(tensor: Tensor) -> tuple[int | None, int, int]:
    """Return the memory of a tensor, and where its elements begin and end in it, in bytes."""
    if tensor.layout is not torch.strided or not tensor.numel():
        return None, 0, 0
    last = int(sum((size - 1) * step for size, step in zip(tensor.shape, tensor.stride(), strict=True)))
    begin, size = int(tensor.storage_offset()), tensor.element_size()
    return int(tensor.untyped_storage()._cdata), begin * size, (begin + last + 1) * size
