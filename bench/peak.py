"""What this machine's processor can do: the peak that every "share of peak" in the results refers to.

Example:
    >>> peak_gflops(1) > 1
    True
"""

from __future__ import annotations

import ctypes
import functools
import os
import platform
import shutil
import statistics
import subprocess
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

SOURCE = Path(__file__).with_name("peak.cpp")
FOLDER = Path(__file__).parent.parent / "build" / "bench"


@functools.cache
def _probe() -> ctypes.CDLL | None:
    """The compiled probe, or None where there is no compiler or no x86."""
    compiler = shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")
    if compiler is None or platform.machine() not in ("x86_64", "AMD64"):
        return None
    FOLDER.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=FOLDER) as folder:
        library = Path(folder) / "peak.so"
        flags = ["-O3", "-march=native", "-ffp-contract=fast", "-shared", "-fPIC", "-pthread", "-std=c++17"]
        subprocess.run([compiler, *flags, SOURCE, "-o", library], check=True)
        loaded = ctypes.CDLL(str(library))
    loaded.fma_peak.restype = ctypes.c_double
    loaded.fma_peak.argtypes = [ctypes.c_double, ctypes.c_float, ctypes.c_float]
    loaded.core_to_core_ns.restype = ctypes.c_double
    return loaded


@functools.cache
def peak_gflops(threads: int, seconds: float = 0.2) -> float:
    """Single-precision GFLOP/s of fused multiply-adds on registers, all threads together.

    Without a C++ compiler it is what PyTorch's matrix product reaches, which lies below the peak, so that shares come
    out too high; `peak_source` says which of the two it is.

    Args:
        threads: running at the same time.
        seconds: of each thread's measurement.
    """
    probe = _probe()
    if probe is not None:
        with ThreadPoolExecutor(threads) as pool:
            return sum(pool.map(lambda _: probe.fma_peak(seconds, 1.0, 0.0), range(threads))) / 1e9
    from sparse_engine.report.measure import measure_ceilings

    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        return measure_ceilings(seconds).gflops
    finally:
        torch.set_num_threads(before)


def peak_source() -> str:
    """What `peak_gflops` measures here, in words."""
    if _probe() is None:
        return "PyTorch's dense product (no C++ compiler for the register probe)"
    return "fused multiply-adds on registers"


def core_to_core_ns() -> float | None:
    """Nanoseconds for a word to go between two cores of this process; None with one core or without the probe.

    Some 50 ns where the cores share their last cache, several times that where they do not. On a virtual machine that
    can change while it runs, and with it the speed of whatever passes data between threads.
    """
    cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
    probe = _probe()
    if len(cores) < 2 or probe is None:
        return None
    return statistics.median(probe.core_to_core_ns(cores[0], cores[1]) for _ in range(5))
