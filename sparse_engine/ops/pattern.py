"""The form in which a pattern reaches the ops, and what is kept per pattern so that it is built only once."""

import threading
from collections.abc import Callable, Hashable
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch._functorch.pyfunctorch import temporarily_clear_interpreter_stack
from torch.autograd import forward_ad
from torch.multiprocessing.reductions import StorageWeakRef

from sparse_engine.packed import PackedWeight

__all__ = ["Pattern", "cached", "cell_index", "gather_matrix", "scatter_matrix"]

T = TypeVar("T")


@dataclass(frozen=True, eq=False)
class Pattern:
    """The kept cells of a weight in compressed block rows, as plain tensors and ints that `torch.export` can carry.

    Example:
        >>> packed = PackedWeight.from_dense(torch.tensor([[0.0, 2.0], [1.0, 0.0]]))
        >>> Pattern.from_packed(packed).cols
        tensor([1, 0], dtype=torch.int32)

    The two tensors are never written to once made: whatever the kernels derive from them is kept for as long as they
    live.

    Attributes:
        row_ptr: int64 (block rows + 1).
        cols: int32 (cells), ascending block columns in each block row.
        shape: the dense weight's shape (M, ...).
        block: (rows, cols) of a cell; (1, 1) for everything but `Block`.
    """

    row_ptr: torch.Tensor
    cols: torch.Tensor
    shape: tuple[int, ...]
    block: tuple[int, int]

    @classmethod
    def from_packed(cls, packed: PackedWeight) -> "Pattern":
        """Expand a packed weight's pattern, on the device of its values; the values' order stays as it is.

        A transposed weight (one with `order`) has its values elsewhere; pass `packed.values[packed.order]` with this
        pattern.
        """
        row_ptr, cols, _ = packed.blocks()
        return cls(row_ptr.to(packed.device), cols.to(packed.device), packed.shape, packed.block)

    @property
    def rows(self) -> int:
        """Rows of the matrix view."""
        return self.shape[0]

    @property
    def columns(self) -> int:
        """Columns of the matrix view."""
        columns = 1
        for size in self.shape[1:]:
            columns *= size
        return columns

    @property
    def num_values(self) -> int:
        """Length of the values tensor, padding of cut blocks included."""
        return self.cols.numel() * self.block[0] * self.block[1]

    def to(self, device: torch.device | str) -> "Pattern":
        """Return the pattern on a device; the same object where it is there already."""
        device = torch.device(device)
        if self.cols.device == device or (self.cols.device.type == device.type and device.index is None):
            return self
        return Pattern(self.row_ptr.to(device), self.cols.to(device), self.shape, self.block)


@dataclass
class _Entry:
    # While a weak reference to a storage is held, its address cannot be given to another storage: the address is an
    # identity.
    storages: tuple[StorageWeakRef, ...]
    versions: tuple[int, ...]
    built: dict[Hashable, Any] = field(default_factory=dict)


_entries: dict[tuple[Hashable, ...], _Entry] = {}
_lock = threading.Lock()


def cached(row_ptr: torch.Tensor, cols: torch.Tensor, key: Hashable, build: Callable[[], T]) -> T:
    """Return what `build()` made when this pattern was first asked for under `key`; forgotten with the tensors.

    The pattern is recognised by the storages of its two tensors, so views and detached copies of them find the same
    entry.

    Args:
        row_ptr, cols: the pattern's tensors.
        key: what is being kept, with everything else that it depends on.
        build: called at most once per live pattern and key (twice when two threads ask at the same moment).
    """
    identity = (_place(row_ptr), _place(cols))
    versions = (_version(row_ptr), _version(cols))
    entry = _entries.get(identity)
    if entry is None or entry.versions != versions:
        entry = _new_entry(identity, (row_ptr, cols), versions)
    try:
        return entry.built[key]
    except KeyError:
        # What is kept outlives the call, so no function transform may wrap it.
        with temporarily_clear_interpreter_stack() if under_transform() else nullcontext():
            built = build()
        return entry.built.setdefault(key, built)


