"""What surrounds the kernels: overhead of a call, memory, threads, neighbours.

    python -m bench.runtime overhead | memory | threads

Write bench/results/call_overhead.json, memory.json and threads.json. Memory and threads use ResNet-50 at 90 %.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
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


def run_memory() -> None:
    WORK.mkdir(parents=True, exist_ok=True)
    file = WORK / "memory.spx"
    rows = [_apart("converting", file)] + [_apart("running", file, batch) for batch in (1, 16)]
    file.unlink()
    results_io.write(
        "memory",
        rows=rows,
        claim="Resident memory and time of converting and of running ResNet-50 at 90 % unstructured.",
        command="python -m bench.runtime memory",
        notes="Each row in a process of its own. Above: above what is resident after importing PyTorch and "
        "sparse_engine and making the input (for converting: and the model). Seconds: converting; loading with the "
        "first call.",
    )


def _apart(what: str, file: Path, *rest: int) -> dict[str, Any]:
    command = [sys.executable, "-m", "bench.runtime", "--child", what, str(file), *map(str, rest)]
    output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    return json.loads(output.strip().splitlines()[-1])


# ---- threads


def run_threads(rounds: int) -> None:
    """Scaling, a busy neighbour, two executables at once, idle."""
    import sparse_engine as se
    from bench.networks import IMAGE, pruned_network

    cores = os.cpu_count() or 1
    torch.set_num_threads(cores)
    model = pruned_network(NETWORK, sparsity=0.9)
    rows = []
    for batch in (1, 16):
        x = torch.randn(batch, *IMAGE, generator=torch.Generator().manual_seed(0))
        one, all_cores = se.convert(model, (x,), threads=1), se.convert(model, (x,), threads=cores)

        def median(calls: dict[str, Callable[[], Any]], batch: int = batch) -> dict[str, float]:
            times = results_io.interleaved(calls, seconds=rounds * (0.3 if batch == 1 else 1.0))
            return {name: summary["median_ms"] for name, summary in times.items()}

        alone = median({"one": lambda: one(x), "all": lambda: all_cores(x)})  # noqa: B023
        spin = subprocess.Popen([sys.executable, "-c", "while True: pass"])
        try:
            disturbed = median({"all": lambda: all_cores(x)})  # noqa: B023
        finally:
            spin.kill()
            spin.wait()
        together = _two_at_once(lambda: all_cores(x), rounds * 0.5)  # noqa: B023
        begin, used = time.perf_counter(), time.process_time()
        time.sleep(1.0)
        idle = (time.process_time() - used) / (time.perf_counter() - begin)
        rows.append(
            {
                "batch": batch,
                "one_thread_ms": alone["one"],
                f"{cores}_threads_ms": alone["all"],
                "scaling": alone["one"] / alone["all"],
                "busy_neighbour_ms": disturbed["all"],
                "slowdown_by_neighbour": disturbed["all"] / alone["all"],
                "two_callers_ms": together[0],
                "two_callers_unfairness": together[1],
                "idle_cpu_%": 100 * idle,
            }
        )
    results_io.write(
        "threads",
        rows=rows,
        claim="Scaling over cores, a neighbour that keeps one core busy, two callers at once, and an idle process.",
        command="python -m bench.runtime threads",
        notes="ResNet-50, 90 % unstructured. Two callers: two Python threads call the executable; ms per call of both "
        "together, and the larger share of calls over the smaller. Idle: processor time in the second after a call.",
    )


def _two_at_once(call: Callable[[], Any], seconds: float) -> tuple[float, float]:
    counts = [0, 0]
    end = time.perf_counter() + seconds

    def caller(which: int) -> None:
        while time.perf_counter() < end:
            call()
            counts[which] += 1

    callers = [threading.Thread(target=caller, args=(which,)) for which in range(2)]
    begin = time.perf_counter()
    for thread in callers:
        thread.start()
    for thread in callers:
        thread.join()
    return 1e3 * (time.perf_counter() - begin) / sum(counts), max(counts) / max(1, min(counts))


def main(arguments: Sequence[str] | None = None) -> None:
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    if arguments[:1] == ["--child"]:
        what, file, *rest = arguments[1:]
        row = memory_of_converting(Path(file)) if what == "converting" else memory_of_running(Path(file), int(rest[0]))
        print(json.dumps(row))
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
        run_threads(3 if options.quick else 10)


if __name__ == "__main__":
    main()
