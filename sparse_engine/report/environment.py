"""What this machine offers and what will run where: the facts behind `sparse-engine doctor`."""

from __future__ import annotations

import functools
import importlib
import importlib.metadata
import importlib.util
import os
import platform
import re
import shutil
import subprocess
import sys
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from sparse_engine.errors import ExtensionError

_CPU_FOLDER = Path("/sys/devices/system/cpu")
_INSTRUCTION_SETS = (
    ("sse4_2", "SSE4.2"),
    ("avx", "AVX"),
    ("f16c", "F16C"),
    ("fma", "FMA"),
    ("avx2", "AVX2"),
    ("avx512f", "AVX-512F"),
    ("avx512bw", "AVX-512BW"),
    ("avx512dq", "AVX-512DQ"),
    ("avx512vl", "AVX-512VL"),
    ("avx512_vnni", "AVX-512 VNNI"),
    ("avx512_bf16", "AVX-512 BF16"),
    ("avx512_vbmi", "AVX-512 VBMI"),
    ("amx_tile", "AMX"),
    ("asimd", "NEON"),
    ("sve", "SVE"),
)
_PACKAGES = (
    "torch",
    "numpy",
    "triton",
    "safetensors",
    "torchvision",
    "timm",
    "matplotlib",
    "scikit-learn",
    "typer",
    "rich",
    "onnxruntime",
    "openvino",
)
_VARIABLES = (
    "SPARSE_ENGINE_ISA",
    "SPARSE_ENGINE_IMPL",
    "SPARSE_ENGINE_NUM_THREADS",
    "OMP_NUM_THREADS",
    "CUDA_VISIBLE_DEVICES",
    "CXX",
)


@dataclass(frozen=True)
class Verdict:
    """One line of "what runs where": a kind of work, where it runs here, and why."""

    work: str
    where: str
    why: str
    works: bool = True


@dataclass
class Environment:
    """Facts about the machine and the installation, as plain data.

    Attributes:
        cpu: model, cores, instruction sets, caches in bytes, memory in bytes.
        threads: how many threads this process may use and what limits them.
        native: the compiled core: whether it loads, and which kernels it will use.
        compilers: version line by compiler, None where absent.
        gpus: one dict per GPU that PyTorch can use.
        gpu_reason: why there is no GPU, or "".
        packages: version by package, None where absent.
        variables: environment variables that change behaviour, where set.
        verdicts: what will run where and why.
    """

    python: str
    system: str
    cpu: dict[str, Any]
    threads: dict[str, Any]
    native: dict[str, Any]
    compilers: dict[str, str | None]
    gpus: list[dict[str, Any]]
    gpu_reason: str
    packages: dict[str, str | None]
    variables: dict[str, str]
    verdicts: list[Verdict] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        """The same as plain JSON."""
        return asdict(self)


def environment() -> Environment:
    """Look at the machine; takes about a second and changes nothing.

    Example:
        >>> environment().cpu["model"]                             # doctest: +SKIP
        'AMD EPYC 9R14'

    Returns:
        An `Environment` with the verdicts filled in.
    """
    gpus, gpu_reason = _gpus()
    found = Environment(
        python=f"{platform.python_implementation()} {platform.python_version()}",
        system=f"{platform.system()} {platform.release()} {platform.machine()}",
        cpu=cpu(),
        threads=_threads(),
        native=native_core(),
        compilers={name: _version_line(name) for name in ("g++", "clang++", "nvcc", "cmake", "ninja")},
        gpus=gpus,
        gpu_reason=gpu_reason,
        packages={"sparse_engine": package_version(), **{name: _package(name) for name in _PACKAGES}},
        variables={name: os.environ[name] for name in _VARIABLES if name in os.environ},
    )
    found.verdicts = _verdicts(found)
    return found


def machine_line() -> str:
    """One line for the head of a table: processor, threads, versions."""
    import torch

    facts = cpu()
    return (
        f"{facts['model']}, {_threads()['available']} of {facts['logical_cpus']} CPUs, "
        f"torch {torch.__version__}, sparse_engine {package_version()}"
    )


def busy_warning() -> str:
    """A sentence when other processes keep this machine busy, so that times measured now mean little; else ""."""
    if not hasattr(os, "getloadavg"):
        return ""
    load, cpus = os.getloadavg()[0], os.cpu_count() or 1
    if load <= max(0.5, 0.25 * cpus):
        return ""
    return f"Other work kept this machine busy (load {load:.1f} on {cpus} CPUs): the times are not to be relied on."


def package_version() -> str:
    """The version of sparse_engine."""
    import sparse_engine

    return sparse_engine.__version__


@functools.cache
def cpu() -> dict[str, Any]:
    """Processor model, cores, instruction sets, caches and memory of this machine."""
    text = _read(Path("/proc/cpuinfo"))
    flags = set(_field(text, "flags").split()) | set(_field(text, "Features").split())
    cores = {
        (_read(topology / "physical_package_id"), _read(topology / "core_id"))
        for topology in _CPU_FOLDER.glob("cpu[0-9]*/topology")
    }
    return {
        "model": _field(text, "model name") or platform.processor() or platform.machine(),
        "logical_cpus": os.cpu_count() or 1,
        "physical_cores": len(cores) or (os.cpu_count() or 1),
        "instruction_sets": [label for flag, label in _INSTRUCTION_SETS if flag in flags],
        "caches": _caches(),
        "memory_bytes": _memory(),
    }


