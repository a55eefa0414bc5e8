"""Loaded samplers: inputs of another form, and what kind of module they are."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from l2c_compile import CompiledSampler, LoadedSampler, load
from l2c_compile.backends.options import EAGER
from l2c_compile.errors import (
    BackendError,
    InputFormError,
)
from tests.saved_samplers import compiled, inputs, saved_in


@pytest.fixture(scope="module")
def sampler() -> CompiledSampler:
    return compiled()


@pytest.fixture(scope="module")
def saved(sampler: CompiledSampler, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved_in(tmp_path_factory.mktemp("saved"), sampler)


class TestInputs:
    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"noise": torch.zeros(3, 6)}, r"noise was saved as float32 \[2, 6\] on cpu, got float32 \[3, 6\]"),
            ({"noise": torch.zeros(2, 6, dtype=torch.float64)}, "got float64"),
            ({"noise": (torch.zeros(2, 6),)}, "give the same containers"),
            ({"scale": 1}, "condition 'scale' was saved as the value 0.5, got the value 1"),
            ({"scale": torch.tensor(0.5)}, "got float32"),
            ({"y": 3}, "condition 'y' was saved as int64"),
            ({"z": 3}, "saved with conditions 'y', 'scale', got 'y', 'scale', 'z'"),
        ],
    )
    def test_another_form_is_refused_and_named(self, saved: Path, change: dict[str, object], message: str) -> None:
        noise, y = inputs()
        given: dict[str, object] = {"noise": noise, "y": y, "scale": 0.5, **change}
        with pytest.raises(InputFormError, match=message):
            load(saved)(**given)

    def test_an_unknown_backend_is_refused(self, saved: Path) -> None:
        with pytest.raises(BackendError, match="knows no backend"):
            load(saved, backend="inductr")


def test_loaded_samplers_are_modules_in_evaluation_mode(saved: Path) -> None:
    loaded = load(saved, backend=EAGER)
    assert isinstance(loaded, LoadedSampler)
    assert not loaded.training
    assert not any(tensor.requires_grad for tensor in loaded.state_dict().values())


def test_an_input_that_was_saved_expanded_is_asked_for_likewise(tmp_path: Path) -> None:
    sampler = compiled()
    noise, y = inputs()
    wide = noise[:1].expand(2, 6)
    sampler.save(tmp_path / "x.pt2", wide, y=y, scale=0.5)
    loaded = load(tmp_path / "x.pt2")
    loaded(wide, y=y, scale=0.5)
    with pytest.raises(InputFormError, match=r"strides \[0, 1\].*expand it likewise"):
        loaded(noise, y=y, scale=0.5)
