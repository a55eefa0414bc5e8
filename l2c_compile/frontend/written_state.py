"""Show that what a denoiser writes in a call does not change its later calls, which a static graph would not see.

Models write for harmless reasons: a table that is made in the first call, the size of the last input, attention maps
for somebody to look at. Others count their calls or carry features to the next one. To tell them apart the denoiser is
captured a second time, in the state that the first capture left: if the second graph is the first one, and leaves the
same state, then so are all later ones.

In the second capture a table, a stored tensor that is made from no input, stands as a constant; a tensor that was made
from the inputs is replaced by an object that cannot be used, so that reading it is an error. A number that was changed
may be counted on, but not asked for its value, so that a model may count its calls as long as nothing comes of it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import NoReturn

import torch
from torch import Tensor, fx, nn
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind
from torch.utils._pytree import tree_leaves

from l2c_compile.errors import CaptureError, LoopTraceError
from l2c_compile.graphs.forms import StaticValue, TensorForm
from l2c_compile.graphs.nodes import output_list
from l2c_compile.state.caches import clear_caches_of_fakes
from l2c_compile.state.python_state import Change, PythonState


@dataclass(frozen=True)
class StateEffect:
    """What one call of the denoiser changed in its state."""

    before: PythonState
    after: PythonState
    changes: tuple[Change, ...]

    @classmethod
    def since(cls, before: PythonState) -> StateEffect | None:
        """Return what changed since a snapshot, None if nothing did."""
        if before.is_untouched():
            return None
        after = PythonState(before.roots)
        changes = before.changes_to(after)
        return cls(before, after, tuple(changes)) if changes else None

    @cached_property
    def stored(self) -> dict[str, Tensor]:
        """The tensors that the call left in the state, by path."""
        return self.after.tensors_not_in(self.before)

    def __str__(self) -> str:
        return "; ".join(sorted(map(str, self.changes))[:3])


class FromEarlierRun:
    """Stands for a tensor that an earlier run made from its inputs: using it in any way is an error.

    Args:
        path: where it stands.
    """

    def __init__(self, path: str) -> None:
        self._path = path

    def _refuse(self, *_: object, **__: object) -> NoReturn:
        raise CaptureError(f"it reads '{object.__getattribute__(self, '_path')}', which an earlier run left there")

    def __getattr__(self, name: str) -> NoReturn:
        self._refuse()

    @classmethod
    def __torch_function__(
        cls, func: object, types: object, args: tuple[object, ...] = (), kwargs: Mapping[str, object] | None = None
    ) -> NoReturn:
        given = tree_leaves((args, dict(kwargs or {})))
        next(each for each in given if isinstance(each, cls))._refuse()

    __add__ = __radd__ = __sub__ = __rsub__ = __mul__ = __rmul__ = __truediv__ = __rtruediv__ = __neg__ = _refuse
    __getitem__ = __setitem__ = __iter__ = __len__ = __bool__ = __float__ = __int__ = __matmul__ = __call__ = _refuse
    __lt__ = __le__ = __gt__ = __ge__ = __pow__ = __rpow__ = __mod__ = __rmatmul__ = __abs__ = _refuse


def _refuse_question(self: object, *_: object) -> NoReturn:
    raise CaptureError("it asks for a number that every call changes")


def _counted(name: str) -> Callable[..., object]:
    def method(self: int | float, *others: object) -> object:
        kind = float if isinstance(self, float) else int
        result = getattr(kind, name)(kind(self), *others)
        return _count_of(result) if type(result) in (int, float) else result

    return method


_ARITHMETIC = ("add", "radd", "sub", "rsub", "mul", "rmul", "mod", "floordiv", "truediv", "neg", "pow")
_QUESTIONS = ("bool", "eq", "ne", "lt", "le", "gt", "ge", "hash", "index")
_METHODS = {f"__{name}__": _counted(f"__{name}__") for name in _ARITHMETIC} | {
    f"__{name}__": _refuse_question for name in _QUESTIONS
}
_CountedInt = type("_CountedInt", (int,), _METHODS)
_CountedFloat = type("_CountedFloat", (float,), _METHODS)


def _count_of(number: int | float) -> object:
    """Return the number as one that may be counted on, but whose value cannot be asked for."""
    return _CountedFloat(number) if isinstance(number, float) else _CountedInt(number)


@dataclass(frozen=True)
class Run:
    """One run of the user's Python: what it gave, and what it changed in its own state."""

    result: object
    effect: StateEffect | None
    """What the run changed; None if nothing."""
    values: tuple[object, ...] = ()
    """Python values among the results."""


