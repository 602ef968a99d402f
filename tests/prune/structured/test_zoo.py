"""The property over real architectures: random zeros, compact, outputs agree; and units zeroed are units removed."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from sparse_engine.prune.structured import analyse, capture, compact, find_groups, zero_units_

from .conftest import randomise_, zero_rows_

# name, side of the input, options; every definition is torchvision's own
CLASSIFIERS: list[tuple[str, int, dict[str, Any]]] = [
    *(
        (name, 64, {})
        for name in ("alexnet", "vgg11", "vgg13_bn", "vgg16_bn", "vgg19", "squeezenet1_0", "squeezenet1_1")
    ),
    *(
        (name, 64, {})
        for name in ("resnet18", "resnet34", "resnet50", "resnet101", "wide_resnet50_2", "resnext50_32x4d")
    ),
    *((name, 64, {}) for name in ("densenet121", "densenet161", "densenet169", "mnasnet0_5", "mnasnet1_3")),
    *((name, 64, {}) for name in ("mobilenet_v2", "mobilenet_v3_small", "mobilenet_v3_large")),
    *((name, 64, {}) for name in ("shufflenet_v2_x0_5", "shufflenet_v2_x1_0", "shufflenet_v2_x1_5")),
    *((name, 64, {}) for name in ("efficientnet_b0", "efficientnet_b1", "efficientnet_b3", "efficientnet_v2_s")),
    *((name, 64, {}) for name in ("regnet_x_400mf", "regnet_y_400mf", "regnet_x_1_6gf", "regnet_y_1_6gf")),
    *((name, 64, {}) for name in ("convnext_tiny", "convnext_small", "swin_t", "swin_v2_t")),
    ("maxvit_t", 224, {}),  # its windows of 7 x 7 fit no smaller image
    ("googlenet", 64, {"init_weights": False}),
    ("inception_v3", 96, {"init_weights": False}),
    ("vit_b_16", 32, {"image_size": 32}),
    ("vit_b_32", 32, {"image_size": 32}),
]
SEGMENTERS = ("fcn_resnet50", "deeplabv3_resnet50", "deeplabv3_mobilenet_v3_large", "lraspp_mobilenet_v3_large")
VIDEO = ("r3d_18", "mc3_18", "r2plus1d_18")


def build(models: ModuleType, name: str, options: dict[str, Any]) -> nn.Module:
    if name in SEGMENTERS:
        return getattr(models.segmentation, name)(weights=None, weights_backbone=None, num_classes=5)
    return getattr(models.video if name in VIDEO else models, name)(weights=None, **options)


def tensors(value: Any) -> list[Tensor]:
    return torch.utils._pytree.tree_leaves(value)


def check(model: nn.Module, *inputs: Tensor) -> nn.Module:
    """The compact model agrees with the masked one on inputs that it was not made with."""
    small = compact(model, inputs)
    others = tuple(torch.rand_like(x) for x in inputs)
    with torch.no_grad():
        for expected, got in zip(tensors(model(*others)), tensors(small(*others)), strict=True):
            scale = float(expected.abs().max())
            assert scale > 0
            assert float((expected - got).abs().max()) <= 1e-5 * scale
    assert sum(p.numel() for p in small.parameters()) < sum(p.numel() for p in model.parameters())
    return small


def zero_random_units_(model: nn.Module, inputs: tuple[Tensor, ...], seed: int) -> None:
    groups = find_groups(analyse(capture(model, inputs)))
    generator = np.random.default_rng(seed)
    gone = []
    for group in groups:
        vector = generator.random(len(group)) < 0.4
        vector[generator.integers(len(group))] = False
        gone.append(vector)
    zero_units_(model, groups, gone)


# what every run of the tests looks at: one family each, small
def _small(models: ModuleType) -> dict[str, tuple[nn.Module, int]]:
    return {
        "resnet": (models.ResNet(models.resnet.BasicBlock, [1, 1, 1, 1], num_classes=7), 32),
        "densenet": (models.DenseNet(6, (2, 2), 8, num_classes=7), 32),
        "vision_transformer": (models.VisionTransformer(16, 8, 1, 4, 32, 48, num_classes=7), 16),
        "swin": (models.SwinTransformer([4, 4], 16, [2, 2], [2, 4], [4, 4], num_classes=7), 32),
        "shufflenet": (models.ShuffleNetV2([1, 2, 1], [8, 16, 24, 32, 48], num_classes=7), 32),
    }


@pytest.mark.parametrize("name", ["resnet", "densenet", "vision_transformer", "swin", "shufflenet"])
def test_small_definitions(torchvision_models: ModuleType, name: str):
    model, side = _small(torchvision_models)[name]
    check(zero_rows_(randomise_(model), 0.4, 1), torch.rand(2, 3, side, side))


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    ["resnet18", "densenet121", "mobilenet_v2", "shufflenet_v2_x0_5", "resnext50_32x4d", "vit_b_16", "regnet_y_400mf"],
)
def test_units_of_definitions(torchvision_models: ModuleType, name: str):
    side, options = next((side, options) for other, side, options in CLASSIFIERS if other == name)
    model = randomise_(build(torchvision_models, name, options))
    inputs = (torch.rand(2, 3, side, side),)
    zero_random_units_(model, inputs, 0)
    check(model, *inputs)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "side", "options"), CLASSIFIERS, ids=[name for name, *_ in CLASSIFIERS])
def test_every_classifier(torchvision_models: ModuleType, name: str, side: int, options: dict[str, Any]):
    check(zero_rows_(randomise_(build(torchvision_models, name, options)), 0.4, 1), torch.rand(2, 3, side, side))


@pytest.mark.slow
@pytest.mark.parametrize("name", SEGMENTERS)
def test_every_segmenter(torchvision_models: ModuleType, name: str):
    check(zero_rows_(randomise_(build(torchvision_models, name, {})), 0.4, 1), torch.rand(2, 3, 64, 64))


@pytest.mark.slow
@pytest.mark.parametrize("name", VIDEO)
def test_every_video_network(torchvision_models: ModuleType, name: str):
    check(zero_rows_(randomise_(build(torchvision_models, name, {})), 0.4, 1), torch.rand(1, 3, 4, 32, 32))


@pytest.mark.slow
def test_optical_flow(torchvision_models: ModuleType):
    model = zero_rows_(randomise_(torchvision_models.optical_flow.raft_small(weights=None)), 0.4, 1)
    small = compact(model, (torch.rand(1, 3, 128, 128), torch.rand(1, 3, 128, 128), 2))
    pair = (torch.rand(1, 3, 128, 128), torch.rand(1, 3, 128, 128), 2)
    with torch.no_grad():
        for expected, got in zip(model(*pair), small(*pair), strict=True):
            assert float((expected - got).abs().max()) <= 1e-4 * float(
                expected.abs().max()
            )  # a recurrent network amplifies rounding


def test_a_checkpoint_pruned_by_others(real_data):
    """Channel group lasso left whole channels at zero: they go, and the outputs stay."""
    from safetensors.torch import load_file

    from sparse_engine.train import models

    model = models.build("resnet20", option="B", head="fc")
    models.load_state(model, load_file(str(real_data / "checkpoints" / "resnet20_cifar10_channels_zeroed.safetensors")))
    x = torch.rand(2, 3, 32, 32) * 2 - 1
    small = compact(model.eval(), x)
    with torch.no_grad():
        torch.testing.assert_close(small(x), model(x), rtol=0, atol=1e-5 * float(model(x).abs().max()))
    assert small.layer1[1].conv1.out_channels == 8
    assert sum(p.numel() for p in small.parameters()) < 0.85 * sum(p.numel() for p in model.parameters())
