"""Result files and the tables made from them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from bench import results_io, tables

ROWS = [
    {"network": "b", "batch": 1, "ms": 2.5, "note": None},
    {"network": "a", "batch": 1, "ms": 0.125, "note": "x|y"},
    {"network": "a", "batch": 16, "ms": 1234567.0, "note": True},
]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    results_io.write("speed", rows=ROWS, claim="It is fast.", command="python -m x", seeds=[1, 2], folder=tmp_path)
    return tmp_path


def test_a_result_says_what_is_needed_to_repeat_it(folder: Path) -> None:
    result = results_io.read("speed", folder)
    assert set(results_io.REQUIRED) <= set(result)
    assert result["rows"] == ROWS
    assert result["seeds"] == [1, 2]
    assert {"python", "sparse_engine", "torch"} <= set(result["versions"])
    assert result["device"]["cpus"] >= 1
    assert [path.name for path in folder.iterdir()] == ["speed.json"]  # no temporary file is left


def test_a_result_without_its_origin_is_refused(folder: Path) -> None:
    (folder / "typed.json").write_text(json.dumps({"claim": "x", "rows": []}))
    with pytest.raises(ValueError, match="lacks command, date, device, versions, seeds"):
        results_io.read("typed", folder)


def test_columns_rows_and_order_can_be_chosen(folder: Path) -> None:
    text = tables.table_from_spec("speed columns=network,ms:time_in_ms sort=-ms where=batch:1", folder)
    assert "| b | 2.50 |" in text
    assert text.index("| b |") < text.index("| a |")
    assert "1.23e+06" not in text


@pytest.mark.parametrize(
    "spec, message",
    [
        ("speed colour=red", "unknown option colour"),
        ("speed columns=nothing", "no row has nothing"),
        ("speed where=batch:7", "no rows are left"),
    ],
)
def test_a_wrong_mark_is_an_error(folder: Path, spec: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tables.table_from_spec(spec, folder)


def test_marked_regions_are_replaced_and_nothing_else(folder: Path) -> None:
    page = "before\n<!-- table: speed columns=network,note -->\nold\n<!-- end -->\nafter <!-- end -->\n"
    once = tables.rewrite(page, folder)
    assert "old" not in once
    assert once.startswith("before\n<!-- table: speed columns=network,note -->\n| network | note |")
    assert once.endswith("<!-- end -->\nafter <!-- end -->\n")
    assert "x\\|y" in once
    assert tables.rewrite(once, folder) == once
    assert tables.rewrite("no marks", folder) == "no marks"


@pytest.mark.parametrize(
    "value, text",
    [(0.0, "0.000"), (0.1234, "0.123"), (1.234, "1.23"), (12.34, "12.3"), (1234.5, "1,234"), (1e-7, "1.00e-07")]
    + [(12345, "12,345"), (3, "3"), (True, "yes"), (None, "–"), ([1, 2.0], "1, 2.00"), ("a|b", "a\\|b")],
)
def test_cells(value: object, text: str) -> None:
    assert tables.format_cell(value) == text


def test_the_results_page_holds_every_result(folder: Path) -> None:
    results_io.write("other", rows=[{"x": 1}], claim="Other.", notes="Careful.", folder=folder)
    page = tables.results_page(folder)
    assert page.index("## other") < page.index("## speed")
    assert "It is fast." in page
    assert "Careful." in page
    assert "`python -m x`" in page


def test_contenders_take_turns() -> None:
    calls: list[str] = []
    times = results_io.interleaved(
        {"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, seconds=0, warmup=1
    )
    assert calls[:2] == ["a", "b"]  # warm-up
    assert calls[2:] == ["a", "b"] * 5
    assert times["a"]["runs"] == 5
    assert times["b"]["p10_ms"] <= times["b"]["median_ms"] <= times["b"]["p90_ms"]
