"""Sparse layers that stand in for PyTorch's, and the functions that put them into a model and take them out again."""

from sparse_engine.nn.convert import LayerReport, SparsifyReport, densify_, sparse_layers, sparsify_
from sparse_engine.nn.layers import PatternChange, SparseConv2d, SparseLayer, SparseLinear
from sparse_engine.nn.low_precision import LowPrecisionLinear, lower_precision_

__all__ = [
    "LayerReport",
    "LowPrecisionLinear",
    "PatternChange",
    "SparseConv2d",
    "SparseLayer",
    "SparseLinear",
    "SparsifyReport",
    "densify_",
    "lower_precision_",
    "sparse_layers",
    "sparsify_",
]
