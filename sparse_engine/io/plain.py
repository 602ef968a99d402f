"""Dataclasses from untrusted JSON, checked against their own annotations."""

from __future__ import annotations

import dataclasses
import types
import typing
from typing import Any, TypeVar

from sparse_engine.errors import FileFormatError

T = TypeVar("T")


def from_plain(kind: type[T], data: Any, what: str) -> T:
    """Build a dataclass from JSON, or say which field does not fit its annotation.

    Example:
        >>> @dataclasses.dataclass
        ... class Point:
        ...     x: float
        ...     tags: list[str]
        >>> from_plain(Point, {"x": 1, "tags": ["a"]}, "point")                # doctest: +SKIP
        Point(x=1.0, tags=['a'])

    Understood are the scalars of JSON, `None`, `Any`, unions, `list[T]`, `tuple[T, ...]`, `dict[str, T]` and
    dataclasses. Fields
    with a default may be missing.

    Args:
        kind: the dataclass.
        data: parsed JSON; nothing about it is trusted.
        what: what is being read, put in front of every message.

    Returns:
        An instance.

    Raises:
        FileFormatError: a field is missing, unknown or of the wrong type.
    """
    return typing.cast("T", _dataclass(kind, data, what))


def _dataclass(kind: Any, data: Any, what: str) -> Any:
    if not isinstance(data, dict):
        raise FileFormatError(f"{what} must be an object, not {_short(data)}")
    fields = {field.name: field for field in dataclasses.fields(kind)}
    unknown = sorted(str(key) for key in data.keys() - fields.keys())
    missing = sorted(
        name
        for name, field in fields.items()
        if name not in data and field.default is field.default_factory is dataclasses.MISSING
    )
    if unknown or missing:
        raise FileFormatError(f"{what}: missing fields {missing}, unknown fields {_short(unknown)}")
    hints = typing.get_type_hints(kind)
    return kind(**{name: _value(hints[name], item, f"{what}.{name}") for name, item in data.items()})


def _value(kind: Any, data: Any, what: str) -> Any:
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if kind is Any:
        return data
    if dataclasses.is_dataclass(kind):
        return _dataclass(kind, data, what)
    if origin in (types.UnionType, typing.Union):
        return _first_that_fits(arguments, data, what)
    if origin in (list, tuple) and isinstance(data, list):
        return origin(_value(arguments[0], item, f"{what}[{index}]") for index, item in enumerate(data))
    if origin is dict and isinstance(data, dict):
        return {key: _value(arguments[1], item, f"{what}[{_short(key)}]") for key, item in data.items()}
    if kind is float and type(data) in (int, float):
        return float(data)
    if kind in (int, str, bool) and type(data) is kind:
        return data
    if kind is types.NoneType and data is None:
        return None
    wanted = getattr(kind, "__name__", str(kind)) if origin is None else str(kind)
    raise FileFormatError(f"{what} must be {wanted}, not {_short(data)}")


def _first_that_fits(kinds: tuple[Any, ...], data: Any, what: str) -> Any:
    for kind in kinds:
        try:
            return _value(kind, data, what)
        except FileFormatError as error:
            last = error
    raise last


def _short(data: Any) -> str:
    text = data if isinstance(data, str) else repr(data)
    return text if len(text) <= 60 else text[:57] + "..."
