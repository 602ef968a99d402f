"""Writes the tables and plots in the documentation from bench/results/*.json: ``python -m bench.tables``.

A region of README.md or of a page in docs/ between two marks is replaced by the table of that result:

    <!-- table: layers columns=layer,ms sort=-ms -->
    <!-- end -->

``columns`` picks and orders columns (``key:Title`` renames one; write _ for a space), ``sort`` orders rows (- for
descending), ``where`` keeps rows (``where=batch:1``), ``limit`` cuts. docs/results.md lists every result there is.
``--check`` changes nothing and fails where a file is not up to date.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from bench import results_io

ROOT = Path(__file__).parent.parent
# Results that another command makes a page of: single runs, not a table.
ELSEWHERE = "reproduction_"
_LIBRARIES = ("sparse_engine", "torch")  # the whole list is in the file
_REGION = re.compile(r"(<!-- table: (?P<spec>[^\n]*?) -->\n)(?P<body>.*?)(<!-- end -->)", re.DOTALL)


def format_cell(value: Any) -> str:
    """A number with as many digits as mean something; anything else as it is."""
    if isinstance(value, bool) or value is None:
        return {True: "yes", False: "no", None: "–"}[value]
    if isinstance(value, float):
        if value == 0 or 0.01 <= abs(value) < 1e6:
            digits = 0 if abs(value) >= 100 else 1 if abs(value) >= 10 else 2 if abs(value) >= 1 else 3
            return f"{value:,.{digits}f}"
        return f"{value:.2e}"
    if isinstance(value, int):
        return f"{value:,}" if abs(value) >= 10_000 else str(value)
    if isinstance(value, (list, tuple)):
        return ", ".join(format_cell(item) for item in value)
    return str(value).replace("|", "\\|")


def markdown_table(rows: Sequence[dict[str, Any]], columns: Sequence[tuple[str, str]]) -> str:
    """Rows as a Markdown table; columns are (key, title)."""
    numeric = {key: all(isinstance(row.get(key), (int, float, type(None))) for row in rows) for key, _ in columns}
    lines = [
        "| " + " | ".join(title for _, title in columns) + " |",
        "| " + " | ".join("---:" if numeric[key] else "---" for key, _ in columns) + " |",
    ]
    lines += ["| " + " | ".join(format_cell(row.get(key)) for key, _ in columns) + " |" for row in rows]
    return "\n".join(lines)


def title_of(key: str) -> str:
    return key.replace("_", " ")


def table_from_spec(spec: str, folder: Path = results_io.RESULTS) -> str:
    """The text between two marks, for what the first mark says."""
    name, *options = spec.split()
    chosen = dict(option.split("=", 1) for option in options)
    unknown = sorted(set(chosen) - {"columns", "sort", "where", "limit"})
    if unknown:
        raise ValueError(f"table {name!r}: unknown option {', '.join(unknown)}; there are columns, sort, where, limit")
    result = results_io.read(name, folder)
    rows = list(result["rows"])
    for condition in filter(None, chosen.get("where", "").split(",")):
        key, _, wanted = condition.partition(":")
        rows = [row for row in rows if str(row.get(key)) == wanted.replace("_", " ")]
    if "sort" in chosen:
        key = chosen["sort"].lstrip("-")
        rows.sort(key=lambda row: row[key], reverse=chosen["sort"].startswith("-"))
    if "limit" in chosen:
        rows = rows[: int(chosen["limit"])]
    columns = []
    for column in filter(None, chosen.get("columns", "").split(",")):
        key, _, title = column.partition(":")
        columns.append((key, (title or title_of(key)).replace("_", " ")))
    if not columns:
        columns = [(key, title_of(key)) for key in dict.fromkeys(key for row in rows for key in row)]
    if not rows:
        raise ValueError(f"table {name!r}: no rows are left by {spec!r}")
    missing = [key for key, _ in columns if all(key not in row for row in rows)]
    if missing:
        raise ValueError(f"table {name!r}: no row has {', '.join(missing)}; there are {', '.join(rows[0])}")
    return markdown_table(rows, columns) + "\n\n" + origin(result) + "\n"


def origin(result: dict[str, Any]) -> str:
    """One line that says where figures come from."""
    device = result["device"]
    machine = device.get("gpu") or device.get("cpu", "unknown processor")
    if "gpu" not in device and "cpus" in device:
        machine += f", {device['cpus']} cores"
    used = ", ".join(f"{name} {result['versions'][name]}" for name in _LIBRARIES if name in result["versions"])
    return f"<sub>{machine}; {used}; {result['date']} UTC; `{result['command']}`</sub>"


def rewrite(text: str, folder: Path = results_io.RESULTS) -> str:
    """A page with every marked region made anew."""
    return _REGION.sub(lambda match: match.group(1) + table_from_spec(match["spec"], folder) + match.group(4), text)


def results_page(folder: Path = results_io.RESULTS) -> str:
    """The text of docs/results.md: every result, in the order of their names."""
    parts = [
        "# Results",
        (
            "Every table is made by `python -m bench.tables` from the files in `bench/results/`, which the command "
            "under each table writes."
        ),
    ]
    names = {path.relative_to(folder).with_suffix("").as_posix() for path in folder.rglob("*.json")}
    for name in sorted(name for name in names if not name.startswith(ELSEWHERE)):
        result = results_io.read(name, folder)
        if not result["rows"]:
            continue
        columns = list(dict.fromkeys(key for row in result["rows"] for key in row))
        parts += [
            f"## {name}",
            result["claim"],
            markdown_table(result["rows"], [(key, title_of(key)) for key in columns]),
            *([result["notes"]] if result.get("notes") else []),
            origin(result),
        ]
    return "\n\n".join(parts) + "\n"


def pages() -> Iterable[tuple[Path, str]]:
    """Every page that holds figures, with its text as it should be."""
    for path in [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]:
        if path == ROOT / "docs" / "results.md":
            continue
        text = path.read_text()
        if "<!-- table:" in text:
            yield path, rewrite(text)
    yield ROOT / "docs" / "results.md", results_page()


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.tables", description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="change nothing; fail where a page is not up to date")
    options = parser.parse_args(arguments)
    stale = []
    for path, text in pages():
        if not path.exists() or path.read_text() != text:
            stale.append(path.relative_to(ROOT).as_posix())
            if not options.check:
                path.write_text(text)
    print(("out of date: " if options.check else "written: ") + (", ".join(stale) or "nothing"))
    return 1 if options.check and stale else 0


if __name__ == "__main__":
    sys.exit(main())
