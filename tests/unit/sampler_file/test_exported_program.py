"""A loop graph as a program of torch.export."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch.export.graph_signature import InputKind
from torch.utils._pytree import tree_leaves

from l2c_compile import CacheSchedule, CompiledSampler
from l2c_compile.errors import BackendError
from l2c_compile.graphs.forms import TensorForm
from l2c_compile.graphs.loop_graph import LoopGraph
from l2c_compile.passes.pipeline import BITWISE, REGIONS
from l2c_compile.sampler_file.exported_program import compile_ahead_of_time, infer_values, to_exported_program
from tests.saved_samplers import inputs
from tests.tiny import draw, residual, same_bits, steps, unrolled


def graph_of(num_evaluations: int = 3) -> LoopGraph:
    row = [1, *[0] * (num_evaluations - 1)]
    graph = unrolled(residual(), CacheSchedule.from_table({"a": row}), steps(num_evaluations), draw(2, 4))
    BITWISE.run(graph)
    return graph


def test_it_computes_what_the_graph_computes_and_shares_its_weights() -> None:
    graph, noise = graph_of(), draw(2, 4)
    exported = to_exported_program(graph)
    with torch.no_grad():
        assert same_bits(exported.module()(noise), graph.module()(noise))
    weight = graph.root.get_parameter("denoiser.a.weight")
    assert exported.state_dict["denoiser.a.weight"] is weight
    kinds = [spec.kind for spec in exported.graph_signature.input_specs]
    order = [InputKind.PARAMETER, InputKind.BUFFER, InputKind.CONSTANT_TENSOR, InputKind.USER_INPUT]
    assert kinds == sorted(kinds, key=order.index)
    assert kinds.count(InputKind.USER_INPUT) == 1


def test_torch_writes_and_reads_it(tmp_path: Path) -> None:
    graph, noise = graph_of(), draw(2, 4)
    torch.export.save(to_exported_program(graph), tmp_path / "x.pt2")
    with torch.no_grad():
        assert same_bits(torch.export.load(tmp_path / "x.pt2").module()(noise), graph.module()(noise))


def test_equal_operations_are_tried_once_however_many_evaluations_there_are() -> None:
    tried: dict[int, int] = {}
    for num_evaluations in (4, 16):
        told: list[object] = []
        to_exported_program(graph_of(num_evaluations), told.append)
        tried[num_evaluations] = len(told)
    assert tried[4] == tried[16]


def test_what_is_inferred_are_the_forms_that_were_noted() -> None:
    graph = graph_of().graph
    noted = {node: TensorForm.of(node.meta["val"]) for node in graph.nodes if node.op != "output"}
    infer_values(graph, noted.__getitem__)
    for node, form in noted.items():
        assert TensorForm.of(node.meta["val"]) == form
    fakes = {id(node.meta["val"].fake_mode) for node in noted}
    assert len(fakes) == 1


def test_a_graph_of_regions_is_too_much_for_aot_inductor(sampler: CompiledSampler, tmp_path: Path) -> None:
    noise, y = inputs()
    graph = sampler.capture(noise, y=y, scale=0.5).graph.copy()
    REGIONS.run(graph)
    with pytest.raises(BackendError, match="load with backend='inductor'"):
        compile_ahead_of_time(graph, tmp_path / "x.pt2")


def test_aot_inductor_is_given_examples_of_every_input(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[tuple[object, str]] = []

    def package(program: torch.export.ExportedProgram, package_path: str) -> None:
        given.append((program.example_inputs, package_path))

    monkeypatch.setattr(torch._inductor, "aoti_compile_and_package", package)
    compile_ahead_of_time(graph_of(), tmp_path / "x.pt2")
    ((examples, path),) = given
    assert TensorForm.of(tree_leaves(examples)[0]) == TensorForm.of(draw(2, 4))
    assert (len(tree_leaves(examples)), path) == (1, str(tmp_path / "x.pt2"))
