"""Every section of `python -m bench.gpu` runs, in small, and its results are checked; only the clock is not real."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from bench import gpu
from sparse_engine.ops import cuda_library
from tests.cuda.builds import host_library

SMALL = {
    "copy": 64,
    "product": 32,
    "linear": 128,
    "many_tokens": (24,),
    "conv": (1, 16, 6),
    "loss_rows": 64,
    "loss_classes": (40,),
    "last_layer": (256, 16, 40),
    "table": (8, 20, 30),
}


@pytest.fixture
def bench(device, monkeypatch, tmp_path, request):
    monkeypatch.setattr(gpu, "DEVICE", device)
    monkeypatch.setattr(gpu, "SIZES", SMALL)
    monkeypatch.setattr(gpu.Bench, "times", lambda self, contenders, turns=1: dict.fromkeys(contenders, 1.0))
    monkeypatch.setattr(gpu.Bench, "left", 100.0)
    if (
        device == "cpu"
        and getattr(request.node, "callspec", None)
        and request.node.callspec.params.get("section") in ("decode", "unstructured")
    ):
        monkeypatch.setattr(gpu, "_library", lambda: cuda_library.Library(host_library()))
    elif device == "cpu":  # float32: bf16 products on a CPU have other rounding
        monkeypatch.setattr(gpu, "DTYPE", torch.float32)
    run = gpu.Bench(8, tmp_path)
    gpu.ceilings(run)
    return run


@pytest.mark.parametrize("section", sorted(gpu.SECTIONS))
def test_section(section, bench):
    before = len(bench.rows)
    gpu.SECTIONS[section](bench)
    rows = bench.rows[before:]
    mine = [row for row in rows if row["contender"].startswith(("triton", "cuda"))]
    assert mine
    assert not [row for row in mine if "problem" in row]
    assert all(row["ms"] == 1.0 for row in mine)


def test_a_wrong_result_is_reported_and_not_timed(bench):
    contenders = {"base": lambda: torch.ones(4), "wrong": lambda: torch.zeros(4)}
    bench.compare("x", {"n": 4}, contenders, lambda: torch.ones(4), baseline="base")
    assert "wrong by" in bench.rows[-2]["problem"]
    assert bench.rows[-1]["contender"] == "base"
    assert bench.rows[-1]["error"] == 0


def test_markdown_has_a_table_per_section(bench):
    bench.compare(
        "x", {"n": 4}, {"base": lambda: torch.ones(4)}, None, baseline="base", flops=8.0, moved={"base": 16.0}
    )
    text = gpu.markdown(bench.rows, {"gpu": "none"}, ["a note"])
    assert "## ceilings" in text
    assert "| n | contender | ms |" in text
    assert "* a note" in text


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so():
    run = subprocess.run(
        [sys.executable, "-m", "bench.gpu"], capture_output=True, text=True, cwd=Path(__file__).parents[2], check=False
    )
    assert run.returncode == 2
    assert "PyTorch sees no NVIDIA GPU" in run.stderr
