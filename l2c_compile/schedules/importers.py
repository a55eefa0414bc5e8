"""Importers, which read schedules and routers of other projects and convert them to execution order.

No other file knows how another project counts. Each importer says how its file counts and what the entries mean.
Pickles are read only by ``torch.load(weights_only=True)``, with ``argparse.Namespace`` as the one addition.

Shapes: E evaluations, S sites, N rows of the file.
"""

from __future__ import annotations

import argparse
import math
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Literal, TypeGuard

import torch
from torch import Tensor

from l2c_compile.errors import FileFormatError, ScheduleError
from l2c_compile.files.documents import MAX_JSON_BYTES, honoured, open_regular, parse_json, read_bytes
from l2c_compile.files.pickles import load_pickle
from l2c_compile.schedules.router import Router
from l2c_compile.schedules.schedule import FORMAT as SCHEDULE_FORMAT
from l2c_compile.schedules.schedule import MAX_CELLS, MAX_EVALUATIONS, CacheSchedule
from l2c_compile.schedules.sites import Site

Family = Literal["dit", "uvit", "harmonica"]
"""The code base that a pickle of router logits comes from; the file alone does not always show it."""

_Source = str | os.PathLike[str] | Mapping[str, object]
_MAX_ROW_ENTRIES = 100_000
_MAX_INFO_CHARS = 1000


def load_schedule_file(
    path: str | os.PathLike[str],
    *,
    threshold: float | None = None,
    family: Family | None = None,
    num_evaluations: int | None = None,
    loop: Mapping[str, object] | None = None,
) -> Router | CacheSchedule:
    """Read a router or schedule file of this package or of a known other project.

    The known forms are our JSON and safetensors, and the files of Learning-to-Cache (DiT and U-ViT), HarmoniCa,
    SmoothCache and InvarDiff.

    Args:
        path: the file to read.
        threshold: the threshold in place of the one that the router, or its project, uses. Only for routers.
        family: the project that wrote a pickle; by default ``dit`` if the file has ``routers``, else ``uvit``.
        num_evaluations: the number of evaluations that the file must describe; None accepts any number.
        loop: the description of the loop to store with what was read; by default the one in the file, if any.

    Raises:
        FileFormatError: if the file has none of these forms.
        ScheduleError: if the file does not describe ``num_evaluations``, or an option has no meaning for it.
        OSError: if the file cannot be read.
    """
    with open_regular(path) as file:
        start, size_bytes = file.read(9), os.fstat(file.fileno()).st_size
    if family is not None and not start.startswith(b"PK"):
        raise ScheduleError(f"family {family!r} is for pickled router logits, this file is none")
    result: Router | CacheSchedule
    if start.startswith(b"PK"):
        result = _import_pickle(path, family)
    elif len(start) == 9 and start[8:] == b"{" and int.from_bytes(start[:8], "little") < size_bytes:
        result = Router.load(path)
    else:
        result = _import_json(read_bytes(path, max_bytes=MAX_JSON_BYTES))
    if num_evaluations is not None and result.num_evaluations != num_evaluations:
        raise ScheduleError(
            f"the file describes {result.num_evaluations} evaluations, the loop has {num_evaluations}; use a file made "
            "for this loop"
        )
    if isinstance(result, Router):
        return replace(
            result,
            threshold=result.threshold if threshold is None else threshold,
            loop=result.loop if loop is None else loop,
        )
    if threshold is not None:
        raise ScheduleError(f"threshold {threshold} is for routers; this file already is a schedule")
    return result if loop is None else replace(result, loop=loop)


def import_l2c_dit(source: _Source, threshold: float = 0.1, *, loop: Mapping[str, object] | None = None) -> Router:
    """Import a router of Learning-to-Cache for DiT (arXiv 2406.01733; the authors' default threshold is 0.1).

    The file has a row of 2 * depth logits for every evaluation: entry 2i is the attention of block i, 2i + 1 its MLP.
    Rows count from the CLEAN end: row idx is for evaluation E - 1 - idx. Evaluations of even idx may reuse; those of
    odd idx are full.

    Args:
        source: the file, its content, or only its ``routers``.
        threshold: the score above which a sublayer is computed; the score is the sigmoid of its logit.
        loop: the description of the loop to store.

    Raises:
        FileFormatError: if the file is not of this form.
    """
    rows, info = _logit_rows(source)
    if len(rows) % 2:
        raise FileFormatError(f"a Learning-to-Cache router for DiT wants an even number of rows, got {len(rows)}")
    cacheable = tuple(range(1, len(rows), 2))
    return _router_from_clean_end(rows, cacheable, threshold, loop, {"method": "Learning-to-Cache", **info})


