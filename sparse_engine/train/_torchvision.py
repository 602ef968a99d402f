"""torchvision's model definitions, also beside a PyTorch build that its compiled operators do not fit."""

from __future__ import annotations

import importlib
import sys
from types import ModuleType

import torch

__all__ = ["import_torchvision"]

# Operators that torchvision registers shapes for while it is imported; without their schema the import fails.
_SCHEMAS = {
    "nms": "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms": "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
}
_kept: list[torch.library.Library] = []  # a schema lives as long as the library object that declared it


def import_torchvision() -> ModuleType:
    """Import torchvision.

    Example:
        >>> import_torchvision().models.resnet50(weights=None)            # doctest: +SKIP

    A CPU-only PyTorch beside a torchvision that was compiled for CUDA cannot load torchvision's operators, and then
    ``import torchvision`` fails although its networks need none of them. Only in that case the missing operators are
    declared without an implementation and the import is tried once more; calling one still raises torchvision's own
    error. Where the first import succeeds nothing is touched.

    Returns:
        The module.

    Raises:
        ImportError: torchvision is not installed.
        RuntimeError: what the import raised, when it is anything else.
    """
    try:
        return importlib.import_module("torchvision")
    except RuntimeError as error:
        if "operator torchvision::" not in str(error):
            raise
    # Parts that were imported before the failure would be missing as attributes of the new package object.
    for name in [name for name in sys.modules if name == "torchvision" or name.startswith("torchvision.")]:
        del sys.modules[name]
    library = torch.library.Library("torchvision", "FRAGMENT")
    for name, schema in _SCHEMAS.items():
        if not hasattr(torch.ops.torchvision, name):
            library.define(schema)
    _kept.append(library)
    return importlib.import_module("torchvision")
