"""Writes and reads the result files in bench/results/: one JSON file per claim, with all that is needed to repeat it.

Example:
    >>> write("layers", rows=[{"layer": "conv1", "ms": 1.2}], claim="sparse layers are fast")  # doctest: +SKIP
    PosixPath('bench/results/layers.json')

A result file holds ``claim`` (one sentence), ``command`` (what makes it), ``date`` (UTC), ``device``, ``versions``,
``seeds``, ``rows`` (a list of flat dictionaries: the table) and, optionally, ``notes``.
"""

from __future__ import annotations

import importlib.metadata
import json
import math
import os
import platform
import shlex
import statistics
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from time import perf_counter
from typing import Any

RESULTS = Path(__file__).parent / "results"
REQUIRED = ("claim", "command", "date", "device", "versions", "seeds", "rows")
_VERSIONS_OF = (
    *("torch", "torchvision", "triton", "numpy", "onnxruntime", "openvino", "deepsparse", "scikit-learn"),
    *("liger-kernel", "torch-pruning"),
)


def device_description() -> dict[str, Any]:
    """The machine: processor, instruction set in use, threads, caches, memory, GPU where there is one."""
    device: dict[str, Any] = {
        "machine": platform.machine(),
        "system": platform.system(),
        "cpus": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "cpu": _processor_name(),
    }
    try:
        from sparse_engine import _C
    except ImportError:
        pass
    else:
        info = getattr(_C, "cpu_info", None)
        if info is not None:
            device["kernels"] = info()
    try:
        import torch
    except ImportError:
        return device
    device["torch_threads"] = torch.get_num_threads()
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        device["gpu"] = properties.name
        device["gpu_memory_gib"] = round(properties.total_memory / 2**30, 1)
        device["cuda"] = torch.version.cuda
    return device


def _processor_name() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or "unknown"


def versions() -> dict[str, str]:
    """The versions of Python, of sparse_engine and of every library that could change a figure, where installed."""
    import sparse_engine

    found = {"python": platform.python_version(), "sparse_engine": sparse_engine.__version__}
    for name in _VERSIONS_OF:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def command_line() -> str:
    """The command that is running, as one would type it in the repository; of absolute paths only the last part."""
    module = getattr(sys.modules.get("__main__"), "__spec__", None)
    given = [f"DIR/{Path(word).name}" if os.path.isabs(word) else word for word in sys.argv[1:]]
    if module is not None and module.name:
        name = module.name.removesuffix(".__main__")
        return shlex.join(["python", "-m", name, *given])
    return shlex.join(["python", os.path.relpath(sys.argv[0]), *given])


def write(
    name: str,
    *,
    rows: Sequence[Mapping[str, Any]],
    claim: str,
    command: str | None = None,
    seeds: Sequence[int] = (0,),
    notes: str | None = None,
    device: Mapping[str, Any] | None = None,
    folder: Path = RESULTS,
) -> Path:
    """Writes ``bench/results/<name>.json`` in one step and returns its path.

    Args:
        name: the file's name without suffix, also the name of the table made from it.
        rows: the table: flat dictionaries of numbers and strings; units belong in the keys (``ms``, ``mib``).
        claim: what the rows show, in one sentence.
        command: what makes the file; by default the running command.
        seeds: the random seeds used.
        notes: what a reader must know to judge the rows.
        device: instead of the description of this machine, where the rows come from another one.
        folder: where to write.
    """
    result: dict[str, Any] = {
        "claim": claim,
        "command": command or command_line(),
        "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M"),
        "device": dict(device) if device is not None else device_description(),
        "versions": versions(),
        "seeds": list(seeds),
        "rows": [dict(row) for row in rows],
    }
    if notes:
        result["notes"] = notes
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.json"
    with tempfile.NamedTemporaryFile("w", dir=folder, suffix=".tmp", delete=False) as file:
        file.write(_text(result))
    os.chmod(file.name, 0o644)
    os.replace(file.name, path)
    return path


