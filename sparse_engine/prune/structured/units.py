"""Removal units: the smallest sets of channels that can leave a network together, sorted into groups of like ones.

A unit of a plain convolution is one filter with its batch norm entry and its consumers' weights; of a residual stage
one channel of every block; of attention one head; of a grouped convolution one group. Units are the connected
components of all indices under the analysis' index maps.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from sparse_engine.errors import PruneError

from .analysis import Analysis
from .axes import EqualCounts, Grid, Mapping, Removed
from .spec import tensor_owners


@dataclass
class Member:
    """A dimension of a tensor that a group runs through.

    Args:
        name: the tensor.
        dim: its dimension.
        index: int64 [units, indices per unit], which indices of the dimension belong to each unit.
        produces: the dimension is an output of the layer (a filter), not an input or a per-channel vector.
    """

    name: str
    dim: int
    index: NDArray[np.int64]
    produces: bool


@dataclass
class Group:
    """Units that are alike: the channels of one layer, or of all layers that a residual sum ties together.

    Args:
        name: the first tensor that the group's units produce, e.g. ``layer1.0.conv1.weight``.
        members: all tensor dimensions the units run through.
        axes: axis -> int64 [units, indices per unit], the same in terms of the analysis.
        kind: ``"heads"`` where the units are attention heads, else ``"channels"``.
    """

    name: str
    members: list[Member]
    axes: dict[int, NDArray[np.int64]]
    kind: str = "channels"

    def __len__(self) -> int:
        return len(next(iter(self.axes.values())))


def find_groups(analysis: Analysis, ignore: Sequence[str] = ()) -> list[Group]:
    """All groups of removable units of a model, in the order of its layers.

    Example::

        groups = find_groups(analyse(capture(model, x)))
        [(group.name, len(group)) for group in groups]

    Args:
        analysis: of the model.
        ignore: names of tensors, or of modules with everything below them, whose channels must stay.

    Raises:
        PruneError: an entry of ``ignore`` names nothing.
    """
    axes = analysis.axes
    roots = axes.roots()
    offsets: dict[int, int] = {}
    total = 1  # element 0 stands for everything that must stay
    for axis in roots:
        offsets[axis] = total
        total += axes.sizes[axis]
    frozen: dict[int, NDArray[np.bool_]] = {axis: np.full(axes.sizes[axis], axes.sizes[axis] == 1) for axis in roots}
    for axis, index, _ in axes.frozen:
        frozen[axis][slice(None) if index is None else index] = True
    weights = {contraction.weight: contraction for contraction in analysis.contractions}
    for entry in ignore:
        names = [name for name in analysis.tensors if name == entry or name.startswith(f"{entry}.")]
        if not names:
            raise PruneError(f"ignore={entry!r} names no tensor or module of the model")
        for name in names:
            made = weights.get(name)  # of a weight the outputs stay; its inputs are another layer's channels
            for axis in analysis.tensor_axes(name) if made is None else [made.outputs]:
                frozen[axis][:] = True
    whole = {contraction.group_axis for contraction in analysis.contractions} | analysis.attention
    grids = [constraint for constraint in axes.constraints if isinstance(constraint, Grid)]
    grown = True
    while grown:  # (batch x heads) folded into one axis is counted in heads too
        grown = False
        for grid in grids:
            if (
                grid.flat not in whole
                and set(grid.factors) & whole
                and all(f in whole or frozen[f].all() for f in grid.factors)
            ):
                whole.add(grid.flat)
                grown = True
    edges: list[tuple[NDArray[np.int64], NDArray[np.int64]]] = []
    head_axes: set[int] = set()
    for constraint in axes.constraints:
        if isinstance(constraint, Mapping):
            edges.append(
                (
                    offsets[constraint.first] + constraint.first_index,
                    offsets[constraint.second] + constraint.second_index,
                )
            )
        elif isinstance(constraint, EqualCounts):
            first = constraint.parts[0]
            edges += [
                (offsets[constraint.axis] + first, offsets[constraint.axis] + part) for part in constraint.parts[1:]
            ]
        elif isinstance(constraint, Grid):
            chosen = _granular_factor(constraint, frozen, whole)
            for factor in constraint.factors:
                if factor != chosen:
                    frozen[factor][:] = True
            if chosen is None:
                frozen[constraint.flat][:] = True
                continue
            if chosen in analysis.attention:
                head_axes.add(chosen)
            position = constraint.factors.index(chosen)
            digit = np.indices(constraint.shape)[position].reshape(-1)
            edges.append((offsets[constraint.flat] + np.arange(len(digit)), offsets[chosen] + digit))
    for axis, vector in frozen.items():
        stuck = offsets[axis] + np.flatnonzero(vector)
        edges.append((np.zeros_like(stuck), stuck))
    labels = _components(total, edges)
    return _groups(analysis, labels, offsets, head_axes)


def _granular_factor(grid: Grid, frozen: dict[int, NDArray[np.bool_]], whole: set[int | None]) -> int | None:
    """Which factor of a grid the units follow: heads and groups as wholes, else the finest."""
    free = [
        factor for factor, size in zip(grid.factors, grid.shape, strict=True) if size > 1 and not frozen[factor].all()
    ]
    preferred = [factor for factor in free if factor in whole]
    candidates = preferred or free
    return max(candidates, key=lambda factor: len(frozen[factor]), default=None)


def _components(total: int, edges: list[tuple[NDArray[np.int64], NDArray[np.int64]]]) -> NDArray[np.int64]:
    """The smallest element of each element's connected component, by min-label propagation with pointer jumping."""
    labels = np.arange(total)
    if not edges:
        return labels
    a = np.concatenate([first for first, _ in edges]).astype(np.int64)
    b = np.concatenate([second for _, second in edges]).astype(np.int64)
    while True:
        low = np.minimum(labels[a], labels[b])
        new = labels.copy()
        np.minimum.at(new, labels[a], low)
        np.minimum.at(new, labels[b], low)
        new = np.minimum(new, new[new])
        if np.array_equal(new, labels):
            return labels
        labels = new