class LastSeen:
    """What was made of the tensor that was seen last; made again for another one, or when its numbers have changed.

    Detached copies and views of the same numbers count as the same tensor.
    """

    def __init__(self) -> None:
        # What it was made of and the result, replaced together. While the weak reference is held, the address in the
        # first cannot be another storage's.
        self._last: tuple[tuple[Any, ...], StorageWeakRef, Any] | None = None

    def get(self, tensor: torch.Tensor, make: Callable[[], T]) -> T:
        """What `make()` returned for this tensor, now or earlier."""
        if tensor.is_inference():  # counts no versions: a change of its numbers would not be noticed
            return make()
        seen, last = (*_place(tensor), tensor._version, tensor.dtype), self._last
        if last is not None and last[0] == seen and not last[1].expired():
            return last[2]
        made = make()
        self._last = (seen, StorageWeakRef(tensor.untyped_storage()), made)
        return made


def under_transform() -> bool:
    """Say whether a transform of `torch.func` or forward-mode differentiation is at work."""
    return torch._C._functorch.peek_interpreter_stack() is not None or forward_ad._current_level >= 0


def _place(tensor: torch.Tensor) -> tuple[int, int, int]:
    return tensor.untyped_storage()._cdata, tensor.storage_offset(), tensor.numel()


def _version(tensor: torch.Tensor) -> int:
    # Tensors made under inference mode count no versions.
    return 0 if tensor.is_inference() else tensor._version


def _new_entry(identity: tuple[Hashable, ...], tensors: tuple[torch.Tensor, ...], versions: tuple[int, ...]) -> _Entry:
    with _lock:
        # What belongs to patterns that are gone is dropped here, so that training with a changing pattern does not
        # grow.
        for known in [known for known, entry in _entries.items() if any(ref.expired() for ref in entry.storages)]:
            del _entries[known]
        entry = _Entry(tuple(StorageWeakRef(tensor.untyped_storage()) for tensor in tensors), versions)
        _entries[identity] = entry
        return entry


def cell_index(row_ptr: torch.Tensor, cols: torch.Tensor, grid_cols: int) -> torch.Tensor:
    """Return each kept cell's flat position in the grid, int64 (cells,)."""

    def build() -> torch.Tensor:
        rows = torch.arange(row_ptr.numel() - 1, device=cols.device)
        rows = torch.repeat_interleave(rows, row_ptr.diff(), output_size=cols.numel())
        return rows * grid_cols + cols

    return cached(row_ptr, cols, ("cell_index", grid_cols), build)


def scatter_matrix(
    values: torch.Tensor, row_ptr: torch.Tensor, cols: torch.Tensor, rows: int, columns: int, block: tuple[int, int]
) -> torch.Tensor:
    """Write values into the dense matrix (rows, columns) that the pattern describes; zeros elsewhere."""
    height, width = block
    grid_rows, grid_cols = -(-rows // height), -(-columns // width)
    # Not in place: under `torch.func.vmap` the values may be many while the zeros are one.
    cells = values.new_zeros(grid_rows * grid_cols, height * width)
    cells = cells.index_copy(0, cell_index(row_ptr, cols, grid_cols), values.reshape(-1, height * width))
    if block == (1, 1):
        return cells.reshape(rows, columns)
    matrix = cells.reshape(grid_rows, grid_cols, height, width).transpose(1, 2)
    return matrix.reshape(grid_rows * height, grid_cols * width)[:rows, :columns]


def gather_matrix(matrix: torch.Tensor, index: torch.Tensor, block: tuple[int, int]) -> torch.Tensor:
    """Read a dense matrix at the cells of `index` (from `cell_index`); zeros where the edge cuts a block."""
    rows, columns = matrix.shape
    height, width = block
    if block == (1, 1):
        return matrix.reshape(-1)[index]
    grid_rows, grid_cols = -(-rows // height), -(-columns // width)
    padded = torch.nn.functional.pad(matrix, (0, grid_cols * width - columns, 0, grid_rows * height - rows))
    cells = padded.reshape(grid_rows, height, grid_cols, width).transpose(1, 2).reshape(-1, height * width)
    return cells[index].reshape(-1)
