"""What surrounds the kernels: overhead of a call, memory, threads, neighbours.

    python -m bench.runtime overhead | memory | threads

Write bench/results/call_overhead.json, memory.json and threads.json. Memory and threads use ResNet-50 at 90 %.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from bench import results_io

WORK = results_io.RESULTS.parent.parent / "build" / "bench"
NETWORK = "resnet50"


# ---- overhead


@torch.no_grad()
def run_overhead(seconds: float) -> None:
    import sparse_engine as se

    weight = torch.zeros(16, 16)
    weight[0, :2] = 1.0
    dense = nn.Linear(16, 16)
    dense.weight.data.copy_(weight)
    sparse = se.nn.SparseLinear.from_dense(dense)
    x = torch.randn(1, 16)
    executable = se.convert(nn.Sequential(dense, nn.ReLU()), (x,))

    def many(call: Callable[[], Any]) -> Callable[[], None]:
        def run() -> None:
            for _ in range(200):
                call()

        return run

    calls = {
        "SparseLinear": lambda: sparse(x),
        "executable of one layer": lambda: executable(x),
        "nn.Linear, for comparison": lambda: dense(x),
    }
    summary = results_io.interleaved({name: many(call) for name, call in calls.items()}, seconds=seconds)
    results_io.write(
        "call_overhead",
        rows=[{"call": name, "us": 1e3 * summary[name]["median_ms"] / 200} for name in calls],
        claim="A whole call on a 16x16 weight and one row, where the product itself takes no time worth mentioning.",
        command="python -m bench.runtime overhead",
        notes="Without gradients; bursts of 200 calls in turns.",
    )


# ---- memory


def status_mib(key: str) -> float:
    """VmRSS (resident now) or VmHWM (its peak) of this process."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(key + ":"):
            return int(line.split()[1]) / 1024
    raise KeyError(key)


def reset_peak() -> None:
    """Start the peak of the resident size anew (Linux)."""
    Path("/proc/self/clear_refs").write_text("5")


def memory_of_converting(file: Path) -> dict[str, Any]:
    import sparse_engine as se
    from bench.networks import IMAGE, pruned_network

    x = torch.randn(1, *IMAGE, generator=torch.Generator().manual_seed(0))
    model = pruned_network(NETWORK, sparsity=0.9)
    size = sum(value.numel() * value.element_size() for value in model.state_dict().values()) / 2**20
    before = status_mib("VmRSS")
    reset_peak()
    begin = time.perf_counter()
    executable = se.convert(model, (x,))
    seconds = time.perf_counter() - begin
    peak = status_mib("VmHWM")
    executable.save(file)
    return {
        "what": "convert, tuned",
        "seconds": seconds,
        "model_mib": size,
        "before_mib": before,
        "peak_above_mib": peak - before,
        "peak_above_models": (peak - before) / size,
    }


def memory_of_running(file: Path, batch: int) -> dict[str, Any]:
    import sparse_engine as se
    from bench.networks import IMAGE

    x = torch.randn(batch, *IMAGE, generator=torch.Generator().manual_seed(0))
    before = status_mib("VmRSS")
    reset_peak()
    begin = time.perf_counter()
    executable = se.load(file)
    executable(x)
    seconds = time.perf_counter() - begin
    after_first = status_mib("VmRSS")
    for _ in range(20):
        executable(x)
    return {
        "what": f"load and run, batch {batch}",
        "seconds": seconds,
        "file_mib": file.stat().st_size / 2**20,
        "before_mib": before,
        "peak_above_mib": status_mib("VmHWM") - before,
        "resident_above_mib": after_first - before,
        "grown_by_20_more_calls_mib": status_mib("VmRSS") - after_first,
    }


def allocations_of_running(file: Path, batch: int) -> dict[str, Any]:
    """Calls of malloc and its relatives per call of the executable, once it is warm; `allocation_counter` is loaded."""
    import sparse_engine as se
    from bench.networks import IMAGE

    x = torch.randn(batch, *IMAGE, generator=torch.Generator().manual_seed(0))
    executable = se.load(file)
    counter = ctypes.CDLL(os.environ["LD_PRELOAD"])

    def count(call: Callable[[], Any], times: int) -> tuple[float, float]:
        core, others = ctypes.c_int64(), ctypes.c_int64()
        counter.allocations_begin()
        for _ in range(times):
            call()
        counter.allocations_end(ctypes.byref(core), ctypes.byref(others))
        return core.value / times, others.value / times

    first = count(lambda: executable(x), 1)
    later = count(lambda: executable(x), 20)
    return {
        "core_allocations_first_call": first[0],
        "core_allocations_per_call": later[0],
        "other_allocations_per_call": later[1],
        "of_one_torch_empty": count(lambda: torch.empty(batch, 1000), 20)[1],
    }


