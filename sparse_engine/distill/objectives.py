"""Losses with their state: what a training loop or a pruning criterion calls with a forward function and a batch.

Every objective computes its loss through :func:`sparse_engine.distill.functional.kd_loss` or its relatives there.
Because it gets the forward function, a criterion can substitute weights (meta-gradients), and the same object serves in
pruning and in training.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from typing import Any, ClassVar

import torch
import torch.distributed
from torch import Tensor, nn

from sparse_engine.errors import SparseEngineError
from sparse_engine.ops.kd_table import TOP_K, past_predictions, store_predictions

from .batch import Batch, Forward
from .functional import dlb_loss, kd_loss, kd_loss_into_table


class Objective:
    """Base of all objectives.

    Example::

        class Sharpened(Objective):
            def __call__(self, forward, batch):
                return kd_loss(forward(batch.inputs) * 2, batch.targets, sample_weights=batch.weights)

    Attributes:
        needs: what the batches have to carry beyond inputs and targets: ``"pairs"``, ``"second_view"``, ``"indices"``.
    """

    needs: ClassVar[frozenset[str]] = frozenset()
    is_objective: ClassVar[bool] = True

    def __call__(self, forward: Forward, batch: Batch) -> Tensor:
        """The scalar loss of a batch."""
        raise NotImplementedError

    def start_epoch(self, epoch: int, epochs: int) -> None:
        """Told before each epoch: 0-based number and the total."""

    def end_epoch(self) -> None:
        """Told after each epoch; gathers state between processes where that is needed."""

    def for_scoring(self) -> Objective:
        """A copy whose state may be moved freely, as pruning criteria need."""
        return copy.deepcopy(self)

    def warm(self, forward: Forward, batches: Iterable[Batch]) -> None:
        """Fill state that is vacuous at the start, by forward passes over ``batches``; nothing to do for most."""

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint has to hold."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what ``state_dict`` returned."""


class Smoothed(Objective):
    """Base of objectives whose hard part smooths the labels by ``current``, which anneals linearly over the epochs.

    Example::

        class Mine(Smoothed):
            def __call__(self, forward, batch):
                return kd_loss(forward(batch.inputs), batch.targets, label_smoothing=self.current)

    Args:
        label_smoothing: ε at the first epoch.
        final_label_smoothing: ε at the last epoch; the same as at the start when None.
    """

    def __init__(self, label_smoothing: float = 0.0, final_label_smoothing: float | None = None) -> None:
        self.first = label_smoothing
        self.last = label_smoothing if final_label_smoothing is None else final_label_smoothing
        self.current = self.first

    def start_epoch(self, epoch: int, epochs: int) -> None:
        share = epoch / (epochs - 1) if epochs > 1 else 1.0
        self.current = self.first + (self.last - self.first) * share


class CrossEntropy(Smoothed):
    """Cross entropy, with label smoothing that may anneal over the epochs.

    Example::

        objective = CrossEntropy(label_smoothing=0.1, final_label_smoothing=0.0)

    Args:
        label_smoothing, final_label_smoothing: as in :class:`Smoothed`.
    """

    def __call__(self, forward: Forward, batch: Batch) -> Tensor:
        return kd_loss(forward(batch.inputs), batch.targets, label_smoothing=self.current, sample_weights=batch.weights)


class TeacherDistillation(Smoothed):
    """Knowledge distillation from a frozen teacher that sees the same (augmented) inputs.

    Example::

        objective = TeacherDistillation(teacher, alpha=0.9, temperature=4.0)

    Args:
        teacher: a module; used in evaluation mode, without gradients, never changed. Not part of the state dict.
        alpha: share of the soft part; 1 ignores the labels exactly.
        temperature: T.
        label_smoothing, final_label_smoothing: of the hard part, as in :class:`Smoothed`.
    """

    def __init__(
        self,
        teacher: nn.Module,
        alpha: float = 0.9,
        temperature: float = 4.0,
        label_smoothing: float = 0.0,
        final_label_smoothing: float | None = None,
    ) -> None:
        super().__init__(label_smoothing, final_label_smoothing)
        self.teacher = teacher.eval().requires_grad_(False)
        self.alpha = alpha
        self.temperature = temperature

    def __call__(self, forward: Forward, batch: Batch) -> Tensor:
        with torch.no_grad():
            self.teacher.eval()
            theirs = self.teacher(batch.inputs)
        return kd_loss(
            forward(batch.inputs),
            batch.targets,
            teacher_logits=theirs,
            alpha=self.alpha,
            temperature=self.temperature,
            label_smoothing=self.current,
            sample_weights=batch.weights,
        )

    def for_scoring(self) -> TeacherDistillation:
        return self  # the teacher is never changed, a copy would only cost memory


