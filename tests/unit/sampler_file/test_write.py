"""Saving: what cannot be saved, and what is left after a failure."""

from __future__ import annotations

import zipfile
from collections import namedtuple
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from l2c_compile import CacheSchedule, CompiledSampler, l2c_compile
from l2c_compile.errors import (
    L2CError,
    SaveError,
)
from l2c_compile.graphs.forms import TensorForm
from tests.saved_samplers import Tiny, compiled, inputs


@pytest.fixture(scope="module")
def sampler() -> CompiledSampler:
    return compiled()


class TestSave:
    def test_nothing_is_saved_before_anything_is_compiled(self, tmp_path: Path) -> None:
        with pytest.raises(L2CError, match="nothing is compiled"):
            compiled().save(tmp_path / "x.pt2")

    def test_the_suffix_is_asked_for(self, sampler: CompiledSampler, tmp_path: Path) -> None:
        noise, y = inputs()
        with pytest.raises(SaveError, match=r"name it '.*x\.pt2'"):
            sampler.save(tmp_path / "x.pt", noise, y=y, scale=0.5)

    def test_an_interrupted_save_leaves_the_old_file(
        self, sampler: CompiledSampler, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        path = tmp_path / "x.pt2"
        path.write_bytes(b"old")

        def fail(*args: object) -> None:
            raise OSError("disk full")

        monkeypatch.setattr(zipfile.ZipFile, "writestr", fail)
        noise, y = inputs()
        with pytest.raises(OSError, match="disk full"):
            sampler.save(path, noise, y=y, scale=0.5)
        assert path.read_bytes() == b"old"
        assert list(tmp_path.iterdir()) == [path]

    def test_what_a_file_cannot_hold_is_named(self, tmp_path: Path) -> None:
        pair = namedtuple("pair", "latent")

        def loop(denoiser: nn.Module, noise: Tensor, *, y: Tensor, wrap: object = None) -> object:
            latent = denoiser(noise, torch.ones(2), y=y)
            return pair(latent) if wrap == "pair" else latent

        noise, y = inputs()
        sampler = l2c_compile(Tiny().eval(), CacheSchedule.all_compute(1), loop)
        with pytest.raises(SaveError, match="the loop's result is or contains a pair"):
            sampler.save(tmp_path / "x.pt2", noise, y=y, wrap="pair")
        with pytest.raises(SaveError, match="condition 'wrap' is <class 'int'>"):
            sampler.save(tmp_path / "x.pt2", noise, y=y, wrap=int)
        assert list(tmp_path.iterdir()) == []

    def test_an_operator_of_another_library_is_named(self, tmp_path: Path) -> None:
        @torch.library.custom_op("test_saved::double", mutates_args=())
        def double(x: Tensor) -> Tensor:
            return x * 2

        double.register_fake(torch.empty_like)

        class Foreign(nn.Module):
            def forward(self, x: Tensor) -> Tensor:
                doubled: Tensor = double(x)
                return doubled

        sampler = l2c_compile(Foreign(), CacheSchedule.all_compute(1), lambda denoiser, noise: denoiser(noise))
        with pytest.raises(
            SaveError, match=r"test_saved::double in evaluation 0 cannot be in a saved sampler.*another library"
        ):
            sampler.save(tmp_path / "x.pt2", torch.zeros(2))

    def test_an_aot_package_is_written_beside(
        self, sampler: CompiledSampler, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        given = []

        def package(program: torch.export.ExportedProgram, package_path: str) -> None:
            given.append(program.example_inputs)
            Path(package_path).write_bytes(b"native")

        monkeypatch.setattr(torch._inductor, "aoti_compile_and_package", package)
        noise, y = inputs()
        sampler.save(tmp_path / "x.pt2", noise, y=y, scale=0.5, aot_inductor=True)
        assert (tmp_path / "x.aoti.pt2").read_bytes() == b"native"
        assert [TensorForm.of(t) for t in given[0][0]] == [TensorForm.of(t) for t in (noise, y)]
        assert sorted(path.name for path in tmp_path.iterdir()) == ["x.aoti.pt2", "x.pt2"]
