"""One batch as the training loop, the pruning criteria and the losses see it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

from sparse_engine.errors import SparseEngineError

Forward = Callable[[Any], Tensor]


@dataclass(frozen=True)
class Batch:
    """Inputs with their labels and, where a loss asks for them, indices and second inputs.

    Example::

        batch = Batch(inputs=torch.rand(8, 3, 32, 32), targets=torch.randint(10, (8,)), indices=torch.arange(8))

    Args:
        inputs: what the model is called with, first dimension N.
        targets: labels, int64 [N] (or whatever the loss takes).
        indices: int64 [N], the position of each sample in its data set; prediction tables and per-sample scores need
            it.
        pair_inputs: for each sample another one of the same class, same shape as ``inputs`` (class-wise
            self-distillation).
        second_view: a second augmentation of the same samples, same shape as ``inputs`` (last-batch self-distillation).
        weights: float [N], a factor on each sample's loss (rescaling samplers).
    """

    inputs: Any
    targets: Tensor
    indices: Tensor | None = None
    pair_inputs: Any = None
    second_view: Any = None
    weights: Tensor | None = None

    def to(self, device: torch.device | str, **options: Any) -> Batch:
        """The same batch with every tensor on ``device``."""
        moved = {
            field.name: getattr(self, field.name).to(device, **options)
            for field in fields(self)
            if isinstance(getattr(self, field.name), Tensor)
        }
        return replace(self, **moved)

    def __len__(self) -> int:
        return len(self.targets)


def as_batch(item: Any) -> Batch:
    """A Batch from what data loaders yield: a Batch, (inputs, targets), (inputs, targets, indices) or {"inputs": …,
    "targets": …}.

    Raises:
        SparseEngineError: for anything else.
    """
    if isinstance(item, Batch):
        return item
    if isinstance(item, dict) and {"inputs", "targets"} <= set(item):
        return Batch(**item)
    if isinstance(item, tuple | list) and len(item) in (2, 3):
        return Batch(*item)
    described = (
        f"{type(item).__name__} of {len(item)}" if isinstance(item, tuple | list | dict) else type(item).__name__
    )
    raise SparseEngineError(
        f"a batch has to be (inputs, targets), (inputs, targets, indices) or a Batch; got a {described}"
    )


def as_batches(data: Any) -> Iterator[Batch]:
    """Iterate batches over a loader, a list of batches, or one (inputs, targets) pair of tensors."""
    if isinstance(data, Batch):
        yield data
    elif isinstance(data, tuple) and len(data) in (2, 3) and all(isinstance(part, Tensor) for part in data):
        yield Batch(*data)
    elif isinstance(data, Iterable):
        for item in data:
            yield as_batch(item)
    else:
        raise SparseEngineError(
            f"data has to be an iterable of batches or one (inputs, targets) pair; got {type(data).__name__}"
        )