class ClassWiseSelfDistillation(Smoothed):
    """CS-KD: ``CE(z(x), y) + λ T² KL(softmax(z(x′)/T) ‖ softmax(z(x)/T))`` with x′ another sample of the same class
    (arXiv 2003.13964).

    x′ goes through the same network in the same mode, without gradient. Batches carry ``pair_inputs``
    (:class:`sparse_engine.distill.PairSampler`); a batch without them raises.

    Args:
        weight: λ, 1 in the paper, 3 for fine-grained data. With 0 the loss is plain cross entropy, bit for bit.
        temperature: T.
        label_smoothing, final_label_smoothing: of the hard part, as in :class:`Smoothed`.
    """

    needs = frozenset({"pairs"})

    def __init__(
        self,
        weight: float = 1.0,
        temperature: float = 4.0,
        label_smoothing: float = 0.0,
        final_label_smoothing: float | None = None,
    ) -> None:
        super().__init__(label_smoothing, final_label_smoothing)
        self.weight = weight
        self.temperature = temperature

    def __call__(self, forward: Forward, batch: Batch) -> Tensor:
        if self.weight == 0:
            return kd_loss(
                forward(batch.inputs), batch.targets, label_smoothing=self.current, sample_weights=batch.weights
            )
        if batch.pair_inputs is None:
            raise SparseEngineError(
                "class-wise self-distillation needs pair_inputs: another sample of the same class for each one; "
                "make the batches with sparse_engine.distill.PairSampler"
            )
        with torch.no_grad():
            theirs = forward(batch.pair_inputs)
        return kd_loss(
            forward(batch.inputs),
            batch.targets,
            teacher_logits=theirs,
            temperature=self.temperature,
            soft_weight=self.weight,
            label_smoothing=self.current,
            sample_weights=batch.weights,
        )


