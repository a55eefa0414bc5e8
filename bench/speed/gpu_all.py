"""Take every GPU measurement of the project, part by part, in under nine minutes on one GPU.

``python -m bench gpu-all --out DIR``. A part is a list of calls of ordinary benches. Each part writes
``DIR/<part>.json`` when it is done, all at once; a part that is done is not run again unless ``--redo`` is given, so an
interrupted run goes on where it was. At the end all of it is in ``DIR/gpu-all.json`` and in a table. A part has the
seconds of its budget and those that the parts before it left; a call that does not fit is skipped, and a row says so.
``--parts`` chooses. Exits with 2 where there is no CUDA device, having run nothing, and where a part failed.

golden        records of the authors' implementation, replayed on the GPU in float32 without TF32
equality      compiled loops against the eager loop with hooks: each dtype, passes that change no bit and that round
compile-time  DiT-XL/2, the whole loop against torch.compile of one evaluation, from an empty cache
latency       DiT-XL/2, published routers and every second evaluation, with guidance: ours, ours uncached,
              torch.compile in the eager loop, hooks, eager
cuda-graph    the same loops as one CUDA graph, and whether it returns the same bits
memory        the peak that torch.cuda measures against the bytes that the plan counts
kernels       share of a copy's bandwidth, against eager torch and Inductor

The routers and records are files of others; ``shared_folder`` says where they are looked for. Where they are absent a
row says so, and all loops reuse everything in every second evaluation.

``--device cpu --tiny`` rehearses: every part runs on tiny shapes, nothing is compiled by Inductor, files are named
``rehearsal-<part>.json``, and every row says so. No figure of a rehearsal means anything.
"""

from __future__ import annotations

import argparse
import json
import shlex
import time
import traceback
from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import Progress
from torch._inductor.utils import fresh_cache

from bench.cases import BenchError, load
from bench.options import Options
from bench.report import Record, Row, Surroundings, records, results_table
from bench.speed import kernels, latency, memory
from bench.workloads import DTYPES, keeping, shared_folder
from l2c_compile.files.documents import write_atomically

PARTS = ("golden", "equality", "compile-time", "latency", "cuda-graph", "memory", "kernels")
"""The parts, in this order: what the later ones need is compiled by then."""

TOTAL_S = 525.0
"""The time that one run may take, which is the sum of the parts' budgets; the last parts get what is left."""

_LOOPS = (
    *((20, 1, "bfloat16"), (20, 8, "bfloat16"), (50, 1, "bfloat16"), (20, 1, "float32"), (50, 8, "bfloat16")),
    *((20, 8, "float32"), (50, 1, "float32")),
)
"""Steps, batch and dtype of each loop; the most important first, because what comes last is skipped first."""


@dataclass(frozen=True)
class Part:
    """One file of results."""

    budget_s: float
    guess_s: float
    """The time that a call is expected to take, as long as none took longer."""
    calls: Sequence[Sequence[str]]
    """The name of a bench and its arguments for each call. A call that does not fit into the budget is skipped."""
    absent: str = ""
    """The files that are not there, so that fewer calls are made; "" if all are."""


def parts(*, tiny: bool) -> dict[str, Part]:
    """Return the calls of each part; tiny ones for a rehearsal."""
    shared = shared_folder()
    device = ["--device", "cpu" if tiny else "cuda"]
    on = [*device, "--backend", "eager"] if tiny else device
    model, loops, rounds, blocks = ("tiny", [(2, 1, "bfloat16")], "1", "1") if tiny else ("dit-xl", _LOOPS, "5", "4")
    published = all((shared / "routers" / f"l2c_DDIM{steps}_router.pt").is_file() for steps in (20, 50))
    schedules = ["published", "every-second"] if published and not tiny else ["every-second"]

    def loop(steps: int, batch: int, dtype: str, schedule: str = schedules[0]) -> list[str]:
        return [model, *f"--steps {steps} --batch {batch} --dtype {dtype} --schedule {schedule}".split(), *on]

    goldens = sorted((shared / "golden").glob("*.pt"))
    small = ["equality", "--model", model, "--depth", blocks, "--steps", "2" if tiny else "4", *on]
    every = [(*each, schedule) for each in loops for schedule in schedules]
    timed = ["latency", "--rounds", rounds, "--models"]
    others = [latency.UNCACHED, latency.COMPILE, latency.HOOKS, latency.EAGER]
    telling = [case for case in kernels.DIT if case.shape[0] in (2, 16) and case.terms in (1, 7, 28)]
    cases = kernels.SMOKE if tiny else dict.fromkeys((*telling, *kernels.VIDEO, *kernels.DIT))
    no_goldens = "" if goldens else f"no records in {shared}/golden"
    no_routers = "" if published else f"no published routers in {shared}/routers"
    sides = [(dtype, side) for dtype in DTYPES for side in ("bitwise", "rounding", "compiled")]
    return {
        "golden": Part(25, 5, [["golden", *device, str(path)] for path in goldens], no_goldens),
        "equality": Part(55, 8, [[*small, "--dtypes", dtype, "--sides", side] for dtype, side in sides]),
        "compile-time": Part(110, 60, [["compile-time", "--model", *loop(*loops[0])]]),
        "latency": Part(200, 40, [[*timed, *loop(*each), "--sides", *others] for each in every], no_routers),
        "cuda-graph": Part(
            45, 8, [[*timed, *loop(*each), "--cuda-graph", "--sides", latency.UNCACHED] for each in loops[:3]]
        ),
        "memory": Part(45, 6, [["memory", "--model", *loop(*loops[0]), "--sides", side] for side in memory.SIDES]),
        "kernels": Part(45, 3, [["kernels", *device, "--cases", case.name] for case in cases]),
    }


