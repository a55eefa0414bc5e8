"""Find writes from one part of a tensor into an overlapping part: eager torch reads there what it has just written.

    x[:, 1:] = x[:, :-1]

A functional graph reads all before it writes, so such a write is refused.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor


def overlaps_in_part(written: Tensor, read: Iterable[Tensor]) -> bool:
    """Return whether some, but not the same elements in the same places, are written and read."""
    return any(_shares_memory(written, other) and _overlaps(written, other) for other in read)


def _shares_memory(one: Tensor, other: Tensor) -> bool:
    return bool(one.untyped_storage()._cdata == other.untyped_storage()._cdata)


def _overlaps(written: Tensor, other: Tensor) -> bool:
    if _place(written) == _place(other) or not written.numel() or not other.numel():
        return False
    return bool(torch.isin(_elements(written), _elements(other)).any())


def _place(tensor: Tensor) -> object:
    return tensor.storage_offset(), tensor.shape, tensor.stride()


def _elements(tensor: Tensor) -> Tensor:
    """Return the offsets of all elements of a tensor in its memory."""
    offsets = torch.tensor(tensor.storage_offset())
    for size, stride in zip(tensor.shape, tensor.stride(), strict=True):
        offsets = offsets[..., None] + torch.arange(size) * stride
    return offsets.flatten()
