"""Files: checkpoints of PyTorch and safetensors, read without running code, and the `.spx` file of an executable.

Example:
    >>> from sparse_engine.io import read_checkpoint               # doctest: +SKIP
    >>> state = read_checkpoint("pruned.pt")                       # doctest: +SKIP
"""

from __future__ import annotations

from sparse_engine.io.atomic import atomic_write, atomic_write_text
from sparse_engine.io.checkpoint import load_state, read_checkpoint, read_torch_file, resolve_masks, write_checkpoint
from sparse_engine.io.container import Container, TensorEntry, write_container
from sparse_engine.io.spx import SpxContents, SpxSizes, is_spx, read_spx, write_spx

__all__ = [
    "Container",
    "SpxContents",
    "SpxSizes",
    "TensorEntry",
    "atomic_write",
    "atomic_write_text",
    "is_spx",
    "load_state",
    "read_checkpoint",
    "read_spx",
    "read_torch_file",
    "resolve_masks",
    "write_checkpoint",
    "write_container",
    "write_spx",
]
