"""Which indices of which tensor dimensions stand or fall together.

Every dimension of every tensor in a captured model is an *axis*. Operators that keep a dimension as it is
(elementwise, normalisation, the batch of a product) make the two axes one, so a network has few distinct axes however
deep it is. The others relate axes by exact index maps:

* `Mapping`: index ``a[i]`` of one axis is index ``b[i]`` of another (concatenation, split, slice, padding);
* `Grid`: an axis is the row-major product of others (reshape, flatten, heads, groups, channel shuffle);
* `EqualCounts`: parts of an axis have to keep equally many indices (chunk);
* `Condition`: anything else, as a function that takes back removals it cannot allow.

A set of removed indices is *consistent* when every constraint holds. Each constraint only ever takes removals back,
so from any wish list there is one way down to a consistent set, found by a worklist; no recursion, linear in what
changes.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

Indices = NDArray[np.int64]
Removed = dict[int, NDArray[np.bool_]]


class Constraint:
    """Base of the relations between axes: it names the axes it reads and takes back the removals it cannot allow."""

    axes: tuple[int, ...]

    def shrink(self, removed: Removed) -> list[int]:
        """Take back removals in place; return the axes that changed."""
        raise NotImplementedError


@dataclass
class Mapping(Constraint):
    """``first[first_index[i]]`` and ``second[second_index[i]]`` are one and the same."""

    first: int
    first_index: Indices
    second: int
    second_index: Indices

    @property
    def axes(self) -> tuple[int, ...]:  # type: ignore[override]
        return (self.first, self.second)

    def shrink(self, removed: Removed) -> list[int]:
        a, b = removed[self.first], removed[self.second]
        before = np.count_nonzero(a), np.count_nonzero(b)
        both = a[self.first_index] & b[self.second_index]
        a[self.first_index] = both
        b[self.second_index] = both
        return _changed((self.first, self.second), before, (a, b))


@dataclass
class Grid(Constraint):
    """`flat` is the row-major product of `factors`; whole rows and columns go, nothing else."""

    flat: int
    factors: tuple[int, ...]
    shape: tuple[int, ...]

    @property
    def axes(self) -> tuple[int, ...]:  # type: ignore[override]
        return (self.flat, *self.factors)

    def shrink(self, removed: Removed) -> list[int]:
        before = [np.count_nonzero(removed[axis]) for axis in self.axes]
        grid = removed[self.flat].reshape(self.shape)
        allowed = np.zeros(self.shape, dtype=bool)
        for position, factor in enumerate(self.factors):
            others = tuple(i for i in range(len(self.shape)) if i != position)
            removed[factor] &= grid.all(axis=others)
        for position, factor in enumerate(self.factors):
            view = [1] * len(self.shape)
            view[position] = -1
            allowed |= removed[factor].reshape(view)
        removed[self.flat] &= allowed.reshape(-1)
        return _changed(self.axes, before, [removed[axis] for axis in self.axes])


@dataclass
class EqualCounts(Constraint):
    """The parts of `axis` keep equally many indices, because the model's code cuts the axis into equal parts."""

    axis: int
    parts: tuple[Indices, ...]

    @property
    def axes(self) -> tuple[int, ...]:  # type: ignore[override]
        return (self.axis,)

    def shrink(self, removed: Removed) -> list[int]:
        vector = removed[self.axis]
        together = np.logical_and.reduce(
            [vector[part] for part in self.parts]
        )  # positions that leave every part at once
        alone = [part[vector[part] & ~together] for part in self.parts]
        target = min(len(gone) for gone in alone)
        changed = False
        for gone in alone:
            if len(gone) > target:
                vector[gone[target:]] = False
                changed = True
        return [self.axis] if changed else []


@dataclass
class Condition(Constraint):
    """A check written as a function: it takes removals back in place and returns the axes that changed."""

    axes: tuple[int, ...]
    check: Callable[[Removed], list[int]]

    def shrink(self, removed: Removed) -> list[int]:
        return self.check(removed)


