"""Every Triton kernel compiles for Ampere and Hopper, fits, spills nothing and uses the matrix instruction it should.
Needs no GPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def compile_kernels(*arguments: str) -> list[dict]:
    # a process of its own: in this one the kernels may be interpreted
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-W", "ignore", "-m", "sparse_engine.kernels.aot", "--json", "-", *arguments]
    run = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment, check=False)
    assert run.stdout.startswith("["), run.stderr[-3000:]
    return json.loads(run.stdout)


def check(results: list[dict]) -> None:
    wrong = [f"{r['arch']} {r['kernel']} {r['case']}: {'; '.join(r['problems'])}" for r in results if r["problems"]]
    assert not wrong, "\n".join(wrong)
    assert all(r["registers"] > 0 for r in results)


@pytest.mark.parametrize("arch", ["sm_80", "sm_90"])
def test_one_configuration_of_each_kernel(arch):
    results = compile_kernels("--quick", "--arch", arch)
    check(results)
    assert {"dsd_kernel", "sdd_kernel", "distill_kernel"} <= {r["kernel"] for r in results}


def test_the_table_in_the_documentation_is_of_these_kernels():
    """Every configuration of today, compiled for both architectures and without a problem; and the CUDA kernels."""
    command = [sys.executable, "-W", "ignore", "-m", "sparse_engine.kernels.aot", "--list"]
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    run = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment, check=True)
    *listed, fingerprint = run.stdout.splitlines()
    table = (ROOT / "docs" / "kernels" / "aot.md").read_text(encoding="utf-8")
    assert f"Configurations: `{fingerprint}`." in table, (
        "a configuration has changed: python -m sparse_engine.kernels.aot --markdown docs/kernels/aot.md"
    )
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in table.splitlines() if "| sm_" in line]
    assert {row[7] for row in rows} == {"ok"}
    assert all(int(row[3]) > 0 and row[5] == "0" for row in rows)
    cuda = [row for row in rows if row[1].startswith("CUDA C++")]
    assert len(cuda) == 2 * 16
    assert all(row[6].startswith("mma m16n8k16") for row in cuda)
    assert sorted((row[2], row[0], row[1]) for row in rows if row not in cuda) == sorted(
        tuple(line.split("\t")) for line in listed
    )


@pytest.mark.slow
@pytest.mark.parametrize("arch", ["sm_80", "sm_90"])
def test_every_configuration(arch):
    check(compile_kernels("--arch", arch))
