"""Strict JSON: everything that Python's parser would let through and a file format may not."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sparse_engine.errors import FileFormatError
from sparse_engine.io import strict_json

JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**63)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(st.characters(exclude_categories=["Cs"])),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text('ab"\\[{é'), inner, max_size=4),
    max_leaves=20,
)


@given(JSON)
def test_ordinary_json_is_read_as_python_reads_it(value):
    text = strict_json.dump(value, "test")
    assert strict_json.parse(text.encode(), "test") == value
    assert strict_json.parse(json.dumps(value, indent=1).encode(), "test") == value


@given(st.binary(max_size=60) | st.text('{}[]",:0123456789.eE-+nulltrfas\\ ').map(str.encode))
def test_any_bytes_give_a_value_or_one_error(data):
    try:
        value = strict_json.parse(data, "test")
    except FileFormatError:
        return
    assert value == json.loads(data)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "not valid JSON"),
        (b"NaN", "NaN is not"),
        (b"[Infinity]", "Infinity is not"),
        (b"[-Infinity]", "-Infinity is not"),
        (b"[-1e400]", "does not fit a double"),
        (b"18446744073709551616", "does not fit 64 bits"),
        (b"-" + b"1" * 10_000, "integer with"),
        (b'{"a": 1, "b": 2, "a": 3}', "key 'a' appears twice"),
        (b'[{"x": {"y": 1, "y": 1}}]', "key 'y' appears twice"),
        (b'"\\ud800"', "not valid Unicode"),
        (b'{"\\udfff": 1}', "not valid Unicode"),
        (b'"\xc3"', "not UTF-8"),
        (b"[" * 65 + b"]" * 65, "nested deeper than 64"),
        (b'{"a":' * 65 + b"1" + b"}" * 65, "nested deeper than 64"),
        (b"[" * 10_000_000, "nested deeper than 64"),
        (b"[1] 2", "not valid JSON"),
        (b'"unfinished', "not valid JSON"),
        (b"\xef\xbb\xbf1", "not valid JSON"),
    ],
    ids=lambda value: None if isinstance(value, str) else str(value[:20]),
)
def test_refused(data, message):
    with pytest.raises(FileFormatError, match=message):
        strict_json.parse(data, "test")


def test_brackets_in_strings_do_not_count_as_nesting():
    text = "[" * 500 + '"' + "{" * 500
    assert strict_json.parse(json.dumps([text, {text: "\\"}]).encode(), "test") == [text, {text: "\\"}]


def test_the_deepest_nesting_allowed():
    value = strict_json.parse(b"[" * 64 + b"]" * 64, "test")
    for _ in range(63):
        (value,) = value
    assert value == []


@pytest.mark.parametrize("value", [float("nan"), float("inf"), {1, 2}, object(), {(1, 2): 3}])
def test_dump_refuses_what_json_cannot_say(value):
    with pytest.raises(FileFormatError):
        strict_json.dump(value, "test")