def native_core() -> dict[str, Any]:
    """Whether the compiled core loads, and which build of the kernels it will use."""
    if importlib.util.find_spec("sparse_engine._C") is None:
        return {"loaded": False, "reason": "it is not built; run `make setup`, or `pip install .` in the source folder"}
    try:
        from sparse_engine.ops.native import extension, why_not_extension

        core = extension()
        if core is None:
            return {"loaded": False, "reason": "; ".join(why_not_extension())}
        return {"loaded": True, "threads": core.get_num_threads(), **core.cpu_info()}
    except ExtensionError as error:
        return {"loaded": False, "reason": str(error)}
    except (ImportError, RuntimeError, ValueError) as error:
        return {"loaded": False, "reason": f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:300]}"}


def _threads() -> dict[str, Any]:
    available = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else (os.cpu_count() or 1)
    limits = [f"affinity {available}"]
    quota = _quota()
    if quota is not None:
        limits.append(f"container quota {quota:.2f}")
        available = max(1, min(available, round(quota + 0.49)))
    return {"available": available, "limits": limits}


def _quota() -> float | None:
    """CPUs that the container may use on average, or None without a limit (cgroup v2, then v1)."""
    limit = _read(Path("/sys/fs/cgroup/cpu.max")).split()
    if len(limit) == 2 and limit[0].isdigit() and limit[1].isdigit() and int(limit[1]):
        return int(limit[0]) / int(limit[1])
    quota = _read(Path("/sys/fs/cgroup/cpu/cpu.cfs_quota_us"))
    period = _read(Path("/sys/fs/cgroup/cpu/cpu.cfs_period_us"))
    if quota.isdigit() and period.isdigit() and int(period):
        return int(quota) / int(period)
    return None


def _caches() -> dict[str, int]:
    """Bytes of each data or unified cache that the first CPU sees, by level name."""
    found: dict[str, int] = {}
    for index in sorted(_CPU_FOLDER.glob("cpu0/cache/index[0-9]*")):
        kind, level, size = (_read(index / name) for name in ("type", "level", "size"))
        match = re.fullmatch(r"(\d+)([KM]?)", size)
        if kind in ("Data", "Unified") and match:
            name = f"L{level}d" if kind == "Data" else f"L{level}"
            found[name] = int(match[1]) * {"": 1, "K": 1024, "M": 1024**2}[match[2]]
    return found


def _memory() -> int:
    match = re.search(r"MemTotal:\s+(\d+) kB", _read(Path("/proc/meminfo")))
    return int(match[1]) * 1024 if match else 0


def _gpus() -> tuple[list[dict[str, Any]], str]:
    import torch

    if torch.version.cuda is None:
        driver = " although this machine has an NVIDIA driver" if shutil.which("nvidia-smi") else ""
        return [], f"PyTorch {torch.__version__} was built without CUDA{driver}"
    if not torch.cuda.is_available():
        return [], "PyTorch finds no usable CUDA device (driver missing, too old, or no device visible)"
    gpus = []
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        gpus.append(
            {
                "name": properties.name,
                "compute_capability": f"{properties.major}.{properties.minor}",
                "memory_bytes": properties.total_memory,
                "multiprocessors": properties.multi_processor_count,
            }
        )
    return gpus, ""


def _verdicts(found: Environment) -> list[Verdict]:
    native, verdicts = found.native, []
    if native["loaded"]:
        isa = native.get("isa", "portable")
        cause = "SPARSE_ENGINE_ISA" if "SPARSE_ENGINE_ISA" in found.variables else "the best this processor runs"
        where = f"{isa} kernels, {native.get('threads', found.threads['available'])} threads"
        verdicts.append(Verdict("executables (.spx)", f"CPU, native plan, {where}", f"{isa} is {cause}"))
        verdicts.append(Verdict("sparse layers, CPU", f"native, {where}", "forward, both gradients"))
    else:
        verdicts.append(Verdict("executables (.spx)", "nowhere", f"compiled core: {native['reason']}", works=False))
        verdicts.append(Verdict("sparse layers, CPU", "PyTorch reference (slow)", native["reason"], works=False))
    verdicts.append(Verdict("dense candidates", "CPU, PyTorch (oneDNN, MKL)", "timed beside the sparse kernels"))
    if found.gpus and found.packages["triton"]:
        names = ", ".join(f"{gpu['name']} ({gpu['compute_capability']})" for gpu in found.gpus)
        verdicts.append(Verdict("sparse layers, GPU", f"Triton kernels on {names}", "CUDA device and triton found"))
    else:
        reason = found.gpu_reason or "triton is not installed: pip install triton"
        verdicts.append(Verdict("sparse layers, GPU", "nowhere", reason, works=False))
    if found.compilers["g++"] or found.compilers["clang++"]:
        verdicts.append(Verdict("building from source", "here", "a C++ compiler is present"))
    else:
        verdicts.append(Verdict("building from source", "nowhere", "no g++ or clang++ on PATH", works=False))
    return verdicts


@functools.cache
def _version_line(program: str) -> str | None:
    path = shutil.which(program)
    if path is None:
        # Tools that pip installed lie beside the interpreter even where its folder is not on PATH.
        path = shutil.which(program, path=str(Path(sys.executable).parent))
    if path is None:
        return None
    try:
        answer = subprocess.run([path, "--version"], capture_output=True, text=True, timeout=10, check=False).stdout
    except (OSError, subprocess.TimeoutExpired):
        return "present, but does not answer --version"
    lines = [line for line in answer.splitlines() if re.search(r"\d+\.\d+", line)]
    return lines[0].strip() if lines else "present"


def _package(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _field(text: str, name: str) -> str:
    match = re.search(rf"^{name}\s*:\s*(.*)$", text, re.MULTILINE)
    return match[1].strip() if match else ""


def _read(path: Path) -> str:
    try:
        return path.read_text().strip()
    except (OSError, UnicodeDecodeError):
        return ""
