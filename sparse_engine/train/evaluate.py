"""Accuracy and outputs of a model (or an executable) on a data set."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from .data import ArrayData


@torch.no_grad()
def outputs(model: Callable[[Tensor], Any], data: ArrayData, batch_size: int = 512, device: Any = "cpu") -> Tensor:
    """Outputs [N, C] on a data set, never augmented; a module runs in evaluation mode and gets its mode back.

    Example::

        outputs(model, test).argmax(1)
    """
    training = isinstance(model, nn.Module) and model.training
    if isinstance(model, nn.Module):
        model.eval()
    try:
        parts = []
        for start in range(0, len(data), batch_size):
            positions = torch.arange(start, min(start + batch_size, len(data)))
            parts.append(torch.as_tensor(model(data.batch(positions, augment=False).inputs.to(device))).float().cpu())
        return torch.cat(parts) if parts else torch.empty(0, data.classes)
    finally:
        if training:
            model.train()  # type: ignore[union-attr]


def accuracy(model: Callable[[Tensor], Any], data: ArrayData, batch_size: int = 512, device: Any = "cpu") -> float:
    """Share of samples whose largest output is their label.

    Example::

        accuracy(model, test)       # 0.97
    """
    predicted = outputs(model, data, batch_size, device).argmax(1)
    return float((predicted == data.labels).float().mean()) if len(data) else 0.0
