"""The cases that can be run, as data: the name of each and its module.

To add a case, write ``bench/my_case.py`` and one line in ``CASES``. The first line of the module docstring is what
``python -m bench --help`` shows. The module is imported only when its case runs, so it may import anything, and a
broken one does not stop the others::

    '''Time the compiled loop against the eager one.'''

    def run(args: Sequence[str], progress: Progress) -> list[Row]:
        task = progress.add_task("compiled vs eager", total=20)
        timings = compare({"eager": eager, "compiled": compiled}, rounds=20, warmup=3,
                          on_round=lambda: progress.advance(task))
        speedup = ratio(timings["eager"], timings["compiled"])
        return [
            Row.timed("eager", timings["eager"], {"steps": 20}),
            Row.timed("compiled", timings["compiled"], {"steps": 20}),
            Row.ratio("speedup", speedup, {"steps": 20}),
        ]

- ``args`` is all that follows the name on the command line and is no option of the harness, options of the case
  included: ``python -m bench golden a.pt b.pt --threads 2`` gives ``["a.pt", "b.pt", "--threads", "2"]``.
  ``Options("my-case")`` in ``options.py`` parses them and refuses what it does not know.
- ``progress`` is running; add a task and advance it. Print nothing, because the table is made of the rows.
- A ``Row`` says what was measured and under which conditions. The harness adds the name of the case, the machine, the
  versions, the commit and the date. A target in ``targets.toml`` finds a row by case, metric and conditions.
- Include the side that loses: an uncached ``torch.compile``, fewer steps, a size at which we do not help.
- A user's mistake (a missing file, a wrong argument) is an ``L2CError``; the harness prints it and exits with 2.
"""

from __future__ import annotations

import ast
import importlib
import importlib.util
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeAlias

from rich.progress import Progress

from bench.report import Row
from l2c_compile.errors import L2CError, nearest

Run: TypeAlias = Callable[[Sequence[str], Progress], list[Row]]

CASES: dict[str, str] = {
    "compile-time": "bench.speed.compile_time:run",
    "equality": "bench.trust.equality:run",
    "forged-graphs": "bench.trust.forged_graphs:run",
    "fuzz": "bench.trust.fuzz:run",
    "golden": "bench.trust.golden:run",
    "gpu-all": "bench.speed.gpu_all:run",
    "guards": "bench.speed.guards:run",
    "kernel-compile": "bench.speed.kernel_compile:run",
    "kernels": "bench.speed.kernels:run",
    "latency": "bench.speed.latency:run",
    "malformed-files": "bench.trust.malformed_files:run",
    "memory": "bench.speed.memory:run",
    "mutations": "bench.trust.mutations:run",
    "packed-caches": "bench.speed.packed_caches:run",
    "predict": "bench.speed.predict:run",
    "quality": "bench.digits.compare:run",
    "removed-shares": "bench.trust.removed_shares:run",
    "trace-time": "bench.speed.trace_time:run",
    "version-matrix": "bench.trust.version_matrix:run",
}


ALWAYS_CHECKED = frozenset(
    {"equality", "forged-graphs", "fuzz", "golden", "malformed-files", "mutations", "removed-shares"}
)
"""The cases that measure correctness, not speed; they exit with 1 when they fall short, also without ``--check``."""


class BenchError(L2CError, ValueError):
    """A bench that cannot run as it was asked to."""


def load(name: str) -> Run:
    """Import the module of a case and return its function.

    Raises:
        BenchError: if the name is unknown, the module is missing, or something it imports is.
    """
    if name not in CASES:
        raise BenchError(f"no bench named {name!r}: {nearest(name, CASES) or 'known: ' + ', '.join(sorted(CASES))}")
    module_name, function_name = CASES[name].split(":")
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name == module_name:
            raise BenchError(f"bench {name!r} wants the module {module_name}, which does not exist") from error
        advice = "pip install -e '.[dev]' has all of them"
        raise BenchError(f"bench {name!r} wants {error.name!r}, which is not installed; {advice}") from error
    run: Run = getattr(module, function_name)
    return run


def summary(name: str) -> str:
    """Return the first line of the docstring of a case, read from its file without importing it."""
    module_name = CASES[name].split(":")[0]
    spec = importlib.util.find_spec(module_name)
    if spec is None or spec.origin is None:
        return f"({module_name} does not exist)"
    try:
        docstring = ast.get_docstring(ast.parse(Path(spec.origin).read_text(encoding="utf-8")))
    except SyntaxError:
        return f"({module_name} does not parse)"
    return docstring.splitlines()[0] if docstring else ""
