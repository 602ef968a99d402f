"""The networks that engines are compared on: random weights pruned by magnitude, as modules and as ONNX files.

Speed does not depend on accuracy, so the weights are random; batch-norm statistics are not trivial, so that folding
them has to be right. The first convolution and depthwise convolutions stay dense, as in published pruned models.

Example:
    >>> model = pruned_network("resnet18", sparsity=0.9)
    >>> round((model.layer1[0].conv1.weight == 0).float().mean().item(), 2)
    0.9
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

from sparse_engine.train.models import build

NETWORKS = ("resnet50", "resnet18", "vgg16_bn", "mobilenet_v2", "vit_b_16")
IMAGE = (3, 224, 224)


def pruned_network(name: str, *, sparsity: float, block: tuple[int, int] = (1, 1), seed: int = 0) -> nn.Module:
    """A network in evaluation mode with its weights pruned layer by layer.

    Args:
        name: one of `NETWORKS`, or any other name that `sparse_engine.train.models.build` knows.
        sparsity: share of each layer's weights that is removed; 0 leaves the network dense.
        block: outputs × inputs that are kept or removed together; (1, 1) is unstructured.
        seed: of the random weights.
    """
    torch.manual_seed(seed)
    model = build(name, **({"image_size": 224, "num_classes": 1000} if name.startswith("vit") else {})).eval()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.5, 1.5)
            module.weight.data.uniform_(0.5, 1.5)
            module.bias.data.normal_(0, 0.1)
        elif isinstance(module, nn.Linear) and not module.weight.any():
            module.weight.data.normal_(0, 0.02)
    for weight in prunable(model):
        weight.mul_(magnitude_mask(weight, sparsity, block))
    return model


def prunable(model: nn.Module) -> list[Tensor]:
    """The weights of linear layers, attention's projections, and convolutions but the first and grouped ones."""
    found, first = [], True
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            if not first and module.groups == 1:
                found.append(module.weight.data)
            first = False
        elif isinstance(module, nn.Linear):
            found.append(module.weight.data)
        elif isinstance(module, nn.MultiheadAttention) and module.in_proj_weight is not None:
            found.append(module.in_proj_weight.data)
    return found


def magnitude_mask(weight: Tensor, sparsity: float, block: tuple[int, int] = (1, 1)) -> Tensor:
    """Float mask of the weight's shape: 1 on the blocks of its matrix with the largest sums of magnitudes.

    A matrix whose sides are no multiples of the block keeps whole blocks up to its edges.
    """
    matrix = weight.detach().reshape(weight.shape[0], -1).abs()
    rows, columns = matrix.shape
    height, width = block
    padded = nn.functional.pad(matrix, (0, -columns % width, 0, -rows % height))
    scores = padded.reshape(-1, height, padded.shape[1] // width, width).sum((1, 3))
    removed = round(scores.numel() * sparsity)
    kept = torch.ones(scores.numel())
    if removed:
        flat = scores.flatten()
        limit = flat.kthvalue(removed).values  # selects instead of sorting: a tenth of the time on 16 million
        kept[flat < limit] = 0
        equal = (flat == limit).nonzero().flatten()
        kept[equal[: removed - int((flat < limit).sum())]] = 0
    mask = kept.reshape(scores.shape).repeat_interleave(height, 0).repeat_interleave(width, 1)
    return mask[:rows, :columns].reshape(weight.shape).contiguous()


def write_onnx(model: nn.Module, batch: int, path: Path) -> None:
    """Write the network as ONNX (opset 14) for one batch size."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    example = torch.zeros(batch, *IMAGE)
    torch.onnx.export(model, (example,), partial, opset_version=14, dynamo=False, input_names=["x"], output_names=["y"])
    partial.rename(path)
