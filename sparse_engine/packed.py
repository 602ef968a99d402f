"""Packed weights: a small integer *pattern* built once, and the kept *values* as one contiguous 1-D tensor.

The pattern says which cells of a grid are kept. The grid is the weight's matrix (`weight.reshape(M, -1)`) cut into the
structure's blocks; for everything but `Block` a cell is one weight. It is stored in whichever of these codings is
smallest for the tensor at hand:

| coding | holds | bytes |
| --- | --- | --- |
| `full` | nothing: every cell is kept | 0 |
| `bitmask` | one bit per cell, lowest bit first, row-major | cells / 8 |
| `delta8` | the gaps between kept cells in row-major order; 255 means "skip 255 cells" | kept / (share of gaps < 255) |
| `index16`, `index32` | kept cells per row, and the column of each | 2 or 4 per kept cell, and 1 to 4 per row |
| `channels` | the kept rows and input channels (structure `Channel` only) | 2 or 4 per channel |

Values lie row-major over the kept weights; for `Block` block by block, each block row-major and padded with zeros where
the matrix's edge cuts it; for `Channel` as the dense matrix of kept rows and columns.
"""

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy
import torch

from sparse_engine.errors import FileFormatError, ShapeError, StructureError
from sparse_engine.structure import (
    Block,
    Channel,
    FanIn,
    Structure,
    Unstructured,
    block_occupancy,
    channel_indices,
    detect,
)

__all__ = ["CSR", "PackedWeight"]

_VALUE_DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
_ESCAPE = 255
_LARGEST_COUNT = 2**31 - 1


class CSR(NamedTuple):
    """A packed weight in compressed rows: entry i has value `values[order[i]]`, or `values[i]` where order is None."""

    row_ptr: torch.Tensor  # int64 [M + 1]
    cols: torch.Tensor  # int32 [nnz], ascending in each row
    order: torch.Tensor | None  # int64 [nnz]


