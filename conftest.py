"""The one hypothesis profile: the same draws on every machine; ``L2C_EXAMPLES`` asks for more of them."""

from __future__ import annotations

import os

from hypothesis import settings

settings.register_profile(
    "l2c",
    derandomize=True,
    database=None,
    deadline=None,
    print_blob=True,
    max_examples=int(os.environ.get("L2C_EXAMPLES", "25")),
)
settings.load_profile("l2c")
