"""JSON from untrusted files: no duplicate keys, no NaN, no deep nesting, no broken Unicode."""

from __future__ import annotations

import json
import math
import re
from typing import Any

import numpy as np

from sparse_engine.errors import FileFormatError

MAX_DEPTH = 64
"""Deepest nesting accepted; a model graph needs about 8."""

_STRING = re.compile(rb'"(?:[^"\\]|\\.)*+"', re.DOTALL)
_CHUNK = 1 << 20


def parse(data: bytes, what: str) -> Any:
    """Parse JSON strictly.

    ```python
    parse(b'{"a": [1, 2]}', "header")        # {'a': [1, 2]}
    parse(b'{"a": 1, "a": 2}', "header")     # FileFormatError: header: key 'a' appears twice
    ```

    Args:
        data: UTF-8 encoded JSON.
        what: what is being read, put in front of every message.

    Returns:
        Plain dicts, lists, strings, numbers, booleans and None.

    Raises:
        FileFormatError: not JSON, or JSON with duplicate keys, numbers that are not finite, nesting deeper than
            `MAX_DEPTH`, or strings that are not valid Unicode.
    """
    _check_depth(data, what)
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise FileFormatError(f"{what}: not UTF-8 text (byte {error.start})") from None
    try:
        # The hooks raise FileFormatError, which is a ValueError: keep it apart from the parser's own errors.
        parsed = json.loads(
            text,
            object_pairs_hook=lambda pairs: _unique(pairs, what),
            parse_constant=lambda name: _refuse(f"{what}: {name} is not a JSON number"),
            parse_float=lambda digits: _finite(digits, what),
            parse_int=lambda digits: _bounded(digits, what),
        )
    except FileFormatError:
        raise
    except (ValueError, RecursionError) as error:
        raise FileFormatError(f"{what}: not valid JSON ({error})") from None
    # Lone surrogates can only come from escapes, so most texts need no walk.
    if "\\u" in text:
        _check_strings(parsed, what)
    return parsed


def dump(value: Any, what: str) -> str:
    """Compact JSON text that `parse` accepts; NaN, infinities and non-JSON types are refused.

    Raises:
        FileFormatError: the value holds something JSON has no word for.
    """
    try:
        return json.dumps(value, allow_nan=False, ensure_ascii=False, separators=(",", ":"))
    except (TypeError, ValueError, RecursionError) as error:
        raise FileFormatError(f"{what}: cannot be written as JSON ({error})") from None


def _check_depth(data: bytes, what: str) -> None:
    """Bound the nesting before the recursive parser sees it."""
    bare = np.frombuffer(_STRING.sub(b"", data), dtype=np.uint8)
    depth = 0
    for start in range(0, bare.size, _CHUNK):
        part = bare[start : start + _CHUNK]
        step = ((part == ord("[")) | (part == ord("{"))).astype(np.int32)
        step -= (part == ord("]")) | (part == ord("}"))
        levels = depth + np.cumsum(step, dtype=np.int64)
        if levels.max() > MAX_DEPTH:
            raise FileFormatError(f"{what}: nested deeper than {MAX_DEPTH} levels")
        depth = int(levels[-1])


def _unique(pairs: list[tuple[str, Any]], what: str) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        seen: set[str] = set()
        for key, _ in pairs:
            if key in seen:
                raise FileFormatError(f"{what}: key {key[:80]!r} appears twice")
            seen.add(key)
    return result


def _finite(digits: str, what: str) -> float:
    value = float(digits)
    if not math.isfinite(value):
        raise FileFormatError(f"{what}: number {digits[:40]} does not fit a double")
    return value


def _bounded(digits: str, what: str) -> int:
    if len(digits) > 20:
        raise FileFormatError(f"{what}: integer with {len(digits)} digits; at most 64 bits are allowed")
    value = int(digits)
    if not -(2**63) <= value < 2**64:
        raise FileFormatError(f"{what}: integer {digits} does not fit 64 bits")
    return value


def _refuse(message: str) -> Any:
    raise FileFormatError(message)


def _check_strings(value: Any, what: str) -> None:
    pending = [value]
    while pending:
        item = pending.pop()
        if isinstance(item, str):
            try:
                item.encode("utf-8")
            except UnicodeEncodeError:
                raise FileFormatError(f"{what}: string {item[:40]!a} is not valid Unicode") from None
        elif isinstance(item, dict):
            pending.extend(item.keys())
            pending.extend(item.values())
        elif isinstance(item, list):
            pending.extend(item)
