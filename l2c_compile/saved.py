"""Compiled samplers as files: one ``.pt2`` archive with the static graph, its weights and a manifest.

The archive is what ``torch.export.save`` writes, so ``torch.export.load`` opens it: flat tensors in, flat list out. We
do not read it that way. torch's reader unpickles (example inputs, subclass weights, script objects, older layouts),
loads native code from ``data/aotinductor``, evaluates symbolic sizes as Python, and calls any attribute of torch that
the graph names. So the archive carries a second, small form of the graph beside torch's, and only that form and the raw
bytes of the weights are read here:

    data/extra/l2c_compile/manifest.json   format, version, inputs, result, summary, sha256 of the next two
    data/extra/l2c_compile/graph.jsonl     the graph (``graph_lines``), with record and sha256 of each weight
    data/extra/l2c_compile/schedule.json   the schedule
    data/weights/weight_0 ...              storages, each once, tied weights once
    models/model.json ...                  torch's own form; never read here

Our form is also 6 times smaller, does not change with torch's schema, and keeps what the backend needs: evaluation
numbers and module paths. Nothing is unpickled and no text of the file becomes code. What a stranger's file can do is
have torch's own functions compute for a long time, and that only when the sampler is called.
"""

from __future__ import annotations

import dataclasses
import hashlib
import io
import json
import os
import re
import sys
import zipfile
from collections.abc import Callable, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

import torch
from torch import Tensor, fx, nn
from torch.utils._pytree import TreeSpec, keystr, tree_flatten, tree_flatten_with_path, tree_unflatten

from l2c_compile.archive import Archive
from l2c_compile.backend import (
    EAGER,
    Backend,
    Progress,
    check_backend,
    check_mode,
    kernels_for,
    lower_to_backend,
    silent,
)
from l2c_compile.capture import CallSignature, StaticValue, TensorSpec
from l2c_compile.errors import BackendError, FileFormatError, InputFormError, SaveError
from l2c_compile.exported import compile_ahead_of_time, root_tensor, to_exported_program
from l2c_compile.files import MAX_JSON_BYTES, parse_json, replaced_at_once
from l2c_compile.graph import LoopGraph
from l2c_compile.graph_lines import (
    OperationBudget,
    StoredTensor,
    decode_form,
    decode_graph,
    decode_literal,
    encode_form,
    encode_graph,
    encode_literal,
)
from l2c_compile.schedule import CacheSchedule
from l2c_compile.summary import Summary

__all__ = ["FORMAT", "VERSION", "LoadedSampler", "MapLocation", "load", "save_sampler"]

FORMAT = "l2c_compile.sampler"
VERSION = 1

MapLocation = str | torch.device | Mapping[str, str | torch.device] | None
"""Where to put what was saved on another device: one device for all, or a mapping from the names of the saved ones."""

_FOLDER = "data/extra/l2c_compile/"
_MANIFEST, _GRAPH, _SCHEDULE = (_FOLDER + name for name in ("manifest.json", "graph.jsonl", "schedule.json"))
_MAX_GRAPH_BYTES = 256 * 2**20
_MAX_DEPTH = 16

_STORAGE = re.compile(r"data/(weights/weight|constants/tensor)_[0-9]+", re.ASCII)
_SAMPLE_INPUTS = "data/sample_inputs/model.pt"
_TORCHS_OWN = re.compile(
    r"models/model\.json|data/weights/model_weights_config\.json|data/constants/model_constants_config\.json"
    r"|(\.data/)?\.?[a-z_]+",
    re.ASCII,
)

