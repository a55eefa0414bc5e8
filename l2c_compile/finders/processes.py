"""The processes that learn together, and the random numbers that they share."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from l2c_compile.errors import ScheduleError

if TYPE_CHECKING:
    from accelerate import Accelerator


class Workers:
    """The processes that learn together; one of them if there is no accelerator."""

    def __init__(self, accelerator: Accelerator | None = None) -> None:
        self._accelerator = accelerator
        self.count = accelerator.num_processes if accelerator else 1
        self.rank = accelerator.process_index if accelerator else 0

    @property
    def is_main(self) -> bool:
        """Whether this process writes files."""
        return self.rank == 0

    def mean(self, value: Tensor) -> Tensor:
        """Return the mean over the processes."""
        if self._accelerator is None or self.count == 1:
            return value
        result = self._accelerator.reduce(value.to(self._accelerator.device), reduction="mean")
        assert isinstance(result, Tensor)
        return result.to(value.device)

    def autocast(self) -> AbstractContextManager[None]:
        """Return the accelerator's mixed precision."""
        return self._accelerator.autocast() if self._accelerator else nullcontext()

    def share(self, tree: object, count: int, device: torch.device) -> Any:  # noqa: ANN401 - the tree itself
        """Return this process's rows of every tensor that has ``count`` of them, on the device."""
        if count % self.count:
            raise ScheduleError(f"a batch of {count} samples cannot be split over {self.count} processes evenly")
        rows = count // self.count
        own = slice(self.rank * rows, (self.rank + 1) * rows)

        def of(leaf: object) -> object:
            if not isinstance(leaf, Tensor):
                return leaf
            return (leaf[own] if leaf.dim() and len(leaf) == count else leaf).to(device)

        return tree_map(of, tree)


def generator_of(seed: int, number: int) -> torch.Generator:
    """Return the generator of all that round ``number`` draws, the same in every process."""
    return torch.Generator().manual_seed(seed * 2**32 + number)


@contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """Let no weight ask for a gradient meanwhile."""
    asking = [weight for weight in model.parameters() if weight.requires_grad]
    for weight in asking:
        weight.requires_grad_(False)
    try:
        yield
    finally:
        for weight in asking:
            weight.requires_grad_(True)


@contextmanager
def seeded(seed: int, number: int, rank: int) -> Iterator[None]:
    """Seed what the loop itself draws, apart from what the caller draws; processes draw for their own rows."""
    with torch.random.fork_rng():
        torch.manual_seed((seed * 2**32 + number) * 1024 + rank)
        yield