class ProgressiveSelfDistillation(Objective):
    """PS-KD: cross entropy against ``(1 − α_t) · onehot + α_t · p_prev(x)``, p_prev the model's own softmax one epoch
    ago (arXiv 2006.12000).

    ``α_t = α_T · (e + 1) / E``. The table of predictions starts one-hot (:meth:`warm` fills it from a forward pass,
    which is needed for the loss to say anything before the first epoch), is part of the state dict, and is gathered
    between processes at the end of an epoch.

    Args:
        labels: int64 [N], labels of the training set by index.
        classes: C.
        alpha: α_T.
        dtype: of the table; float16 halves it.
        top_k: keep only the 1, 2, 4, 8 or 16 largest probabilities of each sample and spread the rest evenly.
        device: where the table is. On the model's GPU one kernel gathers, mixes and replaces its rows, and nothing has
            to wait for the GPU; on the CPU (default) it takes none of the GPU's memory.
    """

    needs = frozenset({"indices"})

    def __init__(
        self,
        labels: Tensor,
        classes: int,
        alpha: float = 0.8,
        dtype: torch.dtype = torch.float32,
        *,
        top_k: int | None = None,
        device: torch.device | str = "cpu",
    ) -> None:
        if not 0 <= alpha <= 1:
            raise SparseEngineError(f"alpha is {alpha}; it has to lie in 0..1")
        if top_k is not None and (top_k not in TOP_K or top_k >= classes):
            raise SparseEngineError(f"top_k is {top_k}; one of {TOP_K}, below the {classes} classes, expected")
        self.alpha = alpha
        self.current = alpha
        self.classes = classes
        labels = labels.to(device).long()
        if top_k is None:
            self.table = torch.nn.functional.one_hot(labels, classes).to(dtype)
            self.index: Tensor | None = None
        else:
            self.table = torch.zeros(len(labels), top_k, dtype=dtype, device=labels.device)
            self.index = torch.full((len(labels), top_k), -1, dtype=torch.int32, device=labels.device)
            self.table[:, 0], self.index[:, 0] = 1, labels.int()
        self.seen = torch.zeros(len(labels), dtype=torch.bool, device=labels.device)
        self.differentiable_again = False

    def __call__(self, forward: Forward, batch: Batch) -> Tensor:
        outputs = forward(batch.inputs)
        if self.alpha == 0:
            return kd_loss(outputs, batch.targets, sample_weights=batch.weights)
        where = self._positions(batch)
        self.seen[where] = True
        if outputs.device == self.table.device and not self.differentiable_again:
            return kd_loss_into_table(
                outputs,
                batch.targets,
                self.table,
                where,
                alpha=self.current,
                index=self.index,
                sample_weights=batch.weights,
            )
        previous = past_predictions(self.table, self.index, where, self.classes).to(outputs.device, torch.float32)
        store_predictions(self.table, self.index, where, outputs.detach().float().softmax(-1).to(self.table.device))
        return kd_loss(
            outputs,
            batch.targets,
            soft_targets=previous,
            alpha=self.current,
            soft_form="ce",
            sample_weights=batch.weights,
        )

    def for_scoring(self) -> ProgressiveSelfDistillation:
        scoring = copy.deepcopy(self)
        scoring.differentiable_again = True  # the past predictions are kept for second derivatives
        return scoring

    def start_epoch(self, epoch: int, epochs: int) -> None:
        self.current = self.alpha * (epoch + 1) / max(1, epochs)

    def end_epoch(self) -> None:
        if _distributed():
            if self.index is not None:
                self._gather_top_k(self.index)
                self.seen.zero_()
                return
            mine = self.table.float() * self.seen[:, None]
            count = self.seen.float()
            torch.distributed.all_reduce(mine)
            torch.distributed.all_reduce(count)
            known = count > 0
            self.table[known] = (mine[known] / count[known, None]).to(self.table)
        self.seen.zero_()

    @torch.no_grad()
    def warm(self, forward: Forward, batches: Iterable[Batch]) -> None:
        for batch in batches:
            predictions = forward(batch.inputs).float().softmax(-1).to(self.table.device)
            store_predictions(self.table, self.index, self._positions(batch), predictions)

    def state_dict(self) -> dict[str, Any]:
        top_k = {} if self.index is None else {"index": self.index.clone()}
        return {"table": self.table.clone(), "current": self.current, **top_k}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if state["table"].shape != self.table.shape:
            raise SparseEngineError(
                f"the saved prediction table is {tuple(state['table'].shape)}, this data set asks for "
                f"{tuple(self.table.shape)}"
            )
        if (self.index is None) != ("index" not in state):
            raise SparseEngineError(
                "one of the saved prediction table and this one is a top-k table, the other a full one"
            )
        self.table = state["table"].to(self.table).clone()
        if self.index is not None:
            self.index = state["index"].to(self.index).clone()
        self.current = state["current"]

    def _positions(self, batch: Batch) -> Tensor:
        if batch.indices is None:
            raise SparseEngineError(
                "progressive self-distillation needs batch.indices: each sample's position in the data set"
            )
        return batch.indices.to(self.table.device, torch.int64)

    def _gather_top_k(self, index: Tensor) -> None:
        """Gives every process the rows of whoever saw them; of several, the one with the highest rank."""
        me = torch.distributed.get_rank() + 1
        last = self.seen.int() * me
        torch.distributed.all_reduce(last, op=torch.distributed.ReduceOp.MAX)
        mine = (last == me)[:, None]
        values, classes = self.table.float() * mine, (index + 1) * mine
        torch.distributed.all_reduce(values)
        torch.distributed.all_reduce(classes)
        known = last > 0
        self.table[known] = values[known].to(self.table)
        index[known] = classes[known] - 1