@dataclass
class Axes:
    """All axes of a model, which of them are one, what is frozen, and the constraints between them."""

    sizes: list[int] = field(default_factory=list)
    parent: list[int] = field(default_factory=list)
    frozen: list[tuple[int, Indices | None, str]] = field(default_factory=list)
    constraints: list[Constraint] = field(default_factory=list)

    def new(self, size: int) -> int:
        """A fresh axis."""
        self.sizes.append(size)
        self.parent.append(len(self.parent))
        return len(self.parent) - 1

    def find(self, axis: int) -> int:
        """The representative of an axis."""
        root = axis
        while self.parent[root] != root:
            root = self.parent[root]
        while self.parent[axis] != root:
            self.parent[axis], axis = root, self.parent[axis]
        return root

    def join(self, first: int, second: int) -> None:
        """Make two axes of equal size one."""
        a, b = self.find(first), self.find(second)
        if a == b:
            return
        if self.sizes[a] != self.sizes[b]:
            raise ValueError(f"cannot join axes of sizes {self.sizes[a]} and {self.sizes[b]}")
        self.parent[max(a, b)] = min(a, b)

    def freeze(self, axis: int, index: Indices | None = None, why: str = "") -> None:
        """Indices (all when None) that must stay."""
        self.frozen.append((axis, index, why))

    def resolve(self) -> None:
        """Rewrite every constraint in terms of representatives; call it once, when all axes are joined."""
        for constraint in self.constraints:
            if isinstance(constraint, Mapping):
                constraint.first, constraint.second = self.find(constraint.first), self.find(constraint.second)
            elif isinstance(constraint, Grid):
                constraint.flat = self.find(constraint.flat)
                constraint.factors = tuple(self.find(axis) for axis in constraint.factors)
            elif isinstance(constraint, EqualCounts):
                constraint.axis = self.find(constraint.axis)
            elif isinstance(constraint, Condition):
                constraint.axes = tuple(self.find(axis) for axis in constraint.axes)
        self.frozen = [(self.find(axis), index, why) for axis, index, why in self.frozen]

    def roots(self) -> list[int]:
        """The distinct axes."""
        return [axis for axis in range(len(self.parent)) if self.find(axis) == axis]

    def everything(self) -> Removed:
        """The wish to remove all that is not frozen."""
        wish = {axis: np.ones(self.sizes[axis], dtype=bool) for axis in self.roots()}
        self.apply_frozen(wish)
        return wish

    def apply_frozen(self, removed: Removed) -> None:
        """Take back every removal of a frozen index."""
        for axis, index, _ in self.frozen:
            if index is None:
                removed[axis][:] = False
            else:
                removed[axis][index] = False

    def settle(self, removed: Removed, extra: Iterable[Constraint] = ()) -> Removed:
        """The largest consistent part of a wish list, with at least one index kept on every axis.

        Args:
            removed: axis -> bool vector, changed in place.
            extra: further constraints, e.g. the conditions under which a removal is exact.
        """
        constraints = [*self.constraints, *extra]
        readers: dict[int, list[int]] = {}
        for position, constraint in enumerate(constraints):
            for axis in set(constraint.axes):
                readers.setdefault(axis, []).append(position)
        self.apply_frozen(removed)
        queue = deque(range(len(constraints)))
        queued = [True] * len(constraints)
        while True:
            while queue:
                position = queue.popleft()
                queued[position] = False
                for axis in constraints[position].shrink(removed):
                    _wake(readers.get(axis, ()), queue, queued)
            emptied = [axis for axis, vector in removed.items() if len(vector) and vector.all()]
            if not emptied:
                return removed
            for axis in emptied:
                removed[axis][0] = False
                _wake(readers.get(axis, ()), queue, queued)


def _wake(readers: Iterable[int], queue: deque[int], queued: list[bool]) -> None:
    for reader in readers:
        if not queued[reader]:
            queued[reader] = True
            queue.append(reader)


def _changed(axes: Sequence[int], before: Sequence[int], vectors: Sequence[NDArray[np.bool_]]) -> list[int]:
    return [
        axis for axis, count, vector in zip(axes, before, vectors, strict=True) if np.count_nonzero(vector) != count
    ]