def allocation_counter() -> Path | None:
    """The library that counts allocations, compiled now; None where there is no compiler or not glibc."""
    compiler, library = shutil.which(os.environ.get("CXX", "c++")), WORK / "count_allocations.so"
    if compiler is None or platform.libc_ver()[0] != "glibc":
        return None
    source = Path(__file__).with_name("count_allocations.cpp")
    command = [compiler, "-O2", "-std=c++17", "-shared", "-fPIC", str(source), "-o", str(library), "-ldl"]
    subprocess.run(command, check=True)
    return library


def run_memory() -> None:
    WORK.mkdir(parents=True, exist_ok=True)
    file = WORK / "memory.spx"
    rows = [_apart("converting", file)] + [_apart("running", file, batch) for batch in (1, 16)]
    counter = allocation_counter()
    if counter is not None:
        for row, batch in zip(rows[1:], (1, 16), strict=True):
            row |= _apart("allocating", file, batch, environment={"LD_PRELOAD": str(counter)})
    file.unlink()
    results_io.write(
        "memory",
        rows=rows,
        claim="Resident memory and time of converting and of running ResNet-50 at 90 % unstructured.",
        command="python -m bench.runtime memory",
        notes="Each row in a process of its own. Above: above what is resident after importing PyTorch and "
        "sparse_engine and making the input (for converting: and the model). Seconds: converting; loading with the "
        "first call. Allocations: calls of malloc, its relatives and operator new; by the core, which computes, and by "
        "PyTorch and Python, which make the output.",
    )


def _apart(what: str, file: Path, *rest: int, environment: Mapping[str, str] | None = None) -> dict[str, Any]:
    command = [sys.executable, "-m", "bench.runtime", "--child", what, str(file), *map(str, rest)]
    env = {**os.environ, **(environment or {})}
    output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=env).stdout
    return json.loads(output.strip().splitlines()[-1])


# ---- threads


def run_threads(rounds: int) -> None:
    """Scaling, a busy neighbour, two executables at once, beside PyTorch's own threads, idle."""
    import sparse_engine as se
    from bench.networks import IMAGE, pruned_network

    cores = os.cpu_count() or 1
    torch.set_num_threads(cores)
    model = pruned_network(NETWORK, sparsity=0.9)
    x = torch.randn(1, *IMAGE, generator=torch.Generator().manual_seed(0))
    one = se.convert(model, (x,), threads=1)
    every, other = (se.convert(model, (x,), threads=cores) for _ in range(2))
    rows = []
    for batch in (1, 16):
        images = torch.randn(batch, *IMAGE, generator=torch.Generator().manual_seed(0))

        def call(executable: Any, images: torch.Tensor = images) -> Callable[[], Any]:
            return lambda: executable(images)

        window = 0.4 if batch == 1 else 2.0
        alone = _medians({"one": call(one), "all": call(every)}, window * rounds)
        rows.append(_thread_row("one thread", batch, alone["one"]))
        rows.append(_thread_row(f"{cores} threads", batch, alone["all"], alone["one"] / alone["all"], "times faster"))
        quiet, busy = _beside_neighbour(call(every), rounds, window)
        rows.append(_thread_row("beside a busy neighbour", batch, busy, busy / quiet, "times slower"))
        together, unfair = _two_at_once(call(every), call(other), window * rounds / 2)
        # Two calls share the machine that one had: twice the time of one is a fair half each.
        rows.append(
            _thread_row("two executables at once", batch, 2 * together, 2 * together / alone["all"], "times one alone")
        )
        rows.append(_thread_row("the same, fairness", batch, None, unfair, "times as many calls"))
        rows += _beside_torch(call(every), batch, window * rounds)
        rows.append(_thread_row("idle", batch, None, _idle_share(call(every)), "% of one core"))
    results_io.write(
        "threads",
        rows=rows,
        claim="Scaling over cores, a neighbour that keeps one core busy, two executables at once, PyTorch's own "
        "threads beside ours, and an idle process.",
        command="python -m bench.runtime threads",
        notes="ResNet-50, 90 % unstructured; medians. Neighbour: another process in an endless loop, windows with and "
        "without it in turns. Two executables: two Python threads call one each; ms of a call, and how many more calls "
        "the luckier thread made. PyTorch: a convolution of about the same time on all cores, called in turns with the "
        "executable, against each called by itself. Idle: processor time in the second after a call.",
    )


