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


@pytest.mark.slow
@pytest.mark.parametrize("arch", ["sm_80", "sm_90"])
def test_every_configuration(arch):
    check(compile_kernels("--arch", arch))