_MANIFEST_KEYS = frozenset(
    {"format", "version", "l2c_compile", "torch", "denoiser", "loop", "passes", "noise", "conditions", "result"}
    | {"summary", "sha256"}
)


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
    """Write a loop graph after the passes, weights included, as one file. Atomic.

    Args:
        path: ends in ``.pt2``, which torch asks for.
        graph: flat, without sites and cache reads.
        inputs: the form of ``(noise, conditions)`` that it was compiled for.
        loop: a JSON description of the loop, if there is one.
        passes: the names of the passes that made the graph.
        summary: what the graph computes.
        aot_inductor: also write ``<stem>.aoti.pt2``, a package of native code; see ``compile_ahead_of_time``.

    Raises:
        SaveError: the graph, its inputs or its result hold what a file cannot.
        BackendError: AOTInductor cannot take the graph.
        OSError: the folder cannot be written to.
    """
    target = Path(path)
    if target.suffix != ".pt2":
        raise SaveError(f"a saved sampler is a .pt2 archive; name it '{target.with_suffix('.pt2')}'")
    noise, conditions = tree_unflatten([_raw(leaf) for leaf in inputs.leaves], inputs.spec)
    num_results = graph.out_spec.num_leaves
    manifest: dict[str, object] = {
        "format": FORMAT,
        "version": VERSION,
        "l2c_compile": _own_version(),
        "torch": str(torch.__version__),
        "denoiser": type(graph.root.get_submodule("denoiser")).__name__,
        "loop": loop,
        "passes": list(passes),
        "noise": _encode_tree(noise, "noise", _encode_input),
        "conditions": {
            name: _encode_tree(value, f"condition '{name}'", _encode_input) for name, value in conditions.items()
        },
        "result": _encode_tree(
            tree_unflatten(list(range(num_results)), graph.out_spec),
            "the loop's result",
            lambda leaf, _: {"leaf": leaf},
        ),
        "summary": dataclasses.asdict(summary),
    }
    # Found out before minutes are spent on the archive.
    for _ in encode_graph(graph, lambda node: _NOWHERE):
        pass
    exported = to_exported_program(graph, OperationBudget(len(graph.graph.nodes), SaveError).spend)
    with replaced_at_once(target) as temporary:
        with _Patient(temporary) as file:
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
        # What load would refuse is refused here.
        parse_json(text)
        if len(lines) > _MAX_GRAPH_BYTES:
            raise SaveError(
                f"the graph takes {len(lines)} bytes, a file holds {_MAX_GRAPH_BYTES}; compile fewer evaluations"
            )
        with zipfile.ZipFile(temporary, "a") as appended:
            for name, content in ((_MANIFEST, text), (_GRAPH, lines), (_SCHEDULE, schedule)):
                # A fixed date, so that equal samplers are equal files.
                appended.writestr(zipfile.ZipInfo(f"{archive.root}/{name}"), content)
    if aot_inductor:
        with replaced_at_once(target.with_suffix(".aoti.pt2")) as temporary:
            compile_ahead_of_time(graph, temporary)


def load(
    path: str | os.PathLike[str],
    *,
    backend: Backend = EAGER,
    map_location: MapLocation = None,
    mode: Literal["reduce-overhead"] | None = None,
    progress: Progress | None = None,
) -> LoadedSampler:
    """Load what ``CompiledSampler.save`` wrote. The model's class is not needed.

    Args:
        path: the file. It may come from a stranger: nothing of it is unpickled or run as code.
        backend: what runs the graph: "eager", "aot_eager", "inductor" or any other that ``torch.compile`` takes.
        map_location: where to put what was saved on another device.
        mode: "reduce-overhead" runs the loop as one CUDA graph, as in ``l2c_compile``.
        progress: told what is compiled.

    Raises:
        FileFormatError: the file is damaged, hostile, of a newer version or something else.
        BackendError: there is no such backend, or a device of the file is not here and not mapped.
        OSError: the file cannot be read.
    """
    check_backend(backend)
    check_mode(mode)
    devices = _Devices(map_location)
    with Archive(path) as archive:
        _check_names(archive)
        manifest = _read_manifest(archive)
        sha256 = manifest["sha256"]
        if not isinstance(sha256, dict) or sha256.keys() != {"graph", "schedule"}:
            raise FileFormatError("the manifest wants the sha256 of graph and schedule")
        schedule = CacheSchedule.from_json(_hashed(archive, _SCHEDULE, sha256["schedule"], MAX_JSON_BYTES))
        inputs, num_noise = _decode_inputs(manifest, devices)
        program = decode_graph(
            _hashed(archive, _GRAPH, sha256["graph"], _MAX_GRAPH_BYTES),
            inputs.tensor_specs(),
            schedule.num_evaluations,
            devices.place,
            _Storages(archive, devices).load,
        )
    out_spec = _decode_result(manifest["result"], program.graph)
    graph = LoopGraph(program.graph, program.root, schedule, num_noise, [], out_spec)
    module = graph.module()
    run = lower_to_backend(graph, backend, progress or silent, kernels_for(backend, None, ()), mode)
    return LoadedSampler(manifest, inputs, graph, module, run)


