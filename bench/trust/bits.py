"""What it means to be equal bit for bit, and copies that a loop may write into."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_map


def same_bits(got: object, wanted: object) -> bool:
    """Return whether two nested results have equal structure, dtypes, layouts and bits, the sign of zero included."""
    got_leaves, got_spec = tree_flatten(got)
    wanted_leaves, wanted_spec = tree_flatten(wanted)
    return got_spec == wanted_spec and all(map(_same_leaf, got_leaves, wanted_leaves))


def own(tree: Any) -> Any:  # noqa: ANN401
    """Return a copy whose tensors a loop may write into."""
    return tree_map(lambda leaf: leaf.clone() if isinstance(leaf, Tensor) else leaf, tree)


def _same_leaf(got: object, wanted: object) -> bool:
    if not isinstance(got, Tensor) or not isinstance(wanted, Tensor):
        return type(got) is type(wanted) and got == wanted
    equal = got.dtype == wanted.dtype and got.stride() == wanted.stride() and torch.equal(got, wanted)
    return equal and (got.is_complex() or torch.equal(torch.signbit(got), torch.signbit(wanted)))
