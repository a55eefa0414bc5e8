"""The reference: the loop runs eagerly, and the schedule is applied by wrapping the calls of each site's module.

What is wrapped is the whole call, hooks included: a site's value is what a caller gets, and where it is reused neither
the module's forward nor its hooks run. Torch fuses an ``nn.TransformerEncoderLayer`` unless a module in it has a hook;
so a layer with a site inside is never fused, as in a capture.

The reference is short, obvious and slow, and shares nothing with the compiler but the vocabulary (sites, schedule,
rules). Every compiled sampler is judged against it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Generator, Iterator, Mapping
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten

from l2c_compile.errors import ScheduleError, UnknownSiteError
from l2c_compile.schedules.rules import Reading
from l2c_compile.schedules.schedule import CacheSchedule, Reuse
from l2c_compile.schedules.sites import Site

Recorder = Callable[[int, Site, int, Tensor], None]
"""A function that is told (evaluation, site, port, value) for every computed value of a site."""


@torch.no_grad()
def run_reference(
    denoiser: nn.Module,
    loop: Callable[..., object],
    schedule: CacheSchedule,
    noise: object,
    conditions: Mapping[str, object],
    *,
    record: Recorder | None = None,
) -> object:
    """Return what ``loop(denoiser, noise, **conditions)`` gives when ``schedule`` decides what is computed.

    A reused module does not run, nor do its hooks. Where a run of modules is reused, its modules run and their result
    is replaced.

    Args:
        denoiser: the denoiser; its modules are restored when this function returns or raises.
        loop: the sampler, called as ``loop(denoiser, noise, **conditions)``.
        schedule: the schedule; patterns in it are resolved to the modules of ``denoiser``.
        noise: the first argument of the loop.
        conditions: the keyword arguments of the loop.
        record: a function that is told every computed value, to find where two runs begin to differ.

    Returns:
        The result of the loop; of a generator, the list of all that it yields and what it returns.

    Raises:
        UnknownSiteError: if a pattern fits no module.
        ScheduleError: if the loop does not perform as many evaluations as the schedule has, or a change (out - in) is
            not defined.
    """
    if not isinstance(denoiser, nn.Module):
        raise ScheduleError(f"the reference wants a denoiser that is an nn.Module, got {denoiser!r:.80}")
    schedule = schedule.resolve([path for path, _ in denoiser.named_modules()])
    run = _ReferenceRun(denoiser, schedule, record)
    with run.installed():
        result = loop(denoiser, noise, **conditions)
        if isinstance(result, Generator):
            result = _yielded(result)
    if run.evaluation + 1 != schedule.num_evaluations:
        raise ScheduleError(
            f"the schedule is for {schedule.num_evaluations} evaluations, the loop performed {run.evaluation + 1}"
        )
    return result


class _ReferenceRun:
    """One run of the loop under a schedule: what it has computed so far, and the wrapped modules."""

    def __init__(self, denoiser: nn.Module, schedule: CacheSchedule, record: Recorder | None) -> None:
        self.denoiser = denoiser
        self.schedule = schedule
        self.record = record
        self.evaluation = -1
        self.calls: Counter[str] = Counter()
        self.outputs: dict[tuple[int, Site], object] = {}
        self.inputs: dict[tuple[int, Site], Tensor] = {}
        needing = {site for (_, site), reuse in schedule.reuses.items() if reuse.rule.needs_input}
        self.reads_input = needing | {site for site in schedule.sites if site.kind == "delta"}
        self.read_later = {
            (source, site)
            for (e, site), reuse in schedule.reuses.items()
            if schedule.active(e, site) is not None
            for source in reuse.sources
        }

    @contextmanager
    def installed(self) -> Iterator[None]:
        with ExitStack() as undo:
            forward = self.denoiser.forward
            wrapped = _Wrapped(forward, self._wrap_denoiser(forward))
            undo.enter_context(_replaced(self.denoiser, "forward", wrapped))
            for path in dict.fromkeys(p for s in self.schedule.sites for p in (s.path, s.last or s.path)):
                module = _module_at(self.denoiser, path)
                # nn.Module.__call__ hands every call to this attribute if there is one, as after module.compile().
                call = module._compiled_call_impl or module._call_impl
                undo.enter_context(_replaced(module, "_compiled_call_impl", self._wrap(path, call)))
                undo.callback(module.register_forward_hook(_do_nothing).remove)
            yield

    def _wrap_denoiser(self, original: Callable[..., object]) -> Callable[..., object]:
        def forward(*args: object, **kwargs: object) -> object:
            self.evaluation += 1
            self.calls.clear()
            if self.evaluation >= self.schedule.num_evaluations:
                raise ScheduleError(
                    f"the schedule is for {self.schedule.num_evaluations} evaluations, the loop performs more"
                )
            return original(*args, **kwargs)

        return forward

    def _wrap(self, path: str, original: Callable[..., object]) -> Callable[..., object]:
        begins = [site for site in self.schedule.sites if site.path == path]
        ends = [site for site in self.schedule.sites if (site.last or site.path) == path]
        # A run holds at its end what its last module returns, reused or not.
        ends.sort(key=lambda site: site.num_modules)

        def forward(*args: object, **kwargs: object) -> object:
            e, call = self.evaluation, self.calls[path]
            self.calls[path] += 1
            for site in begins:
                if site in self.reads_input and site.call == call and args and isinstance(args[0], Tensor):
                    self.inputs[e, site] = _copy_of(args[0])
            here = [site for site in ends if site.call == call]
            skipped = any(site.last is None and self.schedule.active(e, site) for site in here)
            output = None if skipped else original(*args, **kwargs)
            for site in here:
                reuse = self.schedule.active(e, site)
                if reuse is not None:
                    output = self._reuse(site, reuse)
                elif self.schedule.computes(e, site):
                    self._note(site, output)
                if (e, site) in self.read_later:
                    self.outputs[e, site] = tree_map(_copy, self._cached_part(site, output))
            return output

        return forward

    def _cached_part(self, site: Site, output: object) -> object:
        if site.kind == "out":
            return output
        before = self.inputs.get((self.evaluation, site))
        if (
            not isinstance(output, Tensor)
            or before is None
            or output.shape != before.shape
            or torch.bool in (output.dtype, before.dtype)
        ):
            raise ScheduleError(
                f"site '{site}', evaluation {self.evaluation}: its change (out - in) wants a module that takes and"
                " returns one tensor of numbers, of one shape; reuse its output instead"
            )
        return output - before

    def _reuse(self, site: Site, reuse: Reuse) -> object:
        flat, spec = zip(*(tree_flatten(self.outputs[source, site]) for source in reuse.sources), strict=True)
        inputs = tuple(self.inputs[source, site] for source in reuse.sources) if reuse.rule.needs_input else ()
        current = self.inputs[self.evaluation, site] if reuse.rule.needs_input else None
        values = [
            _copy(reuse.rule.combine(Reading(history, inputs, current)))
            if isinstance(history[0], Tensor)
            else history[0]
            for history in zip(*flat, strict=True)
        ]
        value = tree_unflatten(values, spec[0])
        return value if site.kind == "out" else self.inputs[self.evaluation, site] + value

    def _note(self, site: Site, output: object) -> None:
        if self.record is not None:
            for port, tensor in enumerate(leaf for leaf in tree_flatten(output)[0] if isinstance(leaf, Tensor)):
                self.record(self.evaluation, site, port, tensor)


class _Wrapped:
    """A method that is called elsewhere; all that a loop asks of it otherwise, such as its signature, it answers."""

    def __init__(self, method: Callable[..., object], call: Callable[..., object]) -> None:
        self._method, self._call = method, call

    def __getattribute__(self, name: str) -> object:
        return getattr(object.__getattribute__(self, "_method"), name)

    def __call__(self, *args: object, **kwargs: object) -> object:
        call: Callable[..., object] = object.__getattribute__(self, "_call")
        return call(*args, **kwargs)


def _yielded(loop: Generator[object, None, object]) -> tuple[list[object], object]:
    """Return all that a loop yields, and what it returns in the end."""
    values: list[object] = []
    while True:
        try:
            values.append(next(loop))
        except StopIteration as end:
            return values, end.value


def _module_at(denoiser: nn.Module, path: str) -> nn.Module:
    module: nn.Module = dict(denoiser.named_modules(remove_duplicate=False))[path]
    if isinstance(module, torch.jit.ScriptModule):
        raise UnknownSiteError(
            f"site '{path}': the module is TorchScript, whose calls cannot be left out; name a module around it"
        )
    return module


def _copy(value: object) -> object:
    return _copy_of(value) if isinstance(value, Tensor) else value


def _copy_of(tensor: Tensor) -> Tensor:
    # A caller who gets the original may write into it. clone() would close the gaps of a view, and torch may round
    # differently where elements lie side by side. The elements that an expanded dimension repeats are copied once.
    once = tensor
    for dim, stride in enumerate(tensor.stride()):
        if stride == 0 and tensor.shape[dim] > 1:
            once = once.narrow(dim, 0, 1)
    return (
        torch.empty_strided(once.shape, once.stride(), dtype=tensor.dtype, device=tensor.device)
        .copy_(once)
        .expand(tensor.shape)
    )


def _do_nothing(module: nn.Module, args: object, output: object) -> None:
    """Do nothing; it is there to be found."""


@contextmanager
def _replaced(module: nn.Module, name: str, value: object) -> Iterator[None]:
    """Give a module another attribute while the context is open."""
    own = vars(module)
    had_own, original = name in own, own.get(name)
    own[name] = value
    try:
        yield
    finally:
        if had_own:
            own[name] = original
        else:
            own.pop(name, None)
