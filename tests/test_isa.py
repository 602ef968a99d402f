"""The kernels' builds: each one is right, the variable chooses, and no wide instruction strays outside them."""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
import sys

import pytest

from sparse_engine import _C

BUILDS = ("portable", "avx2", "avx512")

# One linear layer and one convolution, forward and backward; prints the build in use and the largest relative errors.
PRODUCTS = """
import torch
from sparse_engine import _C
from sparse_engine.ops import Pattern, sparse_conv2d, sparse_linear
from sparse_engine.packed import PackedWeight

torch.manual_seed(0)

def errors(weight, x, sparse, dense):
    packed = PackedWeight.from_dense(weight)
    values = packed.values.clone().requires_grad_()
    x = x.requires_grad_()
    y = sparse(x, values, Pattern.from_packed(packed))
    wide_weight, wide_x = weight.double().requires_grad_(), x.detach().double().requires_grad_()
    wide_y = dense(wide_x, wide_weight)
    gradient = torch.randn_like(y)
    y.backward(gradient)
    wide_y.backward(gradient.double())
    wide_values = packed.with_values(values.grad).to_dense().double()
    pairs = [(y, wide_y), (x.grad, wide_x.grad), (wide_values, wide_x.new_tensor(0) + wide_weight.grad * (weight != 0))]
    return [((a.double() - b).abs().max() / b.abs().max()).item() for a, b in pairs]

weight = torch.randn(67, 300) * (torch.rand(67, 300) < 0.2)
found = errors(
    weight,
    torch.randn(41, 300),
    lambda x, v, p: sparse_linear(x, v, p, impl="cpu"),
    torch.nn.functional.linear,
)
weight = torch.randn(19, 7, 3, 3) * (torch.rand(19, 7, 3, 3) < 0.3)
found += errors(
    weight,
    torch.randn(2, 7, 13, 11),
    lambda x, v, p: sparse_conv2d(x, v, p, stride=2, padding=1, impl="cpu"),
    lambda x, w: torch.nn.functional.conv2d(x, w, stride=2, padding=1),
)
print(_C.cpu_info()["isa"], max(found))
"""


def run(isa: str | None, script: str) -> subprocess.CompletedProcess[str]:
    environment = {key: value for key, value in os.environ.items() if key != "SPARSE_ENGINE_ISA"}
    if isa is not None:
        environment["SPARSE_ENGINE_ISA"] = isa
    return subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=environment, check=False)


@pytest.mark.parametrize("isa", _C.cpu_info()["available"])
def test_every_build_that_runs_here_is_right(isa: str) -> None:
    result = run(isa, PRODUCTS)
    assert result.returncode == 0, result.stderr
    used, error = result.stdout.split()
    assert used == isa
    assert float(error) <= 1e-5


def test_the_best_build_is_the_default() -> None:
    result = run(None, "from sparse_engine import _C; print(_C.cpu_info()['isa'])")
    assert result.stdout.strip() == _C.cpu_info()["available"][-1]


@pytest.mark.parametrize("isa", ["avx1024", "AVX2", "sse4"])
def test_an_unknown_build_is_refused(isa: str) -> None:
    result = run(isa, "from sparse_engine import _C; _C.cpu_info()")
    assert result.returncode != 0
    assert f"SPARSE_ENGINE_ISA is '{isa}'; it must be avx512, avx2 or portable" in result.stderr


@pytest.mark.parametrize("isa", [build for build in BUILDS if build not in _C.cpu_info()["available"]] or ["none"])
def test_a_build_that_cannot_run_here_is_refused(isa: str) -> None:
    result = run(isa, "from sparse_engine import _C; _C.cpu_info()")
    assert result.returncode != 0
    assert "SPARSE_ENGINE_ISA" in result.stderr


def test_wide_instructions_stay_inside_their_namespaces() -> None:
    """An inline function that two builds share is kept once by the linker. Were it the wide copy, older processors
    would meet an illegal instruction in ordinary code: every function with a VEX or EVEX instruction must be in one.
    """
    objdump = shutil.which("objdump")
    assert objdump is not None, "objdump is missing; it comes with the compiler's binutils"
    listing = subprocess.run(
        [objdump, "-d", "--no-show-raw-insn", "-C", _C.__file__], capture_output=True, text=True, check=True
    ).stdout
    header = re.compile(r"^[0-9a-f]+ <(.*)>:$")
    wide = re.compile(r"^\s*[0-9a-f]+:\s+v[a-z]|%[yz]mm\d|%k[0-7]\b")
    function, strays, inside = "", set(), set()
    for line in listing.splitlines():
        if match := header.match(line):
            function = match[1]
        elif wide.search(line):
            (inside if re.search(r"sparse_engine::avx(2|512)\b", function) else strays).add(function)
    assert not strays, f"{len(strays)} functions outside the builds, such as {sorted(strays)[:3]}"
    for build in ("avx2", "avx512") if platform.machine() in ("x86_64", "AMD64") else ():
        assert any(f"sparse_engine::{build}" in name for name in inside), f"no kernels of {build} in the module"
