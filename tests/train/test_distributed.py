"""Two gloo processes under torchrun do what one does."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from sparse_engine.prune.structured import load_compact
from sparse_engine.train import models

ROOT = Path(__file__).resolve().parents[2]

SCRIPT = """
import json, sys
import torch
torch.set_num_threads(1)
import sparse_engine as se
from sparse_engine.train import run
recipe, out, options = sys.argv[1], sys.argv[2], json.loads(sys.argv[3])
kill_at = options.pop("kill_at", None)
if kill_at is not None:
    from sparse_engine.train import loop
    usual, steps = loop.learning_rate, 0

    def learning_rate(*arguments):  # asked at the beginning of every step
        global steps
        steps += 1
        if steps == kill_at:
            __import__("os")._exit(0)  # no handler runs, nothing is written any more
        return usual(*arguments)

    loop.learning_rate = learning_rate
result = run(recipe, "digits", out=out, progress=False, resume=True, **options)
rank = int(__import__("os").environ.get("RANK", 0))
torch.save({k: v for k, v in result.model.state_dict().items()}, f"{out}-rank{rank}.pt")
"""

COMMON = {
    "model.options": {"hidden": [24, 24]}, "data.limit": 200, "train.epochs": 2, "train.batch_size": 32,
    "train.learning_rate": 0.05, "convert.enabled": False, "train.sparse_kernels": "never",
}  # fmt: skip


def launch(folder: Path, recipe: str, options: dict, processes: int, name: str = "") -> Path:
    script = folder / "script.py"
    script.write_text(SCRIPT)
    out = folder / f"{recipe}-{processes}{name}"
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    starter = [sys.executable]
    if processes > 1:
        starter += ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    done = subprocess.run(
        [*starter, str(script), recipe, str(out), json.dumps({**COMMON, **options})],
        env=environment, capture_output=True, text=True, timeout=240,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return out


@pytest.mark.parametrize(
    "recipe, options",
    [
        ("epsd", {"prune.options": {"steps": 1, "mode": "first_order"}, "loss.name": "ps_kd"}),
        pytest.param("rigl", {"dynamic.every": 2}, marks=pytest.mark.slow),
        pytest.param("rigl", {"dynamic.every": 2, "train.sparse_kernels": "always"}, marks=pytest.mark.slow),
        pytest.param(
            "data_pruning_kd",
            {"teacher.epochs": 1, "coreset.score": "forgetting", "coreset.epochs": 3, "coreset.updates": "epochs"},
            marks=pytest.mark.slow,
        ),
        pytest.param(
            "magnitude",
            {"pretrain.epochs": 1, "prune.keep_one": True, "coreset.score": "infobatch", "coreset.fraction": 0.5},
            marks=pytest.mark.slow,
        ),
    ],
)
def test_two_processes_agree_with_each_other_and_with_one(tmp_path, recipe, options):
    two, one = launch(tmp_path, recipe, options, 2), launch(tmp_path, recipe, options, 1)
    first, second = (torch.load(f"{two}-rank{rank}.pt") for rank in (0, 1))
    alone = load_file(one / "model.safetensors")
    together = load_file(two / "model.safetensors")
    for name, value in first.items():
        assert torch.equal(value, second[name]), name
        assert torch.equal(value != 0, alone[name] != 0), name
        torch.testing.assert_close(value, alone[name], rtol=1e-3, atol=1e-4)
        assert torch.equal(value, together[name])
    rows = json.loads((two / "log.json").read_text())
    assert [row["phase"] for row in rows].count("train") == 2


@pytest.mark.parametrize(
    "recipe, kill_at, options",
    [
        ("epsd", 10, {"prune.options": {"steps": 1, "mode": "first_order"}, "loss.name": "dlb", "train.epochs": 3}),
        pytest.param("rigl", 10, {"dynamic.every": 2, "train.sparse_kernels": "always"}, marks=pytest.mark.slow),
        pytest.param("end_to_end", 10, {"pretrain.epochs": 2, "prune.sparsity": 0.9}, marks=pytest.mark.slow),
    ],
)
def test_two_killed_processes_resume_bit_for_bit(tmp_path, recipe, kill_at, options):
    whole = launch(tmp_path, recipe, options, 2)
    launch(tmp_path, recipe, {**options, "kill_at": kill_at}, 2, "-killed")
    assert not (tmp_path / f"{recipe}-2-killed" / "summary.json").exists()
    resumed = launch(tmp_path, recipe, options, 2, "-killed")
    for rank in (0, 1):
        first, second = (torch.load(f"{out}-rank{rank}.pt") for out in (whole, resumed))
        for name, value in first.items():
            assert torch.equal(value, second[name]), (rank, name)


def test_two_processes_agree_on_the_subnet_of_stp(tmp_path):
    """Batch norm sees half a batch in each process, so the result is not that of one; but all processes make the same
    cuts, train the same weights and measure the same statistics for the subnet."""
    options = {
        "model.options": {"option": "B", "width": 4}, "model.name": "resnet14", "stp.target": 0.5, "stp.pool": 2,
        "stp.calibration": 3,
    }  # fmt: skip
    out = launch(tmp_path, "stp", options, 2)
    first, second = (torch.load(f"{out}-rank{rank}.pt") for rank in (0, 1))
    assert first.keys() == second.keys()
    for name, value in first.items():
        assert torch.equal(value, second[name]), name
    found = json.loads((out / "summary.json").read_text())["stp"]
    assert found["cost"] <= 0.5 * found["full_cost"]
    dense = models.build("resnet14", num_classes=10, in_channels=1, option="B", width=4)
    small = load_compact(out / "compact.safetensors", dense)
    for name, value in small.state_dict().items():
        assert torch.equal(value, first[name]), name