class LastBatchSelfDistillation(Objective):
    """DLB: each step repeats the last batch (in its second view) and distils what the model said about it then (arXiv
    2203.16172).

    ``CE on [this batch ‖ last batch, second view] + α T² KL(softmax(z_last/T) ‖ softmax(z_now/T))``, the KL over the
    repeated half; one forward pass over both. The first step is plain cross entropy; the last batch is carried across
    epochs and checkpoints.

    Args:
        weight: α; with 0 the loss is plain cross entropy of the batch, bit for bit (nothing is repeated).
        temperature: T.
    """

    needs = frozenset({"second_view"})

    def __init__(self, weight: float = 1.0, temperature: float = 3.0) -> None:
        self.weight = weight
        self.temperature = temperature
        self.last: tuple[Tensor, Tensor, Tensor] | None = None

    def __call__(self, forward: Forward, batch: Batch) -> Tensor:
        if self.weight == 0:
            return kd_loss(forward(batch.inputs), batch.targets, sample_weights=batch.weights)
        view = batch.inputs if batch.second_view is None else batch.second_view
        if self.last is None:
            now = forward(batch.inputs)
            self.last = (view.detach(), batch.targets, now.detach())
            return kd_loss(now, batch.targets, sample_weights=batch.weights)
        inputs, targets, logits = (part.to(batch.targets.device) for part in self.last)
        both = forward(torch.cat([batch.inputs, inputs]))
        now = both[: len(batch)]
        weights = None if batch.weights is None else torch.cat([batch.weights, batch.weights.new_ones(len(targets))])
        self.last = (view.detach(), batch.targets, now.detach())
        return dlb_loss(
            both,
            torch.cat([batch.targets, targets]),
            logits,
            weight=self.weight,
            temperature=self.temperature,
            sample_weights=weights,
        )

    def for_scoring(self) -> LastBatchSelfDistillation:
        return type(self)(self.weight, self.temperature)

    def state_dict(self) -> dict[str, Any]:
        """The last batch; under several processes each has its own part of it, and every process gets them all here."""
        mine = None if self.last is None else [part.cpu().clone() for part in self.last]
        if not _distributed():
            return {"last": mine}
        parts: list[Any] = [None] * torch.distributed.get_world_size()
        torch.distributed.all_gather_object(parts, mine)
        return {"last": mine, "by_rank": parts}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        last = state["last"]
        if "by_rank" in state or _distributed():
            parts = state.get("by_rank", [last])
            world = torch.distributed.get_world_size() if _distributed() else 1
            if len(parts) != world:
                raise SparseEngineError(
                    f"the saved last batch is that of {len(parts)} process(es), this run has {world}; resume with as "
                    "many processes as before"
                )
            last = parts[torch.distributed.get_rank() if _distributed() else 0]
        self.last = None if last is None else tuple(last)  # type: ignore[assignment]


class Supervised(Objective):
    """A plain ``loss(outputs, targets)`` of the user's as an objective.

    Example::

        Supervised(torch.nn.functional.mse_loss)

    Args:
        loss: callable of (outputs, targets) returning a scalar; batches with sample weights need it to accept
            ``reduction="none"``.
    """

    def __init__(self, loss: Callable[..., Tensor]) -> None:
        self.loss = loss

    def __call__(self, forward: Forward, batch: Batch) -> Tensor:
        outputs = forward(batch.inputs)
        if batch.weights is None:
            return self.loss(outputs, batch.targets)
        per_sample = self.loss(outputs, batch.targets, reduction="none")
        return (per_sample * batch.weights).sum() / len(batch)


def _distributed() -> bool:
    return torch.distributed.is_available() and torch.distributed.is_initialized()


def as_objective(loss: Any) -> Objective:
    """An objective from what users pass as ``loss=``: None (cross entropy), an objective, or ``loss(outputs,
    targets)``.

    Raises:
        SparseEngineError: for something that cannot be called.
    """
    if loss is None:
        return CrossEntropy()
    if getattr(loss, "is_objective", False):
        return loss
    if not callable(loss):
        raise SparseEngineError(
            f"loss is a {type(loss).__name__}; pass a function of (outputs, targets) or an objective"
        )
    return Supervised(loss)