def check_later_runs_are_alike(
    name: str,
    first: Run,
    run_again: Callable[[], Run],
    replaced: Callable[[Run], Mapping[int, object]],
    are_alike: Callable[[Run, Run], bool],
    error: type[CaptureError] | type[LoopTraceError] = CaptureError,
) -> None:
    """Raise an error if what a run left in its state may change a later run; the state is changed.

    Args:
        name: the name of the denoiser or the loop, for the message.
        first: the run.
        run_again: a function that runs the same in the state that is there now.
        replaced: a function that returns, for what a run left there, the objects to put in place of stored tensors, by
            the identities of those.
        are_alike: a function that returns whether two runs gave the same.
        error: the error to raise.
    """
    if first.effect is None:
        return
    advice = "pass it as an argument, or make it once, before the model is compiled"
    if error is LoopTraceError:
        advice = "reset it where the loop begins (set_timesteps of a scheduler), or pass it as an argument"
    effect = first.effect

    def again(run: Run, numbers: Mapping[str, object]) -> Run:
        assert run.effect is not None
        run.effect.after.install(replaced(run), numbers)
        try:
            return run_again()
        except Exception as reason:  # whatever the user's own Python does in this state
            raise error(
                f"{name} changes its own state ({effect}), and what it does next depends on that, which a static graph"
                f" cannot hold ({reason!s:.200}); {advice}"
            ) from reason

    second = again(first, {})
    later = _changes(effect, second)
    numbers = effect.after.numbers()
    if later and all(change.path in numbers for change in later) and are_alike(first, second):
        counted = {change.path: _count_of(numbers[change.path]) for change in later}
        second = again(first, counted)
        later = [change for change in _changes(effect, second) if change.path not in counted]
    if later or not are_alike(first, second) or not _equal_values(first, second):
        what = "; ".join(sorted(map(str, later))[:3]) or str(effect)
        raise error(f"{name} changes its own state in every call ({what}), and a static graph would not; {advice}")


def _equal_values(one: Run, other: Run) -> bool:
    counted = any(isinstance(value, (_CountedInt, _CountedFloat)) for value in other.values)
    return not counted and list(map(StaticValue.of, one.values)) == list(map(StaticValue.of, other.values))


def _changes(effect: StateEffect, later: Run) -> list[Change]:
    """Return what a later run changed, by the forms of tensors and objects."""
    return effect.after.changes_to(later.effect.after, by_form=True) if later.effect is not None else []