class LoadedSampler(nn.Module):
    """A sampler from a file: called as the one that was saved, with inputs of the form it was saved for.

    Holds no state between calls. Runs under ``torch.no_grad``. Its weights are its own; to follow a model whose weights
    change, save again.
    """

    def __init__(
        self,
        manifest: Mapping[str, object],
        inputs: CallSignature,
        graph: LoopGraph,
        module: fx.GraphModule,
        run: Callable[..., Sequence[object]],
    ) -> None:
        super().__init__()
        self.graph_module = module
        """The static graph: flat tensors in, flat list of results out."""
        self.schedule = graph.schedule
        self.denoiser = str(manifest["denoiser"])
        """The name of the class that was compiled."""
        self.passes = tuple(map(str, _list(manifest["passes"], "passes")))
        """The passes that made the graph."""
        self.versions = {name: str(manifest[name]) for name in ("l2c_compile", "torch")}
        """What saved it."""
        loop = manifest["loop"]
        self.loop: Mapping[str, object] | None = loop if isinstance(loop, dict) else None
        """The description of the loop; None if it was a function of the user's."""
        self._summary: Summary = _decode_numbers(manifest["summary"], Summary)
        self.inputs = inputs
        """The form of ``(noise, conditions)``."""
        self.loop_graph = graph
        """The static graph as the compiler knows it."""
        self._names = _names(inputs)
        self._out_spec = graph.out_spec
        # Not as a submodule: it has the weights of graph_module.
        self._run: Callable[..., Sequence[object]] = lambda *tensors: run(*tensors)
        self.eval()

    def forward(self, noise: object, **conditions: object) -> object:
        """Sample.

        Args:
            noise: as when the sampler was saved: same shape, dtype and device. Other strides are copied into the saved.
            **conditions: tensors likewise; Python values must be equal to the saved, they are part of the graph.

        Raises:
            InputFormError: the inputs are of another form.
        """
        tensors = self._tensors(noise, conditions)
        with torch.no_grad():
            leaves = self._run(*tensors)
        return tree_unflatten(list(leaves), self._out_spec)

    def summary(self) -> Summary:
        """Return what is computed, read and kept in each evaluation; printable."""
        return self._summary

    def print_readable(self) -> str:
        """Print the code of the static graph and return it."""
        return self.graph_module.print_readable()

    def extra_repr(self) -> str:
        """Describe the sampler in one line."""
        inputs = ", ".join(
            f"{name}: {_describe(leaf)}" for name, leaf in zip(self._names, self.inputs.leaves, strict=True)
        )
        return f"denoiser={self.denoiser}, num_evaluations={self.schedule.num_evaluations}, inputs=({inputs})"

    def _tensors(self, noise: object, conditions: Mapping[str, object]) -> list[Tensor]:
        saved = tree_unflatten(list(self.inputs.leaves), self.inputs.spec)[1]
        if conditions.keys() != saved.keys():
            names = [", ".join(map(repr, each)) or "none" for each in (saved, conditions)]
            raise InputFormError(f"the sampler was saved with conditions {names[0]}, got {names[1]}")
        leaves, spec = tree_flatten((noise, {name: conditions[name] for name in saved}))
        if spec != self.inputs.spec:
            raise InputFormError(
                f"the sampler was saved with the inputs {', '.join(self._names)}, got others; give the same containers"
            )
        tensors = []
        for what, leaf, wanted in zip(self._names, leaves, self.inputs.leaves, strict=True):
            given = TensorSpec.of(leaf) if isinstance(leaf, Tensor) else StaticValue.of(leaf)
            if isinstance(wanted, TensorSpec) and isinstance(leaf, Tensor) and _fits(leaf, wanted):
                tensors.append(leaf if given == wanted else wanted.empty().copy_(leaf))
            elif given != wanted:
                raise InputFormError(
                    f"{what} was saved as {_describe(wanted)}, got {_describe(given)}; compile for this form and save"
                    " that, too"
                )
        return tensors


class _Patient(io.FileIO):
    """A file for torch's writer: what goes wrong in a write is raised when the file is closed.

    In C++ the destructor of the writer writes as well, and an error there, as of a full disk, ends the process.
    """

    def __init__(self, path: Path) -> None:
        super().__init__(path, "w")
        self._error: BaseException | None = None

    def write(self, content: Any, /) -> int:  # noqa: ANN401 - whatever has bytes
        """Write unless an earlier write failed; return how many bytes were taken."""
        remaining = memoryview(content).cast("B")
        size_bytes = len(remaining)
        try:
            while self._error is None and remaining:
                remaining = remaining[super().write(remaining) :]
        except BaseException as error:  # an interrupt, too, would reach the destructor
            self._error = error
        return size_bytes

    def close(self) -> None:
        """Close, and raise the first error of all writes."""
        super().close()
        error, self._error = self._error, None
        if error is not None:
            raise error


