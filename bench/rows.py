"""Rows of a result file that are measured in parts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from bench import results_io


def merged(name: str, rows: Sequence[dict[str, Any]], keys: Sequence[str]) -> list[dict[str, Any]]:
    """The rows of a result file with new ones in the place of those that have the same keys.

    Example:
        >>> merged("no such file yet", [{"layer": "a", "ms": 1.0}], ["layer"])
        [{'layer': 'a', 'ms': 1.0}]

    Args:
        name: of the result file; it need not exist.
        rows: newly measured.
        keys: columns that tell rows apart.
    """
    try:
        old = results_io.read(name)["rows"]
    except FileNotFoundError:
        old = []
    return list({tuple(row.get(key) for key in keys): row for row in [*old, *rows]}.values())
