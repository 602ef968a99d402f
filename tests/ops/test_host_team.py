"""Jobs beside PyTorch: its threads take them while they are awake, and nobody waits for threads that are not there."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import torch

from sparse_engine import _C
from sparse_engine.nn import SparseLinear


def layer(size: int = 512) -> torch.nn.Linear:
    torch.manual_seed(0)
    dense = torch.nn.Linear(size, size)
    dense.weight.data *= torch.rand(size, size) < 0.1
    return dense


def run(script: str, **environment: str) -> str:
    head = "import os, torch\nfrom sparse_engine import _C\nfrom sparse_engine.nn import SparseLinear\n"
    head += "from tests.ops.test_host_team import layer\ntorch.set_grad_enabled(False)\n"
    head += "x, big = torch.randn(512, 512), torch.randn(2048, 2048)\nsparse = SparseLinear.from_dense(layer())\n"
    done = subprocess.run(
        [sys.executable, "-c", head + script],
        env={**os.environ, "PYTHONPATH": os.getcwd(), **environment},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


IN_TURNS = """
torch.manual_seed(1)
y = x
for _ in range(50):
    y = torch.tanh(sparse(y))
    big.relu_()
print(_C.jobs_on_host_team(), y.double().sum().item())
"""


def test_jobs_between_operators_run_on_awake_threads_and_make_the_same_bits() -> None:
    count, with_team = run(
        "torch.set_num_threads(_C.get_num_threads())\n" + IN_TURNS.replace("x\n", "torch.ones(512, 512)\n", 1)
    ).split()
    none, without = run(
        "torch.set_num_threads(_C.get_num_threads())\n" + IN_TURNS.replace("x\n", "torch.ones(512, 512)\n", 1),
        SPARSE_ENGINE_OPENMP="0",
    ).split()
    on_openmp = "ATen parallel backend: OpenMP" in torch.__config__.parallel_info()
    assert (int(count) > 0) == (on_openmp and _C.get_num_threads() > 1)
    assert int(none) == 0
    assert with_team == without


def test_threads_that_sleep_are_left_asleep() -> None:
    sparse, x = SparseLinear.from_dense(layer()), torch.randn(512, 512)
    with torch.no_grad():
        sparse(x)
        time.sleep(0.2)
        before = _C.jobs_on_host_team()
        for _ in range(20):
            sparse(x)
        assert _C.jobs_on_host_team() == before


def test_threads_that_nobody_else_wakes_are_let_go() -> None:
    sparse, x = SparseLinear.from_dense(layer()), torch.randn(8192, 512)

    def jobs_in(seconds: float) -> int:
        before, end = _C.jobs_on_host_team(), time.perf_counter() + seconds
        while time.perf_counter() < end:
            sparse(x)
        return _C.jobs_on_host_team() - before

    with torch.no_grad():
        x.clone().exp_()
        jobs_in(0.5)
        assert jobs_in(0.2) == 0


def test_a_forked_process_does_not_wait_for_threads_that_it_lacks() -> None:
    script = IN_TURNS + (
        "expected = sparse(x)\n"
        "child = os.fork()\n"
        "if child == 0:\n"
        "    before = _C.jobs_on_host_team()\n"
        "    found = [sparse(x) for _ in range(20)]\n"
        "    torch.set_num_threads(1)  # PyTorch itself would wait\n"
        "    same = all(torch.equal(y, expected) for y in found)\n"
        "    os._exit(0 if same and _C.jobs_on_host_team() == before else 1)\n"
        "print(os.waitpid(child, 0)[1])\n"
    )
    assert run(script).split()[-1] == "0"


def test_a_process_that_is_forked_before_the_first_job() -> None:
    script = (
        "big.exp()  # PyTorch has threads now\n"
        "child = os.fork()\n"
        "if child == 0:\n"
        "    for _ in range(5):\n"
        "        sparse(x)\n"
        "    os._exit(_C.jobs_on_host_team())\n"
        "print(os.waitpid(child, 0)[1])\n"
    )
    assert run(script).strip() == "0"


def test_a_forked_process_that_loads_the_package_itself() -> None:
    script = (
        "import multiprocessing, torch\n"
        "torch.randn(2048, 2048).exp()  # PyTorch has threads now\n"
        "def work():\n"
        "    from sparse_engine import _C\n"
        "    from tests.ops.test_host_team import layer\n"
        "    from sparse_engine.nn import SparseLinear\n"
        "    sparse, x = SparseLinear.from_dense(layer(64)), torch.empty(4096, 64)\n"
        "    for _ in range(5):\n"
        "        sparse(x)\n"
        "child = multiprocessing.get_context('fork').Process(target=work)\n"
        "child.start()\n"
        "child.join(40)\n"
        "print(child.exitcode)\n"
        "child.kill()\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script],
        env={**os.environ, "PYTHONPATH": os.getcwd()},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.stdout.strip() == "0", done.stderr


def test_several_callers_beside_operators() -> None:
    sparse, x = SparseLinear.from_dense(layer()), torch.randn(512, 512)
    with torch.no_grad():
        expected = sparse(x)

    def call(_: int) -> bool:
        with torch.no_grad():
            x.clone().mul_(2).exp_()
            return torch.equal(sparse(x), expected)

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(call, range(200)))


def test_other_numbers_of_threads() -> None:
    script = (
        "expected = sparse(x)\n"
        "for threads in (1, 2, 4, 3, 1, 2):\n"
        "    torch.set_num_threads(threads)\n"
        "    for _ in range(10):\n"
        "        big.relu_()\n"
        "        assert torch.equal(sparse(x), expected)\n"
        "print('fine')\n"
    )
    assert run(script).strip() == "fine"
