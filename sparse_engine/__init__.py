"""Prune, train sparse, convert, and run measurably faster: one tested path for PyTorch models on CPUs and NVIDIA GPUs.

Example:
    >>> import sparse_engine as se                             # doctest: +SKIP
    >>> se.prune(model, sparsity=0.9)                          # doctest: +SKIP
    >>> executable = se.convert(se.squash_(model), (x,))       # doctest: +SKIP
    >>> print(executable.report)                               # doctest: +SKIP

Importing the package is cheap: nothing below is loaded before it is used, and neither a compiled extension, nor triton,
nor a GPU is needed to import it.
"""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sparse_engine._face import Face, find_kernels_in_checkout
from sparse_engine.errors import SparseEngineError

if TYPE_CHECKING:
    from sparse_engine import cli, convert, coreset, distill, io, kernels, nn, ops, prune, report, train
    from sparse_engine.convert import Executable, load
    from sparse_engine.nn import densify_, sparsify_
    from sparse_engine.packed import PackedWeight
    from sparse_engine.prune import compact, masks, squash_
    from sparse_engine.structure import NM, Block, Channel, FanIn, Structure, Unstructured

__version__ = "0.1.0"

# public name -> the module it lives in
_NAMES = {
    "Block": "structure",
    "Channel": "structure",
    "Executable": "convert",
    "FanIn": "structure",
    "NM": "structure",
    "PackedWeight": "packed",
    "Structure": "structure",
    "Unstructured": "structure",
    "compact": "prune",
    "densify_": "nn",
    "load": "convert",
    "masks": "prune",
    "sparsify_": "nn",
    "squash_": "prune",
}
_PACKAGES = (
    "cli",
    "convert",
    "coreset",
    "distill",
    "errors",
    "io",
    "kernels",
    "nn",
    "ops",
    "packed",
    "prune",
    "report",
    "structure",
    "train",
)

__all__ = [
    "NM",
    "Block",
    "Channel",
    "Executable",
    "FanIn",
    "PackedWeight",
    "SparseEngineError",
    "Structure",
    "Unstructured",
    "__version__",
    "cli",
    "compact",
    "convert",
    "coreset",
    "densify_",
    "distill",
    "io",
    "kernels",
    "load",
    "masks",
    "nn",
    "ops",
    "prune",
    "report",
    "sparsify_",
    "squash_",
    "train",
]

sys.modules[__name__].__class__ = Face
find_kernels_in_checkout(__name__, Path(__file__).parent)


def __getattr__(name: str) -> Any:
    if name in _NAMES:
        value = getattr(importlib.import_module(f"{__name__}.{_NAMES[name]}"), name)
        globals()[name] = value
        return value
    if name in _PACKAGES:
        return importlib.import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}; its public names are {', '.join(__all__)}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
