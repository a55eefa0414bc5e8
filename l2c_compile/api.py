"""``l2c_compile``: what is given decides which sampler is made. The flow of the compiler is in ``compile.py``."""

from __future__ import annotations

from collections.abc import Collection
from typing import Literal

from torch import nn

from l2c_compile.backends.options import EAGER, Backend, Options
from l2c_compile.errors import CaptureError, LoopError, ScheduleError
from l2c_compile.frontend.capture import check_names, check_sites_exist
from l2c_compile.frontend.stand_in import Loop
from l2c_compile.loops import loop_from_dict
from l2c_compile.progress import Progress
from l2c_compile.samplers.compiled_sampler import MAX_FORMS, Check, CompiledSampler
from l2c_compile.schedules.router import Router, schedule_of
from l2c_compile.schedules.schedule import CacheSchedule


def l2c_compile(
    model: nn.Module,
    router: Router | CacheSchedule,
    loop: Loop | None = None,
    *,
    backend: Backend = EAGER,
    threshold: float | None = None,
    numerics: Literal["bitwise", "rounding"] | None = None,
    without: Collection[str] = (),
    caches: Literal["int8", "fp8"] | None = None,
    mode: Literal["reduce-overhead"] | None = None,
    check: Check = "first",
    max_forms: int = MAX_FORMS,
    progress: Progress | None = None,
) -> CompiledSampler:
    """Compile a sampling loop and its cache schedule into one static graph.

    Nothing is captured yet: the first call does that, and every call with another form of input (shape, strides, dtype,
    device, or a Python value among the conditions) does it again for that form, like ``torch.compile``.

    Args:
        model: the denoiser. Its weights are shared, not copied.
        router: which sites are reused in which evaluations.
        loop: ``loop(denoiser, noise, **conditions) -> latent``; None takes the loop that the router was made for.
        backend: what runs the graph: "eager", "aot_eager", "inductor" or any other backend that ``torch.compile``
            takes.
        numerics: "bitwise" runs only the passes that change no bit in eager mode; "rounding" also those that compute
            the same formula in another order, and faster kernels for linear layers on CPUs. None takes "bitwise" for
            backend "eager" and "rounding" for all others, which round in their own way anyway.
        without: names of passes to leave out, as ``passes/pipeline.py`` lists them.
        threshold: the score above which a site is computed; None takes the router's own. Only for a ``Router``.
        caches: "int8" or "fp8" keeps values for later evaluations in one byte an element, with a scale for each token.
            That takes less memory and changes the result (``kernels/README.md`` says by how much). None keeps the
            values as they are.
        mode: "reduce-overhead" records the whole loop as one CUDA graph in the first call of each form and replays it,
            so that nothing is launched from Python. Inputs are copied in and results copied out. CUDA only.
        check: what is checked at run time. "first" runs the user's loop eagerly in the first call of each form, on the
            same inputs and random numbers, and compares: bit for bit, or within what rounding explains if passes or
            backend round. "first" and "structure" compare, before each call, what the form was captured from (modules,
            attributes, hooks, closures, globals) with what is there now, and capture anew if it changed. None checks
            only weights. ``summary()`` says what each costs, docs/trust.md what none of them can see.
        max_forms: how many forms of input are kept compiled; beyond that the least recently used one is forgotten, with
            a warning.
        progress: a function that is told each stage of a capture before it begins.

    Returns:
        An ``nn.Module`` to be called as ``sampler(noise, **conditions)``.

    Raises:
        CaptureError: if ``model`` is no module.
        LoopError: if ``loop`` cannot be called.
        UnknownSiteError: if the schedule names a module that ``model`` does not have.
        ScheduleError: if there is no loop, or a threshold is given for a schedule, which needs none.
        BackendError: if ``torch.compile`` knows no such backend, or there is no such mode.
        ValueError: if ``without`` names an unknown pass, one that another pass needs, or the one that applies the
            schedule, or if there are no such ``caches`` or ``numerics``.
    """
    schedule = schedule_of(router, threshold)
    if loop is None:
        if schedule.loop is None:
            raise ScheduleError(
                "the schedule does not say which loop it was made for; give one: l2c_compile(model, s, loop)"
            )
        loop = loop_from_dict(schedule.loop)
    if not isinstance(model, nn.Module):
        raise CaptureError(
            f"l2c_compile wants a denoiser that is an nn.Module, got {model!r:.80}; give a module whose forward it is"
        )
    if not callable(loop):
        raise LoopError(
            f"l2c_compile wants a loop that is called as loop(denoiser, noise, **conditions), got {loop!r:.80}"
        )
    if type(max_forms) is not int or max_forms < 1:
        raise ValueError(f"max_forms wants a whole number from 1, got {max_forms!r}")
    if check not in ("first", "structure", None):
        raise ValueError(f"check wants 'first', 'structure' or None, got {check!r}")
    options = Options(backend, numerics, without, caches, mode)
    check_names(model, schedule.sites)
    schedule = schedule.resolve([path for path, _ in model.named_modules()])
    check_sites_exist(model, schedule.sites)
    return CompiledSampler(model, schedule, loop, options, progress, max_forms, check)
