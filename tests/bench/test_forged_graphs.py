"""A slice of ``python -m bench forged-graphs``: forged graphs are refused or run, with and without the allocator."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import pytest
from rich.progress import Progress

from bench.cases import BenchError
from bench.trust import forged_graphs
from bench.trust.malformed_files import ALLOWED, outcomes

linux = pytest.mark.skipif(sys.platform != "linux", reason="the limits and the allocator are Linux's")
guarded = pytest.mark.skipif(shutil.which("cc") is None, reason="the allocator wants a C compiler")


@linux
def test_a_slice_of_forged_graphs_is_refused_or_runs() -> None:
    done = list(outcomes(5, 0, 60, "forged_worker"))
    assert [each for each in done if each.outcome not in ALLOWED] == []
    # A bench whose files are all refused would show nothing.
    assert {"refused", "ran", "refused when called"} == {each.outcome for each in done}
    assert sum(each.outcome == "ran" for each in done) > 10


@linux
@guarded
def test_the_allocator_ends_a_process_that_reads_too_far(tmp_path: Path) -> None:
    rows = forged_graphs.run(["--count", "3"], Progress(disable=True))
    assert all(row.conditions["guard"] is True for row in rows)
    # torch's own operators without bounds, which no file may call, show that the allocator sees what they do.
    worker = tmp_path / "bench" / "trust" / "reads_too_far.py"
    worker.parent.mkdir(parents=True)
    for folder in (worker.parent, worker.parent.parent):
        (folder / "__init__.py").touch()
    worker.write_text(
        "import torch\nprint('ready', flush=True)\ntorch.ops.aten._reshape_alias(torch.ones(4), [99], [1]).sum()\n"
    )
    with pytest.MonkeyPatch.context() as patch, forged_graphs.guard(wanted=True) as library:
        patch.setattr("bench.trust.malformed_files.ROOT", tmp_path)
        (one,) = outcomes(0, 0, 1, "reads_too_far", {"LD_PRELOAD": str(library)})
    assert (one.outcome, one.detail) == ("CRASHED", "the process ended with -11")


def test_a_count_below_one_is_refused() -> None:
    with pytest.raises(BenchError, match="count of at least 1"):
        forged_graphs.run(["--count", "0"], Progress(disable=True))
