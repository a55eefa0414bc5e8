"""Manifests that are damaged or hostile are refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.saved_samplers import MANIFEST, refused, rewritten


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": "l2c_compile.router"}, "wants format"),
        ({"version": 3}, "update l2c_compile"),
        ({"version": "1"}, "version number"),
        ({"surprise": 1}, "unknown keys"),
        ({"summary": {}}, "summary wants"),
        ({"passes": "all"}, "passes wants a list"),
        ({"noise": {"value": "%0"}}, "no earlier line"),
        ({"noise": {"pickle": "x"}}, "wants a tensor or a value"),
        ({"conditions": {}}, "inputs where the manifest names"),
        ({"result": {"leaf": 0}}, "each output of the graph once"),
        ({"sha256": {}}, "wants the sha256"),
    ],
)
def test_a_hostile_manifest_is_refused(saved: Path, tmp_path: Path, change: dict[str, object], message: str) -> None:
    edit = {MANIFEST: lambda content: json.dumps({**json.loads(content), **change}).encode()}
    refused(rewritten(saved, tmp_path / "x.pt2", edit), message)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"format": NaN}', "finite"),
        (b'{"a": ' + b"[" * 90_000 + b"]" * 90_000 + b"}", "nested"),
        (b"[" * 5_000_000, "at most"),
        (b"\x80\x04.", "not valid JSON"),
    ],
)
def test_malformed_json_is_refused(saved: Path, tmp_path: Path, content: bytes, message: str) -> None:
    refused(rewritten(saved, tmp_path / "x.pt2", {MANIFEST: lambda _: content}), message)


def test_a_deep_tree_is_refused(saved: Path, tmp_path: Path) -> None:
    tree: object = {"value": 1}
    for _ in range(100):
        tree = {"list": [tree]}
    edit = {MANIFEST: lambda content: json.dumps({**json.loads(content), "noise": tree}).encode()}
    refused(rewritten(saved, tmp_path / "x.pt2", edit), "deep")
