"""Rows that are measured in parts."""

from __future__ import annotations

from pathlib import Path

import pytest

from bench import kernels
from bench.kernels import Budget, read_smtx
from bench.rows import Unfinished


def test_an_interrupted_measurement_goes_on_where_it_stopped(tmp_path: Path) -> None:
    measured = []

    def measure(layer: str) -> dict[str, object]:
        if layer == "broken":
            raise KeyboardInterrupt
        measured.append(layer)
        return {"layer": layer, "ms": 1.5}

    first = Unfinished("layers", resume=False, folder=tmp_path)
    assert first.row(["a", 0.9], lambda: measure("a")) == {"layer": "a", "ms": 1.5}
    with pytest.raises(KeyboardInterrupt):
        first.row(["b", 0.9], lambda: measure("broken"))

    second = Unfinished("layers", resume=True, folder=tmp_path)
    assert second.resumed == 1
    assert second.row(["a", 0.9], lambda: measure("a again")) == {"layer": "a", "ms": 1.5}
    second.row(["b", 0.9], lambda: measure("b"))
    assert measured == ["a", "b"]
    second.finished()
    assert Unfinished("layers", resume=True, folder=tmp_path).resumed == 0
    assert list(tmp_path.iterdir()) == []


def test_without_resume_an_interrupted_measurement_is_forgotten(tmp_path: Path) -> None:
    Unfinished("layers", resume=False, folder=tmp_path).row(["a"], lambda: {"ms": 1.0})
    assert Unfinished("layers", resume=False, folder=tmp_path).row(["a"], lambda: {"ms": 2.0}) == {"ms": 2.0}


def test_a_run_out_of_time_writes_nothing_and_goes_on_later(tmp_path: Path, monkeypatch, capsys) -> None:
    written: dict[str, list[dict[str, object]]] = {}
    measured = []

    def measure(layer: kernels.Layer, structure: str, sparsity: float, *rest: object) -> dict[str, object]:
        measured.append((structure, sparsity))
        row = {"layer": layer.name, "structure": structure, "sparsity_%": 100 * sparsity, "N": 1, "ms": 1.0}
        return row | {"speed_up_over_dense": 2.0, "speed_up_over_csr": None, "share_of_peak_%": 50.0}

    monkeypatch.setattr(kernels, "Unfinished", lambda name, resume: Unfinished(name, resume, tmp_path))
    monkeypatch.setattr(kernels, "measure_layer", measure)
    monkeypatch.setattr(kernels, "merged", lambda name, rows, keys: rows)
    monkeypatch.setattr(kernels, "plot_layers", lambda table: None)
    monkeypatch.setattr(kernels.results_io, "write", lambda name, *, rows, **rest: written.update({name: list(rows)}))
    kernels.run_layers("one row, 4096x1024", "quick", 1, True, Budget(-1.0))
    assert not measured
    assert not written
    assert "0 of 10 points" in capsys.readouterr().out
    kernels.run_layers("one row, 4096x1024", "quick", 1, True, Budget(None))
    assert len(measured) == len(written["layers"]) == 10
    summary = {(row["layers"], row["structure"], row["sparsity_%"]): row for row in written["layers_summary"]}
    assert summary["one row", "unstructured", 90]["worst_over_dense"] == 2.0
    assert summary["all", "unstructured", 90]["slower_than_dense_by_3_%"] == 0


def test_a_pattern_of_the_collection(tmp_path: Path) -> None:
    file = tmp_path / "0.9" / "a.smtx"
    file.parent.mkdir()
    file.write_text("2, 3, 3\n0 2 3\n0 2 1\n")
    assert (read_smtx(file) != 0).tolist() == [[True, False, True], [False, True, False]]
    file.write_text("2, 3, 4\n0 2 3\n0 2 1\n")
    with pytest.raises(ValueError, match="4 entries are announced, 3 and 3 found"):
        read_smtx(file)
