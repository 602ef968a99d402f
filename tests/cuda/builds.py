"""Builds of the CUDA sources for the tests, kept under build/cuda-tests by the sources' hash so that a second run
compiles nothing."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SOURCES = ROOT / "csrc" / "cuda"
COMPILER = os.environ.get("CXX") or "g++"


def cached(name: str, command: list[str], *more: Path) -> Path:
    """Runs a compiler whose last argument is to be the output file; returns that file. Its messages: `log_of`."""
    if shutil.which(command[0]) is None:
        pytest.skip(f"{command[0]} is not installed")
    digest = hashlib.sha256(" ".join(command).encode())
    for path in sorted([*SOURCES.iterdir(), *more]):
        digest.update(path.read_bytes())
    folder = ROOT / "build" / "cuda-tests"
    folder.mkdir(parents=True, exist_ok=True)
    output = folder / f"{name}-{digest.hexdigest()[:16]}"
    if not output.exists() or not log_of(output).exists():
        partial = output.with_suffix(f".{os.getpid()}")
        run = subprocess.run([*command, str(partial)], capture_output=True, text=True, cwd=ROOT, check=False)
        if run.returncode and "cannot find -l" in run.stderr:
            pytest.skip(f"the runtime of {name} is not installed: {run.stderr.strip().splitlines()[-1]}")
        assert run.returncode == 0, run.stdout + run.stderr
        log_of(output).write_text(run.stdout + run.stderr, encoding="utf-8")
        partial.rename(output)
    return output


def log_of(output: Path) -> Path:
    """Where a compiler's messages lie: beside the file, with its hash, so that they are never another source's."""
    return output.with_name(f"{output.name}.log")


def host_library() -> Path:
    """The kernels as a library that runs them on the CPU."""
    flags = ["-std=c++20", "-O1", "-Wall", "-Wextra", "-Werror", "-Icsrc", "-fPIC", "-shared", "-x", "c++"]
    return cached("kernels-host", [COMPILER, *flags, "csrc/cuda/kernels.cu", "-o"])


def device_log(arch: str) -> str:
    """What nvcc and ptxas say about the kernels for one architecture."""
    flags = ["-std=c++17", "-O3", "--expt-relaxed-constexpr", "-Icsrc", "-Xptxas", "-v", "-cubin"]
    output = cached(
        f"kernels-{arch}.cubin",
        ["nvcc", *flags, f"-gencode=arch=compute_{arch[3:]},code={arch}", "csrc/cuda/kernels.cu", "-o"],
    )
    return log_of(output).read_text(encoding="utf-8")
