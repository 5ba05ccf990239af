"""What a setting may be, as the type hint of a dataclass's field, and the error for what it is not.

A hint is Annotated[type, what is allowed in words, test of a value of that type (for a list or tuple, of each item)].
"""

from __future__ import annotations

import dataclasses
import math
import types
from collections.abc import Iterable
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

Switch = Annotated[bool, "true or false"]
Count = Annotated[int, "an integer of at least 1", lambda x: x >= 1]
CountOrNull = Annotated[int | None, "null or an integer of at least 1", lambda x: x >= 1]
Share = Annotated[float, "a number in [0, 1]", lambda x: 0 <= x <= 1]
Text = Annotated[str, "a non-empty text", str.strip]
Region = Annotated[tuple[int, int] | None, "null or two integers of at least 1 (h, w)", lambda x: x >= 1]
Tile = Annotated[tuple[int, int, int], "three integers of at least 1 (t, h, w)", lambda x: x >= 1]


def check(made: object, prefix: str) -> None:
    """Raise ValueError, naming it, for a field of a dataclass's instance that is not what its hint allows."""
    for name, hint in of(type(made)).items():
        judge(prefix + name, getattr(made, name), hint)


def of(kind: type) -> dict[str, Any]:
    """The hints of a dataclass's arguments, by name."""
    hints = get_type_hints(kind, include_extras=True)
    return {field.name: hints[field.name] for field in dataclasses.fields(kind) if field.init}


def judge(key: str, value: Any, hint: Any, empty: bool = False) -> None:
    """Raise ValueError unless the value is of the hint's type and passes its test; empty: a list may be."""
    kind, allowed, test = hint, _words(hint), _anything
    if get_origin(hint) is Annotated:
        kind, allowed, *rest = get_args(hint)
        test = rest[0] if rest else _anything
    if value is None and type(None) in get_args(kind):
        return
    kind = next((one for one in get_args(kind) if get_origin(one) is list), kind)  # of a list or null
    if get_origin(kind) is list:
        if not isinstance(value, list) or not (value or empty):
            raise wrong(key, allowed, value)
        (item_kind,) = get_args(kind)
        for i, item in enumerate(value):
            if not (_fits(item, item_kind) and test(item)):
                raise wrong(key, allowed, item)
            if item in value[:i]:
                raise ValueError(f"{key} must be {allowed}, got {short(item)} twice")
    elif not (_fits(value, kind) and (all(map(test, value)) if isinstance(value, list | tuple) else test(value))):
        raise wrong(key, allowed, value)


def one_of(names: Iterable[Any]) -> str:
    """A choice, in words."""
    return "one of " + ", ".join(map(str, names))


def wrong(key: str, allowed: str, value: Any) -> ValueError:
    """The error for a value that is not what is allowed."""
    return ValueError(f"{key} must be {allowed}, got {short(value)}")


def short(value: Any) -> str:
    """A value as it is written in a config, at most 120 characters."""
    text = "null" if value is None else str(value).lower() if isinstance(value, bool) else repr(value)
    return text if len(text) <= 120 else f"{text[:117]}..."


def _anything(value: Any) -> bool:
    return True


def _fits(value: Any, kind: Any) -> bool:
    """Whether a plain value is of a type; true is no number, an integer is one, kinds not known here fit."""
    origin, arguments = get_origin(kind), get_args(kind)
    if origin is Literal:
        return value in arguments
    if origin in (Union, types.UnionType):
        return any(_fits(value, argument) for argument in arguments)
    if origin is tuple:
        sized = isinstance(value, list | tuple) and (Ellipsis in arguments or len(value) == len(arguments))
        return sized and all(_fits(item, arguments[0]) for item in value)
    if kind is float:
        return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    if kind is int:
        return isinstance(value, int) and not isinstance(value, bool)
    return isinstance(value, kind) if kind in (bool, str, type(None)) else True


def _words(kind: Any) -> str:
    """A type in words."""
    origin, arguments = get_origin(kind), get_args(kind)
    if origin is Literal:
        return one_of(arguments)
    if origin is list:
        return f"a list of {_words(arguments[0]).removeprefix('one of ')}, each once"
    if origin in (Union, types.UnionType):
        return " or ".join(sorted(map(_words, arguments), key=lambda words: words != "null"))
    if origin is tuple:
        return f"a list of {len(arguments)}, each {_words(arguments[0])}"
    return {bool: "true or false", int: "an integer", float: "a number", str: "a text", type(None): "null"}.get(
        kind, str(kind)
    )