def _groups(analysis: Analysis, labels: NDArray[np.int64], offsets: dict[int, int], head_axes: set[int]) -> list[Group]:
    axes = analysis.axes
    signature: dict[int, list[tuple[int, int]]] = {}
    positions: dict[tuple[int, int], list[int]] = {}
    for axis, offset in offsets.items():
        own = labels[offset : offset + axes.sizes[axis]]
        order = np.argsort(own, kind="stable")
        values, starts, counts = np.unique(own[order], return_index=True, return_counts=True)
        for value, start, count in zip(values.tolist(), starts.tolist(), counts.tolist(), strict=True):
            if value != 0:
                signature.setdefault(value, []).append((axis, count))
                positions[value, axis] = order[start : start + count].tolist()
    families: dict[tuple[tuple[int, int], ...], list[int]] = {}
    for label, touched in signature.items():
        families.setdefault(tuple(touched), []).append(label)
    producing = {contraction.outputs for contraction in analysis.contractions}
    weights = {
        contraction.weight: contraction for contraction in analysis.contractions if contraction.weight is not None
    }
    by_axis: dict[int, list[tuple[str, int]]] = {}
    for name in analysis.tensors:
        for dim, axis in enumerate(analysis.tensor_axes(name)):
            by_axis.setdefault(axis, []).append((name, dim))
    groups = []
    for touched, units in families.items():
        touched_axes = [axis for axis, _ in touched]
        index = {axis: np.array([positions[unit, axis] for unit in units], dtype=np.int64) for axis in touched_axes}
        members = []
        for axis in touched_axes:
            for name, dim in by_axis.get(axis, ()):
                contraction = weights.get(name)
                produces = (
                    contraction is not None
                    and axis == contraction.outputs
                    and dim == (1 if contraction.transposed else 0)
                )
                if contraction is not None and contraction.transposed and contraction.outputs_per_group == axis:
                    produces = True
                members.append(Member(name, dim, index[axis], produces))
        if not any(member.produces for member in members) or not producing & set(touched_axes):
            continue
        order = list(analysis.tensors)
        first = min((member for member in members if member.produces), key=lambda member: order.index(member.name))
        groups.append(Group(first.name, members, index, "heads" if head_axes & set(touched_axes) else "channels"))
    order = {name: position for position, name in enumerate(analysis.tensors)}
    return sorted(
        groups, key=lambda group: (order[group.name], group.members[0].index[0, 0] if len(group.members) else 0)
    )


def removal(analysis: Analysis, groups: Sequence[Group], gone: Sequence[NDArray[np.bool_]]) -> Removed:
    """The consistent set of removed indices when some units go.

    Args:
        analysis: of the model.
        groups: from `find_groups`.
        gone: for each group a bool vector over its units, True = removed.
    """
    axes = analysis.axes
    wish = {axis: np.zeros(axes.sizes[axis], dtype=bool) for axis in axes.roots()}
    for group, vector in zip(groups, gone, strict=True):
        for axis, index in group.axes.items():
            wish[axis][index[vector].reshape(-1)] = True
    return axes.settle(wish)


def zero_units_(model: nn.Module, groups: Sequence[Group], gone: Sequence[NDArray[np.bool_]]) -> dict[str, Tensor]:
    """Set all that belongs to the given units to exact zero: filters, biases, norm entries, the consumers' weights.

    Example::

        zero_units_(model, groups, [scores < limit for scores in all_scores])
        small = se.compact(model, x)

    Args:
        model: the model, changed in place; running statistics stay.
        groups, gone: as for `removal`.

    Returns:
        Tensor name -> bool mask of its shape, True = kept, for the tensors that were touched.
    """
    owners = tensor_owners(model)
    masks: dict[str, Tensor] = {}
    for group, vector in zip(groups, gone, strict=True):
        if not vector.any():
            continue
        for member in group.members:
            tensor = getattr(*owners[member.name][0])
            if not isinstance(tensor, nn.Parameter):
                continue
            index = torch.from_numpy(member.index[vector].reshape(-1)).to(tensor.device)
            mask = masks.setdefault(member.name, torch.ones(tensor.shape, dtype=torch.bool, device=tensor.device))
            mask.index_fill_(member.dim, index, False)
    with torch.no_grad():
        for name, mask in masks.items():
            getattr(*owners[name][0]).data.masked_fill_(~mask, 0)
    return masks
