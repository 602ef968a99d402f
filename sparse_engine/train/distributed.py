"""The little that the training loop needs to run under torchrun."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn


@dataclass(frozen=True)
class Processes:
    """This process among all: rank 0 of 1 without torchrun."""

    rank: int = 0
    world: int = 1
    local: int = 0
    started_here: bool = False

    @property
    def first(self) -> bool:
        """Whether this process writes files and talks."""
        return self.rank == 0


def join(device: str = "cpu") -> Processes:
    """Join the process group that torchrun announces (gloo on the CPU, NCCL on GPUs); alone without torchrun.

    Example::

        processes = join()
    """
    if dist.is_available() and dist.is_initialized():
        return Processes(dist.get_rank(), dist.get_world_size(), int(os.environ.get("LOCAL_RANK", 0)))
    if "RANK" not in os.environ or "WORLD_SIZE" not in os.environ:
        return Processes()
    dist.init_process_group("nccl" if device.startswith("cuda") else "gloo")
    return Processes(dist.get_rank(), dist.get_world_size(), int(os.environ.get("LOCAL_RANK", 0)), True)


def leave(processes: Processes) -> None:
    """Leave the group again if :func:`join` started it."""
    if processes.started_here:
        dist.destroy_process_group()


def wrapped(model: nn.Module, processes: Processes) -> nn.Module:
    """The model in DistributedDataParallel where there is more than one process."""
    if processes.world == 1:
        return model
    devices = [next(model.parameters()).device.index] if next(model.parameters()).is_cuda else None
    return nn.parallel.DistributedDataParallel(model, device_ids=devices, broadcast_buffers=False)


def agree(value: Any, processes: Processes) -> Any:
    """Rank 0's object, on every rank."""
    if processes.world == 1:
        return value
    box = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]


@torch.no_grad()
def average_buffers(model: nn.Module, processes: Processes) -> None:
    """Give all ranks the mean of the batch-norm statistics, so that they evaluate and save the same model."""
    if processes.world == 1:
        return
    for buffer in model.buffers():
        if buffer.is_floating_point():
            dist.all_reduce(buffer)
            buffer /= processes.world


def total(values: Tensor, processes: Processes) -> Tensor:
    """The sum over ranks."""
    if processes.world > 1:
        dist.all_reduce(values)
    return values
