"""Give torch the masks and numpy arrays of a loop in a form that needs no values of the latent.

``x[mask]`` has as many elements as the mask is true at, which is known where the mask is a constant: it becomes
``x[mask.nonzero()]``, as in eager torch. ``x * array`` is computed by numpy in eager mode, on the values of x.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeGuard

import numpy as np
import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from l2c_compile.frontend.loop_tensor import LoopTensor

_INDEXING = frozenset({"__getitem__", "__setitem__"})
_MASKS = frozenset({torch.bool, torch.uint8})
_EXACT = frozenset({torch.float32, torch.float64})

# Numpy and torch round these alike: they are correct to the last bit in both.
_EXACT_OPERATIONS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    **dict.fromkeys(("add", "__add__", "__radd__"), torch.add),
    **dict.fromkeys(("mul", "__mul__", "__rmul__"), torch.mul),
    **dict.fromkeys(("sub", "__sub__"), torch.sub),
    **dict.fromkeys(("div", "true_divide", "__truediv__", "__div__"), torch.div),
}


def with_tensors(func: Callable[..., object], args: tuple[Any, ...]) -> tuple[Callable[..., Any], tuple[Any, ...]]:
    """Return a call of torch that gives what ``func(*args)`` gives, with index tensors for masks and numpy arrays."""
    name = getattr(func, "__name__", "")
    if name in _INDEXING and len(args) > 1:
        index = args[1] if isinstance(args[1], tuple) else (args[1],)
        return func, (args[0], tuple(part for each in index for part in _parts_of(each)), *args[2:])
    if name == "masked_select" and len(args) == 2 and _is_mask(args[1]):
        shape = torch.broadcast_shapes(args[0].shape, args[1].shape)  # type: ignore[no-untyped-call]
        return Tensor.__getitem__, (args[0].expand(shape), tuple(args[1].expand(shape).nonzero(as_tuple=True)))
    operation = _EXACT_OPERATIONS.get(name)
    if operation is not None and len(args) == 2 and _is_computed_alike(*args):
        array: np.ndarray[Any, Any] = args[1]
        dtype = torch.promote_types(args[0].dtype, torch.from_numpy(array[:0].copy()).dtype)
        return operation, (args[0].to(dtype), torch.from_numpy(array.copy()).to(dtype))
    return func, args


def _parts_of(index: object) -> list[object]:
    if isinstance(index, np.ndarray) and index.dtype != object:
        index = torch.from_numpy(np.ascontiguousarray(index))
    elif isinstance(index, list) and not any(isinstance(leaf, LoopTensor) for leaf in tree_leaves(index)):
        index = torch.as_tensor(np.asarray(index)) if index else torch.empty(0, dtype=torch.long)
    return list(index.nonzero(as_tuple=True)) if _is_mask(index) else [index]


def _is_mask(index: object) -> TypeGuard[Tensor]:
    return isinstance(index, Tensor) and not isinstance(index, LoopTensor) and index.dtype in _MASKS and index.ndim > 0


def _is_computed_alike(left: object, right: object) -> bool:
    if not isinstance(left, LoopTensor) or not isinstance(right, np.ndarray):
        return False
    return left.ndim > 0 and right.ndim > 0 and left.dtype in _EXACT and right.dtype in (np.float32, np.float64)
