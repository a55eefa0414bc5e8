"""The flow of the compiler, one line for each stage; start here.

``build_loop_graph`` is all of it: ``trace_and_capture`` runs the loop once and captures each form of call to the
denoiser, ``graph_of`` unrolls both into a loop graph and runs the passes on it.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn

from l2c_compile.analyses.cost import prices_of
from l2c_compile.errors import ScheduleError
from l2c_compile.frontend.capture import capture, check_sites_called
from l2c_compile.frontend.loop_effects import trace_without_effects
from l2c_compile.frontend.reused_sites import check_reused_sites
from l2c_compile.frontend.stand_in import Loop
from l2c_compile.frontend.unroll import unroll
from l2c_compile.frontend.weights_lock import weights_swapped
from l2c_compile.graphs.forms import CallSignature
from l2c_compile.graphs.loop_graph import EvaluationGraph, LoopGraph
from l2c_compile.graphs.skeleton import LoopSkeleton
from l2c_compile.passes.base import PassRun, Pipeline
from l2c_compile.passes.pipeline import BITWISE, EVALUATION, SKELETON
from l2c_compile.progress import Progress, silent
from l2c_compile.schedules.schedule import CacheSchedule


def build_loop_graph(
    denoiser: nn.Module,
    loop: Loop,
    schedule: CacheSchedule,
    noise: object,
    conditions: Mapping[str, object],
    passes: Pipeline = BITWISE,
    progress: Progress = silent,
) -> tuple[LoopGraph, list[PassRun]]:
    """Return the loop as one static graph, and what the passes did."""
    trace = trace_and_capture(denoiser, loop, schedule, noise, conditions, progress)
    return graph_of(trace, denoiser, schedule, passes, progress)


def trace_and_capture(
    denoiser: nn.Module,
    loop: Loop,
    schedule: CacheSchedule,
    noise: object,
    conditions: Mapping[str, object],
    progress: Progress = silent,
) -> LoopSkeleton:
    """Return the loop as it was traced, with its evaluations as they were captured: no pass has run, and none will.

    Raises:
        CaptureError: if the denoiser cannot be captured.
        LoopTraceError: if the loop cannot be traced.
        ScheduleError: if the schedule is for another number of evaluations, or no evaluation calls one of its sites.
    """
    evaluations: dict[CallSignature, EvaluationGraph] = {}
    read_inputs_of = {site for (_, site), reuse in schedule.reuses.items() if reuse.rule.needs_input}

    def capture_call(signature: CallSignature) -> EvaluationGraph:
        if signature not in evaluations:
            progress(f"capture form {len(evaluations)} of an evaluation")
            evaluations[signature] = capture(denoiser, signature, schedule.sites, read_inputs_of)
        return evaluations[signature]

    progress("trace the loop")
    # Torch's flag for tracing is one for all threads, and code that torch.compile made refuses to run while it is set.
    with weights_swapped():
        trace = trace_without_effects(loop, denoiser, noise, conditions, capture_call)
    _check_num_evaluations(schedule, len(trace.calls))
    check_sites_called(denoiser, schedule.sites, evaluations.values())
    return trace


def graph_of(
    trace: LoopSkeleton,
    denoiser: nn.Module,
    schedule: CacheSchedule,
    passes: Pipeline = BITWISE,
    progress: Progress = silent,
) -> tuple[LoopGraph, list[PassRun]]:
    """Return the static graph of a traced loop under a schedule, and what the passes did; the trace stays as it is.

    Args:
        trace: what ``trace_and_capture`` returned for a schedule of the same sites.
        denoiser: the module that the weights belong to.
        schedule: the schedule, its patterns resolved.
        passes: the passes to run over the loop graph.
        progress: a function that is told each stage before it begins.

    Raises:
        ScheduleError: if a site is reused where its module is not called, or returns something else.
    """
    check_reused_sites(trace, schedule)
    skeleton = trace.copy()
    progress("simplify")
    SKELETON.run(skeleton)
    for evaluation in skeleton.evaluations():
        EVALUATION.run(evaluation)
    progress(f"unroll {len(skeleton.calls)} evaluations")
    graph = unroll(skeleton, denoiser, schedule)
    graph.prices = prices_of(skeleton)
    runs = passes.run(graph, on_pass=lambda name: progress(f"pass {name}"))
    return graph, runs


def _check_num_evaluations(schedule: CacheSchedule, performed: int) -> None:
    if schedule.num_evaluations != performed:
        raise ScheduleError(
            f"the schedule is for {schedule.num_evaluations} evaluations, but the loop calls the denoiser {performed}"
            " times; use a schedule made for this loop (guidance in separate calls counts each of them)"
        )
