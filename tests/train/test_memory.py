"""`keep_freed_memory`: the process keeps what it frees, and can be told to stop."""

import subprocess
import sys

import pytest

PROBE = """
import resource, torch
from sparse_engine.train import keep_freed_memory
keep = {keep}
if keep is not None:
    assert keep_freed_memory(True)
if keep is False:
    assert keep_freed_memory(False)
for _ in range(3):
    torch.ones(16, 2**20)
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(3):
    torch.ones(16, 2**20)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="a setting of glibc")
def test_large_tensors_come_from_memory_that_was_used_before():
    faults = {}
    for keep in (None, True, False):
        done = subprocess.run(
            [sys.executable, "-c", PROBE.format(keep=keep)], capture_output=True, text=True, check=True
        )
        faults[keep] = int(done.stdout)
    # 3 x 64 MiB are 49152 pages of 4 KiB, or 96 of 2 MiB.
    assert faults[True] < 20
    assert faults[None] > 50
    assert faults[False] > 50