class _Devices:
    """Maps the devices of a file to those of this machine."""

    def __init__(self, map_location: MapLocation) -> None:
        self._map = map_location
        self._known: dict[torch.device, torch.device] = {}

    def place(self, saved: torch.device) -> torch.device:
        if saved not in self._known:
            self._known[saved] = self._find(saved)
        return self._known[saved]

    def _find(self, saved: torch.device) -> torch.device:
        wanted = self._map.get(str(saved), saved) if isinstance(self._map, Mapping) else self._map or saved
        try:
            # With its index: "cuda" means the current one.
            return torch.empty(0, device=wanted).device
        except (RuntimeError, AssertionError, NotImplementedError) as error:
            raise BackendError(
                f"the sampler was saved on {saved}, and there is no {wanted} here; give another map_location, for"
                " example load(path, map_location='cpu')"
            ) from error


class _Storages:
    """Reads the records of an archive that are storages, each once."""

    def __init__(self, archive: Archive, devices: _Devices) -> None:
        self._archive = archive
        self._devices = devices
        self._hashes: dict[str, str] = {}
        self._read: dict[tuple[str, torch.device], torch.UntypedStorage] = {}

    def load(self, stored: StoredTensor) -> Tensor:
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
            raise FileFormatError(f"{stored.record} cannot hold {_describe(stored.form)}: {error!s:.200}") from error

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
        ours = name in (_MANIFEST, _GRAPH, _SCHEDULE) or _STORAGE.fullmatch(name) or _TORCHS_OWN.fullmatch(name)
        if not ours and not (name == _SAMPLE_INPUTS and archive.size_bytes(name) == 0):
            raise FileFormatError(
                f"the archive holds {name!r:.80}, which no saved sampler does; if you trust it and it is a package of"
                " AOTInductor, torch._inductor.aoti_load_package runs it"
            )
    if _MANIFEST not in archive.names:
        raise FileFormatError(
            "the archive has no manifest of l2c_compile; if you trust it, torch.export.load may open it"
        )
    order = archive.read("byteorder", max_bytes=16) if "byteorder" in archive.names else b"little"
    if order != sys.byteorder.encode():
        raise FileFormatError(f"the weights are in byte order {order!r}, this machine has {sys.byteorder}")


def _read_manifest(archive: Archive) -> dict[str, object]:
    manifest = parse_json(archive.read(_MANIFEST, max_bytes=MAX_JSON_BYTES))
    if manifest.get("format") != FORMAT:
        raise FileFormatError(f"a saved sampler wants format {FORMAT!r}, got {manifest.get('format')!r:.80}")
    version = manifest.get("version")
    if type(version) is not int or version < 1:
        raise FileFormatError(f"a saved sampler wants a version number, got {version!r:.80}")
    if version > VERSION:
        raise FileFormatError(
            f"the sampler is of version {version}, this l2c_compile reads up to {VERSION}; update l2c_compile"
        )
    if manifest.keys() != _MANIFEST_KEYS:
        raise FileFormatError(f"the manifest wants the keys {sorted(_MANIFEST_KEYS)}, got {sorted(manifest)[:16]}")
    return manifest


def _hashed(archive: Archive, name: str, sha256: object, max_bytes: int) -> bytes:
    content = archive.read(name, max_bytes=max_bytes)
    if hashlib.sha256(content).hexdigest() != sha256:
        raise FileFormatError(f"{name} does not have the sha256 that the manifest says; the file is damaged")
    return content


def _stored_tensors(archive: Archive) -> Callable[[LoopGraph, fx.Node], StoredTensor]:
    """Return a function that says where ``torch.export.save`` has put the tensor of a ``get_attr`` node."""
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
        form = TensorSpec.of(root_tensor(graph.root, node))
        return StoredTensor(records[name], hashes[records[name]], form, offsets[name])

    return stored


_NOWHERE = StoredTensor("", "", TensorSpec((), (), torch.float32, torch.device("cpu")), 0)


def _encode_tree(value: object, what: str, leaf: Callable[[object, str], object]) -> object:
    if type(value) is tuple or type(value) is list:
        return {type(value).__name__: [_encode_tree(item, what, leaf) for item in value]}
    if type(value) is dict and all(isinstance(key, str) for key in value):
        return {"dict": {key: _encode_tree(item, what, leaf) for key, item in value.items()}}
    if isinstance(value, (tuple, list, dict)) or not tree_flatten(value)[1].is_leaf():
        raise SaveError(
            f"{what} is or contains a {type(value).__name__}, which a file cannot hold without its class; use tuples,"
            " lists and dicts with text as keys"
        )
    return leaf(value, what)


