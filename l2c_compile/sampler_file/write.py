"""Write a compiled sampler as one ``.pt2`` archive."""

from __future__ import annotations

import dataclasses
import hashlib
import io
import json
import os
import zipfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import fx
from torch.export import ExportedProgram
from torch.utils._pytree import tree_unflatten

from l2c_compile.analyses.summary import Summary
from l2c_compile.errors import L2CError, SaveError
from l2c_compile.files.archive import Archive
from l2c_compile.files.documents import parse_json, replaced_at_once
from l2c_compile.graphs.forms import CallSignature, TensorForm
from l2c_compile.graphs.loop_graph import LoopGraph
from l2c_compile.graphs.nodes import root_tensor
from l2c_compile.sampler_file.exported_program import compile_ahead_of_time, to_exported_program
from l2c_compile.sampler_file.graph_lines import StoredTensor, encode_graph
from l2c_compile.sampler_file.manifest import (
    FORMAT,
    GRAPH,
    MANIFEST,
    MAX_GRAPH_BYTES,
    SCHEDULE,
    VERSION,
    encode_input,
    encode_tree,
    own_version,
    raw_value,
)
from l2c_compile.sampler_file.operands import OperationChecker


def save_sampler(
    path: str | os.PathLike[str],
    graph: LoopGraph,
    inputs: CallSignature,
    *,
    loop: Mapping[str, object] | None,
    passes: Sequence[str],
    summary: Summary,
    aot_inductor: bool = False,
) -> None:
    """Write a loop graph after the passes, weights included, as one file, at once or not at all.

    Args:
        path: the file to write; its name ends in ``.pt2``, because torch wants that.
        graph: the loop graph, flat, without sites and cache reads.
        inputs: the form of ``(noise, conditions)`` that the graph was compiled for.
        loop: the JSON description of the loop; None if there is none.
        passes: the names of the passes that made the graph.
        summary: the summary of what the graph computes.
        aot_inductor: whether ``<stem>.aoti.pt2``, a package of native code, is written too; see
            ``compile_ahead_of_time``.

    Raises:
        SaveError: if the graph, its inputs or its result hold what a file cannot.
        BackendError: if AOTInductor cannot take the graph.
        OSError: if the folder cannot be written to.
    """
    target = Path(path)
    if target.suffix != ".pt2":
        raise SaveError(f"a saved sampler is a .pt2 archive; name it '{target.with_suffix('.pt2')}'")
    noise, conditions = tree_unflatten([raw_value(leaf) for leaf in inputs.leaves], inputs.spec)
    num_results = graph.out_spec.num_leaves
    manifest: dict[str, object] = {
        "format": FORMAT,
        "version": VERSION,
        "l2c_compile": own_version(),
        "torch": str(torch.__version__),
        "denoiser": type(graph.root.get_submodule("denoiser")).__name__,
        "loop": loop,
        "passes": list(passes),
        "noise": encode_tree(noise, "noise", encode_input),
        "conditions": {
            name: encode_tree(value, f"condition '{name}'", encode_input) for name, value in conditions.items()
        },
        "result": encode_tree(
            tree_unflatten(list(range(num_results)), graph.out_spec),
            "the loop's result",
            _result_leaf,
        ),
        "summary": dataclasses.asdict(summary),
    }
    # A graph that cannot be written is found before minutes are spent on the archive.
    for _ in encode_graph(graph, lambda node: _NOWHERE):
        pass
    exported = _checked_program(graph)
    with replaced_at_once(target) as temporary:
        with _DeferredErrorFile(temporary) as file:
            torch.export.save(exported, file)
        with Archive(temporary) as archive:
            stored = _stored_tensors(archive)
            lines = "".join(encode_graph(graph, lambda node: stored(graph, node))).encode()
        schedule = graph.schedule.to_json().encode()
        manifest["sha256"] = {
            "graph": hashlib.sha256(lines).hexdigest(),
            "schedule": hashlib.sha256(schedule).hexdigest(),
        }
        text = json.dumps(manifest, allow_nan=False, indent=1).encode()
        # A manifest that load would refuse is refused here.
        parse_json(text)
        if len(lines) > MAX_GRAPH_BYTES:
            raise SaveError(
                f"the graph takes {len(lines)} bytes, a file holds {MAX_GRAPH_BYTES}; compile fewer evaluations"
            )
        with zipfile.ZipFile(temporary, "a") as appended:
            for name, content in ((MANIFEST, text), (GRAPH, lines), (SCHEDULE, schedule)):
                # ZipInfo has a fixed date, so that equal samplers are equal files.
                appended.writestr(zipfile.ZipInfo(f"{archive.root}/{name}"), content)
    if aot_inductor:
        with replaced_at_once(target.with_suffix(".aoti.pt2")) as temporary:
            compile_ahead_of_time(graph, temporary)


