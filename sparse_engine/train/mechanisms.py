"""What takes part in a phase: rewiring masks, learned gates, annealed helpers, trackers of samples."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sparse_engine.coreset import ForgettingTracker, InfoBatchOrder
from sparse_engine.distill.batch import Batch
from sparse_engine.prune import LearnedMasks

from .loop import Mechanism, Phase
from .post import PostPruning


class Rewiring(Mechanism):
    """Masks that move: anything with ``update(step) -> bool``, made when the optimiser exists.

    Args:
        make: from the phase to a ``DynamicMask``, ``GraNet`` or ``GradualPruning``.
        before: whether it acts before the optimiser step (and may replace it) or after.
    """

    def __init__(self, make: Callable[[Phase], Any], before: bool) -> None:
        self.make = make
        self.before = before
        self.inner: Any = None

    def attach(self, phase: Phase) -> None:
        self.phase = phase
        self.inner = self.make(phase)

    def progress(self, share: float) -> None:
        if hasattr(self.inner, "prepare"):
            self.inner.prepare(self.phase.step + 1)

    def before_step(self, step: int) -> bool:
        return bool(self.inner.update(step)) if self.before else False

    def after_step(self, step: int) -> None:
        if not self.before:
            self.inner.update(step)

    def state_dict(self) -> dict[str, Any]:
        return self.inner.state_dict() if hasattr(self.inner, "state_dict") else {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if hasattr(self.inner, "load_state_dict"):
            self.inner.load_state_dict(state)


class GateTraining(Mechanism):
    """Learned gates on every weight; their penalty joins the loss. The gates' own values are part of the model's state.

    Gates have an Adam optimiser of their own: their gradients are products of a weight and its gradient, several orders
    of magnitude smaller than the weights', and what counts is their sign against the penalty's.

    Args:
        gates: on the phase's model.
        rate: learning rate of the gates' logits.
    """

    def __init__(self, gates: LearnedMasks, rate: float = 0.05) -> None:
        self.gates = gates
        self.optimizer = torch.optim.Adam(gates.parameters(), lr=rate)

    def parameters(self) -> list[nn.Parameter]:
        return self.gates.parameters()

    def progress(self, share: float) -> None:
        self.gates.set_progress(share)
        self.optimizer.zero_grad(set_to_none=True)

    def penalty(self) -> Tensor:
        return self.gates.penalty()

    def after_step(self, step: int) -> None:
        self.optimizer.step()

    def state_dict(self) -> dict[str, Any]:
        return self.optimizer.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.optimizer.load_state_dict(state)


class Helpers(Mechanism):
    """Soft activations and skip connections, annealed by the share of the phase done."""

    def __init__(self, post: PostPruning) -> None:
        self.post = post

    def progress(self, share: float) -> None:
        self.post.set_progress(share)


class Forgetting(Mechanism):
    """Feeds a :class:`ForgettingTracker` from the training passes, epoch by epoch and over all processes."""

    def __init__(self, tracker: ForgettingTracker) -> None:
        self.tracker = tracker
        self.seen = torch.zeros(len(tracker.visits), dtype=torch.bool)
        self.correct = torch.zeros(len(tracker.visits))

    def observe(self, batch: Batch, outputs: Tensor) -> None:
        if batch.indices is not None:
            where = batch.indices.cpu()
            self.seen[where] = True
            self.correct[where] = (outputs.argmax(1) == batch.targets).float().cpu()

    def end_epoch(self) -> None:
        correct, seen = _over_processes(self.correct, self.seen)
        where = seen.nonzero().flatten()
        self.tracker.note(where, correct[where] > 0.5)
        self.seen.zero_()

    def state_dict(self) -> dict[str, Any]:
        return self.tracker.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.tracker.load_state_dict(state)


class InfoBatch(Mechanism):
    """Tells an :class:`InfoBatchOrder` the loss of every sample, after each epoch and from all processes."""

    def __init__(self, order: InfoBatchOrder) -> None:
        self.order = order
        self.seen = torch.zeros(order.size, dtype=torch.bool)
        self.losses = torch.zeros(order.size)

    @torch.no_grad()
    def observe(self, batch: Batch, outputs: Tensor) -> None:
        if batch.indices is not None:
            where = batch.indices.cpu()
            self.seen[where] = True
            self.losses[where] = F.cross_entropy(outputs.float(), batch.targets, reduction="none").cpu()

    def end_epoch(self) -> None:
        losses, seen = _over_processes(self.losses, self.seen)
        where = seen.nonzero().flatten()
        self.order.observe(where, losses[where])
        self.seen.zero_()

    def state_dict(self) -> dict[str, Any]:
        return self.order.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.order.load_state_dict(state)


def _over_processes(values: Tensor, seen: Tensor) -> tuple[Tensor, Tensor]:
    """Values by sample, averaged over the processes that saw the sample, and which samples any of them saw."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return values, seen
    sums, counts = values * seen, seen.float()
    torch.distributed.all_reduce(sums)
    torch.distributed.all_reduce(counts)
    return sums / counts.clamp(min=1), counts > 0
