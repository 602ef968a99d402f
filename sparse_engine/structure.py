"""What is kept together: the value objects that name a sparsity structure.

Every structure looks at a weight as a matrix of `weight.shape[0]` rows (outputs) and `weight[0].numel()` columns
(inputs; for a convolution (channel, tap) pairs, channel-major). Example:

    >>> from sparse_engine.structure import Block, Structure
    >>> Structure.parse("block(4, 1)") == Block((4, 1))
    True
    >>> str(Block((4, 1)))
    'block(4, 1)'
"""

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import numpy
import torch

from sparse_engine.errors import StructureError

__all__ = ["NM", "Block", "Channel", "FanIn", "Structure", "Unstructured", "detect"]


class Structure:
    """Base of the five structures: compare with `==`, print with `str`, read back with `Structure.parse`."""

    name: ClassVar[str]

    @staticmethod
    def parse(text: "str | Structure") -> "Structure":
        """Read a structure from the text that `str(structure)` prints.

        Example:
            >>> Structure.parse("nm(2, 4)")
            NM(n=2, m=4)

        Args:
            text: "unstructured", "block(rows, cols)", "nm(n, m)" (or "n:m"), "fan_in(k)" or "channel"; a structure is
                returned as it is.

        Raises:
            StructureError: when the text names no structure.
        """
        if isinstance(text, Structure):
            return text
        cleaned = text.strip().lower().replace(" ", "")
        found = re.fullmatch(r"([a-z_]+)(?:\(\(?([0-9,]*)\)?\))?", cleaned)
        ratio = re.fullmatch(r"(\d+):(\d+)", cleaned)
        size = re.fullmatch(r"(?:block)?(\d+)x(\d+)", cleaned)
        try:
            if ratio:
                return NM(int(ratio[1]), int(ratio[2]))
            if size:
                return Block((int(size[1]), int(size[2])))
            if found:
                numbers = tuple(int(number) for number in (found[2] or "").split(",") if number)
                kind, count = found[1], len(numbers)
                if (kind, count) == ("unstructured", 0):
                    return Unstructured()
                if (kind, count) == ("channel", 0):
                    return Channel()
                if (kind, count) == ("block", 2):
                    return Block((numbers[0], numbers[1]))
                if (kind, count) == ("nm", 2):
                    return NM(*numbers)
                if (kind, count) in (("fan_in", 1), ("fanin", 1)):
                    return FanIn(*numbers)
        except StructureError as error:
            raise StructureError(f"{text!r} is no structure: {error}") from None
        raise StructureError(
            f'{text!r} is no structure; write "unstructured", "block(4, 1)", "nm(2, 4)", "fan_in(8)" or "channel"'
        )

    def check(self, mask: torch.Tensor) -> None:
        """Refuse a mask that this structure cannot hold.

        Example:
            >>> Block((2, 2)).check(torch.ones(4, 4, dtype=torch.bool))

        Args:
            mask: bool tensor of the weight's shape, True = kept.

        Raises:
            StructureError: with the number of places that do not fit and the first of them.
        """
        self._check(_matrix(mask), tuple(mask.shape))

    def _check(self, kept: numpy.ndarray, shape: tuple[int, ...]) -> None:
        """Structures that constrain nothing accept every mask."""


@dataclass(frozen=True)
class Unstructured(Structure):
    """Any weight may be kept or removed on its own."""

    name: ClassVar[str] = "unstructured"

    def __str__(self) -> str:
        return self.name


@dataclass(frozen=True)
class Block(Structure):
    """Rectangles of `shape = (rows, cols)` are kept or removed as a whole; the matrix's edge may cut a block."""

    name: ClassVar[str] = "block"
    shape: tuple[int, int]

    def __post_init__(self) -> None:
        shape = tuple(self.shape) if isinstance(self.shape, (tuple, list)) else (self.shape,)
        if len(shape) != 2 or any(not isinstance(size, int) or size < 1 for size in shape):
            raise StructureError(f"a block needs two positive sizes, for example Block((4, 1)); got {self.shape!r}")
        object.__setattr__(self, "shape", shape)

    def __str__(self) -> str:
        return f"{self.name}({self.shape[0]}, {self.shape[1]})"

    def _check(self, kept: numpy.ndarray, shape: tuple[int, ...]) -> None:
        full, any_kept = block_occupancy(kept, self.shape)
        partly = any_kept & ~full
        if not partly.any():
            return
        row, col = (int(index) for index in numpy.argwhere(partly)[0])
        rows, cols = self.shape
        raise StructureError(
            f"mask of shape {shape} does not fit {self}: {int(partly.sum())} of {partly.size} blocks are partly kept, "
            f"the first at rows "
            f"{row * rows}..{min((row + 1) * rows, kept.shape[0]) - 1}, columns "
            f"{col * cols}..{min((col + 1) * cols, kept.shape[1]) - 1} of the "
            f"{kept.shape[0]} x {kept.shape[1]} matrix; prune by whole blocks, or use Unstructured()"
        )


