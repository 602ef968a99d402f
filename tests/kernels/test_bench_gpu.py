"""Every section of `python -m bench.gpu` runs, in small, and its results are checked; only the clock is not real."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from bench import gpu
from sparse_engine.ops import cuda_library
from tests.cuda.builds import host_library


@pytest.fixture
def bench(device, monkeypatch, tmp_path):
    monkeypatch.setattr(gpu, "DEVICE", device)
    monkeypatch.setattr(gpu, "SIZES", gpu.DRY_SIZES)
    monkeypatch.setattr(gpu.Bench, "times", lambda self, contenders, turns=1: dict.fromkeys(contenders, 1.0))
    monkeypatch.setattr(gpu.Bench, "left", 100.0)
    monkeypatch.setenv("SPARSE_ENGINE_IMPL", "kd_rows:triton")
    if device == "cpu":  # half precision: bf16 products on a CPU have other rounding
        monkeypatch.setattr(gpu, "DTYPE", torch.float16)
        monkeypatch.setattr(gpu, "_host_library", cuda_library.Library(host_library()))
    run = gpu.Bench(8, tmp_path)
    gpu.ceilings(run)
    return run


@pytest.mark.parametrize("section", sorted(gpu.SECTIONS))
def test_section(section, bench):
    before = len(bench.rows)
    gpu.SECTIONS[section](bench)
    rows = bench.rows[before:]
    mine = [row for row in rows if row["contender"].startswith(gpu.OURS)]
    assert mine
    assert not [row for row in mine if "problem" in row]
    assert all(row["ms"] == 1.0 for row in mine)
    assert all("error" in row for row in mine), "a result was timed and never compared"
    assert not bench.failed


def test_every_row_of_the_target_table_has_its_contenders(bench):
    """What `docs` promises: the baselines by name, and our kernels beside them."""
    wanted = {
        "block_sparse": {"cuBLAS dense", "triton", "cuda", "torch BSR", "torch BSR, Triton"},
        "block_gradients": {"cuBLAS dense", "triton", "torch BSR", "torch BSR, sampled_addmm"},
        "masked": {"cuBLAS on zeros", "triton"},
        "channel_conv": {"cuDNN full", "cuDNN on the small layer", "triton", "cuda"},
        "unstructured": {"cuBLAS dense", "cuda", "cuSPARSE (torch CSR)"},
        "decode": {"cuBLAS dense", "cuda"},
        "two_of_four": {"cuBLAS dense", "torch 2:4", "triton compressed"},
        "kd_loss": {"eager", "triton", "triton, through autograd"},
        "linear_kd": {"eager", "triton, chunks"},
    }
    for section, contenders in wanted.items():
        gpu.SECTIONS[section](bench)
        found = {row["contender"] for row in bench.rows if row["section"] == section}
        assert contenders <= found, (section, contenders - found)
    sparsities = {(row["block"], row["sparsity"]) for row in bench.rows if row["section"] == "block_sparse"}
    assert {(side, s) for side in (64, 128) for s in (0.5, 0.8, 0.9)} <= sparsities
    assert {(16, 0.5), (16, 0.7), (32, 0.35), (32, 0.5)} <= sparsities
    assert all("peak_mib" in row for row in bench.rows if row["section"] == "linear_kd" and "ms" in row)


def test_a_dense_product_is_credited_with_the_zeros_that_it_computes(bench):
    bench.flops = 1e12
    bench.compare(
        "x", {"n": 4}, {"base": lambda: torch.ones(4), "triton": lambda: torch.ones(4)}, None, baseline="base",
        flops=1e8, done={"base": 5e8},
    )  # fmt: skip
    assert [row["share_of_product_ceiling"] for row in bench.rows[-2:]] == [0.5, 0.1]


def test_a_kernel_of_ours_that_cannot_run_fails_the_run_and_a_baseline_does_not(bench):
    def cannot():
        raise RuntimeError("no such instruction")

    bench.compare("x", {}, {"base": lambda: torch.ones(4), "Liger": cannot}, None, baseline="base")
    assert not bench.failed
    bench.compare("x", {}, {"base": lambda: torch.ones(4), "triton": cannot}, None, baseline="base")
    assert bench.failed


def test_a_wrong_result_is_reported_and_not_timed(bench):
    contenders = {"base": lambda: torch.ones(4), "wrong": lambda: torch.zeros(4)}
    bench.compare("x", {"n": 4}, contenders, lambda: torch.ones(4), baseline="base")
    assert "wrong by" in bench.rows[-2]["problem"]
    assert bench.rows[-1]["contender"] == "base"
    assert bench.rows[-1]["error"] == 0
    assert bench.failed


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
    assert "--dry-run" in run.stderr


@pytest.fixture
def dry(monkeypatch):
    """A dry run in this process, without its compilers and its list of tests."""
    for name in ("DEVICE", "DTYPE", "SIZES", "_host_library"):
        monkeypatch.setattr(gpu, name, getattr(gpu, name))
    for name in ("TRITON_INTERPRET", "SPARSE_ENGINE_IMPL"):
        monkeypatch.setenv(name, "1" if name == "TRITON_INTERPRET" else "")
    monkeypatch.setattr(gpu, "_compile", lambda *arguments: None)
    monkeypatch.setattr(gpu, "_build_for_host", lambda *arguments: cuda_library.Library(host_library()))
    monkeypatch.setattr(gpu, "test_files", lambda: ["tests/kernels/test_nm.py"])


def files_of_results():
    return {path: path.stat().st_mtime_ns for path in gpu.RESULTS.iterdir()}


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_dry_run_checks_and_leaves_nothing_behind(dry, capsys):
    before = files_of_results()
    assert gpu.main(["--dry-run", "--only", "two_of_four", "decode"]) == 0
    said = capsys.readouterr().out
    assert "8 of 8 results of our kernels right, 2 contenders that this machine lacks" in said
    assert "nothing measured" in said
    assert " ms" not in said
    assert files_of_results() == before


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_dry_run_reports_a_wrong_kernel(dry, capsys, monkeypatch):
    from sparse_engine import kernels

    right = kernels.nm_linear
    monkeypatch.setattr(kernels, "nm_linear", lambda *arguments: right(*arguments) * 1.1, raising=False)
    assert gpu.main(["--dry-run", "--only", "two_of_four"]) == 1
    assert "wrong by" in capsys.readouterr().out


def test_tests_are_dealt_out_and_counted(bench, monkeypatch):
    monkeypatch.setattr(gpu, "test_files", lambda: ["tests/kernels/test_nm.py"])
    tests, _ = gpu.collect_tests()
    gpu.run_tests(bench, 500, processes=2)
    rows = [row for row in bench.rows if row["section"] == "tests"]
    assert [row["contender"] for row in rows] == ["part 1 of 2", "part 2 of 2"]
    passed = [re.search(r"(\d+) passed", row["result"]) for row in rows]
    assert sum(int(found.group(1)) for found in passed if found) == len(tests) > 20
    assert not bench.failed


def test_tests_that_cannot_be_collected_fail_the_run(bench, monkeypatch):
    monkeypatch.setattr(gpu, "test_files", lambda: ["tests/kernels/no_such_file.py"])
    gpu.run_tests(bench, 500)
    assert bench.failed


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_the_whole_dry_run():
    before = files_of_results()
    run = subprocess.run(
        [sys.executable, "-m", "bench.gpu", "--dry-run"], capture_output=True, text=True,
        cwd=Path(__file__).parents[2], check=False,
    )  # fmt: skip
    assert run.returncode == 0, run.stdout[-3000:] + run.stderr[-3000:]
    assert files_of_results() == before
