"""Built-in networks, with the parameter names of torchvision (ImageNet forms) and of the usual CIFAR code (CIFAR
forms).

Example::

    model = build("resnet20", num_classes=10)
    model = build("resnet50")                       # loads torchvision's state dict
    model = build("mlp", in_features=64, hidden=(128, 128))
"""

from __future__ import annotations

import difflib
import inspect
import itertools
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sparse_engine.errors import CheckpointError, RecipeError

from ._torchvision import import_torchvision


class MLP(nn.Module):
    """Fully connected network with ReLU between layers, ``fc1``, ``fc2``, …; the input is flattened.

    Example::

        MLP()(torch.rand(2, 1, 28, 28)).shape       # (2, 10)

    Args:
        in_features: size of a flattened input.
        hidden: sizes of the hidden layers; the default is the 784-784-784-10 network of the end-to-end paper (arXiv
            2312.01653).
        num_classes: outputs.
    """

    def __init__(self, in_features: int = 784, hidden: Sequence[int] = (784, 784), num_classes: int = 10) -> None:
        super().__init__()
        sizes = [in_features, *hidden, num_classes]
        self.depth = len(sizes) - 1
        for i, (inputs, outputs) in enumerate(itertools.pairwise(sizes), 1):
            setattr(self, f"fc{i}", nn.Linear(inputs, outputs))
        for i in range(1, self.depth):
            setattr(self, f"act{i}", nn.ReLU())

    def forward(self, x: Tensor) -> Tensor:
        x = x.flatten(1)
        for i in range(1, self.depth):
            x = getattr(self, f"act{i}")(getattr(self, f"fc{i}")(x))
        return getattr(self, f"fc{self.depth}")(x)


# --- VGG --------------------------------------------------------------------------------------------------------------

_VGG: dict[int, tuple[int | str, ...]] = {
    11: (64, "M", 128, "M", 256, 256, "M", 512, 512, "M", 512, 512, "M"),
    13: (64, 64, "M", 128, 128, "M", 256, 256, "M", 512, 512, "M", 512, 512, "M"),
    16: (64, 64, "M", 128, 128, "M", 256, 256, 256, "M", 512, 512, 512, "M", 512, 512, 512, "M"),
    19: (64, 64, "M", 128, 128, "M", *(256,) * 4, "M", *(512,) * 4, "M", *(512,) * 4, "M"),
}


class VGG(nn.Module):
    """VGG with batch norm: torchvision's names (``features.N``, ``classifier.N``) and, for CIFAR, a single linear
    classifier.

    Args:
        depth: 11, 13, 16 or 19.
        num_classes: outputs.
        cifar: 32×32 form: one linear layer on the 1×1 features; otherwise torchvision's three-layer classifier on 7×7.
        width: factor on every channel count (tests and quick runs).
        in_channels: input channels.
        dropout: in the ImageNet classifier.
    """

    def __init__(
        self,
        depth: int = 16,
        num_classes: int = 1000,
        cifar: bool = False,
        width: float = 1.0,
        in_channels: int = 3,
        dropout: float = 0.5,
    ) -> None:
        super().__init__()
        if depth not in _VGG:
            raise RecipeError(f"VGG depth is {depth}; known are {', '.join(map(str, _VGG))}")
        layers: list[nn.Module] = []
        channels = in_channels
        for entry in _VGG[depth]:
            if entry == "M":
                layers.append(nn.MaxPool2d(2, 2))
                continue
            outputs = max(1, round(int(entry) * width))
            layers += [nn.Conv2d(channels, outputs, 3, padding=1), nn.BatchNorm2d(outputs), nn.ReLU(inplace=True)]
            channels = outputs
        self.features = nn.Sequential(*layers)
        if cifar:
            self.avgpool = nn.AdaptiveAvgPool2d(1)
            self.classifier: nn.Module = nn.Linear(channels, num_classes)
        else:
            self.avgpool = nn.AdaptiveAvgPool2d(7)
            self.classifier = nn.Sequential(
                nn.Linear(channels * 49, 4096),
                nn.ReLU(True),
                nn.Dropout(dropout),
                nn.Linear(4096, 4096),
                nn.ReLU(True),
                nn.Dropout(dropout),
                nn.Linear(4096, num_classes),
            )
        _kaiming(self)

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(torch.flatten(self.avgpool(self.features(x)), 1))


# --- ResNet, CIFAR form -----------------------------------------------------------------------------------------------


