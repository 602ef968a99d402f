"""From scores to masks: exact counts, deterministic ties, every structure."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from sparse_engine.errors import PruneError
from sparse_engine.structure import NM, Block, Channel, FanIn, Structure, Unstructured


def top_k_mask(scores: Tensor, k: int) -> Tensor:
    """Mark exactly the ``k`` largest entries; among equal scores the ones that come first win.

    Example::

        top_k_mask(torch.tensor([1.0, 3.0, 3.0, 3.0]), 2)      # [False, True, True, False]

    Args:
        scores: 1-D float tensor; −inf means "never, if there is any choice".
        k: how many to mark, 0 to ``scores.numel()``.

    Returns:
        A bool tensor of the same shape with exactly ``k`` entries True.

    Raises:
        PruneError: if ``k`` is out of range or a score is NaN.
    """
    total = scores.numel()
    if not 0 <= k <= total:
        raise PruneError(f"cannot keep {k} of {total} weights")
    if torch.isnan(scores).any():
        raise PruneError(
            f"{int(torch.isnan(scores).sum())} of {total} scores are NaN; the loss or a weight is not finite"
        )
    if k == 0:
        return torch.zeros_like(scores, dtype=torch.bool)
    if k == total:
        return torch.ones_like(scores, dtype=torch.bool)
    threshold = torch.kthvalue(scores, total - k + 1).values
    kept = scores > threshold
    ties = (scores == threshold).nonzero().flatten()
    kept[ties[: k - int(kept.sum())]] = True
    return kept


def select(
    scores: Mapping[str, Tensor],
    counts: int | Mapping[str, int],
    structure: Structure | None = None,
    *,
    keep_one: bool = False,
) -> dict[str, Tensor]:
    """Choose what is kept.

    Example::

        select({"fc.weight": torch.rand(10, 20)}, 50)["fc.weight"].sum()     # 50

    Args:
        scores: a tensor of each weight's shape, larger = more worth keeping.
        counts: how many weights to keep: one number shared by all layers through one threshold, or a number per layer.
        structure: what is kept together; the score of a group is the mean over its weights. With groups of one size the
            count is exact when it is a whole number of groups, otherwise it is the largest number of whole groups below
            it. ``NM`` and ``FanIn`` fix the number kept in each group or row, and ``counts`` is not used.
        keep_one: keep the best weight (or group) of a layer that would lose everything; the total stays the same.

    Returns:
        Bool masks of the shapes of the scores.
    """
    structure = structure or Unstructured()
    if isinstance(structure, NM | FanIn):
        return {name: _regular(score, structure) for name, score in scores.items()}
    if not isinstance(structure, Unstructured | Block | Channel):
        raise PruneError(f"pruning to {structure} is not known; use Unstructured, Block, NM, FanIn or Channel")
    grouped = {name: group_scores(score, structure) for name, score in scores.items()}
    if isinstance(counts, int):
        flat = {"": _join([grouped[name] for name in scores])}
        budget = {"": counts}
    else:
        flat, budget = grouped, dict(counts)
    kept: dict[str, Tensor] = {}
    for name, (values, sizes) in flat.items():
        first = (
            _firsts(grouped)
            if keep_one and name == ""
            else [int(values.argmax())]
            if keep_one and values.numel()
            else []
        )
        kept[name] = _choose(values, sizes, budget[name], first)
    if isinstance(counts, int):
        pieces = kept.pop("").split([grouped[name][0].numel() for name in scores])
        kept = dict(zip(scores, pieces, strict=True))
    return {name: ungroup(kept[name], score.shape, structure) for name, score in scores.items()}


def structure_counts(shapes: Mapping[str, tuple[int, ...]], structure: Structure) -> dict[str, int] | None:
    """How many weights each layer keeps where the structure itself fixes it (``NM``, ``FanIn``), else None."""
    if isinstance(structure, NM):
        out = {}
        for name, shape in shapes.items():
            columns = _columns(shape)
            whole, rest = divmod(columns, structure.m)
            out[name] = shape[0] * (whole * structure.n + min(structure.n, rest))
        return out
    if isinstance(structure, FanIn):
        return {name: shape[0] * min(structure.k, _columns(shape)) for name, shape in shapes.items()}
    return None


def _columns(shape: tuple[int, ...]) -> int:
    columns = 1
    for size in shape[1:]:
        columns *= size
    return columns


def _choose(values: Tensor, sizes: Tensor | None, budget: int, forced: list[int]) -> Tensor:
    """The groups to keep: the best first, until the next one would exceed the budget of weights."""
    if forced:
        values = values.clone()
        values[torch.tensor(forced, device=values.device)] = torch.inf
    if sizes is None or bool((sizes == sizes[:1]).all()):
        size = 1 if sizes is None or not sizes.numel() else int(sizes[0])
        k = max(min(budget // size, values.numel()), len(forced))
        return top_k_mask(values, k)
    if torch.isnan(values).any():
        raise PruneError(
            f"{int(torch.isnan(values).sum())} of {values.numel()} scores are NaN; the loss or a weight is not finite"
        )
    order = torch.sort(values, descending=True, stable=True).indices
    fits = sizes[order].cumsum(0) <= budget
    fits[: len(forced)] = True
    kept = torch.zeros_like(values, dtype=torch.bool)
    kept[order[fits]] = True
    return kept


def group_scores(score: Tensor, structure: Structure) -> tuple[Tensor, Tensor | None]:
    """Mean score and number of weights of every group, flattened."""
    if isinstance(structure, Unstructured):
        return score.reshape(-1), None
    matrix = score.reshape(score.shape[0], -1)
    ones = torch.ones_like(matrix)
    if isinstance(structure, Channel):
        return matrix.mean(1), ones.sum(1)
    rows, columns = structure.shape
    totals = _block_sums(matrix, rows, columns)
    sizes = _block_sums(ones, rows, columns)
    return (totals / sizes).reshape(-1), sizes.reshape(-1)


def _block_sums(matrix: Tensor, rows: int, columns: int) -> Tensor:
    height, width = matrix.shape
    padded = torch.nn.functional.pad(matrix, (0, -width % columns, 0, -height % rows))
    return padded.reshape(padded.shape[0] // rows, rows, padded.shape[1] // columns, columns).sum((1, 3))


def ungroup(kept: Tensor, shape: torch.Size, structure: Structure) -> Tensor:
    """The mask of a weight of ``shape`` from one bool per group, the inverse of :func:`group_scores`."""
    if isinstance(structure, Unstructured):
        return kept.reshape(shape)
    height = shape[0]
    width = _columns(tuple(shape))
    if isinstance(structure, Channel):
        return kept[:, None].expand(height, width).reshape(shape).clone()
    rows, columns = structure.shape
    grid = kept.reshape(-(-height // rows), -(-width // columns))
    full = grid.repeat_interleave(rows, 0).repeat_interleave(columns, 1)
    return full[:height, :width].reshape(shape).clone()


def _regular(score: Tensor, structure: NM | FanIn) -> Tensor:
    matrix = score.reshape(score.shape[0], -1)
    if torch.isnan(matrix).any():
        raise PruneError(
            f"{int(torch.isnan(matrix).sum())} of {matrix.numel()} scores are NaN; the loss or a weight is not finite"
        )
    width = matrix.shape[1]
    if isinstance(structure, FanIn):
        if structure.k > width:
            raise PruneError(
                f"{structure} keeps {structure.k} weights per row, but a row of {tuple(score.shape)} has only {width}"
            )
        groups = matrix[:, None, :]
        keep = structure.k
    else:
        padded = torch.nn.functional.pad(matrix, (0, -width % structure.m), value=-torch.inf)
        groups = padded.reshape(matrix.shape[0], -1, structure.m)
        keep = structure.n
    order = torch.sort(groups, dim=-1, descending=True, stable=True).indices[..., :keep]
    kept = torch.zeros_like(groups, dtype=torch.bool).scatter_(-1, order, True)
    return kept.reshape(matrix.shape[0], -1)[:, :width].reshape(score.shape).clone()


def _join(groups: list[tuple[Tensor, Tensor | None]]) -> tuple[Tensor, Tensor | None]:
    if not groups:
        return torch.empty(0), None
    values = torch.cat([value for value, _ in groups])
    sizes = None if groups[0][1] is None else torch.cat([size for _, size in groups if size is not None])
    return values, sizes


def _firsts(grouped: Mapping[str, tuple[Tensor, Tensor | None]]) -> list[int]:
    """Positions, in the joined vector, of the best group of every layer."""
    out, offset = [], 0
    for values, _ in grouped.values():
        if values.numel():
            out.append(offset + int(values.argmax()))
        offset += values.numel()
    return out
