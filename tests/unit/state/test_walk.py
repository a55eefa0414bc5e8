"""What a walk finds behind modules, objects, functions and classes, and what it does not enter."""

from __future__ import annotations

import functools
import itertools
import warnings
from types import SimpleNamespace

import hypothesis
import numpy as np
import torch
from torch import nn

from l2c_compile.state.walk import Held, counts, reach

FACTOR = 2.0
TABLES = {"a": [1, 2]}


class Slotted:
    __slots__ = ("size",)

    def __init__(self) -> None:
        self.size = 3


def uses_globals(x: float) -> float:
    return x * FACTOR + len(TABLES)


def uses_globals_by_name() -> float:
    return float(globals()["FACTOR"])


def paths(value: object) -> set[str]:
    reached = reach({"root": value})
    named = [*reached.cells, *reached.tensors, *reached.arrays, *reached.moving, *reached.functions, *reached.objects]
    return (
        {held.path for held in reached.containers}
        | {path for path, _ in named}
        | {path for path, _, _ in (*reached.slots, *reached.globals)}
    )


def test_the_weights_of_the_denoiser_are_no_constants_and_those_of_others_are() -> None:
    def tensors(name: str) -> set[str]:
        model = nn.Linear(2, 2)
        model.register_buffer("shift", torch.zeros(2))
        model.plain = torch.ones(2)
        return {path for path, _ in reach({name: model}).tensors}

    assert tensors("denoiser") == {"denoiser.plain"}
    assert tensors("decoder") == {"decoder.plain", "decoder.weight", "decoder.bias", "decoder.shift"}


def test_a_function_is_left_through_its_closure_its_defaults_and_the_globals_that_it_names() -> None:
    scale = [0.5]

    def closed(x: float, history: list[int] = []) -> float:  # noqa: B006 - a default that holds a state
        return x * scale[0] + len(history) + uses_globals(x)

    found = paths(closed)
    assert {"root's scale", "root's defaults[0]", "global uses_globals", "global FACTOR", "global TABLES"} <= found
    assert "global FACTOR" in paths(uses_globals_by_name)


def test_objects_are_looked_into_whether_they_have_a_dict_slots_or_both() -> None:
    found = paths(
        {"config": SimpleNamespace(sizes=[1]), "slotted": Slotted(), "partial": functools.partial(uses_globals, 2)}
    )
    assert {"root['config'].sizes", "root['slotted'].size", "root['partial'].args[0]", "global TABLES"} - found == {
        "root['partial'].args[0]"
    }


def test_what_moves_on_when_it_is_used_is_found() -> None:
    generator = (i for i in range(3))
    value = [itertools.count(), iter([1]), generator, np.random.default_rng(0), torch.Generator(), np.zeros(2)]
    assert paths(value) == {"root", "torch's global forward hooks", "torch's global forward pre-hooks"} | {
        f"root[{index}]" for index in range(6)
    }


def test_torch_and_the_standard_library_are_not_entered() -> None:
    found = reach({"root": [torch.nn.functional.gelu, itertools, torch.float32, functools.reduce]})
    assert not found.functions
    assert not found.globals


def test_a_module_of_torch_jit_keeps_its_parts_to_itself() -> None:
    warnings.filterwarnings("ignore", category=DeprecationWarning)
    model = nn.Sequential(torch.jit.trace(nn.Linear(2, 2), torch.zeros(1, 2)))  # type: ignore[no-untyped-call]
    assert not any(held.path.startswith("root.0") for held in reach({"root": model}).containers)


def test_a_thing_that_contains_itself_is_visited_once() -> None:
    loop: list[object] = []
    loop.append(loop)
    assert paths(loop) >= {"root"}


def test_names_that_python_or_torch_keep_for_themselves_do_not_count() -> None:
    attributes = Held("denoiser", {}, "attributes")
    assert not counts(attributes, "_state_dict_hooks")
    assert counts(attributes, "training")
    assert counts(attributes, "scale")
    of_class = Held("class A", {}, "class")
    assert not counts(of_class, "__doc__")
    assert counts(of_class, "forward")


def test_an_object_of_a_library_is_looked_into_where_a_denoiser_or_a_condition_holds_it() -> None:
    # Hypothesis stands for any installed library that makes objects with attributes.
    model, settings = nn.Linear(2, 2), hypothesis.settings(max_examples=3)
    vars(model)["settings"] = settings

    def paths_below(name: str, root: object) -> set[str]:
        return {held.path for held in reach({name: root}).containers if held.kind == "attributes"}

    assert "denoiser.settings" in paths_below("denoiser", model)
    assert "conditions[0]" in paths_below("conditions", [settings])
    assert "loop's settings" not in paths_below("loop", lambda: settings)
