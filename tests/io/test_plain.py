"""Dataclasses from JSON: only what fits the annotations gets through."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from sparse_engine.errors import FileFormatError
from sparse_engine.io.plain import from_plain


@dataclasses.dataclass
class Inner:
    name: str
    sizes: tuple[int, ...]


@dataclasses.dataclass
class Outer:
    items: list[Inner]
    share: float
    count: int | None
    on: bool
    notes: dict[str, str] = dataclasses.field(default_factory=dict)
    anything: Any = None


GOOD = {"items": [{"name": "a", "sizes": [1, 2]}], "share": 1, "count": None, "on": True}


def test_what_fits_is_built():
    assert from_plain(Outer, GOOD, "x") == Outer([Inner("a", (1, 2))], 1.0, None, True)
    full = {**GOOD, "count": 3, "notes": {"k": "v"}, "anything": [1, {}]}
    assert from_plain(Outer, full, "x") == Outer([Inner("a", (1, 2))], 1.0, 3, True, {"k": "v"}, [1, {}])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"items": {}}, r"x\.items must be list"),
        ({"items": ["a"]}, r"x\.items\[0\] must be an object"),
        ({"items": [{"name": "a"}]}, r"x\.items\[0\]: missing fields \['sizes'\]"),
        ({"items": [{"name": 1, "sizes": []}]}, r"x\.items\[0\]\.name must be str"),
        ({"items": [{"name": "a", "sizes": [1, 2.5]}]}, r"x\.items\[0\]\.sizes\[1\] must be int"),
        ({"share": "1"}, r"x\.share must be float"),
        ({"share": True}, r"x\.share must be float"),
        ({"count": 1.0}, r"x\.count must be"),
        ({"on": 1}, r"x\.on must be bool"),
        ({"notes": {"k": 1}}, r"x\.notes\[k\] must be str"),
        ({"more": 1}, "unknown fields"),
    ],
)
def test_what_does_not_fit_is_named(change, message):
    with pytest.raises(FileFormatError, match=message):
        from_plain(Outer, {**GOOD, **change}, "x")


@pytest.mark.parametrize("data", [None, [], "x", 3])
def test_only_objects(data):
    with pytest.raises(FileFormatError, match="x must be an object"):
        from_plain(Outer, data, "x")
