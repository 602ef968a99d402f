"""Sparsity by layer: how many exact zeros, which structure they form, and what packing saves."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch

from sparse_engine.errors import StructureError
from sparse_engine.io import is_spx, read_checkpoint, read_spx
from sparse_engine.packed import PackedWeight
from sparse_engine.rounded import RoundedWeight


@dataclass(frozen=True)
class LayerSparsity:
    """One weight with two or more dimensions.

    Attributes:
        name: the tensor's name.
        shape: of the dense weight.
        zeros: number of exact zeros (−0.0 is one).
        structure: what is kept together, as `Structure` prints it; "dense" without any zero.
        coding: how the pattern is stored when packed.
        empty_rows: outputs whose weights are all zero.
        empty_inputs: input channels whose weights are all zero.
        dense_bytes: size as it is.
        packed_bytes: size when packed, or `dense_bytes` where packing does not pay.
        predicted_speedup: over the dense kernel, by the cost model, for many pixels or tokens; None where the model
            does not apply or the native core is not built.
    """

    name: str
    shape: tuple[int, ...]
    zeros: int
    structure: str
    coding: str
    empty_rows: int
    empty_inputs: int
    dense_bytes: int
    packed_bytes: int
    predicted_speedup: float | None = None

    @property
    def weights(self) -> int:
        return math.prod(self.shape)

    @property
    def sparsity(self) -> float:
        """Fraction of weights that are zero, 0 to 1."""
        return self.zeros / self.weights if self.weights else 0.0


@dataclass(frozen=True)
class SparsityReport:
    """Sparsity of all weights of a model or checkpoint.

    Attributes:
        layers: weights with two or more dimensions, in the file's order.
        other_values: number of values in all other tensors (biases, norms, counters).
        other_bytes: their size.
    """

    layers: list[LayerSparsity]
    other_values: int
    other_bytes: int

    @property
    def weights(self) -> int:
        return sum(layer.weights for layer in self.layers)

    @property
    def zeros(self) -> int:
        return sum(layer.zeros for layer in self.layers)

    @property
    def sparsity(self) -> float:
        """Fraction of all weights that are zero, 0 to 1."""
        return self.zeros / self.weights if self.weights else 0.0

    @property
    def sparse_layers(self) -> int:
        """Layers with any zero."""
        return sum(layer.zeros > 0 for layer in self.layers)

    @property
    def dense_bytes(self) -> int:
        return sum(layer.dense_bytes for layer in self.layers) + self.other_bytes

    @property
    def packed_bytes(self) -> int:
        return sum(layer.packed_bytes for layer in self.layers) + self.other_bytes

    def to_json(self) -> dict[str, Any]:
        """The same as plain JSON."""
        return {
            "weights": self.weights,
            "zeros": self.zeros,
            "sparsity": self.sparsity,
            "sparse_layers": self.sparse_layers,
            "dense_bytes": self.dense_bytes,
            "packed_bytes": self.packed_bytes,
            "other_values": self.other_values,
            "layers": [{**asdict(layer), "sparsity": layer.sparsity} for layer in self.layers],
        }


def sparsity_of_state(
    state: Mapping[str, torch.Tensor | PackedWeight | RoundedWeight], progress: Callable[[int, int], None] | None = None
) -> SparsityReport:
    """Measure a state dict (or the constants of an executable).

    Example:
        >>> report = sparsity_of_state({"fc.weight": torch.eye(16)})
        >>> report.layers[0].zeros, report.layers[0].structure
        (240, 'fan_in(1)')

    Args:
        state: name -> tensor, packed weight or rounded weight.
        progress: called with (tensors done, tensors in all) after each.

    Returns:
        The report.
    """
    layers: list[LayerSparsity] = []
    other_values = other_bytes = 0
    for done, (name, tensor) in enumerate(state.items(), start=1):
        if not isinstance(tensor, torch.Tensor) or (tensor.dim() >= 2 and tensor.is_floating_point()):
            layers.append(_measure(name, tensor))
        else:
            other_values += tensor.numel()
            other_bytes += tensor.numel() * tensor.dtype.itemsize
        if progress:
            progress(done, len(state))
    return SparsityReport(layers, other_values, other_bytes)


def sparsity_of_file(
    path: str | os.PathLike[str], progress: Callable[[int, int], None] | None = None
) -> SparsityReport:
    """Measure a checkpoint (PyTorch or safetensors) or a `.spx` file.

    Raises:
        FileFormatError: the file cannot be read.
        OSError: the file does not exist.
    """
    state = read_spx(path).constants if is_spx(path) else read_checkpoint(path)
    return sparsity_of_state(state, progress)


def _measure(name: str, tensor: torch.Tensor | PackedWeight | RoundedWeight) -> LayerSparsity:
    rounded = tensor if isinstance(tensor, RoundedWeight) else None
    packed = (
        tensor.packed if isinstance(tensor, RoundedWeight) else tensor if isinstance(tensor, PackedWeight) else None
    )
    dense = tensor.detach() if isinstance(tensor, torch.Tensor) else tensor.to_dense()
    dense_bytes = dense.numel() * dense.dtype.itemsize
    kept = dense != 0
    zeros = dense.numel() - int(kept.sum())
    structure, coding, packed_bytes = "dense", "", dense_bytes
    if zeros:
        structure = "unstructured"
        try:
            packed = packed or PackedWeight.from_dense(dense)
        except StructureError:
            # Types and sizes that are never packed (float8, more than 2^31 entries) still have their zeros counted.
            packed = None
        if packed is not None:
            structure = str(packed.structure)
            if packed.nbytes < dense_bytes:
                coding, packed_bytes = packed.coding, packed.nbytes
    if rounded is not None:
        coding, packed_bytes = f"{rounded.packed.coding}, {rounded.precision}", rounded.nbytes
    other_axes = tuple(axis for axis in range(dense.dim()) if axis != 1)
    return LayerSparsity(
        name=name,
        shape=tuple(dense.shape),
        zeros=zeros,
        structure=structure,
        coding=coding,
        empty_rows=int((~kept.flatten(1).any(1)).sum()) if dense.numel() else 0,
        empty_inputs=int((~kept.any(dim=other_axes)).sum()) if dense.numel() else 0,
        dense_bytes=dense_bytes,
        packed_bytes=packed_bytes,
        predicted_speedup=_predict(dense) if zeros else None,
    )


def _predict(dense: torch.Tensor) -> float | None:
    if dense.dtype != torch.float32 or not 2 <= dense.dim() <= 4 or (dense.dim() > 2 and dense.shape[1] == 1):
        return None
    try:
        from sparse_engine.convert.choose import predicted_speedup
    except ImportError:
        return None
    return predicted_speedup(dense.flatten(1).numpy())
