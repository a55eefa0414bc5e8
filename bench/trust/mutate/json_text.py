"""JSON: one value, key or object of a document replaced by something odd."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

from bench.trust.mutate.raw import Bytes, Draw
from l2c_compile import CacheSchedule

_Edit = Callable[[Draw, object, Path], object]


def _odd_value(draw: Draw, canary: Path) -> object:
    """Return a value that no reader expects where it stands; ``_RawText`` is written as it is."""
    code = f"__import__('os').mkdir({str(canary)!r})"
    deep: object = 0
    for _ in range(draw.choice((10, 40, 300))):
        deep = [deep] if draw.random() < 0.5 else {"a": deep}
    return draw.choice(
        (
            *(None, True, False, 0, 1, -1, 0.5, -0.0, 1e308, "", [], {}, [[]], "0", "%0", "%99999999", "%-1", 2**31),
            *(2**63 - 1, 2**63, -(2**63), 10**400, 3.0, [0] * 1000, [None], {"": 0}, [1, [2, [3]]]),
            *map(_RawText, ("NaN", "Infinity", "-Infinity", "1e999", "1" * 5000, "-0")),
            *(
                "\x00",
                "\u202eevil",
                "\ud800",
                "bl\u043ecks.0",
                "\uff10",
                "\u0660",
                "\x1b[2J",
                "a\nb",
                "\ufeff",
                "x" * 10**5,
            ),
            *("../../etc/passwd", "/dev/zero", "blocks.*", "*" * 50, "a." * 5000 + "a", "blocks.0..blocks.99999999"),
            *("blocks.0..blocks." + "9" * 400, "delta(" * 50, "x@99999999999", "__class__", "__proto__"),
            *(code, f"{{{code}}}", f"\n{code}\n", f"x); {code}  #", {"str": code}, {"device": "cuda:999"}),
            *({"float": "nan"}, {"dtype": "float128"}, {"tensor": {}}, {"list": [{"list": []}] * 100}, deep),
        )
    )


class _RawText:
    """Text that goes into the document as it is, valid JSON or not."""

    def __init__(self, text: str) -> None:
        self.text = text


def _dumps(document: object) -> bytes:
    raw: list[str] = []

    def stand_in(value: object) -> str:
        assert isinstance(value, _RawText)
        raw.append(value.text)
        return f"@raw{len(raw) - 1}@"

    text = json.dumps(document, default=stand_in)
    for number, each in enumerate(raw):
        text = text.replace(f'"@raw{number}@"', each)
    return text.encode()


def _places(document: object, above: tuple[object, ...] = ()) -> list[tuple[object, ...]]:
    """Return the path of every value in the document, the whole included."""
    found = [above]
    if isinstance(document, (dict, list)):
        items = document.items() if isinstance(document, dict) else enumerate(document)
        for key, value in items:
            found += _places(value, (*above, key))
    return found


def _edited(document: object, place: tuple[object, ...], edit: Callable[[object], object]) -> object:
    if not place:
        return edit(document)
    first, *rest = place
    if isinstance(document, dict):
        return {key: _edited(v, tuple(rest), edit) if key == first else v for key, v in document.items()}
    assert isinstance(document, list)
    return [_edited(v, tuple(rest), edit) if i == first else v for i, v in enumerate(document)]


def _replace_value(draw: Draw, document: object, canary: Path) -> object:
    value = _odd_value(draw, canary)
    return _edited(document, draw.choice(_places(document)), lambda _: value)


def _nearly(draw: Draw, document: object, canary: Path) -> object:
    """Change a number or a text by little, so that the form is right and the content is not."""

    def shift(value: object) -> object:
        if isinstance(value, bool):
            return not value
        if isinstance(value, (int, float)):
            return value + draw.choice((-1, 1, 2, 100, 0.5))
        if isinstance(value, str):
            at = draw.randrange(len(value) + 1)
            return value[:at] + draw.choice(("0", ".", "*", "(", "@1", " ", "-")) + value[at:]
        return value

    leaves = [place for place in _places(document) if place]
    return _edited(document, draw.choice(leaves), shift) if leaves else document


def _drop(draw: Draw, document: object, canary: Path) -> object:
    inner = [place for place in _places(document) if place]
    if not inner:
        return {}
    *above, last = draw.choice(inner)

    def without(value: object) -> object:
        if isinstance(value, dict):
            return {key: item for key, item in value.items() if key != last}
        assert isinstance(value, list)
        return [item for i, item in enumerate(value) if i != last]

    return _edited(document, tuple(above), without)


def _add_key(draw: Draw, document: object, canary: Path) -> object:
    objects = [place for place in _places(document) if isinstance(_at(document, place), dict)]
    if not objects:
        return document
    key = draw.choice(("surprise", "", "__class__", "blocks.0", "format", "4", "\u202e", "\ud800", "a\nb"))
    value = _odd_value(draw, canary)
    return _edited(document, draw.choice(objects), lambda d: {**d, key: value})  # type: ignore[dict-item]


def _rename_key(draw: Draw, document: object, canary: Path) -> object:
    keys = [place for place in _places(document) if place and isinstance(place[-1], str)]
    if not keys:
        return document
    *above, last = draw.choice(keys)
    new = draw.choice(
        (str(last).upper(), f"{last} ", f" {last}", str(last)[::-1], f"{last}\x00", "\x1b[31m", "x" * 9999)
    )
    return _edited(document, tuple(above), lambda d: {new if k == last else k: v for k, v in d.items()})  # type: ignore[attr-defined]


def _multiply(draw: Draw, document: object, canary: Path) -> object:
    lists = [place for place in _places(document) if isinstance(_at(document, place), list)]
    place = draw.choice(lists or [()])
    # At most what the largest JSON document may have, and a bit.
    count = min(draw.choice((2, 100, 20_000)), 5 * 2**20 // len(_dumps(_at(document, place))))
    return _edited(document, place, lambda value: list(value if isinstance(value, list) else [value]) * count)


def _twice(draw: Draw, document: object, canary: Path) -> object:
    """Write one key twice in one object: readers disagree on which of them counts."""
    if not isinstance(document, dict) or not document:
        return document
    text = _dumps(document).decode()
    key = json.dumps(draw.choice(list(document)))
    return _RawText("{" + f"{key}: {draw.choice(('0', 'null', '[]', '{}'))}, " + text[1:])


def _at(document: object, place: tuple[object, ...]) -> object:
    for key in place:
        document = document[key]  # type: ignore[index]
    return document


_EDITS: dict[str, _Edit] = {
    "odd value": _replace_value,
    "nearly": _nearly,
    "missing": _drop,
    "more": _add_key,
    "other name": _rename_key,
    "multiplied": _multiply,
    "twice": _twice,
}


def edits(canary: Path) -> dict[str, Bytes]:
    """Return the mutations of a JSON document."""
    return {name: _on_text(edit, canary) for name, edit in _EDITS.items()}


def _on_text(edit: _Edit, canary: Path) -> Bytes:
    def change(draw: Draw, content: bytes) -> bytes:
        document = json.loads(content)
        for _ in range(draw.choice((1, 1, 3))):
            changed = edit(draw, document, canary)
            if isinstance(changed, _RawText):
                return changed.text.encode()
            document = changed
            if not isinstance(document, (dict, list)):
                break
        return _dumps(document)

    return change


def large_json(draw: Draw, content: bytes) -> bytes:
    """Return a schedule with so many sites, evaluations or rules that only a bound keeps its reading short."""
    num_sites, num_evaluations = draw.choice(((1, 100_000), (1000, 1000), (9000, 20), (100_000, 3), (200, 5000)))
    sites = draw.choice(
        (
            [f"blocks.{i}.attn" for i in range(num_sites)],
            [f"blocks.{i}..blocks.{num_sites}" for i in range(min(num_sites, 2000))],
            [".".join(["a"] * (1 + i % 200)) + f".{i}" for i in range(min(num_sites, 5000))],
            [f"{'a.' * (i + 1)}a" for i in range(min(num_sites, 300))],
        )
    )
    row = [1, *draw.choices((0, 1), k=num_evaluations - 1)]
    ours = json.loads(CacheSchedule.all_compute(3, ["a"]).to_json())
    ours["sites"] = dict.fromkeys(sites, row)
    ours["num_evaluations"] = num_evaluations
    if draw.random() < 0.5:
        ours["cacheable"] = list(range(1, num_evaluations))
    rows = dict.fromkeys(("attn", *(f"attn-{i}" for i in range(len(sites)))), row)
    text = json.dumps(
        ours if b"format" in content else rows if draw.random() < 0.5 else {"step_cache_book": [0] * 10**5}
    )
    return text.encode()[: 8 * 2**20]
