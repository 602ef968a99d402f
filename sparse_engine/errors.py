"""The exceptions that sparse_engine raises for bad input.

Every one of them is a `SparseEngineError`, which is a `ValueError`, so that one ``except`` catches them all. A message
names what was given, with its numbers, and the way out.
"""

from __future__ import annotations

__all__ = [
    "BackendError",
    "CaptureError",
    "CheckpointError",
    "ConvertError",
    "ExtensionError",
    "FileFormatError",
    "MaskError",
    "PruneError",
    "RecipeError",
    "ShapeError",
    "SparseEngineError",
    "StructureError",
    "VerificationError",
]


class SparseEngineError(ValueError):
    """The base of every error that sparse_engine raises on purpose.

    Example:
        >>> import sparse_engine as se
        >>> try:
        ...     se.NM(5, 4)
        ... except se.SparseEngineError as error:
        ...     print("refused")
        refused
    """


class StructureError(SparseEngineError):
    """A structure that cannot exist, or a weight or mask that does not fit the structure it is declared to have."""


class MaskError(SparseEngineError):
    """A mask of the wrong shape or type, or one that belongs to another weight."""


class ShapeError(SparseEngineError):
    """Sizes that do not fit together: operands of an op, or an input of an executable."""


class BackendError(SparseEngineError):
    """A kernel that was asked for by name cannot run here; the message lists every candidate and its reasons."""


class ExtensionError(SparseEngineError):
    """A compiled module that was built from other sources than the Python code beside it; `make build` mends it."""


class PruneError(SparseEngineError):
    """A pruning request that cannot be met: a sparsity out of range, an unknown layer, a criterion without its data."""


class ConvertError(SparseEngineError):
    """A model that cannot be converted."""


class CaptureError(ConvertError):
    """A model that ``torch.export`` cannot capture; the message names the place in the model."""


class VerificationError(ConvertError):
    """A converted model whose outputs are further from the original's than the bound allows."""


class FileFormatError(SparseEngineError):
    """A file that is truncated, damaged, of another version, or not what its name says."""


class CheckpointError(FileFormatError):
    """A checkpoint that cannot be read, or that does not fit the model it is loaded into."""


class RecipeError(SparseEngineError):
    """A training or pruning recipe with an unknown key, a wrong type or a contradiction."""