class PackedWeight:
    """A sparse weight in its packed form.

    Example:
        >>> weight = torch.tensor([[0.0, 2.0], [0.0, 0.0]])
        >>> packed = PackedWeight.from_dense(weight)
        >>> packed.values
        tensor([2.])
        >>> torch.equal(packed.to_dense(), weight)
        True

    Make one with `from_dense` or `from_state`; it is not changed afterwards.

    Attributes:
        structure: what is kept together.
        shape: the dense weight's shape, (M, ...).
        coding: how the pattern is stored (see the module's table).
        pattern: small integer tensors on the CPU, independent of the values.
        values: contiguous 1-D tensor of the kept values.
        bias: the bias (M,) that travels with the weight, or None.
        order: for a transposed weight, where in `values` each of its own values lies (int32); None means in order.
    """

    __slots__ = ("bias", "coding", "order", "pattern", "shape", "structure", "values")

    def __init__(
        self,
        structure: Structure,
        shape: tuple[int, ...],
        coding: str,
        pattern: dict[str, torch.Tensor],
        values: torch.Tensor,
        bias: torch.Tensor | None = None,
        order: torch.Tensor | None = None,
    ) -> None:
        self.structure = structure
        self.shape = shape
        self.coding = coding
        self.pattern = pattern
        self.values = values
        self.bias = bias
        self.order = order

    @classmethod
    def from_dense(
        cls,
        weight: torch.Tensor,
        mask: torch.Tensor | None = None,
        structure: Structure | str | None = None,
        bias: torch.Tensor | None = None,
    ) -> "PackedWeight":
        """Pack a dense weight.

        Example:
            >>> packed = PackedWeight.from_dense(torch.eye(8), structure="block(4, 4)")
            >>> packed.nnz
            32

        Args:
            weight: (M, ...) of two or more dimensions; float32, float16, bfloat16 or float64.
            mask: bool tensor of the same shape, True = kept. Without one everything but exact zeros is kept (−0.0 is a
                zero), and zeros inside a kept block or channel are stored like any other value.
            structure: found by `sparse_engine.structure.detect` when not given.
            bias: (M,) to carry along.

        Returns:
            The packed weight, with values on the weight's device. Kept values come back bit for bit, NaN and infinities
            included.

        Raises:
            StructureError: when weight, mask and structure do not fit together.
        """
        if weight.dtype not in _VALUE_DTYPES:
            raise StructureError(
                f"weight has dtype {weight.dtype}; packed weights hold float32, float16, bfloat16 or float64"
            )
        if mask is not None and tuple(mask.shape) != tuple(weight.shape):
            raise StructureError(
                f"mask of shape {tuple(mask.shape)} does not fit a weight of shape {tuple(weight.shape)}"
            )
        if bias is not None and tuple(bias.shape) != (weight.shape[0],):
            raise StructureError(f"bias of shape {tuple(bias.shape)} does not fit a weight of {weight.shape[0]} rows")
        source = weight if mask is None else mask
        shape = tuple(weight.shape)
        declared = None if structure is None else Structure.parse(structure)
        structure = detect(source) if declared is None else declared
        rows, cols = shape[0], math.prod(shape[1:])
        if rows * cols > _LARGEST_COUNT:
            raise StructureError(f"a weight of {rows} x {cols} has more than {_LARGEST_COUNT} entries; split it")
        kept = (source if source.dtype == torch.bool else source.detach() != 0).reshape(rows, cols).cpu().numpy()

        # A detected structure may include places that an explicit mask removed; those must stay out.
        if mask is not None or not isinstance(structure, Block | Channel):
            try:
                structure.check(source)
            except StructureError:
                if declared is not None:
                    raise
                structure = Unstructured()

        if isinstance(structure, Channel):
            kept_rows, kept_cols = channel_indices(kept, shape)
            taps = cols // shape[1] if shape[1] else 1
            channels = kept_cols[::taps] // taps if taps else kept_cols[:0]
            pattern = {"rows": _smallest_ints(kept_rows, shape[0]), "channels": _smallest_ints(channels, shape[1])}
            coding = "channels"
        else:
            _, occupied = (None, kept) if _block(structure) == (1, 1) else block_occupancy(kept, _block(structure))
            coding, pattern = _encode(numpy.flatnonzero(occupied), occupied.shape, isinstance(structure, FanIn))
        packed = cls(
            structure, shape, coding, pattern, weight.new_empty(0), None if bias is None else bias.detach().clone()
        )
        packed.values = packed._gather(weight.detach())
        return packed

    # -- sizes ---------------------------------------------------------------------------------------------------------

    @property
    def rows(self) -> int:
        """Rows of the matrix view (outputs)."""
        return self.shape[0]

    @property
    def columns(self) -> int:
        """Columns of the matrix view (inputs; for a convolution (channel, tap) pairs)."""
        return math.prod(self.shape[1:])

    @property
    def block(self) -> tuple[int, int]:
        """Rows and columns of one cell of the pattern's grid; (1, 1) for everything but `Block`."""
        return _block(self.structure)

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of the pattern's grid."""
        block_rows, block_cols = self.block
        return -(-self.rows // block_rows), -(-self.columns // block_cols)

    @property
    def dtype(self) -> torch.dtype:
        """Type of the values."""
        return self.values.dtype

    @property
    def device(self) -> torch.device:
        """Where the values lie."""
        return self.values.device

    @property
    def nnz(self) -> int:
        """Kept weights, padding not counted."""
        if isinstance(self.structure, Block):
            block_rows, block_cols = self.block
            cells = self._cells()
            heights = numpy.minimum(block_rows, self.rows - cells // self.grid[1] * block_rows)
            widths = numpy.minimum(block_cols, self.columns - cells % self.grid[1] * block_cols)
            return int((heights * widths).sum())
        return self.values.numel()

    @property
    def density(self) -> float:
        """Share of weights kept (0 for an empty weight)."""
        total = self.rows * self.columns
        return self.nnz / total if total else 0.0

    @property
    def sparsity(self) -> float:
        """Share of weights removed."""
        return 1.0 - self.density if self.rows * self.columns else 0.0

    @property
    def pattern_nbytes(self) -> int:
        """Bytes of the pattern, in memory and on disk."""
        own = sum(tensor.numel() * tensor.element_size() for tensor in self.pattern.values())
        return own + (0 if self.order is None else self.order.numel() * self.order.element_size())

    @property
    def nbytes(self) -> int:
        """Bytes of pattern, values and bias, in memory and on disk."""
        bias = 0 if self.bias is None else self.bias.numel() * self.bias.element_size()
        return self.pattern_nbytes + self.values.numel() * self.values.element_size() + bias

    @property
    def dense_nbytes(self) -> int:
        """Bytes of the dense weight and bias in the same dtype."""
        bias = 0 if self.bias is None else self.bias.numel() * self.bias.element_size()
        return self.rows * self.columns * self.values.element_size() + bias

    def __repr__(self) -> str:
        return (
            f"PackedWeight({self.structure}, shape={self.shape}, sparsity={self.sparsity:.4f}, coding={self.coding}, "
            f"{self.dtype}, {self.nbytes} of {self.dense_nbytes} bytes)"
        )

    # -- views ---------------------------------------------------------------------------------------------------------

    def mask(self) -> torch.Tensor:
        """Return the bool mask of the dense weight's shape, True = kept, on the CPU."""
        flat, _ = self._flat_indices()
        mask = torch.zeros(self.rows * self.columns, dtype=torch.bool)
        mask[torch.from_numpy(flat)] = True
        return mask.reshape(self.shape)

    def to_dense(self) -> torch.Tensor:
        """Return the dense weight, kept values bit for bit and +0.0 elsewhere; differentiable in the values."""
        flat, source = self._flat_indices()
        index = torch.from_numpy(flat).to(self.device)
        dense = self.values.new_zeros(self.rows * self.columns)
        values = self.values if source is None else self.values[torch.from_numpy(source).to(self.device)]
        return dense.index_copy(0, index, values).reshape(self.shape)

    def csr(self) -> CSR:
        """Return the matrix view in compressed rows.

        Example:
            >>> PackedWeight.from_dense(torch.tensor([[0.0, 2.0], [1.0, 0.0]])).csr().cols
            tensor([1, 0], dtype=torch.int32)

        Returns:
            `CSR(row_ptr int64 [M + 1], cols int32 [nnz], order int64 [nnz] or None)`: entry i has value
            `values[order[i]]`.
        """
        flat, source = self._flat_indices()
        rows, cols = numpy.divmod(flat, max(self.columns, 1))
        row_ptr = numpy.zeros(self.rows + 1, dtype=numpy.int64)
        numpy.cumsum(numpy.bincount(rows, minlength=self.rows), out=row_ptr[1:])
        order = None if source is None else torch.from_numpy(source)
        return CSR(torch.from_numpy(row_ptr), torch.from_numpy(cols.astype(numpy.int32)), order)

    def blocks(self) -> CSR:
        """Return the kept cells of `grid` in compressed block rows; cells cut by the edge count as whole ones.

        Value j of cell i is `values[i * block_rows * block_cols + j]`, through `self.order` where that is set. For
        `Channel` a cell is one weight.
        """
        if isinstance(self.structure, Channel):
            row_ptr, cols, _ = self._replace(order=None).csr()
            return CSR(row_ptr, cols, None)
        rows, cols = numpy.divmod(self._cells(), max(self.grid[1], 1))
        row_ptr = numpy.zeros(self.grid[0] + 1, dtype=numpy.int64)
        numpy.cumsum(numpy.bincount(rows, minlength=self.grid[0]), out=row_ptr[1:])
        return CSR(torch.from_numpy(row_ptr), torch.from_numpy(cols.astype(numpy.int32)), None)

    def transpose(self) -> "PackedWeight":
        """Return the transposed matrix view, (columns, rows), over the *same* values tensor, reached through `order`.

        Example:
            >>> packed = PackedWeight.from_dense(torch.tensor([[0.0, 2.0], [1.0, 3.0]]))
            >>> packed.transpose().values is packed.values
            True
        """
        shape = (self.columns, self.rows)
        if isinstance(self.structure, Channel):
            rows, cols = self._channel_lists()
            permutation = numpy.arange(len(rows) * len(cols)).reshape(len(rows), len(cols)).T.reshape(-1)
            pattern = {"rows": _smallest_ints(cols, shape[0]), "channels": _smallest_ints(rows, shape[1])}
            structure: Structure = Channel()
            coding = "channels"
        else:
            block_rows, block_cols = self.block
            grid_rows, grid_cols = self.grid
            cell_rows, cell_cols = numpy.divmod(self._cells(), max(grid_cols, 1))
            # Sorting 16-bit keys stably is a radix sort in numpy, several times faster than a merge sort of wider ones.
            keys = cell_cols.astype(numpy.uint16) if grid_cols <= 2**16 else cell_cols
            cell_order = numpy.argsort(keys, kind="stable")
            size = block_rows * block_cols
            inner = numpy.arange(size).reshape(block_rows, block_cols).T.reshape(-1)
            permutation = (cell_order[:, None] * size + inner[None, :]).reshape(-1)
            structure = Block((block_cols, block_rows)) if isinstance(self.structure, Block) else Unstructured()
            cells = cell_cols[cell_order] * grid_rows + cell_rows[cell_order]
            coding, pattern = _encode(cells, (grid_cols, grid_rows), False)
        order = torch.from_numpy(permutation.astype(numpy.int32))
        if self.order is not None:
            order = self.order[order.long()]
        return PackedWeight(structure, shape, coding, pattern, self.values, None, order)

    def with_values(self, values: torch.Tensor) -> "PackedWeight":
        """Return the same pattern over other values (any float dtype and device; the tensor is kept, not copied).

        Args:
            values: contiguous (values.numel(),) tensor in this weight's order.

        Raises:
            ShapeError: when their number differs.
        """
        if values.dim() != 1 or values.numel() != self.values.numel():
            raise ShapeError(f"got values of shape {tuple(values.shape)} for a pattern of {self.values.numel()} values")
        return self._replace(values=values.contiguous())

    def with_bias(self, bias: torch.Tensor | None) -> "PackedWeight":
        """Return the same weight carrying another bias (M,) or none."""
        if bias is not None and tuple(bias.shape) != (self.rows,):
            raise ShapeError(f"bias of shape {tuple(bias.shape)} does not fit a weight of {self.rows} rows")
        return self._replace(bias=bias)

    def gather(self, dense: torch.Tensor) -> torch.Tensor:
        """Read a dense tensor of this weight's shape at the pattern, in the order of `values`; padding is zero."""
        if tuple(dense.shape) != self.shape:
            raise ShapeError(f"got a tensor of shape {tuple(dense.shape)} for a pattern of shape {self.shape}")
        return self._gather(dense)

    def places_in(self, other: "PackedWeight") -> torch.Tensor:
        """Say where each of this weight's values lies among another weight's values.

        Example:
            >>> left = PackedWeight.from_dense(torch.tensor([[1.0, 2.0, 0.0]]))
            >>> right = PackedWeight.from_dense(torch.tensor([[0.0, 2.0, 3.0]]))
            >>> right.places_in(left)
            tensor([ 1, -1])

        Args:
            other: a packed weight of the same shape.

        Returns:
            int64 (number of values): the place, or −1 for what the other does not keep. The padding of a block goes
            with its block.
        """
        if other.shape != self.shape:
            raise ShapeError(f"patterns of shapes {self.shape} and {other.shape} cannot be matched")
        own_flat, own_source = self._flat_indices()
        other_flat, other_source = other._flat_indices()
        found = numpy.minimum(numpy.searchsorted(other_flat, own_flat), max(len(other_flat) - 1, 0))
        known = other_flat[found] == own_flat if len(other_flat) else numpy.zeros(len(own_flat), dtype=bool)
        places = numpy.full(self.values.numel(), -1, dtype=numpy.int64)
        target = numpy.flatnonzero(known) if own_source is None else own_source[known]
        places[target] = found[known] if other_source is None else other_source[found[known]]
        if self.block == other.block and self.block != (1, 1) and self.order is None and other.order is None:
            area = self.block[0] * self.block[1]
            cells = places.reshape(-1, area)
            first = cells - numpy.arange(area)
            first = numpy.where(cells >= 0, first, -1).max(axis=1, initial=-1)[:, None]
            places = numpy.where(first >= 0, first + numpy.arange(area), -1).reshape(-1)
        return torch.from_numpy(places)

    # -- saving --------------------------------------------------------------------------------------------------------

    def state(self) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
        """Return `(tensors, meta)`: plain tensors and plain JSON, from which `from_state` rebuilds the weight."""
        tensors = {"values": self.values.detach()}
        tensors.update({f"pattern.{name}": tensor for name, tensor in self.pattern.items()})
        if self.bias is not None:
            tensors["bias"] = self.bias.detach()
        if self.order is not None:
            tensors["order"] = self.order
        return tensors, {"structure": str(self.structure), "shape": list(self.shape), "coding": self.coding}

    @classmethod
    def from_state(
        cls,
        tensors: Mapping[str, torch.Tensor],
        meta: Mapping[str, Any],
        dtypes: tuple[torch.dtype, ...] = _VALUE_DTYPES,
    ) -> "PackedWeight":
        """Rebuild a packed weight, trusting nothing: every size, index and type is checked before use.

        Example:
            >>> packed = PackedWeight.from_dense(torch.eye(3))
            >>> torch.equal(PackedWeight.from_state(*packed.state()).to_dense(), torch.eye(3))
            True

        Args:
            tensors, meta: as `state` returns them.
            dtypes: that the values may have.

        Raises:
            FileFormatError: naming what is wrong.
        """
        structure, shape, coding = _read_meta(meta)
        if not isinstance(tensors, Mapping) or not all(isinstance(name, str) for name in tensors):
            raise FileFormatError("packed weight: its tensors are no mapping from names to tensors")
        expected = {"values", "bias", "order", *(f"pattern.{name}" for name in _PATTERN_TENSORS[coding])}
        if isinstance(structure, FanIn):
            expected.discard("pattern.counts")
        unknown = sorted(set(tensors) - expected)
        missing = sorted(expected - {"bias", "order"} - set(tensors))
        if unknown or missing:
            raise FileFormatError(
                f"packed weight with coding {coding!r}: unknown tensors {unknown}, missing tensors {missing}"
            )
        for name, tensor in tensors.items():
            if not isinstance(tensor, torch.Tensor) or tensor.dim() != 1:
                raise FileFormatError(f"packed weight: {name} is not a one-dimensional tensor")
        pattern = {
            name: tensors[f"pattern.{name}"].cpu().contiguous()
            for name in _PATTERN_TENSORS[coding]
            if f"pattern.{name}" in tensors
        }
        values, bias, order = tensors["values"], tensors.get("bias"), tensors.get("order")
        if values.dtype not in dtypes:
            expected = " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
            raise FileFormatError(f"packed weight: values have dtype {values.dtype}; {expected} expected")
        if bias is not None and (bias.numel() != shape[0] or not bias.dtype.is_floating_point):
            raise FileFormatError(f"packed weight: bias of {bias.numel()} x {bias.dtype} does not fit {shape[0]} rows")
        packed = cls(
            structure,
            shape,
            coding,
            pattern,
            values.contiguous(),
            bias,
            None if order is None else order.cpu().contiguous(),
        )
        packed._validate()
        return packed

    def _validate(self) -> None:
        """Check pattern, values and order against each other; the pattern's own tensors may hold anything."""
        if isinstance(self.structure, Channel):
            if self.coding != "channels":
                raise FileFormatError(f"packed weight: coding {self.coding!r} does not belong to {self.structure}")
            _check_index_list(self.pattern["rows"], self.shape[0], "rows")
            _check_index_list(self.pattern["channels"], self.shape[1], "channels")
            rows, cols = self._channel_lists()
            count = len(rows) * len(cols)
        else:
            if self.coding == "channels":
                raise FileFormatError(f"packed weight: coding {self.coding!r} does not belong to {self.structure}")
            cells = _decode_checked(self.coding, self.pattern, self.grid, self.structure)
            count = len(cells) * self.block[0] * self.block[1]
            if self.block == (1, 1) and not isinstance(self.structure, Unstructured | Block):
                try:
                    self.structure.check(self.mask())
                except StructureError as error:
                    raise FileFormatError(f"packed weight: {error}") from None
        if self.values.numel() != count:
            raise FileFormatError(f"packed weight: {self.values.numel()} values for a pattern of {count}")
        if self.order is not None:
            if self.order.dtype != torch.int32 or self.order.numel() != count:
                raise FileFormatError(
                    f"packed weight: order of {self.order.numel()} x {self.order.dtype} for {count} values"
                )
            order = self.order.numpy()
            if count and (
                order.min() < 0 or order.max() >= count or (numpy.bincount(order, minlength=count) != 1).any()
            ):
                raise FileFormatError("packed weight: order is not a permutation of the values")

    # -- private -------------------------------------------------------------------------------------------------------

    def __reduce__(self) -> tuple[Any, ...]:
        return (
            PackedWeight,
            (self.structure, self.shape, self.coding, self.pattern, self.values, self.bias, self.order),
        )

    def _replace(self, **changes: Any) -> "PackedWeight":
        fields = {name: getattr(self, name) for name in self.__slots__}
        fields.update(changes)
        return PackedWeight(**fields)

    def _cells(self) -> numpy.ndarray:
        """Flat grid positions of the kept cells, ascending."""
        return _decode(self.coding, self.pattern, self.grid, self.structure)

    def _channel_lists(self) -> tuple[numpy.ndarray, numpy.ndarray]:
        """Kept rows and kept columns of the matrix view."""
        rows = self.pattern["rows"].numpy().astype(numpy.int64)
        channels = self.pattern["channels"].numpy().astype(numpy.int64)
        taps = self.columns // self.shape[1] if self.shape[1] else 1
        return rows, (channels[:, None] * taps + numpy.arange(taps)[None, :]).reshape(-1)

    def _flat_indices(self) -> tuple[numpy.ndarray, numpy.ndarray | None]:
        """Matrix positions of all kept weights, row-major, and where in `values` each lies (None: in order)."""
        source: numpy.ndarray | None = None
        if isinstance(self.structure, Channel):
            rows, cols = self._channel_lists()
            flat = (rows[:, None] * self.columns + cols[None, :]).reshape(-1)
        elif self.block == (1, 1):
            flat = self._cells()
        else:
            flat, source = self._block_indices()
        if self.order is not None:
            order = self.order.numpy().astype(numpy.int64)
            source = order if source is None else order[source]
        return flat, source

    def _block_indices(self) -> tuple[numpy.ndarray, numpy.ndarray]:
        block_rows, block_cols = self.block
        cell_rows, cell_cols = numpy.divmod(self._cells(), max(self.grid[1], 1))
        rows = cell_rows[:, None, None] * block_rows + numpy.arange(block_rows)[None, :, None]
        cols = cell_cols[:, None, None] * block_cols + numpy.arange(block_cols)[None, None, :]
        inside = ((rows < self.rows) & (cols < self.columns)).reshape(-1)
        flat = (rows * self.columns + cols).reshape(-1)
        # Only the last block of a block row can be cut, so the place of an entry in its row is the number of blocks
        # before it.
        widths = numpy.minimum(block_cols, self.columns - cell_cols * block_cols)
        entries = numpy.zeros(self.rows + 1, dtype=numpy.int64)
        per_block_row = numpy.bincount(cell_rows, weights=widths, minlength=self.grid[0]).astype(numpy.int64)
        numpy.cumsum(numpy.repeat(per_block_row, block_rows)[: self.rows], out=entries[1:])
        first_cell = numpy.zeros(self.grid[0] + 1, dtype=numpy.int64)
        numpy.cumsum(numpy.bincount(cell_rows, minlength=self.grid[0]), out=first_cell[1:])
        rank = numpy.arange(len(cell_rows)) - first_cell[cell_rows]
        row_start = entries[numpy.minimum(rows, self.rows)]
        target = (row_start + rank[:, None, None] * block_cols + numpy.arange(block_cols)[None, None, :]).reshape(-1)[
            inside
        ]
        source = numpy.empty(len(target), dtype=numpy.int64)
        source[target] = numpy.flatnonzero(inside)
        return flat[source], source

    def _gather(self, dense: torch.Tensor) -> torch.Tensor:
        flat, source = self._flat_indices()
        picked = dense.reshape(-1)[torch.from_numpy(flat).to(dense.device)]
        if source is None:
            return picked
        count = (
            int(self.values.numel()) if self.order is not None else self._cells().size * self.block[0] * self.block[1]
        )
        return picked.new_zeros(count).index_put((torch.from_numpy(source).to(dense.device),), picked)


# -- codings -----------------------------------------------------------------------------------------------------------

_PATTERN_TENSORS = {
    "full": (),
    "bitmask": ("bits",),
    "delta8": ("gaps",),
    "index16": ("counts", "cols"),
    "index32": ("counts", "cols"),
    "channels": ("rows", "channels"),
}


def _block(structure: Structure) -> tuple[int, int]:
    return structure.shape if isinstance(structure, Block) else (1, 1)


def _smallest_ints(numbers: numpy.ndarray, limit: int) -> torch.Tensor:
    """Store numbers below `limit` in one, two or four bytes each."""
    dtype = numpy.uint8 if limit <= 2**8 else numpy.uint16 if limit <= 2**16 else numpy.int32
    return torch.from_numpy(numpy.ascontiguousarray(numbers.astype(dtype)))


def _encode(cells: numpy.ndarray, grid: tuple[int, ...], constant_count: bool) -> tuple[str, dict[str, torch.Tensor]]:
    """Store ascending flat grid positions in the smallest coding."""
    total = grid[0] * grid[1]
    if len(cells) == total:
        return "full", {}
    counts = numpy.bincount(cells // grid[1], minlength=grid[0])
    count_tensor = _smallest_ints(counts, int(counts.max(initial=0)) + 1)
    count_bytes = 0 if constant_count else count_tensor.numel() * count_tensor.element_size()
    gaps = numpy.diff(cells, prepend=-1) - 1
    skips = gaps // _ESCAPE
    sizes = {
        "bitmask": -(-total // 8),
        "delta8": len(cells) + int(skips.sum()),
        "index16": 2 * len(cells) + count_bytes if grid[1] <= 2**16 else math.inf,
        "index32": 4 * len(cells) + count_bytes,
    }
    coding = min(sizes, key=lambda name: sizes[name])
    if coding == "bitmask":
        occupied = numpy.zeros(total, dtype=bool)
        occupied[cells] = True
        return coding, {"bits": torch.from_numpy(numpy.packbits(occupied, bitorder="little"))}
    if coding == "delta8":
        stream = numpy.full(int(sizes["delta8"]), _ESCAPE, dtype=numpy.uint8)
        stream[numpy.cumsum(skips + 1) - 1] = gaps % _ESCAPE
        return coding, {"gaps": torch.from_numpy(stream)}
    cols = (cells % grid[1]).astype(numpy.uint16 if coding == "index16" else numpy.int32)
    pattern = {"cols": torch.from_numpy(cols)}
    return coding, pattern if constant_count else {"counts": count_tensor, **pattern}


def _decode(
    coding: str, pattern: Mapping[str, torch.Tensor], grid: tuple[int, int], structure: Structure
) -> numpy.ndarray:
    """Return the ascending flat grid positions (int64)."""
    total = grid[0] * grid[1]
    if coding == "full":
        return numpy.arange(total, dtype=numpy.int64)
    if coding == "bitmask":
        return numpy.flatnonzero(numpy.unpackbits(pattern["bits"].numpy(), count=total, bitorder="little"))
    if coding == "delta8":
        stream = pattern["gaps"].numpy()
        ends = stream != _ESCAPE
        return numpy.cumsum(stream.astype(numpy.int64) + ends)[ends] - 1
    cols = pattern["cols"].numpy().astype(numpy.int64)
    counts = (
        numpy.full(grid[0], structure.k)
        if isinstance(structure, FanIn)
        else pattern["counts"].numpy().astype(numpy.int64)
    )
    return numpy.repeat(numpy.arange(grid[0], dtype=numpy.int64) * grid[1], counts) + cols


def _decode_checked(
    coding: str, pattern: Mapping[str, torch.Tensor], grid: tuple[int, int], structure: Structure
) -> numpy.ndarray:
    """Decode a pattern from an untrusted file, or say what is wrong with it."""
    total = grid[0] * grid[1]
    dtypes = {
        "bitmask": {"bits": (torch.uint8,)},
        "delta8": {"gaps": (torch.uint8,)},
        "index16": {"cols": (torch.uint16,), "counts": (torch.uint8, torch.uint16, torch.int32)},
        "index32": {"cols": (torch.int32,), "counts": (torch.uint8, torch.uint16, torch.int32)},
    }.get(coding, {})
    for name, tensor in pattern.items():
        if tensor.dtype not in dtypes[name]:
            raise FileFormatError(f"packed weight: pattern.{name} of coding {coding!r} has dtype {tensor.dtype}")
    if coding == "bitmask":
        bits = pattern["bits"].numpy()
        if len(bits) != -(-total // 8):
            raise FileFormatError(f"packed weight: bitmask of {len(bits)} bytes for {total} cells")
        if total % 8 and bits[-1] >> (total % 8):
            raise FileFormatError(f"packed weight: bitmask has bits set beyond its {total} cells")
    if coding == "delta8":
        stream = pattern["gaps"].numpy()
        if len(stream) and stream[-1] == _ESCAPE:
            raise FileFormatError("packed weight: the gap stream ends inside a gap")
        end = int(stream.astype(numpy.int64).sum()) + int(numpy.count_nonzero(stream != _ESCAPE))
        if end > total:
            raise FileFormatError(f"packed weight: the gap stream reaches cell {end} of {total}")
    if coding in ("index16", "index32"):
        cols = pattern["cols"].numpy().astype(numpy.int64)
        if isinstance(structure, FanIn):
            counts = numpy.full(grid[0], structure.k, dtype=numpy.int64)
        else:
            counts = pattern["counts"].numpy().astype(numpy.int64)
        if len(counts) != grid[0] or counts.min(initial=0) < 0 or counts.sum() != len(cols):
            raise FileFormatError(
                f"packed weight: counts for {len(counts)} rows with sum {counts.sum()}; {grid[0]} rows and {len(cols)} "
                f"expected"
            )
        if len(cols) and (cols.min() < 0 or cols.max() >= grid[1]):
            raise FileFormatError(
                f"packed weight: column indices reach {cols.min()}..{cols.max()} of {grid[1]} columns"
            )
        cells = _decode(coding, pattern, grid, structure)
        if (numpy.diff(cells) <= 0).any():
            raise FileFormatError("packed weight: column indices do not ascend")
        return cells
    if isinstance(structure, FanIn) and coding == "full" and structure.k != grid[1]:
        raise FileFormatError(f"packed weight: {structure} cannot be full with {grid[1]} columns")
    return _decode(coding, pattern, grid, structure)


def _check_index_list(tensor: torch.Tensor, limit: int, name: str) -> None:
    if tensor.dtype not in (torch.uint8, torch.uint16, torch.int32):
        raise FileFormatError(f"packed weight: pattern.{name} has dtype {tensor.dtype}")
    numbers = tensor.numpy().astype(numpy.int64)
    if len(numbers) and (numbers[0] < 0 or numbers[-1] >= limit or (numpy.diff(numbers) <= 0).any()):
        raise FileFormatError(f"packed weight: pattern.{name} does not ascend within 0..{limit - 1}")


def _read_meta(meta: Mapping[str, Any]) -> tuple[Structure, tuple[int, ...], str]:
    if not isinstance(meta, Mapping):
        raise FileFormatError(f"packed weight: its description is {meta!r}; structure, shape and coding expected")
    if set(meta) != {"structure", "shape", "coding"}:
        raise FileFormatError(f"packed weight: keys {sorted(map(str, meta))}; structure, shape and coding expected")
    shape, coding = meta["shape"], meta["coding"]
    if not isinstance(meta["structure"], str):
        raise FileFormatError(f"packed weight: structure is {meta['structure']!r}, not a text")
    try:
        structure = Structure.parse(meta["structure"])
    except StructureError as error:
        raise FileFormatError(f"packed weight: {error}") from None
    sizes_fit = isinstance(shape, list | tuple) and all(
        isinstance(size, int) and not isinstance(size, bool) and size >= 0 for size in shape
    )
    if not sizes_fit or not 2 <= len(shape) <= 8 or math.prod(shape) > _LARGEST_COUNT or max(shape) > _LARGEST_COUNT:
        raise FileFormatError(
            f"packed weight: {shape!r} is no shape of two to eight dimensions and at most {_LARGEST_COUNT} entries"
        )
    if not isinstance(coding, str) or coding not in _PATTERN_TENSORS:
        raise FileFormatError(f"packed weight: unknown coding {coding!r}; one of {sorted(_PATTERN_TENSORS)} expected")
    if isinstance(structure, Block) and structure.shape[0] * structure.shape[1] > _LARGEST_COUNT:
        raise FileFormatError(f"packed weight: {structure} is larger than any weight")
    return structure, tuple(shape), coding
