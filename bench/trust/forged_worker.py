"""Load and call saved samplers with forged graphs in a process of its own and print what came of each, a line a file.

    python -m bench.trust.forged_worker SEED START STOP

A sampler that loads is called three times. Memory is filled with one byte before the first call and with another before
the second: the results are equal unless some of it was returned without having been written. Under ``guard_pages.c``
blocks end where a page ends in these two, and begin where one begins in the third.
"""

from __future__ import annotations

import ctypes
import gc
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from bench.trust.malformed_worker import ForbiddenActionRecorder, Outcome, bounded_memory, judge_error, print_outcomes
from bench.trust.mutate.forgeries import forged
from bench.trust.mutate.raw import Draw
from bench.trust.mutate.valid import valid_files
from bench.trust.mutate.zips import records_of
from l2c_compile import LoadedSampler, load
from l2c_compile.graphs.forms import TensorForm
from l2c_compile.sampler_file.operands import extent_bytes

GRAPH_BYTES = 64 * 2**20
"""The memory that a graph may take by what ``load`` is told."""
MEMORY_BYTES = 2**30
"""The address space that loading and calling may take; torch's libraries take memory of their own for some calls."""

_LOAD_SECONDS = 1.0
# What glibc's malloc.h calls M_PERTURB.
_PERTURB = -6


def _fill_function() -> Callable[[int, int], object]:
    """Return a function that sets where blocks lie and what new memory is filled with."""
    library = ctypes.CDLL(None)
    guarded: Callable[[int, int], object] | None = getattr(library, "guard_pages_set", None)
    return guarded or (lambda _, byte: library.mallopt(_PERTURB, byte))


class _ForgedGraphRunner:
    """Loads and calls forged samplers, one after the other."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / "forged.pt2"
        (folder / "valid").mkdir()
        content = valid_files(folder / "valid")["sampler"]
        self.records = records_of(content)
        self.recorder = ForbiddenActionRecorder()
        self.fill = _fill_function()
        self.path.write_bytes(content)
        self._called(load(self.path), 0, 0, 1)
        gc.freeze()

    def outcome(self, index: int, seed: int) -> Outcome:
        draw = Draw(f"forged:{seed}:{index}")
        torch.manual_seed(0)
        self.path.write_bytes(forged(draw, self.records))
        there = sorted(self.path.parent.iterdir())
        seconds = 0.0
        try:
            with self.recorder.recording(), bounded_memory(MEMORY_BYTES):
                start = time.process_time()
                sampler = None
                try:
                    sampler = load(self.path, max_bytes=GRAPH_BYTES)
                finally:
                    seconds = time.process_time() - start
                result = self._judged(sampler, index)
        except Exception as error:
            kind, detail = judge_error(error)
            result = ("refused when called" if kind == "refused" and sampler is not None else kind), detail
        if self.recorder.seen or sorted(self.path.parent.iterdir()) != there:
            result = "EXECUTED", f"{self.recorder.seen}"
        elif seconds > _LOAD_SECONDS:
            result = "SLOW", f"{seconds} s to load"
        gc.collect()
        return Outcome(index, "forged", self._operators(), *result, seconds)

    def _judged(self, sampler: LoadedSampler, index: int) -> tuple[str, str]:
        first, second, _ = (self._called(sampler, index, *layout) for layout in ((0, 0x11), (0, 0xEE), (1, 0x11)))
        if first != second:
            return "UNWRITTEN MEMORY", "two calls gave other bits where only unwritten memory differed"
        return "ran", ""

    def _called(self, sampler: LoadedSampler, index: int, begins_at_page: int, byte: int) -> list[bytes]:
        torch.manual_seed(0)
        self.fill(begins_at_page, byte)
        try:
            noise, y = (_input(form, exact=index % 2 == 0) for form in sampler.inputs.tensor_forms())
            result = sampler(noise, y=y, scale=0.5)
            leaves = result.values() if isinstance(result, dict) else result
            return [_bits(leaf) for leaf in leaves]
        finally:
            self.fill(0, 0)

    def _operators(self) -> str:
        records = records_of(self.path.read_bytes())
        lines = map(json.loads, records["archive/data/extra/l2c_compile/graph.jsonl"].splitlines())
        return " ".join(str(line["op"]) for line in lines if line.get("op", "getitem") != "getitem")


def _input(form: TensorForm, *, exact: bool) -> Tensor:
    """Return an input of a form, with its strides if ``exact``; otherwise it is for the sampler to make these."""
    if not exact:
        return torch.ones(form.shape, dtype=form.dtype)
    memory = torch.ones(extent_bytes(form) // form.dtype.itemsize, dtype=form.dtype)
    return memory.as_strided(form.shape, form.stride)


def _bits(tensor: Tensor | None) -> bytes:
    # Attention in one operator has None for its weights, where they are not asked for.
    if tensor is None or tensor.is_meta:
        return b""
    flat = torch.empty(tensor.numel(), dtype=tensor.dtype).copy_(tensor.flatten())
    return bytes(flat.view(torch.uint8).numpy()) if flat.numel() else b""


if __name__ == "__main__":
    print_outcomes(_ForgedGraphRunner, *map(int, sys.argv[1:]))
