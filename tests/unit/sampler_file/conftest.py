"""A sampler and the file that it is saved to, made once."""

from __future__ import annotations

from pathlib import Path

import pytest

from l2c_compile import CompiledSampler
from tests.saved_samplers import compiled, saved_in


@pytest.fixture(scope="session")
def sampler() -> CompiledSampler:
    return compiled()


@pytest.fixture(scope="session")
def saved(sampler: CompiledSampler, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved_in(tmp_path_factory.mktemp("saved"), sampler)
