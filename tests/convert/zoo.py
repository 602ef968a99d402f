"""Model definitions, mostly torchvision's, with random weights, made such that every pass has something to do."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
from torch import nn

from sparse_engine.train._torchvision import import_torchvision


@dataclass(frozen=True)
class Case:
    """A model to convert: how to build it, and the height and width of its input."""

    name: str
    build: Callable[[ModuleType], nn.Module]
    size: int


def named(name: str, size: int, **arguments: Any) -> Case:
    return Case(name, lambda models: getattr(models, name)(weights=None, **arguments), size)


def mobilenet_v1(width: float = 1.0, classes: int = 1000) -> nn.Module:
    """MobileNetV1 (arXiv 1704.04861, table 1), which torchvision does not have."""

    def channels(count: int) -> int:
        return int(count * width)

    def convolution(inputs: int, outputs: int, kernel: int, stride: int, groups: int = 1) -> list[nn.Module]:
        conv = nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, groups=groups, bias=False)
        return [conv, nn.BatchNorm2d(outputs), nn.ReLU()]

    layers, inputs = convolution(3, channels(32), 3, 2), channels(32)
    plan = [(64, 1), (128, 2), (128, 1), (256, 2), (256, 1), (512, 2), *[(512, 1)] * 5, (1024, 2), (1024, 1)]
    for count, stride in plan:
        layers += convolution(inputs, inputs, 3, stride, groups=inputs) + convolution(inputs, channels(count), 1, 1)
        inputs = channels(count)
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(inputs, classes))


def mlp(size: int) -> nn.Module:
    """Linear layers with most activations between them."""
    layers: list[nn.Module] = [nn.Flatten(), nn.Linear(3 * size * size, 48)]
    for activation in (nn.ReLU(), nn.GELU(), nn.SiLU(), nn.Hardswish(), nn.Sigmoid()):
        layers += [nn.BatchNorm1d(48), activation, nn.Dropout(), nn.Linear(48, 48)]
    return nn.Sequential(*layers, nn.LayerNorm(48), nn.Linear(48, 10), nn.Softmax(1))


ZOO = [
    named("resnet18", 64),
    named("resnet50", 64),
    named("vgg11_bn", 32),
    named("vgg16_bn", 32),
    Case("mobilenet_v1", lambda models: mobilenet_v1(), 64),
    named("mobilenet_v2", 64),
    named("mobilenet_v3_small", 64),
    named("mobilenet_v3_large", 64),
    named("efficientnet_b0", 64),
    named("densenet121", 64),
    named("squeezenet1_0", 64),
    named("squeezenet1_1", 64),
    named("shufflenet_v2_x1_0", 64),
    named("regnet_y_400mf", 64),
    named("regnet_x_400mf", 64),
    named("convnext_tiny", 64),
    named("vit_b_16", 64, image_size=64),
    named("swin_t", 64),
    named("swin_v2_t", 64),
    named("googlenet", 64, init_weights=False),
    named("inception_v3", 96, init_weights=False),
    named("mnasnet1_0", 64),
    named("alexnet", 64),
]

# The same families, small enough for every run of the tests.
SMALL = [
    named("resnet18", 40),
    named("mobilenet_v3_small", 40),
    named("squeezenet1_1", 40),
    named("shufflenet_v2_x0_5", 40),
    Case(
        "tiny_vision_transformer",
        lambda models: models.VisionTransformer(32, 8, 2, 4, 32, 64, num_classes=10),
        32,
    ),
    Case(
        "tiny_swin",
        lambda models: models.SwinTransformer([4, 4], 16, [2], [2], [3, 3], num_classes=10),
        20,
    ),
    Case(
        "tiny_densenet",
        lambda models: models.DenseNet(8, (2, 2), 16, num_classes=10),
        40,
    ),
    Case("small_mobilenet_v1", lambda models: mobilenet_v1(0.25, 10), 40),
    Case("mlp", lambda models: mlp(8), 8),
]


def torchvision_models() -> ModuleType:
    """torchvision's definitions, also beside a PyTorch build that its compiled operators do not fit."""
    return import_torchvision().models


def build(case: Case, sparsity: float = 0.9, seed: int = 0) -> nn.Module:
    """The case's model in eval mode, pruned, with statistics that matter and no parameter at a neutral value."""
    torch.manual_seed(seed)
    model = case.build(torchvision_models()).eval()
    randomise_(model)
    prune_(model, sparsity)
    return model


def randomise_(model: nn.Module) -> None:
    """Batch-norm statistics that are not trivial, and numbers instead of the zeros and ones that layers start with."""
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.running_mean.normal_(0, 0.1)
                module.running_var.uniform_(0.5, 1.5)
        for name, parameter in model.named_parameters():
            if "layer_scale" in name or (parameter == 1).all():
                parameter.uniform_(0.5, 1.5)
            elif not parameter.any():
                parameter.normal_(0, 0.1)


def prune_(model: nn.Module, sparsity: float) -> None:
    """Magnitude pruning of every convolution and linear layer but the first and the depthwise ones."""
    first = True
    with torch.no_grad():
        for module in model.modules():
            if not isinstance(module, (nn.Conv2d, nn.Linear)):
                continue
            weight, keep = module.weight, first or getattr(module, "groups", 1) == getattr(module, "in_channels", 0)
            first = False
            count = int(weight.numel() * sparsity)
            if keep or count == 0:
                continue
            threshold = weight.abs().flatten().kthvalue(count).values
            weight.mul_(weight.abs() > threshold)
