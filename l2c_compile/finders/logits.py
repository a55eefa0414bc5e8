"""The logits of a router that is learned, and their optimiser.

Shapes: E evaluations, S sites.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping

import torch
from torch import Tensor, nn

from l2c_compile.finders.settings import Settings

_MOMENTS = ("step", "exp_avg", "exp_avg_sq")
"""What AdamW keeps of each row."""


class Logits(Mapping[int, nn.Parameter]):
    """The row of logits, shape (S,), of each trained evaluation.

    Args:
        trained: the evaluations that have logits.
        num_sites: the length of a row.
        settings: how to learn.
        device: where the rows are.
    """

    def __init__(self, trained: Iterable[int], num_sites: int, settings: Settings, device: torch.device) -> None:
        generator = torch.Generator().manual_seed(settings.seed)
        draws = {e: torch.randn(num_sites, generator=generator) for e in trained}
        self._rows = {e: nn.Parameter(drawn.to(device)) for e, drawn in draws.items()}
        self._settings = settings
        self._optimizer = torch.optim.AdamW(self._rows.values(), lr=settings.learning_rate, weight_decay=0.0)

    def __getitem__(self, e: int) -> nn.Parameter:
        return self._rows[e]

    def __iter__(self) -> Iterator[int]:
        return iter(self._rows)

    def __len__(self) -> int:
        return len(self._rows)

    def scores(self, e: int) -> Tensor:
        """Return the scores that evaluation ``e`` is mixed with, shape (S,), differentiable in its logits."""
        scores_S = self._rows[e].sigmoid()
        if self._settings.straight_through:
            rounded_S = (scores_S > self._settings.threshold).to(scores_S.dtype)
            scores_S = scores_S + (rounded_S - scores_S).detach()
        return scores_S

    def table(self, num_evaluations: int, untrained_score: float) -> Tensor:
        """Return the scores of all evaluations, shape (E, S), on the CPU; rows that are not trained are constant."""
        num_sites = len(next(iter(self._rows.values())))
        scores_ES = torch.full((num_evaluations, num_sites), untrained_score)
        for e, row in self._rows.items():
            scores_ES[e] = row.detach().sigmoid().float().cpu()
        return scores_ES

    def step(self, gradients: Mapping[int, Tensor]) -> None:
        """Take one step of the optimiser on the rows that have a gradient."""
        for e, gradient in gradients.items():
            self._rows[e].grad = gradient
        # Rows without a gradient are left alone, their moments too: the authors train one parameter an evaluation.
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        with torch.no_grad():
            for e in gradients:
                self._rows[e].clamp_(-self._settings.limit, self._settings.limit)

    def state(self) -> dict[str, Tensor]:
        """Return the rows and what the optimiser keeps of them, copied, on the CPU."""
        tensors = {}
        for e, row in self._rows.items():
            tensors[f"logits.{e}"] = row.detach().cpu().clone()
            for name, value in self._optimizer.state[row].items():
                tensors[f"{name}.{e}"] = value.cpu().clone()
        return tensors

    def forms(self, names: Collection[str]) -> dict[str, Tensor]:
        """Return tensors of the forms that a state with these names must have."""
        # AdamW counts in float32, also where other numbers are smaller.
        is_double = torch.get_default_dtype() == torch.float64
        step = torch.zeros((), dtype=torch.float64 if is_double else torch.float32)
        wanted: dict[str, Tensor] = {}
        for e, row in self._rows.items():
            wanted[f"logits.{e}"] = row
            moments = {f"{name}.{e}": like for name, like in zip(_MOMENTS, (step, row, row), strict=True)}
            wanted |= moments if any(name in names for name in moments) else {}
        return wanted

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Go on from what ``state`` returned."""
        for e, row in self._rows.items():
            with torch.no_grad():
                row.copy_(tensors[f"logits.{e}"])
            moments = {name: tensors[f"{name}.{e}"] for name in _MOMENTS if f"{name}.{e}" in tensors}
            # AdamW counts on the CPU.
            self._optimizer.state[row] = {n: v if n == "step" else v.to(row.device) for n, v in moments.items()}
