"""Read a compiled sampler from a ``.pt2`` archive with the static graph, its weights and a manifest.

The archive is what ``torch.export.save`` writes, so ``torch.export.load`` opens it, as a program that takes flat
tensors and returns a flat list. We do not read it that way. Torch's reader unpickles (example inputs, subclass weights,
script objects, older layouts), loads native code from ``data/aotinductor``, evaluates symbolic sizes as Python, and
calls any attribute of torch that the graph names. So the archive carries a second, small form of the graph beside
torch's, and only that form and the raw bytes of the weights are read here:

    data/extra/l2c_compile/manifest.json   format, version, inputs, result, summary, sha256 of the next two
    data/extra/l2c_compile/graph.jsonl     the graph (``graph_lines``), with record and sha256 of each weight
    data/extra/l2c_compile/schedule.json   the schedule
    data/weights/weight_0 ...              the storages; a storage is there once, also one of tied weights
    models/model.json ...                  torch's own form; never read here

Our form is also 6 times smaller, does not change with torch's schema, and keeps the evaluation numbers and module paths
that the backend needs. Nothing is unpickled, no text of the file becomes code, the operators are those of a list
(``allowed_operators``), and the memory that they take has a limit. A stranger's file can do no more than let torch's
own functions compute for a long time, and only when the sampler is called.
"""

from __future__ import annotations

import dataclasses
import os
import re
import sys
from collections.abc import Mapping

import torch
from torch import Tensor, fx
from torch.utils._pytree import TreeSpec, tree_flatten

from l2c_compile.errors import BackendError, FileFormatError
from l2c_compile.files.archive import Archive
from l2c_compile.files.documents import MAX_JSON_BYTES
from l2c_compile.graphs.forms import CallSignature, StaticValue, TensorForm
from l2c_compile.graphs.loop_graph import LoopGraph
from l2c_compile.sampler_file.graph_lines import StoredTensor, decode_form, decode_graph, decode_literal
from l2c_compile.sampler_file.manifest import (
    GRAPH,
    MANIFEST,
    MAX_GRAPH_BYTES,
    SCHEDULE,
    decode_tree,
    describe_input,
    hashed,
    read_manifest,
)
from l2c_compile.schedules.schedule import CacheSchedule

MapLocation = str | torch.device | Mapping[str, str | torch.device] | None
"""Where tensors of other devices are put: one device for all, or a mapping from the names of the saved devices."""

_STORAGE = re.compile(r"data/(weights/weight|constants/tensor)_[0-9]+", re.ASCII)
_SAMPLE_INPUTS = "data/sample_inputs/model.pt"
_TORCHS_OWN = re.compile(
    r"models/model\.json|data/weights/model_weights_config\.json|data/constants/model_constants_config\.json"
    r"|(\.data/)?\.?[a-z_]+",
    re.ASCII,
)


def read_sampler(
    path: str | os.PathLike[str], map_location: MapLocation = None, max_bytes: int | None = None
) -> tuple[dict[str, object], CallSignature, LoopGraph]:
    """Return the manifest, the form of ``(noise, conditions)`` and the loop graph of a saved sampler.

    Args:
        path: the file. It may come from a stranger: nothing of it is unpickled or run as code.
        map_location: the device, or devices, for tensors that were saved on another device.
        max_bytes: the most memory that the graph may take when it runs; None is that of its devices.

    Raises:
        FileFormatError: if the file is damaged, hostile, too large, of a newer version, or something else.
        BackendError: if a device of the file is neither on this machine nor mapped.
        OSError: if the file cannot be read.
    """
    devices = _DeviceMap(map_location)
    with Archive(path) as archive:
        _check_names(archive)
        manifest = read_manifest(archive)
        sha256 = manifest["sha256"]
        if not isinstance(sha256, dict) or sha256.keys() != {"graph", "schedule"}:
            raise FileFormatError("the manifest wants the sha256 of graph and schedule")
        schedule = CacheSchedule.from_json(hashed(archive, SCHEDULE, sha256["schedule"], MAX_JSON_BYTES))
        inputs, num_noise = _decode_inputs(manifest, devices)
        program = decode_graph(
            hashed(archive, GRAPH, sha256["graph"], MAX_GRAPH_BYTES),
            inputs.tensor_forms(),
            schedule.num_evaluations,
            devices.place,
            _SavedStorages(archive, devices).load,
            max_bytes,
        )
    out_spec = _decode_result(manifest["result"], program.graph)
    return manifest, inputs, LoopGraph(program.graph, program.root, schedule, num_noise, out_spec)


