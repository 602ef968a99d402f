"""Scores of training samples: how hard, or how telling, each one is. Arrays by sample index; larger = harder."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sparse_engine.distill.batch import Batch
from sparse_engine.errors import FileFormatError, SparseEngineError


def el2n(logits: Tensor, labels: Tensor) -> Tensor:
    """``‖softmax(z) − onehot(y)‖₂`` per sample, [N]; early in training, averaged over runs (EL2N, arXiv 2107.07075).

    Example::

        scores = torch.stack([el2n(outputs(model, train), train.labels) for model in models]).mean(0)
    """
    _check(logits, labels)
    p = logits.float().softmax(1)
    return (p - F.one_hot(labels, p.shape[1])).norm(dim=1)


def margin(logits: Tensor, labels: Tensor) -> Tensor:
    """``1 − (p_y − max_{c ≠ y} p_c)`` per sample, [N], 0 to 2: large where another class comes close or wins.

    Example::

        margin(outputs(model, train), train.labels)
    """
    _check(logits, labels)
    p = logits.float().softmax(1)
    own = p.gather(1, labels[:, None]).squeeze(1)
    other = p.scatter(1, labels[:, None], -1.0).amax(1)
    return 1 - (own - other)


def grand_last_layer(features: Tensor, logits: Tensor, labels: Tensor, bias: bool = True) -> Tensor:
    """``‖∇ ℓ‖₂`` per sample with respect to the last linear layer only, in closed form, [N].

    The gradient is ``(softmax(z) − onehot) ⊗ [h, 1]``, so its norm is the product of two norms.

    Example::

        grand_last_layer(features, logits, labels)

    Args:
        features: inputs h of the last layer, [N, K].
        logits: its outputs, [N, C].
        labels: int64 [N].
        bias: whether that layer has one.
    """
    _check(logits, labels)
    length = features.float().square().sum(1) + (1.0 if bias else 0.0)
    return el2n(logits, labels) * length.sqrt()


def grand(model: nn.Module, batches: Iterable[Batch], size: int, chunk: int = 32) -> Tensor:
    """``‖∇_θ ℓ‖₂`` per sample over *all* parameters, [N], by vectorised per-sample gradients (GraNd, arXiv 2107.07075).

    The model is used in evaluation mode: with batch statistics a sample has no gradient of its own.

    Example::

        scores = grand(model, batches, size=len(train))

    Args:
        model: any module that ``torch.func`` can differentiate.
        batches: with indices.
        size: N of the data set.
        chunk: samples differentiated at once (memory: chunk × parameters).

    Returns:
        Scores by index; samples that no batch held are NaN.
    """
    training = model.training
    model.eval()
    parameters = {name: parameter.detach() for name, parameter in model.named_parameters()}
    buffers = dict(model.named_buffers())

    def loss(values: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
        z = torch.func.functional_call(model, (values, buffers), (x.unsqueeze(0),))
        return F.cross_entropy(z, y.unsqueeze(0))

    per_sample = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0, 0))
    scores = torch.full((size,), float("nan"))
    try:
        for batch in batches:
            if batch.indices is None:
                raise SparseEngineError("GraNd needs batch.indices: each sample's position in the data set")
            for start in range(0, len(batch), chunk):
                part = slice(start, start + chunk)
                gradients = per_sample(parameters, batch.inputs[part], batch.targets[part])
                squares = sum(g.flatten(1).square().sum(1) for g in gradients.values())
                scores[batch.indices[part].cpu()] = squares.sqrt().cpu()  # type: ignore[union-attr]
    finally:
        model.train(training)
    return scores


class ForgettingTracker:
    """Counts correct → incorrect transitions of every sample over training (Forgetting, arXiv 1812.05159).

    A sample that was never classified correctly gets the *maximum*: more than any that was, as if forgotten every time.

    Example::

        tracker = ForgettingTracker(len(train))
        tracker.observe(batch.indices, logits, batch.targets)      # for every training batch
        tracker.scores()
    """

    def __init__(self, size: int) -> None:
        self.correct = torch.zeros(size, dtype=torch.bool)
        self.learned = torch.zeros(size, dtype=torch.bool)
        self.forgotten = torch.zeros(size, dtype=torch.int64)
        self.visits = torch.zeros(size, dtype=torch.int64)

    @torch.no_grad()
    def observe(self, indices: Tensor, logits: Tensor, labels: Tensor) -> None:
        """Take note of a batch's predictions."""
        self.note(indices.cpu(), (logits.argmax(1) == labels).cpu())

    def note(self, indices: Tensor, now: Tensor) -> None:
        """As ``observe``, from which samples are classified correctly now (bool)."""
        self.forgotten[indices] += (self.correct[indices] & ~now).long()
        self.correct[indices] = now
        self.learned[indices] |= now
        self.visits[indices] += 1

    def scores(self) -> Tensor:
        """Float [N]: transitions; for the never learned, one more than the largest count possible (visits)."""
        worst = max(int(self.visits.max()) if len(self.visits) else 0, int(self.forgotten.max()), 0) + 1
        return self.forgotten.masked_fill(~self.learned, worst).float()

    def state_dict(self) -> dict[str, Tensor]:
        """All counters."""
        return {name: value.clone() for name, value in vars(self).items()}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Restore what ``state_dict`` returned."""
        for name, value in state.items():
            setattr(self, name, value.clone())


def herding(features: Tensor, labels: Tensor) -> Tensor:
    """Order by herding: each class's samples, greedily chosen so that the mean of the chosen follows the class mean.

    The score is larger for samples chosen *earlier* (``select(keep="hard")`` keeps them), from 1 down within each
    class.

    Source: Welling 2009.
    """
    scores = torch.empty(len(labels))
    features = F.normalize(features.float(), dim=1)
    for label in labels.unique():
        members = (labels == label).nonzero().flatten()
        mean = features[members].mean(0)
        total = torch.zeros_like(mean)
        left = torch.ones(len(members), dtype=torch.bool)
        similar = features[members]
        for rank in range(len(members)):
            wish = similar @ (mean * (rank + 1) - total)
            best = int(wish.masked_fill(~left, -torch.inf).argmax())
            left[best] = False
            total += similar[best]
            scores[members[best]] = 1 - rank / len(members)
    return scores


def k_centre(features: Tensor, labels: Tensor) -> Tensor:
    """Order by the greedy k-centre rule within each class: each choice is the sample farthest from all chosen so far.

    The first is the one nearest the class mean. Scored as in :func:`herding`.

    Source: Sener and Savarese, arXiv 1708.00489.
    """
    scores = torch.empty(len(labels))
    features = features.float()
    for label in labels.unique():
        members = (labels == label).nonzero().flatten()
        own = features[members]
        distance = torch.full((len(members),), torch.inf)
        chosen = int((own - own.mean(0)).norm(dim=1).argmin())
        for rank in range(len(members)):
            scores[members[chosen]] = 1 - rank / len(members)
            distance = torch.minimum(distance, (own - own[chosen]).norm(dim=1))
            distance[chosen] = -1
            chosen = int(distance.argmax())
    return scores


def penultimate(model: nn.Module, forward: Callable[[], Any]) -> Tensor:
    """The inputs of the model's last linear layer during ``forward()``, concatenated over calls, [N, K].

    Example::

        features = penultimate(model, lambda: outputs(model, train))
    """
    layers = [module for module in model.modules() if isinstance(module, nn.Linear)]
    if not layers:
        raise SparseEngineError(f"{type(model).__name__} has no linear layer to read features from")
    caught: list[Tensor] = []
    handle = layers[-1].register_forward_pre_hook(lambda _, inputs: caught.append(inputs[0].detach().flatten(1).cpu()))
    try:
        forward()
    finally:
        handle.remove()
    return torch.cat(caught)


def save_scores(path: str | Path, scores: Tensor, **notes: str) -> None:
    """Write scores (by sample index) and notes on how they were made as a compressed numpy file.

    Example::

        save_scores("el2n.npz", scores, score="el2n", runs="3")
    """
    from sparse_engine.io.atomic import atomic_write

    with atomic_write(path) as file:
        np.savez_compressed(file, scores=scores.cpu().numpy(), **{k: np.array(v) for k, v in notes.items()})


def load_scores(path: str | Path) -> Tensor:
    """Read what :func:`save_scores` wrote.

    Raises:
        FileFormatError: for another kind of file.
    """
    try:
        with np.load(path, allow_pickle=False) as file:
            return torch.from_numpy(file["scores"].copy())
    except FileNotFoundError:
        raise SparseEngineError(f"{path} does not exist") from None
    except Exception as error:
        raise FileFormatError(f"{path} is not a file of sample scores: {error}") from None


def _check(logits: Tensor, labels: Tensor) -> None:
    if logits.dim() != 2 or labels.shape != logits.shape[:1]:
        raise SparseEngineError(
            f"logits {tuple(logits.shape)} and labels {tuple(labels.shape)} do not fit; expected [N, C] and [N]"
        )
