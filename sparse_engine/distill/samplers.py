"""Which sample goes with which: pairs of one class for class-wise self-distillation."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sparse_engine.errors import SparseEngineError


class PairSampler:
    """For each sample of a batch draws another one of the same class.

    Example::

        pairs = PairSampler(labels, seed=0)
        partner = pairs.partners(torch.tensor([0, 17, 3]))      # indices of other samples of the same classes

    Args:
        labels: int64 [N], of the whole training set.
        seed: of the random numbers; the generator's state is part of the state dict, so that a resumed run draws the
            same partners.
    """

    def __init__(self, labels: Tensor, seed: int = 0) -> None:
        labels = labels.cpu().long()
        if labels.dim() != 1 or not len(labels):
            raise SparseEngineError(f"labels have to be one non-empty vector; got shape {tuple(labels.shape)}")
        self.labels = labels
        # samples sorted by class: class c occupies order[start[c] : start[c] + count[c]]
        self.order = torch.argsort(labels, stable=True)
        self.count = torch.bincount(labels)
        self.start = self.count.cumsum(0) - self.count
        self.rank = torch.empty_like(self.order)
        self.rank[self.order] = torch.arange(len(labels)) - self.start[labels[self.order]]
        self.generator = torch.Generator().manual_seed(seed)

    def partners(self, indices: Tensor) -> Tensor:
        """Indices [n] of random other samples of the same classes; a class with a single sample pairs it with
        itself.
        """
        label = self.labels[indices]
        count = self.count[label]
        draw = torch.rand(len(indices), generator=self.generator, dtype=torch.float64)
        step = 1 + (draw * (count - 1)).long().clamp(max=(count - 2).clamp(min=0))
        position = (self.rank[indices] + step) % count
        return self.order[self.start[label] + position]

    def state_dict(self) -> dict[str, Any]:
        """The generator's state."""
        return {"generator": self.generator.get_state()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what ``state_dict`` returned."""
        self.generator.set_state(state["generator"])
