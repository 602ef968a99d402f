"""The constants of an executable, kept packed: a weight with zeros takes its packed size until somebody reads it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, MutableMapping
from typing import TYPE_CHECKING

import numpy
import torch
from torch import Tensor

from sparse_engine.errors import StructureError
from sparse_engine.packed import PackedWeight
from sparse_engine.rounded import RoundedWeight

if TYPE_CHECKING:
    from sparse_engine.convert.graph import Graph

Constant = Tensor | PackedWeight | RoundedWeight


class PackedConstants(MutableMapping[str, Tensor]):
    """A dict of tensors in which those with zeros are stored packed; reading one unpacks it, bit for bit, every time.

    Example:
        >>> constants = PackedConstants({"weight": torch.eye(64)})
        >>> constants["weight"].shape, constants.nbytes < 64 * 64 * 4
        (torch.Size([64, 64]), True)

    Args:
        constants: tensors, or weights that are packed (and rounded) already.
    """

    def __init__(self, constants: Mapping[str, Constant]) -> None:
        self.stored: dict[str, Tensor | PackedWeight | RoundedWeight] = {
            name: pack(item) for name, item in constants.items()
        }

    def __getitem__(self, name: str) -> Tensor:
        item = self.stored[name]
        return item if isinstance(item, Tensor) else item.to_dense()

    def __setitem__(self, name: str, tensor: Tensor) -> None:
        self.stored[name] = pack(tensor)

    def __delitem__(self, name: str) -> None:
        del self.stored[name]

    def __contains__(self, name: object) -> bool:
        return name in self.stored

    def __iter__(self) -> Iterator[str]:
        return iter(self.stored)

    def __len__(self) -> int:
        return len(self.stored)

    @property
    def nbytes(self) -> int:
        """Bytes as stored."""
        return sum(
            item.numel() * item.element_size() if isinstance(item, Tensor) else item.nbytes
            for item in self.stored.values()
        )


def constant_shape(graph: Graph, name: str) -> tuple[int, ...]:
    """The shape of a graph's constant, which is not unpacked for that."""
    item = graph.constants.stored[name] if isinstance(graph.constants, PackedConstants) else graph.constants[name]
    return tuple(item.shape)


def constant_nonzeros(graph: Graph, name: str) -> int:
    """How many entries of a graph's constant are not zero (or, where it is packed, are kept)."""
    item = graph.constants.stored[name] if isinstance(graph.constants, PackedConstants) else graph.constants[name]
    return int(torch.count_nonzero(item)) if isinstance(item, Tensor) else item.nnz


def constant_csr(graph: Graph, name: str) -> tuple[numpy.ndarray, numpy.ndarray, numpy.ndarray]:
    """row_ptr (int64), columns (int32) and values of a constant as a matrix of its first dimension's rows.

    A packed one is not made dense for that, which would take ten times the memory at 90 % zeros.
    """
    item = graph.constants.stored[name] if isinstance(graph.constants, PackedConstants) else graph.constants[name]
    if isinstance(item, RoundedWeight):
        row_ptr, cols, values = item.csr()
        return row_ptr, cols, item.float_values(row_ptr, values)
    if isinstance(item, PackedWeight):
        csr = item.csr()
        values = item.values if csr.order is None else item.values[csr.order]
        return csr.row_ptr.numpy(), csr.cols.numpy(), values.detach().to(torch.float32).numpy()
    weight = item.detach().flatten(1).to(torch.float32).numpy()
    rows, cols = numpy.nonzero(weight)
    row_ptr = numpy.zeros(weight.shape[0] + 1, dtype=numpy.int64)
    numpy.cumsum(numpy.bincount(rows, minlength=weight.shape[0]), out=row_ptr[1:])
    return row_ptr, cols.astype(numpy.int32), weight[rows, cols]


def constant_rounded(graph: Graph, name: str) -> RoundedWeight | None:
    """A graph's constant where it is kept in another precision than it stands for, else None."""
    item = graph.constants.stored[name] if isinstance(graph.constants, PackedConstants) else None
    return item if isinstance(item, RoundedWeight) else None


def pack(item: Constant) -> Constant:
    """A weight packed where that is smaller; everything else as it is."""
    if not isinstance(item, Tensor) or item.dim() < 2 or not item.is_floating_point() or item.numel() == 0:
        return item
    zeros = item.numel() - int(torch.count_nonzero(item))
    # A bitmask alone takes a bit for each entry.
    if 8 * zeros * item.element_size() <= item.numel():
        return item
    try:
        packed = PackedWeight.from_dense(item.detach())
    except StructureError:  # a shape that no structure describes
        return item
    return packed if packed.nbytes < item.numel() * item.element_size() else item
