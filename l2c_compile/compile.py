"""The flow of the compiler, one line a stage; start here.

``build_loop_graph`` captures the denoiser, traces the loop, unrolls both into a loop graph and runs the passes on it.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn

from l2c_compile.errors import ScheduleError
from l2c_compile.frontend.capture import capture
from l2c_compile.frontend.stand_in import Loop
from l2c_compile.frontend.trace import trace_loop
from l2c_compile.frontend.unroll import unroll
from l2c_compile.frontend.weights_lock import weights_swapped
from l2c_compile.graphs.forms import CallSignature
from l2c_compile.graphs.loop_graph import EvaluationGraph, LoopGraph
from l2c_compile.graphs.skeleton import LoopSkeleton
from l2c_compile.passes.base import PassRun, Pipeline
from l2c_compile.passes.pipeline import BITWISE, EVALUATION, SKELETON
from l2c_compile.progress import Progress, silent
from l2c_compile.schedules.schedule import CacheSchedule

__all__ = ["build_loop_graph", "trace_and_capture"]


def build_loop_graph(
    denoiser: nn.Module,
    loop: Loop,
    schedule: CacheSchedule,
    noise: object,
    conditions: Mapping[str, object],
    passes: Pipeline = BITWISE,
    progress: Progress | None = None,
) -> tuple[LoopGraph, list[PassRun]]:
    """Return the loop as one static graph, and what the passes did."""
    say = progress or silent
    skeleton = trace_and_capture(denoiser, loop, schedule, noise, conditions, progress)
    say("simplify")
    SKELETON.run(skeleton)
    for evaluation in {id(call.graph): call.graph for call in skeleton.calls}.values():
        EVALUATION.run(evaluation)
    say(f"unroll {len(skeleton.calls)} evaluations")
    graph = unroll(skeleton, denoiser, schedule)
    runs = passes.run(graph, on_pass=lambda name: say(f"pass {name}"))
    return graph, runs


def trace_and_capture(
    denoiser: nn.Module,
    loop: Loop,
    schedule: CacheSchedule,
    noise: object,
    conditions: Mapping[str, object],
    progress: Progress | None = None,
) -> LoopSkeleton:
    """Return the loop as it is traced, with its evaluations as they are captured: no pass has run."""
    say = progress or silent
    evaluations: dict[CallSignature, EvaluationGraph] = {}
    read_inputs_of = {site for (_, site), reuse in schedule.reuses.items() if reuse.rule.needs_input}

    def capture_call(signature: CallSignature) -> EvaluationGraph:
        if signature not in evaluations:
            say(f"capture form {len(evaluations)} of an evaluation")
            evaluations[signature] = capture(denoiser, signature, schedule.sites, read_inputs_of)
        return evaluations[signature]

    say("trace the loop")
    # Torch's flag that somebody traces is one for all threads: code that torch.compile made would refuse to run.
    with weights_swapped():
        skeleton = trace_loop(loop, denoiser, noise, conditions, capture_call)
    _check_num_evaluations(schedule, len(skeleton.calls))
    return skeleton


def _check_num_evaluations(schedule: CacheSchedule, performed: int) -> None:
    if schedule.num_evaluations != performed:
        raise ScheduleError(
            f"the schedule is for {schedule.num_evaluations} evaluations, but the loop calls the denoiser {performed}"
            " times; use a schedule made for this loop (guidance in separate calls counts each of them)"
        )
