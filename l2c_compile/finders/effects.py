"""The effect of caching: what the result of a loop owes to one evaluation that is cached."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from l2c_compile.finders.open_evaluations import OnEvaluation, OpenDenoiser, OpenEvaluation
from l2c_compile.finders.processes import Workers
from l2c_compile.frontend.stand_in import Loop
from l2c_compile.graphs.forms import tensors_in

Cached = Callable[[int, OpenEvaluation, list[Tensor]], tuple[list[Tensor], list[Tensor] | None]]
"""A function that is given what an ``OnEvaluation`` is. It returns the outputs with which the loop goes on, and those
of the evaluation when it is cached, or None if it never is."""


@torch.no_grad()
def effect_of_caching(
    denoiser: OpenDenoiser,
    loop: Loop,
    noise: object,
    conditions: Mapping[str, object],
    evaluate: Cached,
    workers: Workers,
) -> dict[int, float]:
    """Return what caching an evaluation changes in the result of a loop, for each evaluation that may be cached.

    It is the mean squared difference of two results: the evaluation is cached for the one and full for the other.
    Before it both loops have gone on with what ``evaluate`` gave; after it all evaluations are full.

    Args:
        denoiser: the denoiser.
        loop: runs on it, once for what ``evaluate`` gives and once for each evaluation that may be cached.
        noise: that of the loop.
        conditions: those of the loop.
        evaluate: what the evaluations give; where the outputs to go on with are not the cached ones, they must be full.
        workers: the processes that learn together, for their precision.
    """
    path: list[list[Tensor]] = []
    cached: dict[int, list[Tensor]] = {}
    results: dict[tuple[int, ...], object] = {}

    def result_of(on_evaluation: OnEvaluation) -> object:
        # So that a loop that draws noise draws the same each time.
        with torch.random.fork_rng():
            return denoiser.run(loop, noise, conditions, on_evaluation)

    def record(e: int, evaluation: OpenEvaluation, tensors: list[Tensor]) -> list[Tensor]:
        outputs, when_cached = evaluate(e, evaluation, tensors)
        path.append(outputs)
        if when_cached is not None:
            cached[e] = when_cached
        return _copied(outputs)

    def up_to_last_cached(given: list[list[Tensor]]) -> list[list[Tensor]]:
        """Return the outputs that are no full evaluations, and those before them: the others follow from these."""
        count = max((e + 1 for e, outputs in enumerate(given) if outputs is cached.get(e)), default=0)
        return given[:count]

    def result_after(given: list[list[Tensor]]) -> object:
        given = up_to_last_cached(given)
        key = tuple(map(id, given))

        def resume(e: int, evaluation: OpenEvaluation, tensors: list[Tensor]) -> list[Tensor]:
            if e < len(given):
                return _copied(given[e])
            with workers.autocast():
                return evaluation.in_form(evaluation.observe(tensors)[0])

        if key not in results:
            results[key] = result_of(resume)
        return results[key]

    result = result_of(record)
    results[tuple(map(id, up_to_last_cached(path)))] = result
    return {e: _squared_difference(result_after([*path[:e], cached[e]]), result_after(path[:e])) for e in cached}


def _copied(outputs: list[Tensor]) -> list[Tensor]:
    """Return copies, into which the loop may write."""
    return [output.clone() for output in outputs]


def _squared_difference(one: object, other: object) -> float:
    """Return the mean squared difference of two results of a loop, summed over their tensors."""
    pairs = zip(tensors_in(one), tensors_in(other), strict=True)
    return float(sum((a.double() - b.double()).square().mean() for a, b in pairs))
