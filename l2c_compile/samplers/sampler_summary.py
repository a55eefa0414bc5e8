"""What a compiled form computes, reads and keeps, and what it costs to check it at run time."""

from __future__ import annotations

import time
from dataclasses import dataclass

from l2c_compile.analyses.summary import Summary, summarize
from l2c_compile.samplers.compiled_form import CompiledForm


@dataclass(frozen=True)
class SamplerSummary(Summary):
    """The summary of a static graph, with the cost of the checks around it; ``print`` shows it."""

    first_call_s: float
    """How long the comparison of the first call with the eager loop took, in seconds; 0 if there was none yet."""
    guards_s: float
    """How long it takes to see that a form may still run, in seconds a call."""

    @classmethod
    def of(cls, form: CompiledForm) -> SamplerSummary:
        """Return the summary of a form; its guards are timed once."""
        start_s = time.perf_counter()
        form.guards.why_not()
        guards_s = time.perf_counter() - start_s
        return cls(**vars(summarize(form.graph)), first_call_s=form.checked_in_s, guards_s=guards_s)

    def in_short(self) -> str:
        """Return the totals as one line."""
        first = f"; first call compared with the eager loop in {self.first_call_s:.2g} s" if self.first_call_s else ""
        return f"{super().in_short()}{first}; guards {self.guards_s * 1e3:.2g} ms a call"