class OptionA(nn.Module):
    """Parameter-free shortcut of the CIFAR ResNets: every second pixel, channels padded with zeros on both sides (arXiv
    1512.03385, option A).
    """

    def __init__(self, in_channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        self.stride = stride
        extra = out_channels - in_channels
        self.before, self.after = extra // 2, extra - extra // 2

    def forward(self, x: Tensor) -> Tensor:
        return F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, self.before, self.after))


class CifarBlock(nn.Module):
    """Two 3×3 convolutions and a shortcut of option A or B (1×1 convolution and batch norm)."""

    def __init__(self, in_channels: int, out_channels: int, stride: int, option: str) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(out_channels)
        self.relu = nn.ReLU()
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(out_channels)
        self.relu2 = nn.ReLU()
        self.downsample: nn.Module | None = None
        if stride != 1 or in_channels != out_channels:
            if option == "A":
                self.downsample = OptionA(in_channels, out_channels, stride)
            else:
                self.downsample = nn.Sequential(
                    nn.Conv2d(in_channels, out_channels, 1, stride, bias=False), nn.BatchNorm2d(out_channels)
                )

    def forward(self, x: Tensor) -> Tensor:
        shortcut = x if self.downsample is None else self.downsample(x)
        out = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
        return self.relu2(out + shortcut)


