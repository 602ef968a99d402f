"""Mathematical functions with one schema, one readable reference and any number of backends each."""

from sparse_engine.ops import registry
from sparse_engine.ops.kd_loss import KDRows, kd_rows
from sparse_engine.ops.kd_table import TableRows, kd_table_rows
from sparse_engine.ops.linear_kd import LinearKD, linear_kd
from sparse_engine.ops.low_precision import LowPrecisionWeight, low_precision_linear
from sparse_engine.ops.masked_linear import masked_linear
from sparse_engine.ops.pattern import Pattern
from sparse_engine.ops.registry import explain
from sparse_engine.ops.sparse_conv2d import sparse_conv2d
from sparse_engine.ops.sparse_linear import sparse_linear

from sparse_engine.ops import gpu as _gpu_candidates  # isort: skip  (registers them)

__all__ = [
    "KDRows",
    "LinearKD",
    "LowPrecisionWeight",
    "Pattern",
    "TableRows",
    "explain",
    "kd_rows",
    "kd_table_rows",
    "linear_kd",
    "low_precision_linear",
    "masked_linear",
    "registry",
    "sparse_conv2d",
    "sparse_linear",
]
