"""Masks on a model that FSDP2 has cut into shards: two gloo processes do what one does."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

import sparse_engine as se
from sparse_engine.errors import PruneError, SparseEngineError
from sparse_engine.prune import apply_masks_, hold_masks, set_masks
from sparse_engine.prune.dynamic import DynamicMask

ROOT = Path(__file__).resolve().parents[2]
STEPS = 4


def network() -> nn.Module:
    """Pruned layers with odd sizes: the shards of two processes differ."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(9, 17), nn.ReLU(), nn.Linear(17, 5))
    se.prune(model, sparsity=0.7)
    return model


def train(model: nn.Module, rank: int, world: int) -> None:
    """A few steps with momentum and weight decay; each process takes every world-th sample."""
    generator = torch.Generator().manual_seed(1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.2, momentum=0.9, weight_decay=0.1)
    with hold_masks(model, optimizer, mask_gradients=True):
        for _ in range(STEPS):
            x, y = torch.randn(8, 9, generator=generator), torch.randint(5, (8,), generator=generator)
            nn.functional.cross_entropy(model(x[rank::world]), y[rank::world]).backward()
            optimizer.step()
            optimizer.zero_grad()


def whole(model: nn.Module) -> dict[str, Tensor]:
    """All parameters, put together again."""
    return {name: p.full_tensor() if hasattr(p, "full_tensor") else p for name, p in model.state_dict().items()}


def work(folder: str) -> None:
    """What each of the two processes does."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    model = network()
    for layer in (model[0], model[2]):
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    train(model, dist.get_rank(), dist.get_world_size())
    found = whole(model)
    _new_masks_reach_the_shards(model)
    _refusals(model, mesh)
    if dist.get_rank() == 0:
        torch.save(found, Path(folder) / "found.pt")
    dist.destroy_process_group()


@torch.no_grad()
def _new_masks_reach_the_shards(model: nn.Module) -> None:
    local = model[0].weight.to_local()
    assert 0 < local.shape[0] < 17
    fewer = {name: mask & (torch.arange(mask.shape[1]) > 0) for name, mask in se.masks(model).items()}
    set_masks(model, fewer)
    assert not local[:, 0].any()
    local.fill_(1.0)
    apply_masks_(model)
    assert torch.equal(model[0].weight.full_tensor() != 0, fewer["0.weight"])


def _refusals(model: nn.Module, mesh: Any) -> None:
    from torch.distributed.fsdp import fully_shard

    with pytest.raises(PruneError, match="before fully_shard"):
        se.prune(model, sparsity=0.9)
    with pytest.raises(PruneError, match="before fully_shard"):
        DynamicMask(model, torch.optim.SGD(model.parameters(), lr=0.1), total_steps=10)
    sparse = network()
    se.sparsify_(sparse, force=True)
    with pytest.raises(SparseEngineError, match="densify_"):
        fully_shard(sparse, mesh=mesh)


def test_two_processes_with_shards_do_what_one_does(tmp_path: Path) -> None:
    script = f"from tests.prune.test_sharded import work; work({str(tmp_path)!r})"
    (tmp_path / "script.py").write_text(script)
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", tmp_path / "script.py"],
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}, capture_output=True, text=True,
        timeout=240, cwd=ROOT,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    found = torch.load(tmp_path / "found.pt")
    alone = network()
    before = {name: value.clone() for name, value in alone.state_dict().items()}
    train(alone, 0, 1)
    for name, value in alone.state_dict().items():
        torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-5)
        assert not torch.equal(before[name], value), name
    for name, mask in se.masks(alone).items():
        assert torch.equal(found[name] != 0, mask), name
