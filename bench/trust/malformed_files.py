"""Read files that are broken, forged or hostile: all must be refused at once, and nothing in them may run.

Options: ``--count N`` (default 5000), ``--seed N`` (default 0) and ``--first N`` (default 0), the first file's number:
with ``--count 1`` that replays one. File number n of a seed is the same file in every run. Linux only.

Kinds are what the package reads: schedules, routers, saved samplers, profiles, checkpoints of learning, and the files
of other projects. ``file_mutations.py`` and ``mutate/`` break them, ``malformed_worker.py`` reads them in processes of
their own. Allowed are an ``L2CError`` with a short printable message, or an ``OSError`` that names the
file where the file system is at fault, within a second of processor time and 256 MiB. A file that is read all the same
says what it said before or, where no checksum covers the change, something that is valid.
"""

from __future__ import annotations

import json
import os
import selectors
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence

from rich.progress import Progress

from bench.cases import BenchError
from bench.options import Options
from bench.report import ROOT, Condition, Row
from bench.trust.malformed_worker import Outcome

ALLOWED = ("refused", "not readable", "read as before", "read as another", "ran", "refused when called")
"""The outcomes that are not failures."""

_CHUNK = 1000
# Wall time on a busy machine; a second of processor time is what is allowed.
_HANG_SECONDS = 120.0


def run(args: Sequence[str], progress: Progress) -> list[Row]:
    """Return how many files of each kind came to which outcome, the failures one by one, and the slowest file."""
    parser = Options("malformed-files")
    parser.add_argument("--count", type=int, default=5000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--first", type=int, default=0)
    options = parser.read(args)
    if options.count < 1 or options.first < 0:
        raise BenchError(f"malformed-files wants a count of at least 1, got {options.count} from {options.first}")
    task = progress.add_task("malformed files", total=options.count)
    done = []
    for outcome in outcomes(options.seed, options.first, options.first + options.count):
        done.append(outcome)
        progress.advance(task)
    return summed_up(done, {"seed": options.seed, "first": options.first, "count": len(done)})


def summed_up(done: Sequence[Outcome], of_run: Mapping[str, Condition]) -> list[Row]:
    """Return the rows that say what came of the files of a run."""
    counts = Counter((each.kind, each.outcome) for each in done)
    rows = [Row("files", n, "", {**of_run, "kind": kind, "outcome": how}) for (kind, how), n in sorted(counts.items())]
    failures = [each for each in done if each.outcome not in ALLOWED]
    for each in failures:
        rows.append(Row("failure", each.seconds, "s", {**_which(each, of_run), "detail": each.detail}))
    slowest = max(done, key=lambda each: each.seconds)
    rows.append(Row("slowest", slowest.seconds, "s", _which(slowest, of_run)))
    for what in ("CRASHED", "HUNG", "EXECUTED"):
        rows.append(Row(what.lower(), sum(each.outcome == what for each in failures), "files", of_run))
    rows.append(Row("failures", len(failures), "files", of_run))
    return rows


def _which(one: Outcome, of_run: Mapping[str, Condition]) -> dict[str, Condition]:
    about: dict[str, Condition] = {"kind": one.kind, "mutation": one.mutation, "outcome": one.outcome}
    return {**of_run, "file": one.index, **about}


def outcomes(
    seed: int, start: int, stop: int, worker: str = "malformed_worker", environment: Mapping[str, str] = {}
) -> Iterator[Outcome]:
    """Yield the outcomes of the files ``start`` to ``stop``. That a file ends or stops its process is one, too.

    Args:
        seed: the seed of the run.
        start: the number of the first file.
        stop: the number behind the last.
        worker: the module in this folder that reads the files.
        environment: what the process gets besides the environment of this one.

    Raises:
        BenchError: if the process cannot read even the valid files.
    """
    while start < stop:
        end = min(stop, start + _CHUNK)
        command = [sys.executable, "-m", f"bench.trust.{worker}", *map(str, (seed, start, end))]
        surroundings = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
        with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, env=surroundings) as process:
            assert process.stdout is not None
            lines = _lines(process.stdout.fileno())
            try:
                if next(lines, None) != "ready":
                    raise BenchError("the process that reads malformed files did not start; its error is above")
                for line in lines:
                    yield Outcome(**json.loads(line))
                    start += 1
                if start < end:
                    yield Outcome(start, "?", "?", "CRASHED", f"the process ended with {process.wait()}", 0.0)
                    start += 1
            except TimeoutError:
                yield Outcome(start, "?", "?", "HUNG", f"nothing came for {_HANG_SECONDS} s", _HANG_SECONDS)
                start += 1
            finally:
                process.kill()


def _lines(descriptor: int) -> Iterator[str]:
    """Yield the lines that arrive in a pipe.

    Raises:
        TimeoutError: if nothing arrived for a long time.
    """
    rest = b""
    with selectors.DefaultSelector() as selector:
        selector.register(descriptor, selectors.EVENT_READ)
        while True:
            if not selector.select(_HANG_SECONDS):
                raise TimeoutError
            chunk = os.read(descriptor, 65536)
            if not chunk:
                return
            *whole, rest = (rest + chunk).split(b"\n")
            yield from (line.decode() for line in whole)
