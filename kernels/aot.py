"""Compiles every kernel and configuration ahead of time, with no GPU: what fits, what spills, which matrix instruction
comes out. The Triton kernels by Triton, those in CUDA C++ by nvcc where it and their sources are there.

    python -m sparse_engine.kernels.aot --markdown docs/kernels/aot.md      # every configuration
    python -m sparse_engine.kernels.aot --quick --json -                    # one or two configurations per kernel

Each module with kernels offers `aot_cases(arch)`. A case is wrong when its shared memory passes what a block may take,
when the machine code uses a stack (registers spilled), or when the expected matrix instruction is not in the PTX.
"""

from __future__ import annotations

import argparse
import ctypes
import hashlib
import importlib
import itertools
import json
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

MODULES = ("block_sparse", "distill", "self_distill", "masked", "conv", "nm")
SHARED_LIMIT = {"sm_80": 163 * 1024, "sm_90": 227 * 1024}


@dataclass(frozen=True)
class AotCase:
    """One kernel in one configuration.

    Attributes:
        name: the configuration in words, unique within the kernel.
        kernel: the `triton.jit` function.
        signature: argument → type (`"*bf16"`, `"i32"`, `"fp32"`) of every argument that is not a constant.
        constants: argument → value.
        options: num_warps, num_stages.
        expects: a regular expression that the PTX must match, or "" (no matrix product).
        quick: part of the short list.
        divisible: sizes that are multiples of 16, beside pointers and strides.
    """

    name: str
    kernel: Any
    signature: dict[str, str]
    constants: dict[str, Any]
    options: dict[str, int]
    expects: str = ""
    quick: bool = False
    divisible: tuple[str, ...] = ()


@dataclass(frozen=True)
class AotResult:
    """What the compiler made of a case; `problems` is empty when it is fit to run."""

    kernel: str
    case: str
    arch: str
    registers: int = 0
    shared: int = 0
    stack: int = 0
    instruction: str = ""
    problems: list[str] = field(default_factory=list)


# what operands are called in the table → (Triton's type, PyTorch's, how fp32 is multiplied). fp32 is what PyTorch does
# by default; tf32 are the same operands where `torch.backends.cuda.matmul.allow_tf32`.
KINDS: dict[str, tuple[str, str, str]] = {
    "bf16": ("*bf16", "bfloat16", "ieee"),
    "fp16": ("*fp16", "float16", "ieee"),
    "tf32": ("*fp32", "float32", "tf32"),
    "fp32": ("*fp32", "float32", "ieee"),
}

# where Triton versions differ in the instruction chosen: TF32 products with an operand that lies transposed
MATRIX = r"wgmma\.mma_async|mma\.sync"


def tensor_core(arch: str, wide: bool) -> str:
    """The instruction a product must compile to: wgmma on Hopper where the tile is at least 64 rows high and 4 warps
    wide, mma.sync otherwise."""
    return r"wgmma\.mma_async" if arch == "sm_90" and wide else r"mma\.sync"


def expected_instruction(kind: str, arch: str, wide: bool) -> str:
    """What a product of operands of this kind must compile to; fp32 that is multiplied exactly uses no matrix
    instruction."""
    if kind == "fp32":
        return ""
    return MATRIX if kind == "tf32" else tensor_core(arch, wide)


