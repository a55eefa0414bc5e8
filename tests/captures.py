"""Captures that tests share: most tests are about what comes after, and capturing is most of a small compilation.

``conftest.py`` puts ``shared_capture`` in the place of ``capture`` for every test; a test of capturing itself asks for
the fixture ``captured_anew``. Subprocesses and whoever imports ``capture`` from its own module are not affected.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Collection, Hashable
from dataclasses import replace
from types import BuiltinFunctionType, FunctionType

import torch
from torch import Tensor, nn

from l2c_compile.frontend.capture import capture
from l2c_compile.graphs.forms import CallSignature
from l2c_compile.graphs.loop_graph import EvaluationGraph
from l2c_compile.schedules.sites import Site

__all__ = ["shared_capture"]

_MAX_CAPTURES = 200

_known: OrderedDict[Hashable, EvaluationGraph] = OrderedDict()


def shared_capture(
    denoiser: nn.Module, signature: CallSignature, sites: Collection[Site], read_inputs_of: Collection[Site] = ()
) -> EvaluationGraph:
    """Return what ``capture`` returns, made once for all denoisers that are built alike."""
    structure = _structure(denoiser)
    if structure is None:
        return capture(denoiser, signature, tuple(sites), read_inputs_of)
    key = structure, signature, tuple(sites), frozenset(read_inputs_of), torch.get_default_dtype()
    if key not in _known:
        evaluation = capture(denoiser, signature, tuple(sites), read_inputs_of)
        if evaluation.root._buffers:
            # Tensors in the denoiser's own code: another one may hold others.
            return evaluation
        _known[key] = evaluation
        if len(_known) > _MAX_CAPTURES:
            _known.popitem(last=False)
    _known.move_to_end(key)
    root = nn.Module()
    root.denoiser = denoiser
    return replace(_known[key].copy(), root=root)


_PLAIN = (bool, int, float, str, bytes, type(None), torch.dtype, torch.device, FunctionType, BuiltinFunctionType, type)


def _structure(denoiser: nn.Module) -> Hashable | None:
    """Return all that a capture of the denoiser can depend on, None where that cannot be told."""
    modules: list[Hashable] = []
    numbers: dict[int, int] = {}
    for path, module in denoiser.named_modules(remove_duplicate=False):
        kind = type(module)
        own: list[Hashable] = []
        for name, value in sorted(vars(module).items()):
            if name in ("_parameters", "_buffers"):
                for entry, tensor in value.items():
                    if not (tensor is None or type(tensor) in (Tensor, nn.Parameter)):
                        return None
                    own.append((name, entry, _form(tensor, numbers)))
            elif name == "_modules":
                own.append(
                    (name, tuple((child, numbers.setdefault(id(m), len(numbers))) for child, m in value.items()))
                )
            elif isinstance(value, (dict, set, OrderedDict)) and name.startswith("_"):
                if name != "_non_persistent_buffers_set" and value:
                    return None
            elif not _is_plain(value):
                return None
            else:
                own.append((name, type(value), value))
        if "<locals>" in kind.__qualname__:
            return None
        modules.append((path, kind, kind.forward, kind.__call__, tuple(own)))
    return tuple(modules)


def _form(tensor: Tensor | None, numbers: dict[int, int]) -> Hashable:
    if tensor is None:
        return None
    number = numbers.setdefault(id(tensor), len(numbers))
    return number, tensor.shape, tensor.stride(), tensor.dtype, tensor.device, tensor.requires_grad


def _is_plain(value: object) -> bool:
    if isinstance(value, tuple):
        return all(map(_is_plain, value))
    return isinstance(value, _PLAIN)
