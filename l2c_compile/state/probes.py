"""A few elements of some tensors, to see writes that leave no trace: through ``.data``, numpy or a fused optimizer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

NUM_ELEMENTS = 8
"""The number of elements of each tensor that are looked at, spread evenly over its memory."""


class Probes:
    """A few elements of some tensors, as they were when this was made.

    Tensors of subclasses, and those on the meta device, have no elements that could be read so; they are left out.
    """

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        self._tensors = [tensor for tensor in tensors if _can_be_read(tensor)]
        views = list(map(_some_elements, self._tensors))
        self._seen = [_bits([view]) for view in views]
        # One comparison for all tensors, because a call should cost nothing; numpy joins small arrays fastest.
        on_cpu = [view for view in views if view.device.type == "cpu"]
        self._arrays: dict[int, list[np.ndarray[Any, Any]]] = {}
        for view in on_cpu:
            self._arrays.setdefault(view.element_size(), []).append(view.view(_WORDS[view.element_size()]).numpy())
        self._words = {size: np.concatenate(arrays) for size, arrays in self._arrays.items()}
        groups: dict[object, list[Tensor]] = {}
        for view in views:
            if view.device.type != "cpu":
                groups.setdefault((view.dtype, view.device), []).append(view)
        self._groups = [(group, _bits(group)) for group in groups.values()]

    def hold(self) -> bool:
        """Return whether all elements are as they were, bit for bit."""
        on_cpu = all(np.array_equal(np.concatenate(arrays), self._words[size]) for size, arrays in self._arrays.items())
        return on_cpu and all(torch.equal(_bits(group), seen) for group, seen in self._groups)

    def changed(self) -> list[Tensor]:
        """Return the tensors that have other elements now."""
        pairs = zip(self._tensors, self._seen, strict=True)
        return [tensor for tensor, seen in pairs if not torch.equal(_bits([_some_elements(tensor)]), seen)]


_WORDS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64, 16: torch.complex128}
"""A dtype of each size of element that numpy knows, as which a NaN is equal to itself."""


def _can_be_read(tensor: Tensor) -> bool:
    plain = type(tensor) in (Tensor, nn.Parameter, nn.Buffer)
    return plain and not tensor.is_meta and tensor.layout is torch.strided and tensor.numel() > 0


def _some_elements(tensor: Tensor) -> Tensor:
    """Return a view of a few elements."""
    plain = tensor.detach()
    in_memory = plain.permute(sorted(range(plain.dim()), key=lambda dim: -plain.stride()[dim]))
    if in_memory.is_contiguous():
        num = min(NUM_ELEMENTS, plain.numel())
        return plain.as_strided((num,), (plain.numel() // num,))
    while plain.dim() > 1:
        plain = plain[-1]
    return plain.reshape(-1)[:NUM_ELEMENTS]


def _bits(elements: Sequence[Tensor]) -> Tensor:
    # As bytes, because a NaN is not equal to itself.
    with torch.no_grad():
        return torch.cat(list(elements)).view(torch.uint8)