@dataclass(frozen=True)
class NM(Structure):
    """At most `n` weights are kept in each group of `m` consecutive columns; a row's last group may be shorter."""

    name: ClassVar[str] = "nm"
    n: int
    m: int

    def __post_init__(self) -> None:
        if not (isinstance(self.n, int) and isinstance(self.m, int) and 1 <= self.n <= self.m):
            raise StructureError(f"N:M needs 1 <= n <= m, for example NM(2, 4); got n={self.n!r}, m={self.m!r}")

    def __str__(self) -> str:
        return f"{self.name}({self.n}, {self.m})"

    def _check(self, kept: numpy.ndarray, shape: tuple[int, ...]) -> None:
        counts = group_counts(kept, self.m)
        over = counts > self.n
        if not over.any():
            return
        row, group = (int(index) for index in numpy.argwhere(over)[0])
        raise StructureError(
            f"mask of shape {shape} does not fit {self}: {int(over.sum())} of {over.size} groups of {self.m} columns "
            f"keep more than {self.n}, "
            f"the first in row {row}, columns {group * self.m}..{min((group + 1) * self.m, kept.shape[1]) - 1} "
            f"({int(counts[row, group])} kept); prune to {self.n} of {self.m}, or use Unstructured()"
        )


@dataclass(frozen=True)
class FanIn(Structure):
    """Every row keeps exactly `k` weights (constant fan-in)."""

    name: ClassVar[str] = "fan_in"
    k: int

    def __post_init__(self) -> None:
        if not isinstance(self.k, int) or self.k < 0:
            raise StructureError(f"a fan-in is a count >= 0, for example FanIn(8); got k={self.k!r}")

    def __str__(self) -> str:
        return f"{self.name}({self.k})"

    def _check(self, kept: numpy.ndarray, shape: tuple[int, ...]) -> None:
        counts = kept.sum(axis=1)
        wrong = numpy.flatnonzero(counts != self.k)
        if len(wrong):
            raise StructureError(
                f"mask of shape {shape} does not fit {self}: {len(wrong)} of {kept.shape[0]} rows do not keep exactly "
                f"{self.k}, the first is "
                f"row {int(wrong[0])} with {int(counts[wrong[0]])}; keep {self.k} in every row, or use Unstructured()"
            )


@dataclass(frozen=True)
class Channel(Structure):
    """Whole output channels (rows) and whole input channels (index 1 of the weight, with all its taps) are removed."""

    name: ClassVar[str] = "channel"

    def __str__(self) -> str:
        return self.name

    def _check(self, kept: numpy.ndarray, shape: tuple[int, ...]) -> None:
        rows, cols = channel_indices(kept, shape)
        missing = len(rows) * len(cols) - int(numpy.count_nonzero(kept))
        if missing:
            raise StructureError(
                f"mask of shape {shape} does not fit {self}: {missing} weights are removed inside the {len(rows)} "
                f"output channels and "
                f"{len(cols)} input columns that are kept; remove whole channels, or use Unstructured()"
            )


# A structure is declared for a weight only where it explains at least this share of what it stores ...
_MINIMUM_FILL = 0.9
# ... and of what is removed; otherwise the few whole blocks of a random mask would be taken for a structure.
_MINIMUM_EXPLAINED = 0.9
# Fewer groups or rows than this agree with a regular structure by chance.
_MINIMUM_GROUPS = 32
_MINIMUM_ROWS = 8

# Powers of two, largest first, so that the coarsest block that explains the zeros is the one named.
_BLOCK_CANDIDATES = (
    (64, 64), (32, 32), (16, 16), (8, 8), (64, 1), (32, 1), (4, 4), (16, 1), (1, 16), (8, 1), (1, 8), (2, 2),
    (4, 1), (1, 4), (2, 1), (1, 2),
)  # fmt: skip
_NM_CANDIDATES = ((1, 2), (2, 4), (1, 4), (4, 8), (2, 8), (1, 8), (8, 16), (4, 16), (2, 16), (1, 16), (2, 32), (1, 32))


def detect(weight: torch.Tensor) -> Structure:
    """Name the most specific structure of a weight's exact zeros that pays; −0.0 counts as a zero.

    Example:
        >>> weight = torch.ones(64, 64)
        >>> weight[8:16] = 0
        >>> detect(weight)
        Channel()

    Args:
        weight: the dense weight, (M, ...) with its exact zeros, or a bool mask of that shape.

    Returns:
        `Channel`, `Block`, `NM`, `FanIn` or, when none of them explains at least nine tenths of both what is kept and
        what is removed, `Unstructured`.

    Raises:
        StructureError: for a tensor of fewer than two dimensions.
    """
    kept = _matrix(weight)
    nonzeros = int(numpy.count_nonzero(kept))
    zeros = kept.size - nonzeros
    if zeros == 0 or nonzeros == 0:
        return Unstructured()

    rows, cols = channel_indices(kept, tuple(weight.shape))
    inside = len(rows) * len(cols)
    if nonzeros >= _MINIMUM_FILL * inside and kept.size - inside >= _MINIMUM_EXPLAINED * zeros:
        return Channel()

    for shape, occupied in _block_pyramid(kept):
        stored = _covered(occupied, shape, kept.shape)
        if nonzeros >= _MINIMUM_FILL * stored and kept.size - stored >= _MINIMUM_EXPLAINED * zeros:
            return Block(shape)

    density = nonzeros / kept.size
    for n, m in _NM_CANDIDATES:
        if density > n / m or density < _MINIMUM_FILL * n / m or kept.shape[1] < m:
            continue
        counts = group_counts(kept, m)
        if counts.size >= _MINIMUM_GROUPS and int(counts.max()) <= n:
            return NM(n, m)

    per_row = kept.sum(axis=1)
    if kept.shape[0] >= _MINIMUM_ROWS and (per_row == per_row[0]).all():
        return FanIn(int(per_row[0]))
    return Unstructured()


