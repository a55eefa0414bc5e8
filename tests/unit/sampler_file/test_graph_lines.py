"""Lines of a graph that are damaged or hostile are refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.saved_samplers import GRAPH, refused, rewritten


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ({"op": "aten::from_file", "args": [{"str": "/etc/passwd"}]}, "touches files"),
        ({"op": "aten::save", "args": ["%0", {"str": "x"}]}, "touches files"),
        ({"op": "aten::add_.Tensor", "args": ["%0", "%0"]}, "writes into an argument"),
        ({"op": "aten::item", "args": ["%0"]}, "returns something else"),
        ({"op": "torch.os.system", "args": [{"str": "true"}]}, "wants an operator"),
        ({"op": "higher_order::cond", "args": []}, "does not have"),
        ({"op": "aten::__class__", "args": []}, "does not have"),
        ({"op": "aten::no_such_thing", "args": []}, "does not have"),
        ({"op": "aten::neg", "args": ["%0"], "kwargs": {"x): pass  #": 1}}, "does not have"),
        ({"op": "aten::neg", "args": ["%99999999"]}, "no earlier line"),
        ({"op": "aten::neg", "args": ["0"]}, "no earlier line"),
        ({"op": "aten::neg", "args": [3]}, "does not take"),
        ({"op": "aten::neg", "args": ["%0", "%0", "%0"]}, "does not have"),
        ({"op": "aten::neg", "args": "%0"}, "wants a list"),
        ({"op": "aten::neg", "args": ["%0"], "evaluation": 3}, "evaluation below 3"),
        ({"op": "aten::neg", "args": ["%0"], "path": "a\nimport os"}, "module path"),
        ({"op": "aten::neg", "args": ["%0"], "more": 1}, "wants args, op"),
        ({"op": "aten::matmul", "args": ["%0", "%0"]}, "does not take"),
        ({"op": "aten::zeros", "args": [[2**62, 2**62]]}, "does not take"),
        ({"op": "aten::zeros", "args": [[2**80]]}, "no known form"),
        ({"op": "aten::sum", "args": ["%0"], "kwargs": {"dtype": {"dtype": "Tensor"}}}, "no known form"),
        ({"op": "aten::unbind.int", "args": ["%0", 7]}, "does not take"),
        ({"op": "aten::chunk", "args": ["%0", 2**40]}, "pieces"),
        ({"op": "getitem", "args": ["%0", {"str": "__class__"}]}, "wants getitem"),
        ({"op": "getitem", "args": ["%0", 9]}, "does not take"),
        ({"op": "aten::stack", "args": [["%0"] * 20_000]}, "no known form"),
        ({"op": "aten::neg", "args": [[[[[[[[[[[["%0"]]]]]]]]]]]]}, "no known form"),
        ({"output": ["%0"]}, "after the result"),
        ({"call": 1}, "wants an input"),
        ({}, "wants an input"),
        ([1], "wants an object"),
    ],
)
def test_a_hostile_line_is_refused(saved: Path, tmp_path: Path, line: object, message: str) -> None:
    def insert(graph: bytes) -> bytes:
        # The line's result is returned as well: what nobody uses is refused for that alone.
        *lines, last = map(json.loads, graph.splitlines())
        last["output"].append(f"%{len(lines)}")
        return b"".join(json.dumps(each).encode() + b"\n" for each in (*lines, line, last))

    refused(rewritten(saved, tmp_path / "x.pt2", {GRAPH: insert}), message)


def test_pieces_without_end_are_refused(saved: Path, tmp_path: Path) -> None:
    def insert(graph: bytes) -> bytes:
        *lines, last = map(json.loads, graph.splitlines())
        bomb = [
            {"op": "aten::zeros", "args": [[2**40]]},
            {"op": "aten::unbind.int", "args": [f"%{len(lines)}"]},
        ]
        last["output"].append(f"%{len(lines) + 1}")
        return b"".join(json.dumps(each).encode() + b"\n" for each in (*lines, *bomb, last))

    refused(rewritten(saved, tmp_path / "x.pt2", {GRAPH: insert}), "pieces")


def test_dead_nodes_and_marks_are_refused(saved: Path, tmp_path: Path) -> None:
    def insert(graph: bytes) -> bytes:
        lines = graph.splitlines(keepends=True)
        return b"".join([*lines[:-1], b'{"op":"aten::neg","args":["%0"]}\n', lines[-1]])

    refused(rewritten(saved, tmp_path / "x.pt2", {GRAPH: insert}), "has no user")
