"""What a computed site costs in the loss of a learned finder."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from l2c_compile.finders.open_evaluations import Form, SoftDenoiser, price_in
from l2c_compile.finders.processes import Workers
from l2c_compile.finders.work import work_of
from l2c_compile.schedules.sites import Site

__all__ = ["Costs"]


class Costs:
    """What is computed where, and what that takes.

    Args:
        denoiser: the sites.
        forms: of each evaluation.
        unit: "multiply-adds", "time", or "sites", of which each counts 1.
        workers: measure times each for itself, and agree on the mean.
    """

    def __init__(self, denoiser: SoftDenoiser, forms: Sequence[Form], unit: str, workers: Workers) -> None:
        self._covers = denoiser.covers
        S = len(denoiser.sites)
        if unit == "sites":
            self.total = float(len(forms) * S)
            self.own_ES = torch.ones(len(forms), S, dtype=torch.float64)
            return
        price = price_in(unit, denoiser.device, forms)
        different = {id(form): form.captured for form in forms}
        known = {key: work_of(captured, price) for key, captured in different.items()}
        total = torch.tensor(sum(known[id(form)][0] for form in forms), dtype=torch.float64)
        own_ES = torch.tensor([self._own(known[id(form)][1], denoiser.sites) for form in forms], dtype=torch.float64)
        self.total, self.own_ES = float(workers.mean(total)), workers.mean(own_ES)

    def open(self, scores_S: Tensor) -> Tensor:
        """Return the scores times those of all sites that cover them: a site runs only where these do."""
        if not any(self._covers):
            return scores_S
        return torch.stack([scores_S[[index, *wholes]].prod() for index, wholes in enumerate(self._covers)])

    def kept(self, computed_ES: Tensor) -> float:
        """Return the share of the work that is left; ``computed_ES`` is True where the schedule says compute."""
        open_ES = torch.stack([self.open(row) for row in computed_ES.to(torch.float64)])
        return 1.0 - float(((1.0 - open_ES) * self.own_ES).sum()) / self.total

    def _own(self, saved: Mapping[Site, float], sites: Sequence[Site]) -> list[float]:
        """Return what each site saves without the sites that it covers."""
        costs = [saved[site] for site in sites]
        own = list(costs)
        for index, wholes in enumerate(self._covers):
            if wholes:
                # Of those that cover a site the smallest holds it directly.
                own[min(wholes, key=lambda whole: costs[whole])] -= costs[index]
        return own
