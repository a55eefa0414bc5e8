"""Pickles that run code when they are loaded the ordinary way."""

from __future__ import annotations

import argparse
import os
import pickle
from collections.abc import Callable
from pathlib import Path

from bench.trust.mutate.raw import Draw


class _PickledCall:
    """Pickles as a call of ``function`` with ``arguments``."""

    def __init__(self, function: Callable[..., object], *arguments: object) -> None:
        self.call = function, arguments

    def __reduce__(self) -> tuple[object, ...]:
        return self.call


def payload(draw: Draw, canary: Path) -> bytes:
    """Return a pickle that would create the canary if it were loaded the ordinary way."""
    path = str(canary)
    code = f"import os; os.mkdir({path!r})"
    quoted = path.encode()
    return draw.choice(
        (
            pickle.dumps(_PickledCall(os.mkdir, path)),
            pickle.dumps(_PickledCall(os.system, f"mkdir {path}")),
            pickle.dumps(_PickledCall(exec, code)),
            pickle.dumps(_PickledCall(eval, f"__import__('os').mkdir({path!r})"), protocol=0),
            pickle.dumps({"routers": {"0.prob": _PickledCall(open, path, "w")}}, protocol=2),
            pickle.dumps(_PickledCall(getattr, _PickledCall(__import__, "os"), "mkdir")),
            pickle.dumps(argparse.Namespace(model=_PickledCall(os.mkdir, path)), protocol=2),
            b"cos\nmkdir\n(V" + quoted + b"\ntR.",
            b"(S'" + quoted + b"'\nios\nmkdir\n.",
            b"(cos\nmkdir\nS'" + quoted + b"'\no.",
            b"\x80\x04\x8c\x02os\x8c\x05mkdir\x93\x8c" + bytes([len(quoted) % 256]) + quoted + b"\x85R.",
            b"ctorch.serialization\nload\n(V" + quoted + b"\ntR.",
            b"ctorch.hub\nload_state_dict_from_url\n(V" + quoted + b"\ntR.",
            b"ctorch._dynamo\noptimize\n(tR.",
            b"cargparse\nNamespace\n(tR}(V__class__\ncos\nmkdir\nsb.",
            b"cargparse\nFileType\n(Vw\ntR(V" + quoted + b"\ntR.",
        )
    )
