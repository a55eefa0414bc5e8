"""The packaged digits model and its judge."""

from __future__ import annotations

import subprocess
import sys
from importlib import resources
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from l2c_compile.errors import FileFormatError
from l2c_compile.loops import DDIM, Guidance
from l2c_compile.models import load_digit_classifier, load_digits_dit

DATA = Path(str(resources.files("l2c_compile"))) / "data"


def test_samples_are_the_digits_that_were_asked_for() -> None:
    model, classifier = load_digits_dit(), load_digit_classifier()
    labels = torch.arange(10).repeat_interleave(5)
    noise = torch.randn(50, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        images = DDIM(10, guidance=Guidance(3.0, {"y": 10}))(model, noise, y=labels)
        right = classifier(images).argmax(-1) == labels
    assert right.sum() >= 49
    assert images.abs().max() < 2.0, "a pixel ran away"


def test_the_classifier_has_features_below_its_logits() -> None:
    classifier = load_digit_classifier()
    images = torch.rand(5, 1, 8, 8) * 2 - 1
    features = classifier.features(images)
    assert features.shape == (5, 64)
    torch.testing.assert_close(classifier.head(features), classifier(images), rtol=0, atol=0)


def test_both_are_in_evaluation_mode_and_float32() -> None:
    for model in (load_digits_dit(), load_digit_classifier()):
        assert not model.training
        assert {p.dtype for p in model.parameters()} == {torch.float32}


def test_the_classifier_was_right_on_digits_it_never_saw() -> None:
    with safe_open(DATA / "digit_classifier.safetensors", framework="pt") as file:
        assert float(file.metadata()["held_out_accuracy"]) >= 0.97


def test_the_files_are_small() -> None:
    assert sum(path.stat().st_size for path in DATA.glob("*.safetensors")) < 8_000_000


def test_loading_needs_no_scikit_learn() -> None:
    code = "import sys, l2c_compile.models as m; m.load_digit_classifier(); sys.exit('sklearn' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False, cwd=DATA.parents[1]).returncode == 0


@pytest.mark.parametrize("blob", [b"", b"\x05" * 40, b"\x02\x00\x00\x00\x00\x00\x00\x00{}"])
def test_a_damaged_file_is_named(blob: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "digits_dit.safetensors").write_bytes(blob)
    monkeypatch.setattr(resources, "files", lambda _package: tmp_path)
    with pytest.raises(FileFormatError, match=r"digits_dit\.safetensors is damaged"):
        load_digits_dit()
