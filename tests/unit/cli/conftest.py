"""Commands know their models by name; most tests need only two blocks of one."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.command_line import small_models


@pytest.fixture
def two_blocks_each() -> Iterator[None]:
    with small_models():
        yield