def _result_leaf(leaf: object, what: str) -> dict[str, object]:
    if not isinstance(leaf, int):
        # The leaves are numbers here, so this is a container that is registered with torch, or a generator.
        raise SaveError(
            f"{what} is a {type(leaf).__name__}, which a file does not hold; let the loop return tensors, or tuples,"
            " lists or dicts of tensors"
        )
    return {"leaf": leaf}


def _checked_program(graph: LoopGraph) -> ExportedProgram:
    """Return the program to write, after the checks that ``load`` makes."""
    checker = OperationChecker(len(graph.graph.nodes), SaveError)
    try:
        exported = to_exported_program(graph, checker.check)
        checker.check_whole(graph)
    except L2CError:
        raise
    except (RuntimeError, TypeError, ValueError, IndexError, NotImplementedError) as error:
        raise SaveError(
            f"torch cannot tell from the shapes alone what an operator of the graph returns: {error!s:.300}; write that"
            " part with other functions of torch, or keep the sampler in Python"
        ) from error
    return exported


class _DeferredErrorFile(io.FileIO):
    """A file for torch's writer that raises the error of a write only when the file is closed.

    The destructor of the C++ writer writes as well, and an error there, for example of a full disk, ends the process.
    """

    def __init__(self, path: Path) -> None:
        super().__init__(path, "w")
        self._error: BaseException | None = None

    def write(self, content: Any, /) -> int:  # noqa: ANN401 - whatever has bytes
        """Write unless an earlier write failed; return the number of bytes that were taken."""
        remaining = memoryview(content).cast("B")
        size_bytes = len(remaining)
        try:
            while self._error is None and remaining:
                remaining = remaining[super().write(remaining) :]
        except BaseException as error:  # an interrupt would reach the destructor, too
            self._error = error
        return size_bytes

    def close(self) -> None:
        """Close the file, and raise the first error of all writes."""
        super().close()
        error, self._error = self._error, None
        if error is not None:
            raise error


def _stored_tensors(archive: Archive) -> Callable[[LoopGraph, fx.Node], StoredTensor]:
    """Return a function that finds where ``torch.export.save`` has put the tensor of a ``get_attr`` node."""
    records: dict[str, str] = {}
    offsets: dict[str, int] = {}
    for folder in ("weights", "constants"):
        config = json.loads(archive.read(f"data/{folder}/model_{folder}_config.json", max_bytes=2**30))["config"]
        for name, entry in config.items():
            if entry["use_pickle"]:
                raise SaveError(
                    f"'{name}' is a tensor of a class of its own, which torch pickles; make it a plain tensor"
                )
            records[name] = f"data/{folder}/{entry['path_name']}"
            offsets[name] = entry["tensor_meta"]["storage_offset"]["as_int"]
    hashes = {record: archive.sha256(record) for record in set(records.values())}

    def stored(graph: LoopGraph, node: fx.Node) -> StoredTensor:
        name = str(node.target)
        tensor = root_tensor(graph.root, node)
        return StoredTensor(
            records[name], hashes[records[name]], TensorForm.of(tensor), offsets[name], tensor.requires_grad
        )

    return stored


_NOWHERE = StoredTensor("", "", TensorForm((), (), torch.float32, torch.device("cpu")), 0)
