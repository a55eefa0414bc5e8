"""The manifest of a saved sampler, which describes what is not in its graph and its tensors."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable
from importlib import metadata
from typing import Any, get_args, get_origin, get_type_hints

from torch.utils._pytree import tree_flatten

from l2c_compile.errors import FileFormatError, SaveError
from l2c_compile.files.archive import Archive
from l2c_compile.files.documents import MAX_JSON_BYTES, check_header, parse_json
from l2c_compile.graphs.forms import StaticValue, TensorForm
from l2c_compile.sampler_file.graph_lines import encode_form, encode_literal

FORMAT = "l2c_compile.sampler"
VERSION = 2

_FOLDER = "data/extra/l2c_compile/"
MANIFEST, GRAPH, SCHEDULE = (_FOLDER + name for name in ("manifest.json", "graph.jsonl", "schedule.json"))
MAX_GRAPH_BYTES = 256 * 2**20
_MAX_DEPTH = 16

_MANIFEST_KEYS = frozenset(
    {"format", "version", "l2c_compile", "torch", "denoiser", "loop", "passes", "noise", "conditions", "result"}
    | {"summary", "sha256"}
)


def read_manifest(archive: Archive) -> dict[str, object]:
    """Return the manifest of an archive.

    Raises:
        FileFormatError: if the manifest is damaged, of a newer version, or something else.
    """
    manifest = parse_json(archive.read(MANIFEST, max_bytes=MAX_JSON_BYTES))
    check_header(manifest, "saved sampler", FORMAT, VERSION, _MANIFEST_KEYS)
    return manifest


def hashed(archive: Archive, name: str, sha256: object, max_bytes: int) -> bytes:
    """Return a record of the archive after comparing its sha256.

    Raises:
        FileFormatError: if the digest differs.
    """
    content = archive.read(name, max_bytes=max_bytes)
    if hashlib.sha256(content).hexdigest() != sha256:
        raise FileFormatError(f"{name} does not have the sha256 that the manifest says; the file is damaged")
    return content


def encode_tree(value: object, what: str, leaf: Callable[[object, str], object]) -> object:
    """Return nested tuples, lists and dicts as JSON, with the result of ``leaf(leaf, what)`` for each leaf.

    Raises:
        SaveError: if the value holds another kind of container.
    """
    if type(value) is tuple or type(value) is list:
        return {type(value).__name__: [encode_tree(item, what, leaf) for item in value]}
    if type(value) is dict and all(isinstance(key, str) for key in value):
        return {"dict": {key: encode_tree(item, what, leaf) for key, item in value.items()}}
    if isinstance(value, (tuple, list, dict)) or not tree_flatten(value)[1].is_leaf():
        raise SaveError(
            f"{what} is or contains a {type(value).__name__}, which a file cannot hold without its class; use tuples,"
            " lists and dicts with text as keys"
        )
    return leaf(value, what)


def encode_input(leaf: object, what: str) -> object:
    """Return a leaf of the inputs as JSON, which is the form of a tensor or a Python value."""
    if isinstance(leaf, TensorForm):
        return {"tensor": encode_form(leaf, what)}
    return {"value": encode_literal(leaf, what)}


def decode_tree(document: object, what: str, leaf: Callable[[str, object], object], depth: int = _MAX_DEPTH) -> object:
    """Return the tree that ``encode_tree`` encoded; ``leaf(kind, content)`` decodes a leaf.

    Raises:
        FileFormatError: if the document is no such tree, or is deeper than 16.
    """
    if not isinstance(document, dict) or len(document) != 1 or depth == 0:
        raise FileFormatError(f"{what} wants a tree at most {_MAX_DEPTH} deep, got {document!r:.80}")
    ((kind, content),) = document.items()
    if kind in ("tuple", "list") and isinstance(content, list):
        items = [decode_tree(item, what, leaf, depth - 1) for item in content]
        return tuple(items) if kind == "tuple" else items
    if kind == "dict" and isinstance(content, dict):
        return {key: decode_tree(item, what, leaf, depth - 1) for key, item in content.items()}
    return leaf(kind, content)


def decode_numbers(document: object, form: Any) -> Any:  # noqa: ANN401 - a type, and a value of it
    """Return a value of type ``form``, which is int, a tuple of ints, or a dataclass with fields of such types."""
    if form is int and type(document) is int:
        return document
    if get_origin(form) is tuple and isinstance(document, list):
        return tuple(decode_numbers(item, get_args(form)[0]) for item in document)
    if isinstance(form, type) and dataclasses.is_dataclass(form) and isinstance(document, dict):
        fields = get_type_hints(form)
        if document.keys() == fields.keys():
            return form(**{name: decode_numbers(value, fields[name]) for name, value in document.items()})
    raise FileFormatError(f"the summary wants {getattr(form, '__name__', form)}, got {document!r:.80}")


def raw_value(leaf: object) -> object:
    """Return the Python value of a static leaf, and any other leaf as it is."""
    return leaf.value if isinstance(leaf, StaticValue) else leaf


def describe_input(leaf: object) -> str:
    """Return the words for a leaf of the inputs in a message."""
    if isinstance(leaf, TensorForm):
        return f"{str(leaf.dtype).removeprefix('torch.')} {list(leaf.shape)} on {leaf.device}"
    return f"the value {raw_value(leaf)!r:.80}"


def list_of(value: object, what: str) -> list[Any]:
    """Return the value if it is a list.

    Raises:
        FileFormatError: if it is no list.
    """
    if not isinstance(value, list):
        raise FileFormatError(f"{what} wants a list, got {type(value).__name__}")
    return value


def own_version() -> str:
    """Return the version of the installed package, or "checkout" if it is not installed."""
    try:
        return metadata.version("l2c-compile")
    except metadata.PackageNotFoundError:
        return "checkout"