def _thread_row(what: str, batch: int, ms: float | None, value: float | None = None, meaning: str = "") -> dict:
    return {"batch": batch, "what": what, "ms": ms, "value": value, "meaning": meaning}


def _medians(calls: dict[str, Callable[[], Any]], seconds: float) -> dict[str, float]:
    return {name: found["median_ms"] for name, found in results_io.interleaved(calls, seconds=seconds).items()}


def _times(call: Callable[[], Any], seconds: float) -> list[float]:
    """Milliseconds of each call in a window, at least three."""
    times: list[float] = []
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(times) < 3:
        begin = time.perf_counter()
        call()
        times.append((time.perf_counter() - begin) * 1e3)
    return times


def _beside_neighbour(call: Callable[[], Any], rounds: int, window: float) -> tuple[float, float]:
    """Median ms of windows without and with a process that keeps one core busy, in turns."""
    quiet: list[float] = []
    busy: list[float] = []
    for _ in range(rounds):
        quiet += _times(call, window / 2)
        spin = subprocess.Popen([sys.executable, "-c", "while True: pass"])
        try:
            time.sleep(0.2)  # it is past its start
            busy += _times(call, window / 2)
        finally:
            spin.kill()
            spin.wait()
    return statistics.median(quiet), statistics.median(busy)


def _two_at_once(first: Callable[[], Any], second: Callable[[], Any], seconds: float) -> tuple[float, float]:
    """Ms per call of both together, and the calls of the luckier thread over those of the other."""
    counts = [0, 0]
    end = time.perf_counter() + seconds

    def caller(which: int, call: Callable[[], Any]) -> None:
        while time.perf_counter() < end:
            call()
            counts[which] += 1

    callers = [threading.Thread(target=caller, args=(0, first)), threading.Thread(target=caller, args=(1, second))]
    begin = time.perf_counter()
    for thread in callers:
        thread.start()
    for thread in callers:
        thread.join()
    return 1e3 * (time.perf_counter() - begin) / sum(counts), max(counts) / max(1, min(counts))


@torch.no_grad()
def _beside_torch(call: Callable[[], Any], batch: int, seconds: float) -> list[dict[str, Any]]:
    """The executable and a convolution by PyTorch, each by itself and in turns."""
    x, weight = torch.randn(4 * batch, 64, 56, 56), torch.randn(64, 64, 3, 3)
    dense = lambda: torch.nn.functional.conv2d(x, weight, padding=1)  # noqa: E731
    # Windows of each kind in turns, too: the machine's speed drifts.
    found: dict[str, list[float]] = {"ours": [], "torch": [], "ours in turns": [], "torch in turns": []}
    for _ in range(4):
        found["ours"] += _times(call, seconds / 16)
        found["torch"] += _times(dense, seconds / 16)
        end = time.perf_counter() + seconds / 8
        while time.perf_counter() < end:
            found["ours in turns"] += _times_once(call)
            found["torch in turns"] += _times_once(dense)
    ms = {name: statistics.median(times) for name, times in found.items()}
    return [
        _thread_row(
            f"{name}, in turns with {other}",
            batch,
            ms[f"{key} in turns"],
            ms[f"{key} in turns"] / ms[key],
            "times its own time alone",
        )
        for name, key, other in (("executable", "ours", "PyTorch"), ("PyTorch", "torch", "the executable"))
    ]


def _times_once(call: Callable[[], Any]) -> list[float]:
    begin = time.perf_counter()
    call()
    return [(time.perf_counter() - begin) * 1e3]


def _idle_share(call: Callable[[], Any]) -> float:
    """Per cent of one core in the second after a call."""
    call()
    begin, used = time.perf_counter(), time.process_time()
    time.sleep(1.0)
    return 100 * (time.process_time() - used) / (time.perf_counter() - begin)


def main(arguments: Sequence[str] | None = None) -> None:
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    if arguments[:1] == ["--child"]:
        what, file, *rest = arguments[1:]
        children: dict[str, Callable[..., dict[str, Any]]] = {
            "converting": memory_of_converting,
            "running": memory_of_running,
            "allocating": allocations_of_running,
        }
        print(json.dumps(children[what](Path(file), *map(int, rest))))
        return
    parser = argparse.ArgumentParser(prog="python -m bench.runtime", description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="shorter")
    parser.add_argument("part", nargs="*", choices=("overhead", "memory", "threads"))
    options = parser.parse_args(arguments)
    parts = options.part or ["overhead", "memory", "threads"]
    if "overhead" in parts:
        run_overhead(0.5 if options.quick else 3.0)
    if "memory" in parts:
        run_memory()
    if "threads" in parts:
        run_threads(3 if options.quick else 7)


if __name__ == "__main__":
    main()