def _text(result: Mapping[str, Any]) -> str:
    """JSON with a line for each row, so that a row that changes is a line that changes."""
    head = json.dumps({**result, "rows": []}, indent=1, ensure_ascii=False)
    rows = ",\n".join("  " + json.dumps(row, ensure_ascii=False) for row in result["rows"])
    return head.replace('"rows": []', f'"rows": [\n{rows}\n ]' if rows else '"rows": []') + "\n"


def read(name: str, folder: Path = RESULTS) -> dict[str, Any]:
    """Reads one result file and checks that nothing is missing."""
    path = folder / f"{name}.json"
    result = json.loads(path.read_text())
    missing = [key for key in REQUIRED if key not in result]
    if missing:
        raise ValueError(f"{path} lacks {', '.join(missing)}; write result files with bench.results_io.write")
    return result


def interleaved(
    candidates: Mapping[str, Callable[[], Any]], *, seconds: float = 2.0, warmup: int = 3
) -> dict[str, Any]:
    """Times functions in turns (a, b, c, a, b, c, …), so that a change of the machine's speed touches all of them
    alike.

    Example:
        >>> times = interleaved({"dense": lambda: sum(range(1000)), "nothing": lambda: None}, seconds=0.01)
        >>> times["dense"]["median_ms"] > times["nothing"]["median_ms"]
        True

    Args:
        candidates: name -> function without arguments.
        seconds: about how long to measure, all candidates together; at least five rounds are run.
        warmup: untimed calls of each before.

    Returns:
        name -> ``{"median_ms", "p10_ms", "p90_ms", "runs"}``.
    """
    for function in candidates.values():
        for _ in range(warmup):
            function()
    times: dict[str, list[float]] = {name: [] for name in candidates}
    end = perf_counter() + seconds
    while perf_counter() < end or min(map(len, times.values())) < 5:
        for name, function in candidates.items():
            begin = perf_counter()
            function()
            times[name].append((perf_counter() - begin) * 1e3)
    summary = {}
    for name, values in times.items():
        values.sort()
        summary[name] = {
            "median_ms": statistics.median(values),
            "p10_ms": values[len(values) // 10],
            "p90_ms": values[min(len(values) - 1, len(values) * 9 // 10)],
            "runs": len(values),
        }
    return summary


_WARM_UP = 0.005  # seconds


def burst_medians(calls: Mapping[str, Callable[[], Any]], seconds: float) -> dict[str, float]:
    """Median milliseconds per call, timed in bursts of about two milliseconds, the contenders in turns.

    Within a network, what a layer reads was just written; in bursts every contender finds its data in the cache. The
    calls before each burst, until caches and threads are warm, are not timed. There is no pause: on a shared machine
    a core that was idle comes back with a neighbour in its caches. Calls of twenty milliseconds and more need no others
    to warm up, and of those that take a tenth of a second three are enough.
    """
    once = {}
    for name, call in calls.items():
        once[name] = min(_timed(call), _timed(call))
        for _ in range(2 if once[name] < 0.1 else 0):
            once[name] = min(once[name], _timed(call))
    times = {name: max(1, min(200, math.ceil(0.002 / value))) for name, value in once.items()}
    found: dict[str, list[float]] = {name: [] for name in calls}
    end = perf_counter() + seconds
    bursts = {name: 5 if value < 0.1 else 3 for name, value in once.items()}  # at least
    capped = {name for name, value in once.items() if value >= 0.1}
    while any(
        len(found[name]) < least or (perf_counter() < end and name not in capped) for name, least in bursts.items()
    ):
        for name, call in calls.items():
            if name in capped and len(found[name]) == bursts[name]:
                continue
            warm = perf_counter() + (_WARM_UP if once[name] < 4 * _WARM_UP else 0.0)
            while perf_counter() < warm:
                call()
            begin = perf_counter()
            for _ in range(times[name]):
                call()
            found[name].append((perf_counter() - begin) / times[name])
    return {name: 1e3 * statistics.median(values) for name, values in found.items()}


def _timed(call: Callable[[], Any]) -> float:
    begin = perf_counter()
    call()
    return perf_counter() - begin
