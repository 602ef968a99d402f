"""Batches in a repeatable order: everything random follows from (seed, epoch), so that an epoch can be replayed."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

import torch
from torch import Tensor

from sparse_engine.distill.batch import Batch
from sparse_engine.distill.samplers import PairSampler

from .data import ArrayData

#: (epoch, generator) to the positions of that epoch's samples, in order, and their loss weights (or None)
Order = Callable[[int, torch.Generator], tuple[Tensor, Tensor | None]]


class BatchSource:
    """A data set cut into batches, with what the loss asks for.

    Example::

        source = BatchSource(train, batch_size=128, seed=0, needs={"pairs"})
        for batch in source.epoch(0):
            batch.inputs, batch.pair_inputs

    Under several processes each rank gets its part of every batch; augmentation and pairs are drawn for the whole batch
    first, so that the union over ranks is what one process would see.

    Args:
        data: the training set.
        batch_size: samples per optimiser step, over all processes.
        seed: of order, augmentation and pairs.
        needs: of the objective.
        order: which samples make an epoch; a new permutation of all of them each epoch when None.
        rank, world: this process among all.
        device: where batches go.
    """

    def __init__(
        self,
        data: ArrayData,
        *,
        batch_size: int,
        seed: int = 0,
        needs: frozenset[str] | set[str] = frozenset(),
        order: Order | None = None,
        rank: int = 0,
        world: int = 1,
        device: torch.device | str = "cpu",
    ) -> None:
        self.data = data
        self.batch_size = batch_size
        self.seed = seed
        self.needs = frozenset(needs)
        self.order = order
        self.rank = rank
        self.world = world
        self.device = device
        self.pairs = PairSampler(data.labels, seed) if "pairs" in self.needs else None

    def __len__(self) -> int:
        """Batches of an epoch that visits every sample once."""
        return len(self._starts(len(self.data)))

    def epoch(self, epoch: int) -> Iterator[Batch]:
        """This process's part of the batches of an epoch."""
        generator = torch.Generator().manual_seed((self.seed * 1_000_003 + epoch) * 2 + 1)
        if self.pairs is not None:
            self.pairs.generator.manual_seed((self.seed * 1_000_003 + epoch) * 2)
        weights = None
        if self.order is None:
            positions = torch.randperm(len(self.data), generator=generator)
        else:
            positions, weights = self.order(epoch, generator)
        for start in self._starts(len(positions)):
            chosen = positions[start : start + self.batch_size]
            batch = self._batch(chosen, generator)
            if weights is not None:
                batch = replace(batch, weights=weights[start : start + self.batch_size])
            yield self._part(batch).to(self.device)

    def share(self, batch: Batch) -> float:
        """The factor on a rank's mean loss that makes the average over ranks the mean over the whole batch."""
        if self.world == 1:
            return 1.0
        return len(batch) * self.world / self._whole

    def _batch(self, chosen: Tensor, generator: torch.Generator) -> Batch:
        batch = self.data.batch(chosen, generator=generator)
        if self.pairs is not None:
            batch = replace(batch, pair_inputs=self.data.batch(self.pairs.partners(chosen), generator=generator).inputs)
        if "second_view" in self.needs:
            batch = replace(batch, second_view=self.data.batch(chosen, generator=generator).inputs)
        return batch

    def _part(self, batch: Batch) -> Batch:
        self._whole = len(batch)
        if self.world == 1:
            return batch
        parts = {
            name: value[self.rank :: self.world] for name, value in vars(batch).items() if isinstance(value, Tensor)
        }
        return replace(batch, **parts)

    def _starts(self, samples: int) -> range:
        """A last batch of one sample is left out (batch norm cannot train on it), and one smaller than the ranks."""
        starts = range(0, samples, self.batch_size)
        left = samples - (len(starts) - 1) * self.batch_size if len(starts) else 0
        too_small = left < 2 * self.world and len(starts) > 1
        return starts[:-1] if too_small else starts