def compile_case(case: AotCase, arch: str) -> AotResult:
    """Compiles one case and reads the machine code's resources."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    name = case.kernel.__name__
    signature = {argument: case.signature.get(argument, "constexpr") for argument in case.kernel.arg_names}
    positions = {argument: index for index, argument in enumerate(case.kernel.arg_names)}
    constants = {(positions[argument],): value for argument, value in case.constants.items()}
    # as a launch does for arguments that are multiples of 16: pointers of tensors always, sizes nearly always
    attributes = {
        (positions[argument],): [["tt.divisibility", 16]]
        for argument, kind in case.signature.items()
        if kind.startswith("*") or (kind == "i32" and "stride" in argument) or argument in case.divisible
    }
    try:
        source = ASTSource(fn=case.kernel, signature=signature, constexprs=constants, attrs=attributes)
        compiled = triton.compile(source, target=GPUTarget("cuda", int(arch[3:]), 32), options=dict(case.options))
    except Exception as error:  # the compiler's own errors have no common class
        return AotResult(
            name, case.name, arch, problems=[f"does not compile: {type(error).__name__}: {str(error)[:300]}"]
        )
    registers, stack, shared_static = _resources(compiled.asm["cubin"])
    shared = max(int(compiled.metadata.shared), shared_static)
    ptx = compiled.asm["ptx"]
    found = re.search(r"wgmma\.mma_async[.\w]*|mma\.sync\.aligned[.\w]*", ptx)
    problems = []
    if shared > SHARED_LIMIT[arch]:
        problems.append(f"{shared} bytes of shared memory, the limit is {SHARED_LIMIT[arch]}")
    if stack:
        problems.append(f"{stack} bytes of stack per thread: registers spilled")
    if case.expects and not re.search(case.expects, ptx):
        problems.append(f"no {case.expects} in the PTX" + (f", but {found.group(0)}" if found else ""))
    return AotResult(name, case.name, arch, registers, shared, stack, _short(found.group(0)) if found else "", problems)


def cases(arch: str, modules: Iterable[str] = MODULES, quick: bool = False) -> list[AotCase]:
    """Every case of the modules named, for one architecture."""
    found: list[AotCase] = []
    for module in modules:
        found += importlib.import_module(f".{module}", __package__).aot_cases(arch)
    return [case for case in found if case.quick or not quick]


def compile_all(
    arches: Iterable[str] = ("sm_80", "sm_90"), modules: Iterable[str] = MODULES, quick: bool = False
) -> list[AotResult]:
    """Compiles every case for every architecture; needs Triton, needs no GPU."""
    modules = tuple(modules)
    return [compile_case(case, arch) for arch in arches for case in cases(arch, modules, quick)]


def fingerprint() -> str:
    """Twelve digits that change with any argument type, constant or option of any case: whether a table is of these."""
    told = [
        (arch, case.kernel.__name__, case.name, sorted(case.signature.items()), sorted(case.constants.items()))
        + (sorted(case.options.items()), case.expects)
        for arch in sorted(SHARED_LIMIT)
        for case in cases(arch)
    ]
    return hashlib.sha256(json.dumps(told).encode()).hexdigest()[:12]


def markdown(results: list[AotResult]) -> str:
    """The table of the documentation."""
    import triton

    lines = [
        "# What the compiler makes of every kernel",
        "",
        (
            "Written by `python -m sparse_engine.kernels.aot --markdown docs/kernels/aot.md` with Triton "
            f"{triton.__version__} and {_nvcc_version()}; compiled, not yet run on a GPU."
        ),
        "A block may take 163 KiB of shared memory on sm_80, 227 KiB on sm_90. A stack means spilled registers. fp32",
        "is multiplied exactly (no matrix instruction), tf32 are fp32 operands where PyTorch may use TF32. The shared",
        "memory of kernels in CUDA C++ is the most that a launch asks for.",
        f"Configurations: `{fingerprint()}`.",
        "",
        "| kernel | configuration | architecture | registers | shared KiB | stack | matrix instruction | |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    lines += [
        f"| {r.kernel} | {r.case} | {r.arch} | {r.registers} | {r.shared / 1024:.1f} | {r.stack} | "
        f"{r.instruction or '–'} | {'; '.join(r.problems) or 'ok'} |"
        for r in results
    ]
    return "\n".join(lines) + "\n"


def main(arguments: list[str] | None = None) -> int:
    """The command; returns 1 when any case has a problem."""
    parser = argparse.ArgumentParser(
        prog="python -m sparse_engine.kernels.aot",
        description="Compile every Triton kernel ahead of time and check it.",
    )
    parser.add_argument("--arch", nargs="+", default=["sm_80", "sm_90"], choices=sorted(SHARED_LIMIT))
    parser.add_argument("--module", nargs="+", default=list(MODULES), choices=MODULES)
    parser.add_argument("--quick", action="store_true", help="the short list only")
    parser.add_argument("--list", action="store_true", help="print the kernels and configurations, and compile nothing")
    parser.add_argument("--json", metavar="FILE", help="write the results as JSON ('-': standard output)")
    parser.add_argument("--markdown", metavar="FILE", help="write the table")
    options = parser.parse_args(arguments)
    if options.list:
        for arch in options.arch:
            for case in cases(arch, options.module, options.quick):
                print(f"{arch}\t{case.kernel.__name__}\t{case.name}")
        print(fingerprint())
        return 0
    results: list[AotResult] = []
    cuda = not options.quick and set(options.module) == set(MODULES)
    for arch in options.arch:
        triton_results = (compile_case(case, arch) for case in cases(arch, options.module, options.quick))
        for last in itertools.chain(triton_results, _later(arch) if cuda else ()):
            results.append(last)
            state = "; ".join(last.problems) or "ok"
            print(
                f"{arch} {last.kernel} {last.case}: {last.registers} registers, {last.shared} bytes shared, "
                f"{last.instruction}: {state}",
                file=sys.stderr,
                flush=True,
            )
    if options.json == "-":
        print(json.dumps([asdict(result) for result in results]))
    elif options.json:
        Path(options.json).write_text(json.dumps([asdict(result) for result in results], indent=1), encoding="utf-8")
    if options.markdown:
        Path(options.markdown).write_text(markdown(results), encoding="utf-8")
    return 1 if any(result.problems for result in results) else 0


def cuda_results(arch: str) -> list[AotResult]:
    """The same of the kernels in csrc/cuda; nothing without nvcc or without the sources (an installation has none)."""
    source = Path(__file__).parents[1] / "csrc" / "cuda" / "kernels.cu"
    compiler = _nvcc()
    if compiler is None or not source.exists():
        return []
    flags = ["-std=c++17", "-O3", "--expt-relaxed-constexpr", f"-I{source.parents[1]}", "-Xptxas", "-v"]
    flags += [f"-gencode=arch=compute_{arch[3:]},code=sm_{arch[3:]}", "-Xcompiler", "-fPIC", "-shared"]
    with tempfile.TemporaryDirectory() as folder:
        library = Path(folder) / "kernels.so"
        command = [compiler, *flags, str(source), "-o", str(library)]
        run = subprocess.run(command, capture_output=True, text=True, check=False)
        if run.returncode:
            return [AotResult("csrc/cuda", "", arch, problems=[f"does not compile: {run.stderr[:300]}"])]
        shared_of = ctypes.CDLL(str(library)).se_cuda_shared_bytes
        shared_of.restype = ctypes.c_int64
        command = [_cuobjdump(), "-sass", str(library)]
        machine_code = subprocess.run(command, capture_output=True, text=True, check=False).stdout
    bodies = dict(re.findall(r"Function : (\w+)(.*?)(?=Function : |\Z)", machine_code, re.DOTALL))
    results = []
    pattern = (
        rf"Compiling entry function '(\w+)' for '{arch}'.*?(\d+) bytes stack frame, (\d+) bytes spill stores, "
        r"(\d+) bytes spill loads.*?Used (\d+) registers"
    )
    for mangled, stack, stores, loads, registers in re.findall(pattern, run.stdout + run.stderr, re.DOTALL):
        name, arguments = _template(mangled)
        shared = int(shared_of(name.encode(), int(arguments[-1]) if len(arguments) > 1 else 0))
        kind = "fp16" if arguments[0] == "1" else "bf16"
        case = kind + (f", {arguments[1]} tiles of 8 tokens" if name == "bitmask_decode" else "")
        case += f", runs of {arguments[1]}" if name == "gather_conv" else ""
        instruction = re.search(r"HMMA\.(\d+)", bodies.get(mangled, ""))
        problems = []
        if shared > SHARED_LIMIT[arch]:
            problems.append(f"{shared} bytes of shared memory, the limit is {SHARED_LIMIT[arch]}")
        if int(stack) or int(stores) or int(loads):
            problems.append(f"{stack} bytes of stack, {stores} stored, {loads} loaded: registers spilled")
        if instruction is None:
            problems.append("no HMMA in the machine code")
        results.append(
            AotResult(
                name, f"CUDA C++, {case}", arch, int(registers), shared, int(stack),
                "" if instruction is None else f"mma m16n8k16 {kind.replace('fp16', 'f16')}", problems,
            )
        )  # fmt: skip
    return sorted(results, key=lambda result: (result.kernel, result.case))


def _later(arch: str) -> Iterator[AotResult]:
    """`cuda_results`, made when they are asked for."""
    yield from cuda_results(arch)


def _template(mangled: str) -> tuple[str, list[str]]:
    """`_ZN2se4cuda11gather_convILNS0_4TypeE1ELi8EEEv…` → ("gather_conv", ["1", "8"])."""
    found = re.search(r"cuda\d+([a-z_]+)I(.*?)EEv", mangled)
    if found is None:
        raise RuntimeError(f"unknown kernel {mangled}")
    return found.group(1), re.findall(r"(?:TypeE|Li)(\d+)", found.group(2))


def _nvcc() -> str | None:
    usual = Path("/usr/local/cuda/bin/nvcc")
    return shutil.which("nvcc") or (str(usual) if usual.exists() else None)


def _nvcc_version() -> str:
    compiler = _nvcc()
    if compiler is None:
        return "no nvcc"
    text = subprocess.run([compiler, "--version"], capture_output=True, text=True, check=False).stdout
    found = re.search(r"release ([\d.]+)", text)
    return f"CUDA {found.group(1)}" if found else "an unknown nvcc"


def _resources(cubin: bytes) -> tuple[int, int, int]:
    """(registers, stack bytes, static shared bytes) of the one kernel in a cubin."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = subprocess.run(
            [_cuobjdump(), "--dump-resource-usage", file.name], capture_output=True, text=True, check=True
        ).stdout
    usage = re.search(r"REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)", text)
    if usage is None:
        raise RuntimeError(f"cuobjdump printed no resource usage: {text[:300]}")
    registers, stack, shared, local = (int(number) for number in usage.groups())
    return registers, max(stack, local), shared


def _cuobjdump() -> str:
    """The disassembler that Triton ships."""
    import triton

    return str(Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump")


def _short(instruction: str) -> str:
    """`wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16` → `wgmma m64n128k16 bf16`."""
    kind = "wgmma" if instruction.startswith("wgmma") else "mma"
    shape = re.search(r"m\d+n\d+k\d+", instruction)
    operand = re.search(r"\.(bf16|f16|tf32)\b", instruction.replace("f32.", "", 1))
    return " ".join(
        part for part in (kind, shape.group(0) if shape else "", operand.group(1) if operand else "") if part
    )


if __name__ == "__main__":
    sys.exit(main())