class _DeviceMap:
    """Maps the devices of a file to those of this machine."""

    def __init__(self, map_location: MapLocation) -> None:
        self._map = map_location
        self._known: dict[torch.device, torch.device] = {}

    def place(self, saved: torch.device) -> torch.device:
        """Return the device of this machine for a device of the file."""
        if saved not in self._known:
            self._known[saved] = self._find(saved)
        return self._known[saved]

    def _find(self, saved: torch.device) -> torch.device:
        wanted = self._map.get(str(saved), saved) if isinstance(self._map, Mapping) else self._map or saved
        try:
            # The tensor's device has an index, whereas "cuda" means the current one.
            return torch.empty(0, device=wanted).device
        except (RuntimeError, AssertionError, NotImplementedError) as error:
            raise BackendError(
                f"the sampler was saved on {saved}, and there is no {wanted} here; give another map_location, for"
                " example load(path, map_location='cpu')"
            ) from error


class _SavedStorages:
    """Reads those records of an archive that are storages, each of them once."""

    def __init__(self, archive: Archive, devices: _DeviceMap) -> None:
        self._archive = archive
        self._devices = devices
        self._hashes: dict[str, str] = {}
        self._read: dict[tuple[str, torch.device], torch.UntypedStorage] = {}

    def load(self, stored: StoredTensor) -> Tensor:
        """Return a tensor of the file on its device."""
        if not _STORAGE.fullmatch(stored.record):
            raise FileFormatError(f"a tensor lies in {stored.record!r:.80}, which is no storage")
        if stored.end_bytes > self._archive.size_bytes(stored.record):
            raise FileFormatError(f"a tensor claims {stored.end_bytes} bytes, more than {stored.record!r:.80} has")
        device = self._devices.place(stored.form.device)
        storage = self._storage(stored, device)
        try:
            tensor = torch.empty(0, dtype=stored.form.dtype, device=device)
            return tensor.set_(storage, stored.offset, stored.form.shape, stored.form.stride)
        except (RuntimeError, TypeError, NotImplementedError) as error:
            raise FileFormatError(
                f"{stored.record} cannot hold {describe_input(stored.form)}: {error!s:.200}"
            ) from error

    def _storage(self, stored: StoredTensor, device: torch.device) -> torch.UntypedStorage:
        key = stored.record, device
        if key not in self._read:
            content = torch.empty(self._archive.size_bytes(stored.record), dtype=torch.uint8)
            self._hashes[stored.record] = self._archive.read_into(stored.record, content.numpy().data)
            self._read[key] = content.to(device).untyped_storage()
        if self._hashes[stored.record] != stored.sha256:
            raise FileFormatError(f"{stored.record} does not have the sha256 that the graph says; the file is damaged")
        return self._read[key]


def _check_names(archive: Archive) -> None:
    for name in archive.names:
        ours = name in (MANIFEST, GRAPH, SCHEDULE) or _STORAGE.fullmatch(name) or _TORCHS_OWN.fullmatch(name)
        if not ours and not (name == _SAMPLE_INPUTS and archive.size_bytes(name) == 0):
            raise FileFormatError(
                f"the archive holds {name!r:.80}, which no saved sampler does; if you trust it and it is a package of"
                " AOTInductor, torch._inductor.aoti_load_package runs it"
            )
    if MANIFEST not in archive.names:
        raise FileFormatError(
            "the archive has no manifest of l2c_compile; if you trust it, torch.export.load may open it"
        )
    order = archive.read("byteorder", max_bytes=16) if "byteorder" in archive.names else b"little"
    if order != sys.byteorder.encode():
        raise FileFormatError(f"the weights are in byte order {order!r}, this machine has {sys.byteorder}")


def _decode_inputs(manifest: Mapping[str, object], devices: _DeviceMap) -> tuple[CallSignature, int]:
    """Return the form of the inputs and the number of tensors in the noise."""

    def leaf(kind: str, content: object) -> object:
        if kind == "tensor" and isinstance(content, dict):
            form = decode_form(content, "an input")
            return dataclasses.replace(form, device=devices.place(form.device))
        if kind == "value":
            return decode_literal(content, "an input", place=devices.place)
        raise FileFormatError(f"an input wants a tensor or a value, got {kind!r:.80}")

    conditions = manifest["conditions"]
    if not isinstance(conditions, dict):
        raise FileFormatError(f"conditions wants an object, got {type(conditions).__name__}")
    noise = decode_tree(manifest["noise"], "noise", leaf)
    named = {name: decode_tree(value, f"condition {name!r:.80}", leaf) for name, value in conditions.items()}
    leaves, spec = tree_flatten((noise, named))
    signature = CallSignature(spec, tuple(x if isinstance(x, TensorForm) else StaticValue.of(x) for x in leaves))
    return signature, sum(isinstance(x, TensorForm) for x in tree_flatten(noise)[0])


def _decode_result(document: object, graph: fx.Graph) -> TreeSpec:
    def leaf(kind: str, content: object) -> object:
        if kind != "leaf" or type(content) is not int:
            raise FileFormatError(f"the result wants leaves with a number, got {kind!r:.80}")
        return content

    leaves, spec = tree_flatten(decode_tree(document, "the result", leaf))
    (results,) = graph.output_node().args
    if not isinstance(results, (list, tuple)) or leaves != list(range(len(results))):
        raise FileFormatError("the result wants each output of the graph once, in order")
    return spec