def _encode_input(leaf: object, what: str) -> object:
    if isinstance(leaf, TensorSpec):
        return {"tensor": encode_form(leaf)}
    return {"value": encode_literal(leaf, what)}


def _decode_tree(document: object, what: str, leaf: Callable[[str, object], object], depth: int = _MAX_DEPTH) -> object:
    if not isinstance(document, dict) or len(document) != 1 or depth == 0:
        raise FileFormatError(f"{what} wants a tree at most {_MAX_DEPTH} deep, got {document!r:.80}")
    ((kind, content),) = document.items()
    if kind in ("tuple", "list") and isinstance(content, list):
        items = [_decode_tree(item, what, leaf, depth - 1) for item in content]
        return tuple(items) if kind == "tuple" else items
    if kind == "dict" and isinstance(content, dict):
        return {key: _decode_tree(item, what, leaf, depth - 1) for key, item in content.items()}
    return leaf(kind, content)


def _decode_inputs(manifest: Mapping[str, object], devices: _Devices) -> tuple[CallSignature, int]:
    """Return the form of the inputs, and how many tensors the noise has."""

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
    noise = _decode_tree(manifest["noise"], "noise", leaf)
    named = {name: _decode_tree(value, f"condition {name!r:.80}", leaf) for name, value in conditions.items()}
    leaves, spec = tree_flatten((noise, named))
    signature = CallSignature(spec, tuple(x if isinstance(x, TensorSpec) else StaticValue.of(x) for x in leaves))
    return signature, sum(isinstance(x, TensorSpec) for x in tree_flatten(noise)[0])


def _decode_result(document: object, graph: fx.Graph) -> TreeSpec:
    def leaf(kind: str, content: object) -> object:
        if kind != "leaf" or type(content) is not int:
            raise FileFormatError(f"the result wants leaves with a number, got {kind!r:.80}")
        return content

    leaves, spec = tree_flatten(_decode_tree(document, "the result", leaf))
    (results,) = graph.output_node().args
    if not isinstance(results, (list, tuple)) or leaves != list(range(len(results))):
        raise FileFormatError("the result wants each output of the graph once, in order")
    return spec


def _decode_numbers(document: object, form: Any) -> Any:  # noqa: ANN401 - a type, and a value of it
    """Return a value of type ``form``, which is int, a tuple of such, or a dataclass of such fields."""
    if form is int and type(document) is int:
        return document
    if get_origin(form) is tuple and isinstance(document, list):
        return tuple(_decode_numbers(item, get_args(form)[0]) for item in document)
    if isinstance(form, type) and dataclasses.is_dataclass(form) and isinstance(document, dict):
        fields = get_type_hints(form)
        if document.keys() == fields.keys():
            return form(**{name: _decode_numbers(value, fields[name]) for name, value in document.items()})
    raise FileFormatError(f"the summary wants {getattr(form, '__name__', form)}, got {document!r:.80}")


def _names(inputs: CallSignature) -> list[str]:
    """Return what to call each leaf of the inputs in a message."""
    noise, conditions = tree_unflatten(list(inputs.leaves), inputs.spec)
    names = ["noise" + keystr(path) for path, _ in tree_flatten_with_path(noise)[0]]
    for name, value in conditions.items():
        names += [f"condition '{name}'" + keystr(path) for path, _ in tree_flatten_with_path(value)[0]]
    return names


def _raw(leaf: object) -> object:
    return leaf.value if isinstance(leaf, StaticValue) else leaf


def _fits(tensor: Tensor, wanted: TensorSpec) -> bool:
    return (tuple(tensor.shape), tensor.dtype, tensor.device) == (wanted.shape, wanted.dtype, wanted.device)


def _describe(leaf: object) -> str:
    if isinstance(leaf, TensorSpec):
        return f"{str(leaf.dtype).removeprefix('torch.')} {list(leaf.shape)} on {leaf.device}"
    return f"the value {_raw(leaf)!r:.80}"


def _list(value: object, what: str) -> list[Any]:
    if not isinstance(value, list):
        raise FileFormatError(f"{what} wants a list, got {type(value).__name__}")
    return value


def _own_version() -> str:
    try:
        return metadata.version("l2c-compile")
    except metadata.PackageNotFoundError:
        return "checkout"
