"""Python state that a capture would freeze, or that changes after it: what notices, the guards or the first call.

Each mutation is a program of ``programs/python``: what its loop or denoiser does, or what happens between two calls of
its sampler. It is caught where each call is refused with an error of ours or gives what eager torch gives. What is
caught with ``check="structure"`` is caught by the guards, and the rest by the run of the loop that ``check="first"``
makes in the first call.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from rich.progress import Progress

from bench.report import Row
from bench.trust.programs.checking import Mismatch
from bench.trust.programs.denoisers import Description
from bench.trust.programs.python.checking import PythonChecker
from bench.trust.programs.python.drawing import PythonProgram


@dataclass(frozen=True)
class StateMutation:
    """What a program does or undergoes."""

    feature: str = ""
    """What its loop or denoiser does."""
    change: str = ""
    """What is changed between two calls."""
    values: tuple[str, str] = ("None", "None")
    """The condition in the first call and in all later ones."""
    packs: bool = False
    """Whether the sampler runs on packed copies of the weights."""

    @property
    def program(self) -> PythonProgram:
        """The program: a call, the change, two more calls."""
        changes: list[Description] = [{"change": self.change}] if self.change else []
        first, second, third = (
            {"seed": seed, "batch": 2, "value": self.values[number > 0]} for number, seed in enumerate((0, 0, 1))
        )
        history = [first, *changes, second, third]
        return PythonProgram(
            None, None, [self.feature] if self.feature else [], 3, [], [], None, "eager", False, history
        )


FROZEN: Mapping[str, StateMutation] = {
    feature: StateMutation(feature)
    for feature in (
        "counter",
        "counter in a closure",
        "previous result",
        "list of results",
        "dataclass as result",
        "hook that stores what the loop reads",
        "branch on values that is caught",
        "step of the denoiser",
        "train and eval in the loop",
        "hook in the loop",
        "forward replaced in the loop",
        "weights swapped in half-way",
        "seed of the caller in the loop",
        "fork_rng in the loop",
        "draw of random",
        "draw of numpy in the denoiser",
        "timestep written through numpy",
        "noise given twice",
    )
}
"""State that one trace of the loop, or one capture of the denoiser, takes for a constant."""

STALE: Mapping[str, StateMutation] = {
    "step of a fused optimizer": StateMutation(change="step of a fused optimizer"),
    "weight written through .data": StateMutation(change="weight written through .data"),
    "weight written through numpy": StateMutation(change="weight written through numpy"),
    "packed weights written through .data": StateMutation(change="weights of a block through .data", packs=True),
    "packed weights by a fused optimizer": StateMutation(change="weights of a block by a fused optimizer", packs=True),
    "submodule appended": StateMutation(change="submodule appended"),
    "submodule of a subclass": StateMutation(change="submodule of a subclass"),
    "adapter injected": StateMutation(change="adapter injected"),
    "hook added": StateMutation(change="hook added"),
    "global hook added": StateMutation(change="global hook added"),
    "hook removed": StateMutation("hook that changes the result", "hook removed"),
    "forward of an instance replaced": StateMutation(change="forward of an instance replaced"),
    "forward of the denoiser replaced": StateMutation(change="forward of the denoiser replaced"),
    "eps of a norm": StateMutation(change="eps of a norm"),
    "number attribute": StateMutation("number attribute", "number attribute"),
    "inner config object": StateMutation("config object", "inner config object"),
    "train() of a submodule": StateMutation("training flag of a submodule", "train() of a submodule"),
    "cell of the loop": StateMutation("cell of the loop", "cell of the loop"),
    "list of the loop": StateMutation("list of numbers of the loop", "list of the loop"),
    "weight of a second module": StateMutation("control net", "weight of a control net"),
    "weight that the loop reads": StateMutation("parameter that the loop reads", "parameter that the loop reads"),
    "condition object": StateMutation("value in the loop", "condition object", ("MUTABLE", "MUTABLE")),
    "condition of another type": StateMutation("value in the loop", values=("1.0", "True")),
    "condition with another sign of zero": StateMutation(
        "value in the loop", values=("np.float64(0.0)", "np.float64(-0.0)")
    ),
    "condition that holds another type": StateMutation(
        "value given to the denoiser", values=("frozenset({1})", "frozenset({1.0})")
    ),
    "loop replaced": StateMutation(change="loop replaced"),
    "model replaced": StateMutation(change="model replaced"),
}
"""What changes after the capture."""

STATE_MUTATIONS: Mapping[str, StateMutation] = {**FROZEN, **STALE}
"""All of them by name."""


def caught_by(mutation: StateMutation) -> tuple[str, str]:
    """Return what catches a mutation, empty if nothing does, and the refusal, empty where each result is right."""
    guarded, compared = replace(mutation.program, check="structure"), replace(mutation.program, check="first")
    for program, what in ((guarded, "guards"), (compared, "first call")):
        try:
            return what, PythonChecker().check(program).refused
        except Mismatch:
            continue
    return "", ""


def state_rows(progress: Progress) -> list[Row]:
    """Return a row for each mutation, 1 where it is caught, and the share that is."""
    task = progress.add_task("state", total=len(STATE_MUTATIONS))
    rows: list[Row] = []
    for name, mutation in STATE_MUTATIONS.items():
        what, refused = caught_by(mutation)
        answer = refused.partition(":")[0] or "right result"
        where = {"mutation": name, "caught_by": what or "nothing", "answer": answer if what else "wrong result"}
        rows.append(Row("caught_state", float(bool(what)), "", where))
        progress.advance(task)
    share = sum(row.value for row in rows) / len(rows)
    return [*rows, Row("caught_state_share", share, "", {"mutations": len(rows)})]
