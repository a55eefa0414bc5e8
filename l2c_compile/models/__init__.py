"""The denoisers, whose published checkpoints load unchanged."""

from __future__ import annotations

from l2c_compile.models.digits import load_digit_classifier, load_digits_dit
from l2c_compile.models.dit import DIT_PRESETS, DiT
from l2c_compile.models.uvit import UVIT_PRESETS, UViT

__all__ = ["DIT_PRESETS", "UVIT_PRESETS", "DiT", "UViT", "load_digit_classifier", "load_digits_dit"]
