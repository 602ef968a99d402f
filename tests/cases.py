"""The one case table of the sparse products: every backend, on every device, is tested over all of it.

A case says what is special about it in its name and makes its own data, the same on every run:

    data = case.make(torch.float32)
    y = sparse_linear(data.x, data.packed.values, data.pattern, data.bias, impl="cpu")
"""

import math
from dataclasses import dataclass, field

import torch

from sparse_engine.ops import Pattern
from sparse_engine.packed import PackedWeight
from sparse_engine.structure import NM, Block, Channel, FanIn, Structure, Unstructured

__all__ = ["CONV_CASES", "LINEAR_CASES", "ConvCase", "LinearCase", "ProductData", "structured_mask"]


@dataclass(frozen=True)
class ProductData:
    """What one case runs on."""

    x: torch.Tensor
    weight: torch.Tensor  # dense, exact zeros where nothing is kept
    packed: PackedWeight
    pattern: Pattern
    bias: torch.Tensor | None
    upstream: torch.Tensor  # a gradient of the output's shape


def structured_mask(structure: Structure, shape: tuple[int, ...], density: float, seed: int) -> torch.Tensor:
    """A random mask of about the given density that fits the structure."""
    generator = torch.Generator().manual_seed(seed)
    rows, columns = shape[0], math.prod(shape[1:])
    mask = torch.ones(rows, columns, dtype=torch.bool)
    if isinstance(structure, Block):
        height, width = structure.shape
        grid = torch.rand(-(-rows // height), -(-columns // width), generator=generator) < density
        mask = grid.repeat_interleave(height, 0).repeat_interleave(width, 1)[:rows, :columns]
    elif isinstance(structure, NM):
        for start in range(0, columns, structure.m):
            group = mask[:, start : start + structure.m]
            drop = torch.rand(group.shape, generator=generator).argsort(1)[:, structure.n :]
            group.scatter_(1, drop, False)
    elif isinstance(structure, FanIn):
        drop = torch.rand(rows, columns, generator=generator).argsort(1)[:, structure.k :]
        mask.scatter_(1, drop, False)
    elif isinstance(structure, Channel):
        mask = mask.reshape(shape).clone()
        mask[torch.rand(shape[0], generator=generator) > math.sqrt(density)] = False
        mask[:, torch.rand(shape[1], generator=generator) > math.sqrt(density)] = False
    else:
        mask = torch.rand(rows, columns, generator=generator) < density
    return mask.reshape(shape)


def make_weight(case, shape: tuple[int, ...], dtype: torch.dtype) -> tuple[torch.Tensor, PackedWeight]:
    generator = torch.Generator().manual_seed(case.seed + 1)
    mask = structured_mask(case.structure, shape, case.density, case.seed)
    if "empty rows" in case.special:
        mask[::3] = False
    # Values are drawn in float32, so that every dtype above it holds the same numbers.
    weight = torch.randn(shape, generator=generator).to(dtype) * mask
    kept = mask.nonzero()
    for name, value in (("nan", math.nan), ("infinity", math.inf), ("minus zero kept", -0.0)):
        if name in case.special:
            weight[tuple(kept[len(kept) // 2])] = value
    if "minus zero removed" in case.special:
        weight = torch.where(mask, weight, torch.tensor(-0.0, dtype=dtype))
        return weight, PackedWeight.from_dense(weight, structure=case.structure)
    return weight, PackedWeight.from_dense(weight, mask, case.structure)


def arrange(x: torch.Tensor, layout: str) -> torch.Tensor:
    """The same numbers in another memory order."""
    if layout == "contiguous":
        return x
    if layout == "every second element":
        return torch.stack([x, torch.full_like(x, math.nan)], dim=-1)[..., 0]
    if layout == "wide rows":
        return torch.cat([x, torch.full_like(x, math.nan)], dim=-1)[..., : x.shape[-1]]
    if layout == "transposed":
        return x.transpose(0, -1).contiguous().transpose(0, -1)
    if layout == "expanded":
        return x[:1].expand(x.shape)
    if layout == "channels last":
        return x.contiguous(memory_format=torch.channels_last)
    if layout == "offset":
        return torch.cat([x.new_full((3,), math.nan), x.reshape(-1)])[3:].reshape(x.shape)
    raise ValueError(layout)


@dataclass(frozen=True)
class LinearCase:
    name: str
    out_features: int
    in_features: int
    leading: tuple[int, ...]
    structure: Structure = field(default_factory=Unstructured)
    density: float = 0.3
    bias: bool = True
    layout: str = "contiguous"
    special: tuple[str, ...] = ()
    seed: int = 0

    def make(self, dtype: torch.dtype = torch.float32, device: str = "cpu") -> ProductData:
        generator = torch.Generator().manual_seed(self.seed + 2)
        weight, packed = make_weight(self, (self.out_features, self.in_features), dtype)
        x = torch.randn(*self.leading, self.in_features, generator=generator).to(dtype)
        bias = torch.randn(self.out_features, generator=generator).to(dtype) if self.bias else None
        upstream = torch.randn(*self.leading, self.out_features, generator=generator).to(dtype)
        packed = packed.with_values(packed.values.to(device))
        return ProductData(
            arrange(x.to(device), self.layout),
            weight.to(device),
            packed,
            Pattern.from_packed(packed),
            None if bias is None else bias.to(device),
            upstream.to(device),
        )


@dataclass(frozen=True)
class ConvCase:
    name: str
    out_channels: int
    in_channels: int
    kernel: tuple[int, int]
    size: tuple[int, int]
    batch: int | None = 2
    stride: int | tuple[int, int] = 1
    padding: int | tuple[int, ...] | str = 0
    dilation: int | tuple[int, int] = 1
    groups: int = 1
    structure: Structure = field(default_factory=Unstructured)
    density: float = 0.3
    bias: bool = True
    layout: str = "contiguous"
    special: tuple[str, ...] = ()
    seed: int = 0

    @property
    def arguments(self) -> dict:
        return {"stride": self.stride, "padding": self.padding, "dilation": self.dilation, "groups": self.groups}

    def make(self, dtype: torch.dtype = torch.float32, device: str = "cpu") -> ProductData:
        generator = torch.Generator().manual_seed(self.seed + 2)
        shape = (self.out_channels, self.in_channels // self.groups, *self.kernel)
        weight, packed = make_weight(self, shape, dtype)
        leading = () if self.batch is None else (self.batch,)
        x = torch.randn(*leading, self.in_channels, *self.size, generator=generator).to(dtype)
        bias = torch.randn(self.out_channels, generator=generator).to(dtype) if self.bias else None
        output = dense_conv2d(x, weight, bias, self).shape
        upstream = torch.randn(output, generator=generator).to(dtype)
        packed = packed.with_values(packed.values.to(device))
        return ProductData(
            arrange(x.to(device), self.layout),
            weight.to(device),
            packed,
            Pattern.from_packed(packed),
            None if bias is None else bias.to(device),
            upstream.to(device),
        )


def dense_conv2d(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, case: ConvCase) -> torch.Tensor:
    """What PyTorch computes for a case with the dense weight; the reference of the tests."""
    padding = case.padding
    if isinstance(padding, tuple) and len(padding) == 4:
        top, left, bottom, right = padding
        x, padding = torch.nn.functional.pad(x, (left, right, top, bottom)), 0
    return torch.nn.functional.conv2d(x, weight, bias, case.stride, padding, case.dilation, case.groups)


STRUCTURES: tuple[Structure, ...] = (
    Unstructured(),
    Block((1, 4)),
    Block((4, 1)),
    Block((8, 1)),
    Block((16, 1)),
    Block((4, 4)),
    Block((16, 16)),
    Block((3, 5)),
    NM(2, 4),
    NM(1, 8),
    FanIn(7),
    Channel(),
)

LINEAR_CASES = [
    *(LinearCase(f"{structure}", 48, 64, (32,), structure) for structure in STRUCTURES),
    *(LinearCase(f"{structure} odd", 37, 53, (3, 7), structure, seed=3) for structure in STRUCTURES),
    *(
        LinearCase(f"{rows}x{columns} batch {batch}", rows, columns, (batch,), seed=rows)
        for rows, columns in [(1, 1), (1, 17), (17, 1), (5, 3), (130, 257), (256, 300)]
        for batch in (1, 2, 15, 16, 17, 33)
    ),
    LinearCase("many rows of x", 40, 30, (300,), seed=4),
    *(LinearCase(f"whole vectors of {n} rows of x", 70, 45, (n,), seed=n) for n in (64, 128, 256)),
    # Few entries a row of a long weight: the groups of 4 or 8 rows of x lie along the lanes, in both directions.
    *(
        LinearCase(f"few entries {rows}x{columns}, {n} rows of x", rows, columns, (n,), density=density, seed=n)
        for rows, columns, n, density in [
            (784, 784, 128, 0.005),
            (784, 784, 256, 0.015),
            (31, 1100, 64, 0.2),
            (1701, 37, 128, 0.05),
            (801, 1303, 192, 0.004),
            (5, 4098, 128, 0.1),
            (769, 65, 1024, 0.1),
        ]
    ),
    LinearCase("few entries, no bias", 780, 70, (2, 64), density=0.1, bias=False),
    LinearCase("few entries, blocks", 800, 771, (128,), Block((4, 1)), density=0.01),
    LinearCase("few entries, wide rows", 37, 800, (128,), density=0.2, layout="wide rows"),
    LinearCase("few entries, rows without any, nan", 800, 70, (128,), density=0.03, special=("nan",)),
    LinearCase("few entries, infinity", 70, 800, (128,), density=0.1, special=("infinity",)),
    LinearCase("few entries, minus zero kept", 70, 800, (128,), density=0.1, special=("minus zero kept",)),
    # So few entries that they are taken one at a time.
    *(
        LinearCase(f"some entries {rows}x{columns}, {n} rows of x", rows, columns, (n,), density=density, seed=n)
        for rows, columns, n, density in [
            (10, 784, 128, 0.005),
            (784, 10, 300, 0.005),
            (600, 700, 5, 0.0003),
            (600, 700, 1, 0.0003),
            (45, 53, 2000, 0.003),
        ]
    ),
    LinearCase("some entries, no bias, wide rows", 10, 784, (3, 50), density=0.005, bias=False, layout="wide rows"),
    LinearCase("some entries, blocks", 96, 784, (33,), Block((4, 1)), density=0.0005, seed=2),
    LinearCase("some entries, nan", 2, 2000, (20,), density=0.05, special=("nan",)),
    LinearCase("some entries, infinity", 2, 2000, (20,), density=0.05, special=("infinity",)),
    LinearCase("whole vectors, infinity", 24, 45, (2, 128), special=("infinity",)),
    LinearCase("more columns than a cache tile", 24, 3000, (9,), density=0.05, seed=5),
    LinearCase("no leading dimensions", 37, 53, ()),
    LinearCase("four leading dimensions", 9, 11, (2, 1, 3, 2)),
    LinearCase("batch 0", 37, 53, (0,)),
    LinearCase("batch 0 in the middle", 37, 53, (2, 0, 3)),
    LinearCase("no inputs", 5, 0, (4,)),
    LinearCase("no inputs, no bias", 5, 0, (4,), bias=False),
    LinearCase("no outputs", 0, 5, (4,)),
    LinearCase("nothing kept", 21, 34, (6,), density=0.0),
    LinearCase("nothing kept, no bias", 21, 34, (6,), density=0.0, bias=False),
    LinearCase("everything kept", 21, 34, (6,), density=1.1),
    LinearCase("one weight kept", 64, 64, (20,), density=0.0003, seed=1),
    LinearCase("no bias", 37, 53, (21,), bias=False),
    LinearCase("99 % removed", 128, 256, (64,), density=0.01),
    LinearCase("empty rows", 50, 40, (19,), special=("empty rows",)),
    LinearCase("empty rows and columns", 50, 40, (19,), density=0.02, special=("empty rows",)),
    *(
        LinearCase(f"x {layout}", 37, 53, (6, 5), layout=layout)
        for layout in ("every second element", "wide rows", "transposed", "expanded", "offset")
    ),
    LinearCase("one row, wide", 37, 53, (1,), layout="wide rows"),
    LinearCase("minus zero removed", 37, 53, (9,), special=("minus zero removed",)),
    LinearCase("minus zero kept", 37, 53, (9,), special=("minus zero kept",)),
    LinearCase("nan", 37, 53, (9,), special=("nan",)),
    LinearCase("infinity", 37, 53, (9,), special=("infinity",)),
    LinearCase("nan in a block", 37, 53, (9,), Block((4, 1)), special=("nan",)),
    LinearCase("infinity in a block", 37, 53, (40,), Block((16, 16)), special=("infinity",)),
]

CONV_CASES = [
    *(ConvCase(f"{structure}", 32, 16, (3, 3), (8, 8), padding=1, structure=structure) for structure in STRUCTURES),
    *(
        ConvCase(f"{structure} odd", 19, 7, (3, 3), (9, 11), padding=1, structure=structure, seed=3)
        for structure in STRUCTURES
    ),
    *(
        ConvCase(f"kernel {kernel}", 12, 6, kernel, (11, 13), seed=sum(kernel))
        for kernel in [(1, 1), (2, 2), (3, 3), (5, 5), (7, 7), (1, 7), (7, 1), (4, 3), (11, 13)]
    ),
    *(
        ConvCase(f"kernel {kernel} same", 12, 6, (kernel, kernel), (7, 7), padding="same", seed=kernel)
        for kernel in (1, 2, 3, 4, 5)
    ),
    *(
        ConvCase(f"stride {stride}", 8, 6, (3, 3), (14, 15), padding=1, stride=stride)
        for stride in (2, 3, (1, 2), (2, 1))
    ),
    ConvCase("stride 2 on an even size", 8, 6, (3, 3), (16, 16), padding=1, stride=2),
    ConvCase("stride larger than the kernel", 8, 6, (2, 2), (14, 15), stride=5),
    ConvCase("1x1 stride 2", 24, 16, (1, 1), (14, 14), stride=2),
    ConvCase("1x1 stride 2 odd", 24, 16, (1, 1), (7, 9), stride=2),
    ConvCase("first layer", 16, 3, (7, 7), (32, 32), padding=3, stride=2, density=0.9),
    ConvCase("padding two numbers", 8, 6, (3, 3), (9, 9), padding=(0, 2)),
    ConvCase("padding asymmetric", 8, 6, (3, 3), (9, 9), padding=(0, 1, 2, 3)),
    ConvCase("padding asymmetric, stride 2", 8, 6, (3, 3), (9, 10), padding=(0, 0, 1, 1), stride=2),
    ConvCase("padding larger than the kernel", 8, 6, (3, 3), (4, 4), padding=5),
    ConvCase("valid", 8, 6, (3, 3), (9, 9), padding="valid"),
    ConvCase("same with an even kernel and dilation", 8, 6, (2, 4), (9, 9), padding="same", dilation=(3, 2)),
    *(ConvCase(f"dilation {d}", 8, 6, (3, 3), (15, 15), padding=2, dilation=d) for d in (2, 3, (1, 4))),
    ConvCase("dilation and stride", 8, 6, (3, 3), (15, 15), padding=2, dilation=2, stride=2),
    *(ConvCase(f"groups {g}", 24, 12, (3, 3), (9, 9), padding=1, groups=g) for g in (2, 3, 4, 12)),
    ConvCase("depthwise", 17, 17, (3, 3), (9, 9), padding=1, groups=17),
    ConvCase("depthwise stride 2", 32, 32, (5, 5), (14, 14), padding=2, stride=2, groups=32),
    ConvCase("depthwise with two outputs each", 22, 11, (3, 3), (9, 9), padding=1, groups=11),
    ConvCase("grouped blocks", 32, 16, (3, 3), (9, 9), padding=1, groups=4, structure=Block((4, 1))),
    ConvCase("no batch", 8, 6, (3, 3), (9, 9), batch=None, padding=1),
    ConvCase("batch 0", 8, 6, (3, 3), (9, 9), batch=0, padding=1),
    ConvCase("batch 1", 8, 6, (3, 3), (9, 9), batch=1, padding=1),
    ConvCase("batch 16", 8, 6, (3, 3), (5, 5), batch=16, padding=1),
    ConvCase("batch 17", 8, 6, (3, 3), (5, 5), batch=17, padding=1),
    # Batches that fill vectors with images: every geometry again, sizes below, at and above whole vectors of pixels.
    *(
        ConvCase(f"batch {batch}, {name}", 20, 6, kernel, size, batch=batch, **geometry)
        for batch, name, kernel, size, geometry in (
            (16, "rows of whole vectors", (3, 3), (9, 16), {"padding": 1}),
            (18, "4 x 4", (3, 3), (4, 4), {"padding": 1}),
            (33, "2 x 2", (3, 3), (2, 2), {"padding": 1}),
            (17, "7 x 7", (3, 3), (7, 7), {"padding": 1, "bias": False}),
            (17, "tall", (3, 3), (21, 18), {"padding": 1}),
            (35, "stride 2", (3, 3), (10, 9), {"padding": 1, "stride": 2}),
            (20, "1x1 stride 2", (1, 1), (8, 8), {"stride": 2}),
            (20, "stride 3, dilation 2", (3, 2), (11, 13), {"padding": 2, "stride": 3, "dilation": 2}),
            (20, "stride 2, dilation 3", (3, 3), (12, 12), {"padding": 3, "stride": 2, "dilation": 3}),
            (20, "stride larger than the kernel", (2, 2), (14, 15), {"stride": 5}),
            (20, "padding larger than the kernel", (3, 3), (4, 4), {"padding": 5}),
            (20, "padding asymmetric, stride 2", (3, 3), (9, 10), {"padding": (0, 0, 1, 1), "stride": 2}),
            (20, "infinity", (3, 3), (9, 9), {"padding": 1, "special": ("infinity",)}),
            (20, "empty rows", (3, 3), (5, 5), {"padding": 1, "special": ("empty rows",)}),
        )
    ),
    *(
        ConvCase(f"batch 20, x {layout}", 20, 6, (3, 3), (6, 7), batch=20, padding=1, layout=layout)
        for layout in ("channels last", "every second element", "expanded")
    ),
    ConvCase("batch 20, groups", 24, 12, (3, 3), (9, 9), batch=20, padding=1, groups=3),
    ConvCase("batch 20, depthwise stride 2", 17, 17, (3, 3), (9, 9), batch=20, padding=1, stride=2, groups=17),
    ConvCase("batch 20, many channels", 150, 70, (3, 3), (4, 4), batch=20, padding=1, density=0.1),
    ConvCase("one pixel", 8, 6, (1, 1), (1, 1)),
    ConvCase("one pixel from nine", 8, 6, (3, 3), (3, 3)),
    ConvCase("one column", 8, 6, (3, 1), (9, 1)),
    ConvCase("one row", 8, 6, (1, 3), (1, 9)),
    ConvCase("7 x 7 with many channels", 70, 96, (3, 3), (7, 7), padding=1, density=0.1),
    ConvCase("larger image", 10, 5, (3, 3), (41, 67), padding=1),
    ConvCase("no bias", 8, 6, (3, 3), (9, 9), bias=False),
    ConvCase("nothing kept", 8, 6, (3, 3), (9, 9), density=0.0),
    ConvCase("nothing kept, no bias", 8, 6, (3, 3), (9, 9), density=0.0, bias=False),
    ConvCase("everything kept", 8, 6, (3, 3), (9, 9), density=1.1),
    ConvCase("99 % removed", 64, 32, (3, 3), (9, 9), padding=1, density=0.01),
    ConvCase("empty rows", 20, 6, (3, 3), (9, 9), padding=1, special=("empty rows",)),
    *(
        ConvCase(f"x {layout}", 8, 6, (3, 3), (9, 9), padding=1, layout=layout)
        for layout in ("every second element", "wide rows", "transposed", "expanded", "channels last", "offset")
    ),
    ConvCase("minus zero removed", 8, 6, (3, 3), (9, 9), padding=1, special=("minus zero removed",)),
    ConvCase("minus zero kept", 8, 6, (3, 3), (9, 9), padding=1, special=("minus zero kept",)),
    ConvCase("nan in a 1x1", 8, 6, (1, 1), (9, 9), special=("nan",)),
    ConvCase("infinity in a 1x1", 8, 6, (1, 1), (9, 9), special=("infinity",)),
    ConvCase("nan", 8, 6, (3, 3), (9, 9), special=("nan",)),
    ConvCase("infinity", 8, 6, (3, 3), (9, 9), special=("infinity",)),
    *(
        ConvCase(f"{value}, {name}", 8, 6, (3, 3), (9, 10), 2, special=(value,), **geometry)
        for value in ("nan", "infinity")
        for name, geometry in {
            "padding": {"padding": 1},
            "stride": {"stride": 2, "padding": 1},
            "dilation": {"dilation": 2, "padding": 2},
            "groups": {"groups": 2, "padding": 1},
        }.items()
    ),
]