def block_occupancy(kept: numpy.ndarray, shape: tuple[int, int]) -> tuple[numpy.ndarray, numpy.ndarray]:
    """Return two bool grids (block rows, block cols): blocks kept in full, and blocks with anything kept."""
    if kept.size == 0:
        grid = (-(-kept.shape[0] // shape[0]), -(-kept.shape[1] // shape[1]))
        return numpy.ones(grid, dtype=bool), numpy.zeros(grid, dtype=bool)
    row_starts = numpy.arange(0, kept.shape[0], shape[0])
    col_starts = numpy.arange(0, kept.shape[1], shape[1])
    any_kept, full = kept, kept
    if shape[1] > 1:
        any_kept, full = (ufunc.reduceat(kept, col_starts, axis=1) for ufunc in (numpy.logical_or, numpy.logical_and))
    if shape[0] > 1:
        any_kept = numpy.logical_or.reduceat(any_kept, row_starts, axis=0)
        full = numpy.logical_and.reduceat(full, row_starts, axis=0)
    return full, any_kept


def group_counts(kept: numpy.ndarray, m: int) -> numpy.ndarray:
    """Count what is kept in each group of m consecutive columns: (rows, groups)."""
    if kept.size == 0:
        return numpy.zeros((kept.shape[0], -(-kept.shape[1] // m)), dtype=numpy.int64)
    return numpy.add.reduceat(kept, numpy.arange(0, kept.shape[1], m), axis=1, dtype=numpy.int64)


def channel_indices(kept: numpy.ndarray, shape: tuple[int, ...]) -> tuple[numpy.ndarray, numpy.ndarray]:
    """Return the rows with anything kept, and the columns of all input channels with anything kept."""
    rows = numpy.flatnonzero(kept.any(axis=1))
    channels = shape[1]
    taps = kept.shape[1] // channels if channels else 0
    alive = numpy.flatnonzero(kept.any(axis=0).reshape(channels, taps).any(axis=1))
    return rows, (alive[:, None] * taps + numpy.arange(taps)[None, :]).reshape(-1)


def _block_pyramid(kept: numpy.ndarray) -> Iterator[tuple[tuple[int, int], numpy.ndarray]]:
    """Yield each candidate block that fits the matrix with its occupancy grid, made by halving a finer one."""
    by_rows = {1: kept}
    while max(by_rows) * 2 <= min(64, kept.shape[0]):
        by_rows[max(by_rows) * 2] = _halve(by_rows[max(by_rows)], axis=0)
    for rows, cols in _BLOCK_CANDIDATES:
        if rows <= kept.shape[0] and cols <= kept.shape[1]:
            occupied, width = by_rows[rows], 1
            while width < cols:
                occupied, width = _halve(occupied, axis=1), width * 2
            yield (rows, cols), occupied


def _halve(grid: numpy.ndarray, axis: int) -> numpy.ndarray:
    """Merge neighbours along an axis with "or"; a last one without a neighbour stays as it is."""
    even, odd = (grid[0::2], grid[1::2]) if axis == 0 else (grid[:, 0::2], grid[:, 1::2])
    merged = even.copy()
    target = merged[: len(odd)] if axis == 0 else merged[:, : odd.shape[1]]
    target |= odd
    return merged


def _covered(occupied: numpy.ndarray, block: tuple[int, int], matrix: tuple[int, ...]) -> int:
    """Count the matrix entries inside the occupied blocks, those at the edge with the part that lies inside."""
    per_row = numpy.count_nonzero(occupied, axis=1) * block[1]
    per_row = per_row - occupied[:, -1] * (occupied.shape[1] * block[1] - matrix[1])
    heights = numpy.minimum(block[0], matrix[0] - numpy.arange(0, matrix[0], block[0]))
    return int((per_row * heights).sum())


def _matrix(weight: torch.Tensor) -> numpy.ndarray:
    if not isinstance(weight, torch.Tensor) or weight.dim() < 2:
        what = f"shape {tuple(weight.shape)}" if isinstance(weight, torch.Tensor) else type(weight).__name__
        raise StructureError(
            f"a structure needs a weight or mask tensor of at least two dimensions (rows, columns); got {what}"
        )
    kept = weight.detach() if weight.dtype == torch.bool else weight.detach() != 0
    return kept.reshape(weight.shape[0], math.prod(weight.shape[1:])).cpu().numpy()