def run(args: Sequence[str], progress: Progress) -> list[Row]:
    """Run the parts that are not done, and return the rows of all.

    Raises:
        BenchError: if there is no CUDA device, a file of results is damaged, or a part failed.
    """
    options = _options(args)
    options.out.mkdir(parents=True, exist_ok=True)
    known = parts(tiny=options.tiny)
    task = progress.add_task("gpu-all", total=len(options.parts))
    start_s, planned_s = time.perf_counter(), 0.0
    with keeping(), nullcontext() if options.tiny else fresh_cache():
        for name in options.parts:
            progress.update(task, description=f"gpu-all: {name}")
            path = _file(options, name)
            if options.redo or not path.is_file() or _read(path)["error"] is not None:
                part, used_s = known[name], time.perf_counter() - start_s
                planned_s += part.budget_s
                seconds = min(max(part.budget_s, planned_s - used_s), TOTAL_S - used_s)
                document = _run_part(name, replace(part, budget_s=seconds), options, progress)
                write_atomically(path, json.dumps(document, indent=1).encode())
            progress.advance(task)
    documents = {name: _read(_file(options, name)) for name in known if _file(options, name).is_file()}
    for name, document in documents.items():
        if document["rehearsal"] != options.tiny or document["part"] != name:
            raise BenchError(f"{_file(options, name)} holds another part, or a rehearsal under another name; remove it")
    together = {"rehearsal": options.tiny, "parts": documents}
    write_atomically(_file(options, "gpu-all"), json.dumps(together, indent=1).encode())
    rows = [row for document in documents.values() for row in _rows_of(document)]
    failed = [f"{name}: {documents[name]['error'][-1]}" for name in documents if documents[name]["error"] is not None]
    if failed:
        # The results of the other parts are shown all the same.
        Console().print(results_table(records("gpu-all", rows, Surroundings.here_and_now())))
        raise BenchError(f"{'; '.join(failed)}; tracebacks in {options.out}; the same command runs these parts again")
    return rows


def _options(args: Sequence[str]) -> argparse.Namespace:
    parser = Options("gpu-all")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--parts", nargs="+", default=PARTS, choices=PARTS)
    parser.add_argument("--redo", action="store_true")
    parser.add_argument("--tiny", action="store_true")
    parser.add_device("cuda", "cpu")
    options = parser.read(args)
    if (options.device == "cpu") != options.tiny:
        raise BenchError("gpu-all measures on a GPU; --device cpu and --tiny go together, and rehearse the script")
    return options


def _file(options: argparse.Namespace, name: str) -> Path:
    folder: Path = options.out
    return folder / f"{'rehearsal-' if options.tiny else ''}{name}.json"


def _run_part(name: str, part: Part, options: argparse.Namespace, progress: Progress) -> dict[str, Any]:
    """Make the calls of one part, as many as fit; return what its file holds."""
    surroundings = Surroundings.here_and_now()
    rows: list[Row] = []
    error: list[str] = []
    skipped = [f"{part.absent}; set L2C_SHARED to the folder that has it"] if part.absent else []
    start_s, longest_s = time.perf_counter(), part.guess_s
    for bench, *args in part.calls:
        begun_s, others = time.perf_counter(), set(progress.task_ids)
        left_s = part.budget_s - (begun_s - start_s)
        if longest_s > left_s:
            what = shlex.join((bench, *args))
            skipped.append(f"{what}: would take {longest_s:.0f} s, {max(left_s, 0.0):.0f} s are left")
            continue
        try:
            rows += load(bench)(args, progress)
        # One call that fails must not cost the results of all others.
        except Exception:
            error += traceback.format_exc().splitlines()
        for task in set(progress.task_ids) - others:
            progress.remove_task(task)
        longest_s = max(longest_s, time.perf_counter() - begun_s)
    seconds = time.perf_counter() - start_s
    rows += [Row("skipped", 1, "", {"what": what}, device=options.device) for what in skipped]
    rows.append(Row("part_seconds", seconds, "s", device=options.device))
    on = f"REHEARSAL on {options.device}, tiny shapes" if options.tiny else options.device
    rows = [replace(row, conditions={"on": on, "part": name, **row.conditions}) for row in rows]
    return {
        "part": name,
        "rehearsal": options.tiny,
        "seconds": seconds,
        "skipped": skipped,
        "error": error or None,
        "records": [asdict(record) for record in records("gpu-all", rows, surroundings)],
    }


def _read(path: Path) -> dict[str, Any]:
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
        if not {"part", "rehearsal", "skipped", "error", "records"} <= document.keys():
            raise ValueError("it lacks a key")
    except (ValueError, AttributeError, UnicodeDecodeError) as error:
        raise BenchError(f"{path} is no result of gpu-all ({error}); remove it") from error
    assert isinstance(document, dict)
    return document


def _rows_of(document: Mapping[str, Any]) -> Iterator[Row]:
    device = "cpu" if document["rehearsal"] else "cuda"
    for each in document["records"]:
        record = Record(**each)
        yield Row(record.metric, record.value, record.unit, record.conditions, record.p20, record.p80, device)
