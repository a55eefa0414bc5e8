"""The price of computing in the loss of a learned finder: lambda, prices of sites, and how a budget decides both.

Shapes: E evaluations, S sites.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from l2c_compile.errors import ScheduleError
from l2c_compile.finders.open_evaluations import OpenDenoiser, OpenEvaluation, price_in
from l2c_compile.finders.processes import Workers
from l2c_compile.finders.settings import Settings
from l2c_compile.finders.work import work_of
from l2c_compile.schedules.sites import Site

_MEMORY = 0.9
"""How much of the estimated steepness a round keeps from the one before."""
_LEAST_PENALTY = 1e-6
"""lambda while nothing is known to cost more: AdamW moves a logit at its own pace, however small the gradient is."""
_LEAST_CACHED = 0.005
"""Scores nearer to 1 than this say nothing about what a cached value would do."""
_UNKNOWN = -1.0


class Costs:
    """What each site costs in each evaluation, and what all of them cost together.

    Args:
        denoiser: the sites.
        evaluations: those of the loop, in order.
        unit: "multiply-adds", "time", or "sites", of which each counts 1.
        workers: the processes, which measure times each for itself, and agree on the mean.
    """

    def __init__(
        self, denoiser: OpenDenoiser, evaluations: Sequence[OpenEvaluation], unit: str, workers: Workers
    ) -> None:
        self._denoiser = denoiser
        S = len(denoiser.sites)
        if unit == "sites":
            self.total = float(len(evaluations) * S)
            self.own_ES = torch.ones(len(evaluations), S, dtype=torch.float64)
            return
        price = price_in(unit, denoiser.device, evaluations)
        known = {each: work_of(each.captured, price) for each in dict.fromkeys(evaluations)}
        total = torch.tensor(sum(known[each][0] for each in evaluations), dtype=torch.float64)
        own_ES = torch.tensor([self._own(known[each][1]) for each in evaluations], dtype=torch.float64)
        self.total, self.own_ES = float(workers.mean(total)), workers.mean(own_ES)

    def kept(self, computed_ES: Tensor) -> float:
        """Return the share of the work that is left; ``computed_ES`` is True where the schedule says compute."""
        running_ES = torch.stack([self._denoiser.running(row) for row in computed_ES.to(torch.float64)])
        return 1.0 - float(((1.0 - running_ES) * self.own_ES).sum()) / self.total

    def _own(self, saved: Mapping[Site, float]) -> list[float]:
        """Return what each site saves without the sites that it covers."""
        costs = [saved[site] for site in self._denoiser.sites]
        own = list(costs)
        for index, wholes in enumerate(self._denoiser.covers):
            if wholes:
                # Of those that cover a site the smallest holds it directly.
                own[min(wholes, key=lambda whole: costs[whole])] -= costs[index]
        return own


class Penalty:
    """Prices the computed sites of each evaluation, and fits lambda to the budget, if there is one.

    Args:
        denoiser: the sites.
        evaluations: those of the loop, in order.
        trained: the numbers of those that have logits; in all others every site is computed.
        settings: penalty or budget, and the units of both.
        workers: the processes that learn together.

    Raises:
        ScheduleError: if the budget cannot be met.
    """

    def __init__(
        self,
        denoiser: OpenDenoiser,
        evaluations: Sequence[OpenEvaluation],
        trained: Sequence[int],
        settings: Settings,
        workers: Workers,
    ) -> None:
        self._denoiser = denoiser
        self._trained = list(trained)
        self._settings = settings
        self._work = Costs(denoiser, evaluations, settings.budget_in, workers)
        is_same = settings.price_by == settings.budget_in
        self._prices = self._work if is_same else Costs(denoiser, evaluations, settings.price_by, workers)
        self._set_prices()
        self.factor = settings.penalty or _LEAST_PENALTY
        """lambda."""
        self._steepness_ES = torch.full(self._work.own_ES.shape, _UNKNOWN)
        self._check_budget()

    def price(self, e: int, scores_S: Tensor) -> Tensor:
        """Return the price of what runs in evaluation ``e`` with these scores, without lambda; differentiable."""
        return (self._price_ES[e] * self._denoiser.running(scores_S)).sum()

    @torch.no_grad()
    def note_gradient(self, e: int, gradient: Tensor, r_S: Tensor, scores_S: Tensor) -> None:
        """Estimate how steeply the distance grows where a site is no longer computed, from its gradient.

        To first order the distance is a sum of ``(1 - r)**2 * D`` over the sites, whose slope is ``-2 * (1 - r) * D``.

        Args:
            e: the evaluation.
            gradient: that of the distance with respect to the logits.
            r_S: the sigmoids of the logits.
            scores_S: the scores that the sites were mixed with.
        """
        cached_S = 1.0 - scores_S
        seen_S = (-gradient / (r_S * (1.0 - r_S)) / cached_S.clamp(min=_LEAST_CACHED)).clamp(min=0.0).cpu()
        known_S = self._steepness_ES[e]
        is_known = (cached_S >= _LEAST_CACHED).cpu()
        blended_S = torch.where(known_S < 0, seen_S, _MEMORY * known_S + (1.0 - _MEMORY) * seen_S)
        self._steepness_ES[e] = torch.where(is_known, blended_S, known_S)

    def fit(self) -> None:
        """Set lambda so that as many scores settle above the threshold as the budget allows; without one, do nothing.

        A score settles where ``steepness * (1 - r) = lambda * price``.
        """
        if self._settings.budget is None:
            return
        worth_ES = self._steepness_ES.clamp(min=0.0) / self._price_ES.cpu()
        settled = (1.0 - self._settings.threshold) * self._threshold_within(self._settings.budget, worth_ES)
        self.factor = max(settled, _LEAST_PENALTY)

    def threshold(self, scores_ES: Tensor) -> float:
        """Return the threshold of the settings; with a budget, the one that keeps as much as the budget allows."""
        budget = self._settings.budget
        return self._settings.threshold if budget is None else self._threshold_within(budget, scores_ES)

    def kept(self, scores_ES: Tensor, threshold: float) -> float:
        """Return the share of the work that is left where sites with scores above the threshold are computed."""
        computed_ES = torch.ones_like(scores_ES, dtype=torch.bool)
        computed_ES[self._trained] = scores_ES[self._trained] > threshold
        return self._work.kept(computed_ES)

    def state(self) -> dict[str, Tensor]:
        """Return all that changes from round to round, and all that was measured: times would be others next time."""
        return {
            "penalty": torch.tensor(self.factor, dtype=torch.float64),
            "steepness": self._steepness_ES.clone(),
            "work.total": torch.tensor(self._work.total, dtype=torch.float64),
            "work.own": self._work.own_ES.clone(),
            "prices.own": self._prices.own_ES.clone(),
        }

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Go on from what ``state`` returned."""
        self.factor, self._steepness_ES = float(tensors["penalty"]), tensors["steepness"].clone()
        self._work.total, self._work.own_ES = float(tensors["work.total"]), tensors["work.own"]
        self._prices.own_ES = tensors["prices.own"]
        self._set_prices()

    def _set_prices(self) -> None:
        mean_price = float(self._prices.own_ES[self._trained].mean())
        self._price_ES = (self._prices.own_ES / mean_price).to(torch.float32).to(self._denoiser.device)

    def _threshold_within(self, budget: float, scores_ES: Tensor) -> float:
        """Return the lowest of the scores above which no more than the budget is left; 0 if that is all of them."""
        candidates = [0.0, *torch.unique(scores_ES[self._trained]).tolist()]
        low, high = 0, len(candidates) - 1
        while low < high:
            middle = (low + high) // 2
            if self.kept(scores_ES, candidates[middle]) <= budget:
                high = middle
            else:
                low = middle + 1
        return float(candidates[high])

    def _check_budget(self) -> None:
        budget = self._settings.budget
        if budget is None:
            return
        least = self.kept(torch.zeros(self._work.own_ES.shape), 0.5)
        if budget < least:
            raise ScheduleError(
                f"a budget of {budget:.1%} of the {self._settings.budget_in} cannot be met: {least:.1%} is left when"
                " every site is reused in every evaluation that may reuse; let more evaluations reuse, name more sites,"
                " or raise the budget"
            )
