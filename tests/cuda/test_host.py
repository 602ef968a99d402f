"""The CUDA kernels on the CPU: right, independent of the order of threads, clean under the sanitizers, and no register
spilled on the GPU."""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path

import pytest

from tests.cuda.builds import COMPILER, cached, device_log

SANITIZERS = {
    "plain": [],
    "address": ["-fsanitize=address,undefined", "-fno-sanitize-recover=all"],
    "thread": ["-fsanitize=thread"],
}
TEST = Path(__file__).with_name("kernels_test.cpp")


def run(sanitizer: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    flags = ["-std=c++20", "-O1", "-g", "-Wall", "-Wextra", "-Werror", *SANITIZERS[sanitizer], "-Icsrc"]
    program = cached(f"kernels-test-{sanitizer}", [COMPILER, *flags, str(TEST), "-o"], TEST)
    environment = os.environ | {
        "TSAN_OPTIONS": "halt_on_error=1 exitcode=66",
        "ASAN_OPTIONS": "exitcode=77:detect_leaks=0",
    }
    return subprocess.run(
        [program, *arguments], capture_output=True, text=True, env=environment, check=False, timeout=600
    )


@pytest.mark.parametrize("sanitizer", SANITIZERS)
def test_kernels_against_fp64(sanitizer):
    result = run(sanitizer)
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]
    assert "all passed" in result.stdout


def test_a_barrier_that_not_every_lane_reaches_is_reported():
    result = run("plain", "stuck")
    assert result.returncode != 0
    assert "from lane 0 sync_threads; from lane 40 finished" in result.stderr


def test_a_copy_read_too_early_is_no_number():
    assert run("plain", "late").stdout.strip() == "-1"


def test_a_missing_barrier_is_a_race():
    result = run("thread", "race")
    assert result.returncode == 66
    assert "data race" in result.stderr


def test_a_write_past_shared_memory_is_found():
    result = run("address", "overflow")
    assert result.returncode == 77
    assert "heap-buffer-overflow" in result.stderr


@pytest.mark.parametrize("arch", ["sm_80", "sm_90"])
def test_machine_code_spills_nothing(arch):
    log = device_log(arch)
    kernels = re.findall(
        rf"Compiling entry function '(\w+)' for '{arch}'.*?(\d+) bytes stack frame, (\d+) bytes spill stores, "
        r"(\d+) bytes spill loads.*?Used (\d+) registers",
        log,
        re.DOTALL,
    )
    assert len(kernels) == 16, log[-2000:]
    for name, stack, stores, loads, registers in kernels:
        assert (stack, stores, loads) == ("0", "0", "0"), (
            f"{name}: {stack} bytes of stack, {stores} stored, {loads} loaded"
        )
        threads = 128 if "bitmask_linear" in name else 256
        assert int(registers) * threads <= 65536, f"{name}: {registers} registers × {threads} threads"
