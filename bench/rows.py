"""Rows of a result file that are measured in parts."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from bench import results_io

FOLDER = Path(__file__).parent.parent / "build" / "bench"


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


class Unfinished:
    """Rows of a measurement that may be interrupted, kept in build/bench until all of them are there.

    Example::

        unfinished = Unfinished("layers", resume=True)
        for layer in LAYERS:
            rows.append(unfinished.row([layer.name], lambda: measure(layer)))
        results_io.write("layers", rows=rows, …)
        unfinished.finished()

    Args:
        name: of the result file.
        resume: take the rows of an interrupted run instead of measuring them again; otherwise they are forgotten.
        folder: where they are kept.
    """

    def __init__(self, name: str, resume: bool, folder: Path = FOLDER) -> None:
        self.path = folder / f"{name}.unfinished.json"
        self.rows: dict[str, dict[str, Any]] = {}
        if resume and self.path.exists():
            self.rows = json.loads(self.path.read_text())
        self.resumed = len(self.rows)

    def has(self, key: Sequence[Any]) -> bool:
        """Whether the row of this key is there already."""
        return json.dumps(list(key)) in self.rows

    def row(self, key: Sequence[Any], measure: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """The row of this key: from the interrupted run, or measured now and kept at once."""
        name = json.dumps(list(key))
        if name not in self.rows:
            self.rows[name] = measure()
            self.path.parent.mkdir(parents=True, exist_ok=True)
            partial = self.path.with_suffix(".tmp")
            partial.write_text(json.dumps(self.rows))
            partial.replace(self.path)
        return self.rows[name]

    def finished(self) -> None:
        """The result is written: forget the rows."""
        self.path.unlink(missing_ok=True)