def import_harmonica(source: _Source, threshold: float = 0.1, *, loop: Mapping[str, object] | None = None) -> Router:
    """Import a router of HarmoniCa for DiT (arXiv 2410.01723): the same file as ``import_l2c_dit``, used differently.

    Every evaluation but the first may reuse, from the latest evaluation that computed the sublayer, however old it is.

    Args:
        source: the file, its content, or only its ``routers``.
        threshold: the score above which a sublayer is computed; the score is the sigmoid of its logit.
        loop: the description of the loop to store.

    Raises:
        FileFormatError: if the file is not of this form.
    """
    rows, info = _logit_rows(source)
    return _router_from_clean_end(rows, tuple(range(1, len(rows))), threshold, loop, {"method": "HarmoniCa", **info})


def import_l2c_uvit(
    source: _Source, threshold: float = 0.9, branches: int = 2, *, loop: Mapping[str, object] | None = None
) -> Router:
    """Import a router of Learning-to-Cache for U-ViT with a DPM-Solver of order 2 (the authors' threshold is 0.9).

    The file has N rows for N network evaluations, two for each of the K = N / 2 solver steps. Row k, for k = 1..K-1, is
    for the first evaluation of solver step k, network evaluation 2k, which may reuse the midpoint evaluation before it,
    2k - 1. All other network evaluations are full; the rows beyond are never trained. A row has 2 * (depth + 1) logits,
    blocks in call order: in_blocks, mid_block, out_blocks.

    The authors guide with two separate calls, conditional and unconditional, each with its own cache: branch b of
    network evaluation n is evaluation branches * n + b, and the branches share the decision.

    Args:
        source: the file, or its content.
        threshold: the score above which a sublayer is computed; the score is the sigmoid of its logit.
        branches: the number of denoiser calls in a network evaluation; 1 for no guidance or for guidance in one doubled
            batch.
        loop: the description of the loop to store.

    Raises:
        FileFormatError: if the file is not of this form.
    """
    rows, info = _logit_rows(source)
    num_network_evaluations, num_entries = rows.shape
    if type(branches) is not int or not 1 <= branches <= 16:
        raise ScheduleError(f"branches wants a number from 1 to 16, got {branches!r}")
    # There are 2 entries for each block and an odd number of blocks: half before the middle block, half after it.
    if num_network_evaluations % 2 or num_entries % 4 != 2:
        raise FileFormatError(
            "a Learning-to-Cache router for U-ViT wants an even number of rows of 2 * (2 * n + 1) logits, got "
            f"{num_network_evaluations} rows of {num_entries}"
        )
    half = num_entries // 4
    blocks = [f"in_blocks.{i}" for i in range(half)] + ["mid_block"] + [f"out_blocks.{i}" for i in range(half)]
    scores_NS = torch.ones(num_network_evaluations, num_entries)
    reusing = list(range(2, num_network_evaluations, 2))
    scores_NS[reusing] = torch.sigmoid(rows[1 : num_network_evaluations // 2])
    return Router(
        scores=scores_NS.repeat_interleave(branches, dim=0),
        sites=_sublayers(blocks),
        cacheable=tuple(branches * n + branch for n in reusing for branch in range(branches)),
        threshold=threshold,
        branches=branches,
        loop=loop,
        info={"method": "Learning-to-Cache", **info},
    )


def import_smoothcache(
    source: _Source, site: str = "blocks.{block}.{kind}", *, loop: Mapping[str, object] | None = None
) -> CacheSchedule:
    """Import a schedule of SmoothCache (arXiv 2411.10510), a form in which FORA and L2C schedules also circulate.

    The file has a row for each kind of layer (``attn``: all blocks) or for single layers (``attn-7``: block 7); rows
    are in execution order; 1 is to compute, 0 is to reuse the latest computed value.

    Args:
        source: the file, or its content.
        site: the site of a layer, with ``{block}`` and ``{kind}`` in place of the number and the kind in the file.
        loop: the description of the loop to store.

    Raises:
        FileFormatError: if the file is not of this form.
    """
    table: dict[Site, list[int]] = {}
    for key, row in _json_object(source).items():
        match = re.fullmatch(r"(?P<kind>.*?[^0-9-])(?:-(?P<block>[0-9]{1,9}))?", key)
        if match is None or not _is_row(row):
            raise FileFormatError(
                f"a SmoothCache schedule wants rows of 0 and 1 under 'attn' or 'attn-7', not {key!r:.80}"
            )
        name = site.replace("{block}", match["block"] or "*").replace("{kind}", match["kind"])
        table[_from_foreign(name)] = [int(value) for value in row]
    return _schedule(table, loop, {"method": "SmoothCache"})


def import_invardiff(source: _Source, *, loop: Mapping[str, object] | None = None) -> CacheSchedule:
    """Import the books of InvarDiff for DiT (arXiv 2512.05134), one for the stack of blocks, one for its sublayers.

    Books are in execution order; true is to reuse the latest computed value. ``step_cache_book`` is for the output of
    the last block; where it reuses, the entries of the sublayers have no effect, and their caches are not refreshed.

    Args:
        source: the file, or its content.
        loop: the description of the loop to store.

    Raises:
        FileFormatError: if the file is not of this form.
    """
    document = _json_object(source)
    steps = document.get("step_cache_book")
    if not _is_row(steps) or not steps:
        raise FileFormatError("an InvarDiff file wants a list of booleans 'step_cache_book'")
    books = {
        "attn": _book(document, "msa_cache_book", len(steps)),
        "mlp": _book(document, "mlp_cache_book", len(steps)),
    }
    depth = len(books["attn"][0])
    if any(len(row) != depth for book in books.values() for row in book) or depth == 0:
        raise FileFormatError("an InvarDiff file wants books with one entry a block in every row")
    table = {Site("blocks.0", f"blocks.{depth - 1}"): [int(not value) for value in steps]}
    for i in range(depth):
        for kind, book in books.items():
            table[Site(f"blocks.{i}.{kind}")] = [int(not row[i]) for row in book]
    return _schedule(table, loop, {"method": "InvarDiff"})


def _import_pickle(path: str | os.PathLike[str], family: Family | None) -> Router:
    content = load_pickle(path)
    if family is None:
        family = "dit" if "routers" in content else "uvit"
    if family == "dit":
        return import_l2c_dit(content)
    if family == "uvit":
        return import_l2c_uvit(content)
    if family == "harmonica":
        return import_harmonica(content)
    raise ScheduleError(f"family wants 'dit', 'uvit' or 'harmonica', got {family!r}")


def _import_json(text: bytes) -> CacheSchedule:
    if not text.lstrip(b" \t\r\n").startswith(b"{"):
        raise FileFormatError(
            "the file has no known form: neither a safetensors, nor a file of torch.save, nor a JSON object"
        )
    document = parse_json(text)
    if document.get("format") == SCHEDULE_FORMAT:
        return CacheSchedule.from_json(text)
    if "step_cache_book" in document:
        return import_invardiff(document)
    if document and all(isinstance(row, list) for row in document.values()):
        return import_smoothcache(document)
    raise FileFormatError(
        f"the file has no known form: not a schedule of l2c_compile, SmoothCache or InvarDiff; its keys: "
        f"{list(document)[:5]}"
    )


def _router_from_clean_end(
    rows: Tensor,
    cacheable: tuple[int, ...],
    threshold: float,
    loop: Mapping[str, object] | None,
    info: Mapping[str, object],
) -> Router:
    num_evaluations, num_entries = rows.shape
    if num_entries % 2:
        raise FileFormatError(f"a router for DiT wants two logits a block, got rows of {num_entries}")
    scores_ES = torch.ones(num_evaluations, num_entries)
    # Rows of evaluations that never reuse were never trained; a score of 1 says that these compute.
    reusing = list(cacheable)
    scores_ES[reusing] = torch.sigmoid(rows.flip(0)[reusing])
    sites = _sublayers([f"blocks.{i}" for i in range(num_entries // 2)])
    return Router(scores_ES, sites, cacheable, threshold, loop=loop, info=info)


def _sublayers(blocks: Sequence[str]) -> tuple[Site, ...]:
    return tuple(Site(f"{block}.{kind}") for block in blocks for kind in ("attn", "mlp"))


def _logit_rows(source: _Source) -> tuple[Tensor, dict[str, object]]:
    """Return the logits (N, S), with rows in the order of the file, and what the file says of how it was made."""
    content = source if isinstance(source, Mapping) else load_pickle(source)
    state = content.get("routers", content)
    if not isinstance(state, Mapping) or not 1 <= len(state) <= MAX_EVALUATIONS:
        raise FileFormatError("router logits want a state dict with one entry '<row>.prob' an evaluation")
    names = [f"{row}.prob" for row in range(len(state))]
    if missing := [name for name in names if name not in state]:
        raise FileFormatError(
            f"router logits want the entries '0.prob'..'{len(state) - 1}.prob', {missing[0]!r} is missing"
        )
    rows = [_logits(name, state[name]) for name in names]
    if len({row.shape for row in rows}) != 1:
        raise FileFormatError("router logits want rows of one length")
    # This comes before any row is copied, because rows of a few bytes each can be expanded to any length.
    if len(rows) * rows[0].numel() > MAX_CELLS:
        raise FileFormatError(
            f"router logits want at most {MAX_CELLS} entries, got {len(rows)} rows of {rows[0].numel()}"
        )
    logits = torch.stack([row.to(torch.float32) for row in rows])
    if not torch.isfinite(logits).all():
        raise FileFormatError("router logits want finite numbers, got NaN or infinity")
    return logits, _training_info(content.get("args"))


def _logits(name: str, value: object) -> Tensor:
    plain = type(value) in (Tensor, torch.nn.Parameter)
    if not plain or not isinstance(value, Tensor) or value.layout != torch.strided or value.device.type != "cpu":
        raise FileFormatError(f"{name} wants a plain tensor on the CPU, got {type(value).__name__}")
    if value.dim() != 1 or not 1 <= value.numel() <= _MAX_ROW_ENTRIES or not value.dtype.is_floating_point:
        raise FileFormatError(
            f"{name} wants 1 to {_MAX_ROW_ENTRIES} float logits in a row, got {value.dtype} {tuple(value.shape)}"
        )
    return value.detach()


def _training_info(args: object) -> dict[str, object]:
    """Return what the training arguments in the file say about model and loop, without the trainer's paths."""
    if not isinstance(args, argparse.Namespace):
        return {}
    fields = vars(args)
    keys = ("model", "image_size", "num_classes", "num_sampling_steps", "l1", "lr")
    return {key: fields[key] for key in keys if _is_plain(fields.get(key))}


def _is_plain(value: object) -> bool:
    """Return whether a router can keep and save a value, which has to be short and finite."""
    if type(value) is str:
        return len(value) <= _MAX_INFO_CHARS
    return (type(value) is int and abs(value) < 2**63) or (type(value) is float and math.isfinite(value))


def _json_object(source: _Source) -> Mapping[str, object]:
    return source if isinstance(source, Mapping) else parse_json(read_bytes(source, max_bytes=MAX_JSON_BYTES))


def _is_row(row: object) -> TypeGuard[list[int]]:
    return isinstance(row, list) and all(type(value) in (bool, int) and value in (0, 1) for value in row)


def _book(document: Mapping[str, object], key: str, num_rows: int) -> list[list[int]]:
    book = document.get(key)
    if not isinstance(book, list) or len(book) != num_rows or not all(_is_row(row) for row in book):
        raise FileFormatError(f"an InvarDiff file wants {num_rows} rows of booleans in {key!r}")
    return book


def _from_foreign(name: str) -> Site:
    try:
        return Site.parse(name)
    except ScheduleError as error:
        raise FileFormatError(f"the file names a layer that is no module path: {error}") from error


def _schedule(
    table: Mapping[Site, Sequence[int]], loop: Mapping[str, object] | None, info: Mapping[str, object]
) -> CacheSchedule:
    with honoured("schedule"):
        return CacheSchedule.from_table(table, loop=loop, info=info)