class CifarResNet(nn.Module):
    """ResNet of He et al. for 32×32 images: three stages of 16, 32 and 64 channels, depth = 6n + 2.

    Example::

        CifarResNet(depth=20)(torch.rand(1, 3, 32, 32)).shape       # (1, 10)

    Args:
        depth: 20, 32, 44, 56, 110, … (6n + 2).
        num_classes: outputs.
        option: shortcut ``"A"`` (stride and zero padding, as in the paper) or ``"B"`` (1×1 convolution and batch norm).
        head: name of the final linear layer, ``"linear"`` or ``"fc"``.
        width: channels of the first stage.
        in_channels: input channels.
    """

    def __init__(
        self,
        depth: int = 20,
        num_classes: int = 10,
        option: str = "A",
        head: str = "linear",
        width: int = 16,
        in_channels: int = 3,
    ) -> None:
        super().__init__()
        if depth < 8 or (depth - 2) % 6:
            raise RecipeError(f"the depth of a CIFAR ResNet is 6n + 2 (20, 32, 44, 56, 110); got {depth}")
        if option not in ("A", "B"):
            raise RecipeError(f"shortcut option is {option!r}; it has to be 'A' or 'B'")
        if head not in ("linear", "fc"):
            raise RecipeError(f"head is {head!r}; it has to be 'linear' or 'fc'")
        self.conv1 = nn.Conv2d(in_channels, width, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.relu = nn.ReLU()
        channels = width
        for stage in (1, 2, 3):
            outputs = width * 2 ** (stage - 1)
            blocks = []
            for i in range((depth - 2) // 6):
                blocks.append(CifarBlock(channels, outputs, 2 if stage > 1 and i == 0 else 1, option))
                channels = outputs
            setattr(self, f"layer{stage}", nn.Sequential(*blocks))
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.head = head
        setattr(self, head, nn.Linear(channels, num_classes))
        _kaiming(self)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        return getattr(self, self.head)(torch.flatten(self.avgpool(x), 1))


# --- ResNet, ImageNet form --------------------------------------------------------------------------------------------


class BasicBlock(nn.Module):
    """Two 3×3 convolutions."""

    expansion = 1

    def __init__(self, in_channels: int, channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, channels, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.relu = nn.ReLU()
        self.conv2 = nn.Conv2d(channels, channels, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.relu2 = nn.ReLU()
        self.downsample = _projection(in_channels, channels, stride)

    def forward(self, x: Tensor) -> Tensor:
        shortcut = x if self.downsample is None else self.downsample(x)
        out = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
        return self.relu2(out + shortcut)


class Bottleneck(nn.Module):
    """1×1, 3×3 (with the stride) and 1×1 convolution, four times as many channels at the end."""

    expansion = 4

    def __init__(self, in_channels: int, channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, channels, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.relu = nn.ReLU()
        self.conv2 = nn.Conv2d(channels, channels, 3, stride, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.relu2 = nn.ReLU()
        self.conv3 = nn.Conv2d(channels, 4 * channels, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(4 * channels)
        self.relu3 = nn.ReLU()
        self.downsample = _projection(in_channels, 4 * channels, stride)

    def forward(self, x: Tensor) -> Tensor:
        shortcut = x if self.downsample is None else self.downsample(x)
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.relu2(self.bn2(self.conv2(out)))
        return self.relu3(self.bn3(self.conv3(out)) + shortcut)


class ResNet(nn.Module):
    """ResNet for ImageNet, key for key torchvision's.

    Args:
        depth: 18, 34, 50, 101 or 152.
        num_classes: outputs.
        small_input: for 32×32 images: 3×3 first convolution without stride and no max pooling.
        in_channels: input channels.
        width: channels of the first stage, 64 in the papers.
    """

    def __init__(
        self, depth: int = 50, num_classes: int = 1000, small_input: bool = False, in_channels: int = 3, width: int = 64
    ) -> None:
        super().__init__()
        plans: dict[int, tuple[type[BasicBlock] | type[Bottleneck], tuple[int, ...]]] = {
            18: (BasicBlock, (2, 2, 2, 2)),
            34: (BasicBlock, (3, 4, 6, 3)),
            50: (Bottleneck, (3, 4, 6, 3)),
            101: (Bottleneck, (3, 4, 23, 3)),
            152: (Bottleneck, (3, 8, 36, 3)),
        }
        if depth not in plans:
            raise RecipeError(f"ResNet depth is {depth}; known are {', '.join(map(str, plans))}")
        block, counts = plans[depth]
        self.conv1 = nn.Conv2d(
            in_channels, width, 3 if small_input else 7, 1 if small_input else 2, 1 if small_input else 3, bias=False
        )
        self.bn1 = nn.BatchNorm2d(width)
        self.relu = nn.ReLU()
        self.maxpool = nn.Identity() if small_input else nn.MaxPool2d(3, 2, 1)
        channels = width
        for stage, count in enumerate(counts, 1):
            blocks = []
            for i in range(count):
                blocks.append(block(channels, width * 2 ** (stage - 1), 2 if stage > 1 and i == 0 else 1))
                channels = width * 2 ** (stage - 1) * block.expansion
            setattr(self, f"layer{stage}", nn.Sequential(*blocks))
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(channels, num_classes)
        _kaiming(self)

    def forward(self, x: Tensor) -> Tensor:
        x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        return self.fc(torch.flatten(self.avgpool(x), 1))


# --- MobileNetV2 ------------------------------------------------------------------------------------------------------


def _conv_bn_relu6(inputs: int, outputs: int, kernel: int = 3, stride: int = 1, groups: int = 1) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, kernel, stride, (kernel - 1) // 2, groups=groups, bias=False),
        nn.BatchNorm2d(outputs),
        nn.ReLU6(inplace=True),
    )


class InvertedResidual(nn.Module):
    """Expand (1×1), depthwise 3×3, project (1×1); the shortcut joins the narrow ends."""

    def __init__(self, inputs: int, outputs: int, stride: int, expand: int) -> None:
        super().__init__()
        hidden = inputs * expand
        self.use_shortcut = stride == 1 and inputs == outputs
        layers: list[nn.Module] = [] if expand == 1 else [_conv_bn_relu6(inputs, hidden, 1)]
        layers += [
            _conv_bn_relu6(hidden, hidden, 3, stride, hidden),
            nn.Conv2d(hidden, outputs, 1, bias=False),
            nn.BatchNorm2d(outputs),
        ]
        self.conv = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv(x) if self.use_shortcut else self.conv(x)


class MobileNetV2(nn.Module):
    """MobileNetV2, key for key torchvision's.

    Args:
        num_classes: outputs.
        width: channel multiplier; channels are rounded to multiples of 8.
        small_input: for 32×32 images: the first three strides of 2 become 1.
        in_channels: input channels.
        dropout: before the classifier.
    """

    def __init__(
        self,
        num_classes: int = 1000,
        width: float = 1.0,
        small_input: bool = False,
        in_channels: int = 3,
        dropout: float = 0.2,
    ) -> None:
        super().__init__()

        def rounded(value: float) -> int:
            nearest = max(8, int(value + 4) // 8 * 8)
            return nearest + 8 if nearest < 0.9 * value else nearest

        channels, last = rounded(32 * width), rounded(1280 * max(1.0, width))
        layers: list[nn.Module] = [_conv_bn_relu6(in_channels, channels, stride=1 if small_input else 2)]
        plan = (
            (1, 16, 1, 1),
            (6, 24, 2, 2),
            (6, 32, 3, 2),
            (6, 64, 4, 2),
            (6, 96, 3, 1),
            (6, 160, 3, 2),
            (6, 320, 1, 1),
        )
        for position, (expand, outputs, count, stride) in enumerate(plan):
            if small_input and position in (1, 2):
                stride = 1
            for i in range(count):
                layers.append(InvertedResidual(channels, rounded(outputs * width), stride if i == 0 else 1, expand))
                channels = rounded(outputs * width)
        layers.append(_conv_bn_relu6(channels, last, 1))
        self.features = nn.Sequential(*layers)
        self.classifier = nn.Sequential(nn.Dropout(dropout), nn.Linear(last, num_classes))
        _kaiming(self)

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(torch.flatten(F.adaptive_avg_pool2d(self.features(x), 1), 1))


# --- vision transformer -----------------------------------------------------------------------------------------------


class EncoderBlock(nn.Module):
    """Pre-norm attention and MLP, both residual."""

    def __init__(self, heads: int, width: int, mlp: int, dropout: float) -> None:
        super().__init__()
        self.ln_1 = nn.LayerNorm(width, eps=1e-6)
        self.self_attention = nn.MultiheadAttention(width, heads, dropout=dropout, batch_first=True)
        self.dropout = nn.Dropout(dropout)
        self.ln_2 = nn.LayerNorm(width, eps=1e-6)
        self.mlp = nn.Sequential(
            nn.Linear(width, mlp), nn.GELU(), nn.Dropout(dropout), nn.Linear(mlp, width), nn.Dropout(dropout)
        )

    def forward(self, x: Tensor) -> Tensor:
        y = self.ln_1(x)
        y, _ = self.self_attention(y, y, y, need_weights=False)
        x = x + self.dropout(y)
        return x + self.mlp(self.ln_2(x))


class Encoder(nn.Module):
    """Position embedding, blocks and the final norm."""

    def __init__(self, length: int, layers: int, heads: int, width: int, mlp: int, dropout: float) -> None:
        super().__init__()
        self.pos_embedding = nn.Parameter(torch.empty(1, length, width).normal_(std=0.02))
        self.dropout = nn.Dropout(dropout)
        self.layers = nn.Sequential(
            OrderedDict((f"encoder_layer_{i}", EncoderBlock(heads, width, mlp, dropout)) for i in range(layers))
        )
        self.ln = nn.LayerNorm(width, eps=1e-6)

    def forward(self, x: Tensor) -> Tensor:
        return self.ln(self.layers(self.dropout(x + self.pos_embedding)))


class VisionTransformer(nn.Module):
    """Vision transformer with torchvision's keys; the defaults are a small one for 32×32 images.

    Example::

        VisionTransformer()(torch.rand(2, 3, 32, 32)).shape       # (2, 10)

    Args:
        image_size: side of the square input, pixels.
        patch_size: side of a patch, pixels; divides ``image_size``.
        layers, heads, width, mlp: depth, attention heads, embedding and MLP sizes.
        num_classes: outputs.
        in_channels: input channels.
        dropout: everywhere.
    """

    def __init__(
        self,
        image_size: int = 32,
        patch_size: int = 4,
        layers: int = 6,
        heads: int = 3,
        width: int = 192,
        mlp: int = 768,
        num_classes: int = 10,
        in_channels: int = 3,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        if image_size % patch_size:
            raise RecipeError(f"image_size {image_size} is not a multiple of patch_size {patch_size}")
        self.conv_proj = nn.Conv2d(in_channels, width, patch_size, patch_size)
        self.class_token = nn.Parameter(torch.zeros(1, 1, width))
        self.encoder = Encoder((image_size // patch_size) ** 2 + 1, layers, heads, width, mlp, dropout)
        self.heads = nn.Sequential(OrderedDict(head=nn.Linear(width, num_classes)))

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.conv_proj(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.class_token.expand(tokens.shape[0], -1, -1), tokens], dim=1)
        return self.heads(self.encoder(x)[:, 0])


# --- by name ----------------------------------------------------------------------------------------------------------


def _cifar_resnet(depth: int) -> Callable[..., nn.Module]:
    return lambda **options: CifarResNet(**{"depth": depth, **options})


def _resnet(depth: int) -> Callable[..., nn.Module]:
    return lambda **options: ResNet(**{"depth": depth, **options})


def _vgg(depth: int, cifar: bool) -> Callable[..., nn.Module]:
    return lambda **options: VGG(**{"depth": depth, "cifar": cifar, "num_classes": 10 if cifar else 1000, **options})


def _vit_b_16(**options: Any) -> nn.Module:
    size = {
        "image_size": 224,
        "patch_size": 16,
        "layers": 12,
        "heads": 12,
        "width": 768,
        "mlp": 3072,
        "num_classes": 1000,
    }
    return VisionTransformer(**{**size, **options})


MODELS: dict[str, Callable[..., nn.Module]] = {
    "mlp": MLP,
    **{f"resnet{depth}": _cifar_resnet(depth) for depth in (8, 14, 20, 32, 44, 56, 110)},
    **{f"resnet{depth}": _resnet(depth) for depth in (18, 34, 50, 101, 152)},
    "resnet18_cifar": lambda **options: ResNet(**{"depth": 18, "small_input": True, "num_classes": 10, **options}),
    **{f"vgg{depth}_bn": _vgg(depth, False) for depth in _VGG},
    **{f"vgg{depth}_cifar": _vgg(depth, True) for depth in _VGG},
    "mobilenet_v2": MobileNetV2,
    "vit_small": VisionTransformer,
    "vit_b_16": _vit_b_16,
}


def build(name: str, **options: Any) -> nn.Module:
    """A network by name.

    Example::

        build("resnet20", num_classes=10, option="B", head="fc")
        build("torchvision:efficientnet_b0", num_classes=10)
        build("timm:vit_tiny_patch16_224", num_classes=10)

    Args:
        name: one of ``MODELS``, or ``"torchvision:NAME"`` / ``"timm:NAME"`` where those are installed (random weights).
        options: for the constructor.

    Raises:
        RecipeError: for an unknown name or option.
    """
    library, _, rest = name.rpartition(":")
    if library:
        return _from_library(library, rest, options)
    if name not in MODELS:
        near = difflib.get_close_matches(name, MODELS, 1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise RecipeError(f"model {name!r} is not one of {', '.join(MODELS)}, torchvision:NAME or timm:NAME{hint}")
    try:
        return MODELS[name](**options)
    except TypeError as error:
        raise RecipeError(f"model {name!r}: {str(error).rpartition('__init__() ')[2]}") from None


def accepts(name: str, option: str) -> bool:
    """Whether the constructor of a built-in network takes an option (``in_channels``, ``image_size``, …)."""
    kinds = {"mlp": MLP, "mobilenet_v2": MobileNetV2, "vit_small": VisionTransformer, "vit_b_16": VisionTransformer}
    if name in kinds:
        kind: type[nn.Module] = kinds[name]
    elif name.startswith("vgg"):
        kind = VGG
    elif name in MODELS:
        kind = ResNet if name.removesuffix("_cifar") in {f"resnet{d}" for d in (18, 34, 50, 101, 152)} else CifarResNet
    else:
        return option == "num_classes"
    return option in inspect.signature(kind).parameters


def load_state(model: nn.Module, state: Mapping[str, Tensor]) -> nn.Module:
    """Load a state dict, accepting files without ``num_batches_tracked`` counters and with a ``module.`` prefix.

    Example::

        load_state(build("resnet20"), safetensors.torch.load_file("resnet20_cifar10.safetensors"))

    Raises:
        CheckpointError: listing missing and unexpected keys and shapes that differ.
    """
    if state and all(key.startswith("module.") for key in state):
        state = {key.removeprefix("module."): value for key, value in state.items()}
    own = model.state_dict()
    wrong = [
        f"{k}: file {tuple(v.shape)}, model {tuple(own[k].shape)}"
        for k, v in state.items()
        if k in own and v.shape != own[k].shape
    ]
    missing = [key for key in own if key not in state and not key.endswith("num_batches_tracked")]
    unexpected = [key for key in state if key not in own]
    if wrong or missing or unexpected:
        parts = [
            f"{len(entries)} {label} ({', '.join(entries[:3])}{', …' if len(entries) > 3 else ''})"
            for label, entries in (
                ("missing keys", missing),
                ("unexpected keys", unexpected),
                ("shapes that differ", wrong),
            )
            if entries
        ]
        raise CheckpointError(f"checkpoint does not fit {type(model).__name__}: {'; '.join(parts)}")
    model.load_state_dict({**{k: v for k, v in own.items() if k not in state}, **state})
    return model


def _from_library(library: str, name: str, options: dict[str, Any]) -> nn.Module:
    if library not in ("torchvision", "timm"):
        raise RecipeError(f"model library {library!r} is not known; use torchvision:NAME or timm:NAME")
    try:
        if library == "timm":
            import timm

            return timm.create_model(name, pretrained=False, **options)
        return import_torchvision().models.get_model(name, weights=None, **options)
    except ImportError:
        raise RecipeError(f"model {library}:{name} needs the package {library}, which is not installed") from None
    except (TypeError, ValueError, RuntimeError) as error:
        raise RecipeError(f"model {library}:{name} cannot be built: {error}") from None


def _projection(inputs: int, outputs: int, stride: int) -> nn.Module | None:
    if stride == 1 and inputs == outputs:
        return None
    return nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))


def _kaiming(model: nn.Module) -> None:
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            if module.bias is not None:
                nn.init.zeros_(module.bias)
