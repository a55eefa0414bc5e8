"""What the module of a site returns beside tensors, which a static graph does not hold and so cannot reuse."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten

_TENSOR = object()


@dataclass(frozen=True)
class SiteResult:
    """The containers that a module returned, and the Python values in them."""

    spec: TreeSpec
    leaves: tuple[object, ...]
    """A token for each tensor, anything else as it is."""

    @classmethod
    def of(cls, result: object) -> SiteResult:
        """Return the description of what a module returned."""
        leaves, spec = tree_flatten(result)
        return cls(spec, tuple(_TENSOR if isinstance(leaf, Tensor) else leaf for leaf in leaves))

    @property
    def num_tensors(self) -> int:
        """The number of tensors in the result."""
        return sum(leaf is _TENSOR for leaf in self.leaves)

    def __str__(self) -> str:
        names = ["tensor" if leaf is _TENSOR else type(leaf).__name__ for leaf in self.leaves]
        return str(tree_unflatten(names, self.spec)).replace("'", "")

    def fits(self, other: SiteResult) -> bool:
        """Return whether the containers are the same, with tensors in the same places."""
        places = [[leaf is _TENSOR for leaf in each.leaves] for each in (self, other)]
        return self.spec == other.spec and places[0] == places[1]

    def first_other_value(self, other: SiteResult) -> tuple[object, object] | None:
        """Return the first Python values that differ between two results that fit, this one's first."""
        return next((pair for pair in zip(self.leaves, other.leaves, strict=True) if not _is_same(*pair)), None)


def _is_same(value: object, other: object) -> bool:
    if value is other or type(value) is not type(other):
        return value is other
    if isinstance(value, float) and isinstance(other, float):
        return value.hex() == other.hex()
    equal: object = value == other
    # That of two arrays is an array.
    return bool(equal) if getattr(equal, "ndim", 0) == 0 else False
