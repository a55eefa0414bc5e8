"""Masks and numpy arrays in a loop, in a form that needs no values of the latent.

``x[mask]`` has as many elements as the mask has true ones, which is known where the mask is a constant: it becomes
``x[mask.nonzero()]``, as in eager torch. ``x * array`` is computed by numpy in eager mode, on the values of x.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Set
from typing import Any, TypeGuard

import numpy as np
import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

INDEXING = frozenset({"__getitem__", "__setitem__"})
"""The names of the functions whose second argument is an index."""

_MASKS = frozenset({torch.bool, torch.uint8})
_EXACT_DTYPES = frozenset({torch.float32, torch.float64})

_OPERATORS: dict[np.ufunc, Callable[[Any, Any], Any]] = {
    **{np.add: operator.add, np.subtract: operator.sub, np.multiply: operator.mul, np.divide: operator.truediv},
    **{np.floor_divide: operator.floordiv, np.remainder: operator.mod, np.power: operator.pow},
    **{np.less: operator.lt, np.less_equal: operator.le, np.greater: operator.gt, np.greater_equal: operator.ge},
    **{np.equal: operator.eq, np.not_equal: operator.ne},
}
# Numpy and torch give the same bits here, because both round correctly.
_EXACT = frozenset({np.add, np.subtract, np.multiply, np.divide})


def with_tensors(func: Callable[..., object], args: tuple[Any, ...]) -> tuple[Callable[..., Any], tuple[Any, ...]]:
    """Return a call of torch that gives what ``func(*args)`` gives, with index tensors in the place of masks."""
    name = getattr(func, "__name__", "")
    if name in INDEXING and len(args) > 1:
        index = args[1] if isinstance(args[1], tuple) else (args[1],)
        # Torch reads through masks of integers still, but does not write through them.
        masks = _MASKS if name == "__getitem__" else {torch.bool}
        return func, (args[0], tuple(part for each in index for part in _parts_of(each, masks)), *args[2:])
    if name == "masked_select" and len(args) == 2 and _is_mask(args[1], _MASKS):
        shape = torch.broadcast_shapes(args[0].shape, args[1].shape)  # type: ignore[no-untyped-call]
        return Tensor.__getitem__, (args[0].expand(shape), tuple(args[1].expand(shape).nonzero(as_tuple=True)))
    return func, args


def computed_by_numpy(ufunc: np.ufunc, operands: tuple[Any, ...]) -> Any:  # noqa: ANN401 - NotImplemented, too
    """Return what numpy gives for an operation on a loop tensor and a number or an array, or NotImplemented."""
    operation = _OPERATORS.get(ufunc)
    if operation is None or len(operands) != 2:
        return NotImplemented
    if any(isinstance(each, np.generic) for each in operands):
        # Torch takes the scalars of numpy for Python numbers.
        return operation(*(each.item() if isinstance(each, np.generic) else each for each in operands))
    tensor, array = operands
    if ufunc not in _EXACT or not isinstance(array, np.ndarray) or not array.ndim or not tensor.ndim:
        return NotImplemented
    constant = torch.from_numpy(array.copy())
    if not {tensor.dtype, constant.dtype} <= _EXACT_DTYPES:
        return NotImplemented
    dtype = torch.promote_types(tensor.dtype, constant.dtype)
    return operation(tensor.to(dtype), constant.to(dtype))


def _parts_of(index: object, masks: Set[torch.dtype]) -> list[object]:
    if isinstance(index, np.ndarray) and index.dtype != object:
        index = torch.from_numpy(np.ascontiguousarray(index))
    elif isinstance(index, list) and not any(isinstance(leaf, Tensor) for leaf in tree_leaves(index)):
        index = torch.as_tensor(np.asarray(index)) if index else torch.empty(0, dtype=torch.long)
    return list(index.nonzero(as_tuple=True)) if _is_mask(index, masks) else [index]


def _is_mask(index: object, masks: Set[torch.dtype]) -> TypeGuard[Tensor]:
    return type(index) is Tensor and index.dtype in masks and index.ndim > 0
