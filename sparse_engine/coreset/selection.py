"""From scores to the part of the data that is kept, and how much of the loss the teacher should then be."""

from __future__ import annotations

import torch
from torch import Tensor

from sparse_engine.errors import SparseEngineError


def select(
    scores: Tensor,
    fraction: float,
    *,
    keep: str = "hard",
    labels: Tensor | None = None,
    balance: bool = True,
    seed: int = 0,
) -> Tensor:
    """Indices of the samples to keep, sorted; exactly ``round(fraction × N)`` of them.

    Example::

        kept = select(el2n_scores, 0.1, keep="hard", labels=train.labels)

    Args:
        scores: [N], larger = harder. NaN is refused.
        fraction: share to keep, 0 to 1.
        keep: ``"hard"`` (largest scores), ``"easy"`` or ``"random"``.
        labels: int64 [N], needed for balance.
        balance: keep the same share of every class (by largest remainder). Without it hardest-first loses whole classes
            at small fractions.
        seed: of ``keep="random"``; ties are broken by index otherwise.

    Raises:
        SparseEngineError: for a fraction that keeps nothing, NaN scores or missing labels.
    """
    n = len(scores)
    total = round(fraction * n)
    if not 0 <= fraction <= 1 or total < 1:
        raise SparseEngineError(
            f"fraction {fraction} of {n} samples keeps {total}; it has to keep at least 1 and at most all"
        )
    if torch.isnan(scores.float()).any():
        raise SparseEngineError(
            f"{int(torch.isnan(scores.float()).sum())} of {n} scores are NaN; every sample needs one"
        )
    if keep not in ("hard", "easy", "random"):
        raise SparseEngineError(f"keep is {keep!r}; it has to be 'hard', 'easy' or 'random'")
    if keep == "random":
        key = torch.rand(n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    else:
        key = scores.double() if keep == "hard" else -scores.double()
    if not balance:
        return torch.sort(torch.sort(key, descending=True, stable=True).indices[:total]).values
    if labels is None or len(labels) != n:
        raise SparseEngineError(
            "balance=True needs labels of the same length as the scores; pass them or balance=False"
        )
    classes, counts = labels.unique(return_counts=True)
    ideal = counts.double() * total / n
    quota = ideal.floor().long()
    for position in torch.sort(ideal - quota, descending=True, stable=True).indices[: total - int(quota.sum())]:
        quota[position] += 1
    kept = []
    for label, count in zip(classes, quota, strict=True):
        members = (labels == label).nonzero().flatten()
        kept.append(members[torch.sort(key[members], descending=True, stable=True).indices[: int(count)]])
    return torch.sort(torch.cat(kept)).values


def default_alpha(fraction: float) -> float:
    """The share of the teacher in the loss when nothing better is known: ``clip(1 − f, 0.1, 0.95)``.

    The paper (arXiv 2403.07854) gives no closed form, only that the best α is near 1 at f ≈ 0.1 and small near f = 1;
    this line has that shape. What was measured on small data stands in docs/reproduction.md; a grid on a validation
    split is better than either.

    Example::

        default_alpha(0.1)      # 0.9
    """
    if not 0 < fraction <= 1:
        raise SparseEngineError(f"fraction is {fraction}; it has to lie in 0..1, above 0")
    return min(0.95, max(0.1, 1 - fraction))
