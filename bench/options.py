"""The options of a case: parsed alike everywhere, and a mistake in them is an error of ours."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import NoReturn

import torch

from bench.cases import BenchError
from bench.workloads import DTYPES, SCHEDULES


class Options(argparse.ArgumentParser):
    """The options of one case; ``add_argument`` adds one, as everywhere."""

    def __init__(self, case: str) -> None:
        super().__init__(prog=f"python -m bench {case}", add_help=False, allow_abbrev=False)
        self.case = case

    def add_device(self, *choices: str, required: bool = False) -> None:
        """Add ``--device``: where to compute, by default on the first choice."""
        self.add_argument("--device", choices=choices, required=required, default=None if required else choices[0])

    def add_loop(self, *, schedule: str = "published", dtypes: bool = False) -> None:
        """Add what ``workload`` reads: ``--width``, ``--schedule``, ``--dtype`` (or several) and ``--backend``."""
        self.add_argument("--width", type=int, help="of a DiT, in place of its own")
        self.add_argument("--schedule", choices=SCHEDULES, default=schedule)
        if dtypes:
            self.add_argument("--dtypes", nargs="+", choices=DTYPES, default=list(DTYPES))
        else:
            self.add_argument("--dtype", choices=DTYPES, default=DTYPES[0])
        self.add_argument("--backend", default="inductor", help="of ours and of torch.compile; eager tries the script")

    def read(self, args: Sequence[str]) -> argparse.Namespace:
        """Return the values.

        Raises:
            BenchError: if an option is unknown or has no such value, or if a CUDA device is wanted and there is none.
        """
        options, unknown = self.parse_known_args(list(args))
        if unknown:
            usage = " ".join(self.format_usage().split())
            raise BenchError(f"{self.case} does not know {' '.join(unknown)}; {usage}")
        if getattr(options, "device", None) == "cuda" and not torch.cuda.is_available():
            raise BenchError(f"{self.case} wants a CUDA device, got a machine without one; use another --device")
        return options

    def error(self, message: str) -> NoReturn:
        """Raise a ``BenchError`` in place of ending the process."""
        raise BenchError(f"{self.case}: {message}")
