"""Weights rounded to bfloat16, or of linear layers to int8, kept packed: a half or a quarter of the bytes of float32.

int8 weights are symmetric with one scale for each output:

    W[m, k] = scales[m] · q[m, k],     scales[m] = max_k |W[m, k]| / 127,     q = round(W / scales)
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy
import torch

from sparse_engine.errors import FileFormatError, SparseEngineError
from sparse_engine.packed import PackedWeight

__all__ = ["PRECISIONS", "RoundedWeight", "round_weight"]

PRECISIONS = {"bf16": torch.bfloat16, "int8": torch.int8}
_LEVELS = 127

# Of weights that are kept, from which on a pattern is not worth its bytes and the work that it makes.
_DENSE_FROM = 0.9


def round_weight(weight: torch.Tensor, precision: str) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Round a float32 weight to the nearest that a precision can hold.

    Example:
        >>> round_weight(torch.tensor([[0.5, -1.27]]), "int8")
        (tensor([[  50, -127]], dtype=torch.int8), tensor([0.0100]))

    Args:
        weight: float32 (M, K); in "bf16" of any shape.
        precision: "bf16" or "int8".

    Returns:
        The rounded weight, of the same shape, bfloat16 or int8, and for int8 the scales (M,), float32.

    Raises:
        SparseEngineError: for an unknown precision, or a weight with NaN or infinity in int8.
    """
    if precision not in PRECISIONS:
        raise SparseEngineError(f"precision is {precision!r}; one of {', '.join(PRECISIONS)} expected")
    if precision == "bf16":
        return weight.to(torch.bfloat16), None
    if not bool(weight.isfinite().all()):
        count = int((~weight.isfinite()).sum())
        raise SparseEngineError(f"int8 cannot hold the {count} infinities or NaNs of the weight; use bf16")
    largest = weight.abs().amax(1) if weight.shape[1] else weight.new_zeros(weight.shape[0])
    scales = (largest / _LEVELS).where(largest > 0, 1.0)
    # The smallest numbers have no quotient: their row is zero.
    scales = scales.where(scales > 0, 1.0)
    return (weight / scales[:, None]).round().clamp(-_LEVELS, _LEVELS).to(torch.int8), scales


@dataclass(frozen=True, eq=False)
class RoundedWeight:
    """A rounded weight in its packed form, which stands for a float32 one.

    Example:
        >>> rounded = RoundedWeight.from_dense(torch.tensor([[0.0, 2.0], [1.0, 0.0]]), "int8")
        >>> rounded.to_dense()
        tensor([[0., 2.],
                [1., 0.]])

    Attributes:
        precision: "bf16" or "int8".
        packed: pattern, and values in bfloat16 or int8.
        scales: float32 (M,) for int8, None for bfloat16.
    """

    precision: str
    packed: PackedWeight
    scales: torch.Tensor | None

    @classmethod
    def from_dense(cls, weight: torch.Tensor, precision: str) -> "RoundedWeight":
        """Round and pack a weight (M, K), or in bf16 a convolution's, on the CPU; zeros are left out.

        Raises:
            SparseEngineError: as `round_weight`.
            StructureError: the weight has more entries than a packed weight can have.
        """
        rounded, scales = round_weight(weight.detach().to(torch.float32), precision)
        values = rounded.to(torch.float32)
        if int(torch.count_nonzero(values)) >= _DENSE_FROM * values.numel():
            packed = PackedWeight.from_dense(values, torch.ones_like(values, dtype=torch.bool), "unstructured")
        else:
            packed = PackedWeight.from_dense(values)
        return cls(precision, packed.with_values(packed.values.to(PRECISIONS[precision])), scales)

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the dense weight."""
        return self.packed.shape

    @property
    def dtype(self) -> torch.dtype:
        """Of what it stands for."""
        return torch.float32

    @property
    def nnz(self) -> int:
        """Kept weights."""
        return self.packed.nnz

    @property
    def dense(self) -> bool:
        """Whether every weight is kept."""
        return self.packed.coding == "full"

    @property
    def nbytes(self) -> int:
        """Bytes in memory and on disk."""
        return self.packed.nbytes + (0 if self.scales is None else 4 * self.scales.numel())

    @property
    def dense_nbytes(self) -> int:
        """Bytes of what it stands for."""
        return 4 * self.packed.rows * self.packed.columns

    def to_dense(self) -> torch.Tensor:
        """Return the rounded weight as float32 (M, K)."""
        weight = self.packed.to_dense().to(torch.float32)
        return weight if self.scales is None else weight * self.scales[:, None]

    def csr(self) -> tuple[numpy.ndarray, numpy.ndarray, numpy.ndarray]:
        """Return row_ptr (int64), columns (int32) and values (the bits of bfloat16 as uint16, or int8)."""
        csr = self.packed.csr()
        values = self.packed.values if csr.order is None else self.packed.values[csr.order]
        return csr.row_ptr.numpy(), csr.cols.numpy(), _bits(values)

    def rows(self) -> numpy.ndarray:
        """Return all values, (M · K,), row by row; as in `csr`."""
        return _bits(self.packed.to_dense().reshape(-1))

    def float_values(self, row_ptr: numpy.ndarray, values: numpy.ndarray) -> numpy.ndarray:
        """Return what values in the order of `csr` stand for, in float32."""
        if self.scales is None:
            return (values.astype(numpy.uint32) << 16).view(numpy.float32)
        return values.astype(numpy.float32) * numpy.repeat(self.scales.numpy(), numpy.diff(row_ptr))

    def state(self) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
        """Return `(tensors, meta)`: plain tensors and plain JSON, from which `from_state` rebuilds the weight."""
        tensors, meta = self.packed.state()
        return tensors if self.scales is None else {**tensors, "scales": self.scales}, meta

    @classmethod
    def from_state(
        cls, tensors: Mapping[str, torch.Tensor], meta: Mapping[str, Any], precision: Any
    ) -> "RoundedWeight":
        """Rebuild a rounded weight, trusting nothing.

        Raises:
            FileFormatError: naming what is wrong.
        """
        if not isinstance(precision, str) or precision not in PRECISIONS:
            raise FileFormatError(
                f"rounded weight: to {str(precision)[:40]!r}; one of {', '.join(PRECISIONS)} expected"
            )
        rest = {role: tensor for role, tensor in tensors.items() if role != "scales"}
        packed = PackedWeight.from_state(rest, meta, (PRECISIONS[precision],))
        if (len(packed.shape) != 2 and precision == "int8") or packed.bias is not None:
            raise FileFormatError("rounded weight: in int8 it is no matrix, or it has a bias")
        scales = tensors.get("scales")
        if (scales is not None) != (precision == "int8"):
            raise FileFormatError(f"rounded weight: scales belong to int8, and to nothing else; it is {precision}")
        if scales is not None and (
            scales.dtype != torch.float32
            or tuple(scales.shape) != (packed.rows,)
            or not bool((scales.isfinite() & (scales > 0)).all())
        ):
            raise FileFormatError(f"rounded weight: scales must be {packed.rows} positive float32 numbers")
        return cls(precision, packed, scales)


def _bits(values: torch.Tensor) -> numpy.ndarray:
    if values.dtype == torch.bfloat16:
        return values.contiguous().view(torch.int16).numpy().view(numpy.uint16)
    return values.contiguous().numpy()
