"""Dynamic data pruning in the manner of InfoBatch, as an order of samples with loss weights: no loader is touched."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sparse_engine.errors import SparseEngineError


class InfoBatchOrder:
    """Each epoch leaves out a random share ``ratio`` of the samples whose last loss was below the mean, and weighs
    those of them that stay by ``1 / (1 − ratio)``: the expected gradient is that of the full data (InfoBatch, arXiv
    2303.04947).

    Example::

        order = InfoBatchOrder(len(train), epochs=20)
        source = BatchSource(train, batch_size=128, order=order)        # or use it as a torch sampler, see below
        order.observe(batch.indices, per_sample_losses)

    ``order(epoch, generator)`` returns the positions and their weights. With a plain ``torch.utils.data.DataLoader``
    pass ``order.as_sampler()`` as its ``sampler`` and look the weights up with ``order.weights[indices]``.

    Args:
        size: N.
        epochs: of the training; the last ``1 − annealing`` of them use all data.
        ratio: share of the easy samples left out.
        annealing: share of the epochs during which samples are left out.
        seed: for ``as_sampler``.
    """

    def __init__(self, size: int, epochs: int, ratio: float = 0.5, annealing: float = 0.875, seed: int = 0) -> None:
        if not 0 <= ratio < 1 or not 0 <= annealing <= 1:
            raise SparseEngineError(f"ratio={ratio} has to lie in 0..1 (below 1), annealing={annealing} in 0..1")
        self.size = size
        self.epochs = epochs
        self.ratio = ratio
        self.annealing = annealing
        self.seed = seed
        self.losses = torch.full((size,), torch.inf)  # never seen: hard
        self.weights = torch.ones(size)
        self.visited = 0

    def __call__(self, epoch: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Positions of this epoch's samples in random order, and their weights."""
        kept = torch.ones(self.size, dtype=torch.bool)
        self.weights = torch.ones(self.size)
        known = self.losses.isfinite()
        if epoch < self.annealing * self.epochs and known.any() and self.ratio:
            easy = known & (self.losses < self.losses[known].mean())
            left_out = easy & (torch.rand(self.size, generator=generator) < self.ratio)
            kept &= ~left_out
            self.weights[easy] = 1 / (1 - self.ratio)
        positions = kept.nonzero().flatten()
        positions = positions[torch.randperm(len(positions), generator=generator)]
        self.visited += len(positions)
        return positions, self.weights[positions]

    def observe(self, indices: Tensor, losses: Tensor) -> None:
        """Remember the (unweighted) losses of a batch."""
        self.losses[indices.cpu()] = losses.detach().float().cpu()

    def as_sampler(self) -> _Sampler:
        """An iterable of indices for ``DataLoader(sampler=...)``: a new epoch each time it is iterated."""
        return _Sampler(self)

    def state_dict(self) -> dict[str, Any]:
        """Losses and the count of visits."""
        return {"losses": self.losses.clone(), "visited": self.visited}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what ``state_dict`` returned."""
        self.losses = state["losses"].clone()
        self.visited = state["visited"]


class _Sampler:
    def __init__(self, order: InfoBatchOrder) -> None:
        self.order = order
        self.epoch = 0

    def __iter__(self) -> Any:
        generator = torch.Generator().manual_seed(self.order.seed * 1_000_003 + self.epoch)
        positions, _ = self.order(self.epoch, generator)
        self.epoch += 1
        return iter(positions.tolist())

    def __len__(self) -> int:
        return self.order.size
