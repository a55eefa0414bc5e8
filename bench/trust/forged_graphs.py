"""Load and call saved samplers with forged graphs: each is refused or computes what it says, within its memory.

Options: ``--count N`` (default 2000), ``--seed N`` (default 0), ``--first N`` (default 0), the first file's number, and
``--without-guard``. File number n of a seed is the same file in every run. Linux only.

``mutate/forgeries.py`` draws the graphs, with checksums that are right, and ``forged_worker.py`` runs them in processes
of their own. Allowed are an ``L2CError`` when a file is loaded or the sampler called, or results that do not depend on
memory that nobody wrote. Where there is a C compiler, the processes run on ``guard_pages.c``: whatever reads or writes
outside a tensor, or in one that was freed, ends the process. It sees torch's tensors, to 16 bytes, and the workspaces
of oneDNN; it does not see what operators keep in other memory of the C library. Without it the C library fills memory.
"""

from __future__ import annotations

import shutil
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from rich.progress import Progress

from bench.cases import BenchError
from bench.options import Options
from bench.report import Row
from bench.trust.malformed_files import outcomes, summed_up

_SOURCE = Path(__file__).with_name("guard_pages.c")


def run(args: Sequence[str], progress: Progress) -> list[Row]:
    """Return how many files came to which outcome, the failures one by one, and the file that loaded slowest."""
    parser = Options("forged-graphs")
    parser.add_argument("--count", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--without-guard", action="store_true")
    options = parser.read(args)
    if options.count < 1 or options.first < 0:
        raise BenchError(f"forged-graphs wants a count of at least 1, got {options.count} from {options.first}")
    task = progress.add_task("forged graphs", total=options.count)
    done = []
    with guard(not options.without_guard) as library:
        environment = {} if library is None else {"LD_PRELOAD": str(library)}
        stop = options.first + options.count
        for outcome in outcomes(options.seed, options.first, stop, "forged_worker", environment):
            done.append(outcome)
            progress.advance(task)
    of_run = {"seed": options.seed, "first": options.first, "count": len(done), "guard": library is not None}
    return summed_up(done, of_run)


@contextmanager
def guard(wanted: bool) -> Iterator[Path | None]:
    """Yield the compiled allocator; None where it is not wanted, or there is no C compiler."""
    compiler = shutil.which("cc") if wanted else None
    if compiler is None:
        yield None
        return
    with tempfile.TemporaryDirectory() as folder:
        library = Path(folder) / "guard_pages.so"
        command = [compiler, "-O1", "-shared", "-fPIC", "-o", str(library), str(_SOURCE), "-ldl"]
        compiled = subprocess.run(command, capture_output=True, text=True, check=False)
        if compiled.returncode:
            raise BenchError(f"the allocator does not compile; --without-guard goes without: {compiled.stderr:.300}")
        yield library