def check_later_calls_are_alike(denoiser: nn.Module, first: Run, export_again: Callable[[], Run]) -> None:
    """Raise CaptureError if what a captured call left in the denoiser's state may change a later call.

    Args:
        denoiser: the denoiser; its state is changed.
        first: the capture; the program returns the tensors that the call stored last.
        export_again: a function that captures the denoiser in the state that it is in.
    """
    tables: dict[str, Tensor] = {}

    def replaced(run: Run) -> dict[int, object]:
        program, stored = _program(run), _stored(run)
        results = output_list(program.graph)
        from_inputs = _made_from_inputs(program)
        substitutes: dict[int, object] = {}
        for (path, tensor), result in zip(stored.items(), results[len(results) - len(stored) :], strict=True):
            if result in from_inputs:
                substitutes[id(tensor)] = FromEarlierRun(path)
            else:
                tables[path] = torch.zeros(tensor.shape, dtype=tensor.dtype, device=tensor.device)
                substitutes[id(tensor)] = tables[path]
        clear_caches_of_fakes(denoiser)
        return substitutes

    def are_alike(one: Run, other: Run) -> bool:
        results, stored = output_list(_program(one).graph), _stored(one)
        num_results = len(results) - len(stored)
        named = {
            node: path
            for path, node in zip(stored, results[num_results:], strict=True)
            # A tensor that the other run makes again is no table: both expressions must be equal as they are.
            if path in tables and path not in _stored(other) and isinstance(node, fx.Node)
        }
        numbers: dict[object, int] = {}
        constants = {tensor.data_ptr(): path for path, tensor in tables.items()}
        return _outline(_program(one), num_results, numbers, named, {}) == _outline(
            _program(other), num_results, numbers, {}, constants
        )

    check_later_runs_are_alike(type(denoiser).__name__, first, export_again, replaced, are_alike)


def _program(run: Run) -> ExportedProgram:
    assert isinstance(run.result, ExportedProgram)
    return run.result


def _stored(run: Run) -> Mapping[str, Tensor]:
    return run.effect.stored if run.effect is not None else {}


def _made_from_inputs(program: ExportedProgram) -> set[fx.Node]:
    """Return the nodes that depend on an input of the denoiser."""
    inputs = {spec.arg.name for spec in program.graph_signature.input_specs if spec.kind is InputKind.USER_INPUT}
    found: set[fx.Node] = set()
    for node in program.graph.nodes:
        if node.name in inputs or not found.isdisjoint(node.all_input_nodes):
            found.add(node)
    return found


def _outline(
    program: ExportedProgram,
    num_results: int,
    numbers: dict[object, int],
    tables: Mapping[fx.Node, str],
    constants: Mapping[int, str],
) -> list[object]:
    """Return the first results of a program, each as the number of the expression that it is.

    Args:
        program: the program.
        num_results: how many results count.
        numbers: the numbers of expressions, shared by the programs that are compared; new ones are added.
        tables: the nodes that stand for tables, with the paths of these.
        constants: the addresses of constants that stand for tables, with the paths of these.
    """
    specs = {spec.arg.name: spec for spec in program.graph_signature.input_specs}
    tables = {_without_no_ops(node): path for node, path in tables.items()}
    known: dict[object, str] = {}
    for node in program.graph.nodes:
        if node in tables:
            key: object = ("table", tables[node])
        elif node.op != "output" and _without_no_ops(node) is not node:
            known[node] = known[_without_no_ops(node)]
            continue
        elif node.op == "placeholder":
            spec = specs[node.name]
            held = program.constants.get(str(spec.target)) if spec.kind is InputKind.CONSTANT_TENSOR else None
            if held is None:
                key = (spec.kind, spec.target or node.name)
            elif held.numel() and held.data_ptr() in constants:
                key = ("table", constants[held.data_ptr()])
            else:
                key = ("constant", str(held.dtype), repr(held.tolist()))
        elif node.op == "output":
            break
        else:
            arguments = fx.node.map_arg((node.args, node.kwargs), known.__getitem__)
            key = (str(node.target), repr(arguments))
        known[node] = f"%{numbers.setdefault(key, len(numbers))}"
    return [known.get(result, result) for result in output_list(program.graph)[:num_results]]


def _without_no_ops(node: fx.Node) -> fx.Node:
    """Return the node whose tensor ``to`` returns where nothing is to be done; export gives that another node."""
    while getattr(node.target, "overloadpacket", None) is torch.ops.aten.to:
        (source,) = node.all_input_nodes[:1]
        if TensorForm.of(source.meta["val"]) != TensorForm.of(node.meta["val"]):
            break
        node = source
    return node
