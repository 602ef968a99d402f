"""Convolution of pruned channels by index lists: the full weight and the full feature maps stay where they are.

    y[n, oh, ow, out[m]] = bias[out[m]] + Σ_{r, s, k} x[n, oh·sh + r·dh − ph, ow·sw + s·dw − pw, in[k]] · W[out[m], r,
    s, in[k]]

Implicit GEMM over NHWC: a tile is BLOCK_P output pixels × BLOCK_M kept output channels, the loop runs over taps and,
    within
a tap, over BLOCK_K kept input channels. A step moves (BLOCK_P + BLOCK_M)·BLOCK_K numbers for 2·BLOCK_P·BLOCK_M·BLOCK_K
operations, like a dense convolution of the smaller size; what the lists add is the gather. Channels next to each other
in NHWC are 2 bytes apart, so lists are recognised whose channels come in aligned runs of 2, 4 or 8: then one load
instruction fetches a run. Prune in runs of 8 where you can.

The input gradient is the same loop over (taps, kept output channels) with the strides turned round; the weight gradient
contracts over pixels, split over programs where there are few tiles.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from sparse_engine.errors import ShapeError

from ._common import (
    activate,
    check_activation,
    check_float,
    check_lengths,
    check_tensors,
    generation,
    grid_size,
    on_its_device,
    power_of_two,
    precision,
)

# GPU generation: pixels, channels out, channels in per step, warps, stages
CONFIGS: dict[str, dict[str, int]] = {
    "sm_80": {"BLOCK_P": 128, "BLOCK_M": 64, "BLOCK_K": 32, "num_warps": 4, "num_stages": 4},
    "sm_90": {"BLOCK_P": 128, "BLOCK_M": 128, "BLOCK_K": 64, "num_warps": 8, "num_stages": 4},
}
GRADIENT_CONFIGS: dict[str, dict[str, int]] = {
    "sm_80": {"BLOCK_M": 64, "BLOCK_K": 64, "BLOCK_P": 32, "num_warps": 4, "num_stages": 4},
    "sm_90": {"BLOCK_M": 64, "BLOCK_K": 64, "BLOCK_P": 64, "num_warps": 4, "num_stages": 4},
}


@dataclass(frozen=True)
class ChannelList:
    """Kept channels, in rising order, and how they lie.

    Attributes:
        index: [kept] int32 on the GPU. channels: how many there are in all.
        run: 8, 4, 2 or 1: the kept channels come in aligned runs of so many.
    """

    index: torch.Tensor
    channels: int
    run: int

    @property
    def kept(self) -> int:
        """How many channels are kept."""
        return self.index.numel()


@dataclass(frozen=True)
class ConvGeometry:
    """Kernel size, stride, padding and dilation, each (height, width)."""

    kernel: tuple[int, int]
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (0, 0)
    dilation: tuple[int, int] = (1, 1)

    def output(self, height: int, width: int) -> tuple[int, int]:
        """Height and width of the output."""
        sizes = [
            (size + 2 * p - d * (k - 1) - 1) // s + 1
            for size, k, s, p, d in zip((height, width), self.kernel, self.stride, self.padding, self.dilation)
        ]
        if min(sizes) < 0 or min(self.stride) < 1 or min(self.dilation) < 1:
            raise ShapeError(f"a {height}×{width} input is too small for {self}")
        return max(sizes[0], 0), max(sizes[1], 0)


def channel_list(kept: torch.Tensor, device: torch.device | str | None = None) -> ChannelList:
    """The list of a bool vector, True = kept. Built once per layer: it looks at the values on the host.

    Example:
        >>> channel_list(torch.tensor([True, True, False, False])).run
        2
    """
    if kept.dim() != 1 or kept.dtype != torch.bool:
        raise ShapeError(f"channel_list: a bool vector, got {kept.dtype} {tuple(kept.shape)}")
    host = kept.cpu()
    index = host.nonzero().flatten().int()
    run = 1
    for size in (2, 4, 8):
        if host.numel() % size == 0 and bool((host.reshape(-1, size).sum(1) % size == 0).all()):
            run = size
    return ChannelList(index.to(device or kept.device), host.numel(), run)


@triton.jit
def channel_conv_kernel(
    x_ptr,  # [N, H, W, XC] NHWC
    w_ptr,  # [M, R, S, C]
    in_ptr,  # [KC] int32: channels of the weight, and of x where X_INDEXED
    out_index_ptr,  # [KM] int32: rows of the weight, and channels of y where Y_INDEXED
    bias_ptr,  # [M]
    y_ptr,  # [N, OH, OW, YC] NHWC
    pixels,  # N·OH·OW
    height,
    width,
    out_height,
    out_width,
    x_channels,
    y_channels,
    w_channels,  # C
    kept_in,
    kept_out,
    slope,
    R: tl.constexpr,
    S: tl.constexpr,
    SH: tl.constexpr,
    SW: tl.constexpr,
    PH: tl.constexpr,
    PW: tl.constexpr,
    DH: tl.constexpr,
    DW: tl.constexpr,
    GRADIENT: tl.constexpr,  # x is dy, y is dx: the window runs the other way and the weight is read transposed
    X_INDEXED: tl.constexpr,
    Y_INDEXED: tl.constexpr,
    RUN_IN: tl.constexpr,
    RUN_OUT: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    ACTIVATION: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    tiles_m = tl.cdiv(kept_out, BLOCK_M)
    pid = tl.program_id(0)
    p = (pid // tiles_m) * BLOCK_P + tl.arange(0, BLOCK_P)
    m = (pid % tiles_m) * BLOCK_M + tl.arange(0, BLOCK_M)
    p_in, m_in = p < pixels, m < kept_out
    ow = p % out_width
    oh = (p // out_width) % out_height
    image = (p // out_width // out_height).to(tl.int64) * (height * width)
    out_channel = tl.load(out_index_ptr + m, mask=m_in, other=0)
    out_channel = tl.max_contiguous(tl.multiple_of(out_channel, RUN_OUT), RUN_OUT)
    k = tl.arange(0, BLOCK_K)
    steps = tl.cdiv(kept_in, BLOCK_K)
    acc = tl.zeros((BLOCK_P, BLOCK_M), tl.float32)
    for step in range(R * S * steps):
        tap = step // steps
        r = tap // S
        s = tap % S
        j = (step % steps) * BLOCK_K + k
        j_in = j < kept_in
        channel = tl.load(in_ptr + j, mask=j_in, other=0)
        channel = tl.max_contiguous(tl.multiple_of(channel, RUN_IN), RUN_IN)
        if GRADIENT:
            up = oh + PH - r * DH
            left = ow + PW - s * DW
            ih = up // SH
            iw = left // SW
            hit = (up >= 0) & (left >= 0) & (up % SH == 0) & (left % SW == 0) & (ih < height) & (iw < width)
        else:
            ih = oh * SH - PH + r * DH
            iw = ow * SW - PW + s * DW
            hit = (ih >= 0) & (iw >= 0) & (ih < height) & (iw < width)
        x_channel = channel if X_INDEXED else j
        place = (image + ih * width + iw) * x_channels
        inside = (p_in & hit)[:, None] & j_in[None, :]
        x = tl.load(x_ptr + place[:, None] + x_channel[None, :], mask=inside, other=0.0)  # [BP, BK]
        if GRADIENT:  # weight row = contraction, weight channel = result
            w_row = (channel.to(tl.int64) * (R * S) + tap) * w_channels
            w_place = w_row[:, None] + out_channel[None, :]
        else:
            w_row = (out_channel.to(tl.int64) * (R * S) + tap) * w_channels
            w_place = channel[:, None] + w_row[None, :]
        w = tl.load(w_ptr + w_place, mask=j_in[:, None] & m_in[None, :], other=0.0)  # [BK, BM]
        acc = tl.dot(x, w, acc, input_precision=PRECISION)
    if HAS_BIAS:
        acc += tl.load(bias_ptr + out_channel, mask=m_in, other=0.0).to(tl.float32)[None, :]
    acc = activate(acc, ACTIVATION, slope)
    y_channel = out_channel if Y_INDEXED else m
    where = p.to(tl.int64)[:, None] * y_channels + y_channel[None, :]
    tl.store(y_ptr + where, acc.to(y_ptr.dtype.element_ty), mask=p_in[:, None] & m_in[None, :])


@triton.jit
def channel_conv_weight_kernel(
    dy_ptr,  # [N, OH, OW, YC]
    x_ptr,  # [N, H, W, XC]
    in_ptr,  # [KC] int32
    out_index_ptr,  # [KM] int32
    dw_ptr,  # [SPLITS, KM, R·S, KC]
    pixels,
    height,
    width,
    out_height,
    out_width,
    x_channels,
    y_channels,
    kept_in,
    kept_out,
    S: tl.constexpr,
    TAPS: tl.constexpr,
    SH: tl.constexpr,
    SW: tl.constexpr,
    PH: tl.constexpr,
    PW: tl.constexpr,
    DH: tl.constexpr,
    DW: tl.constexpr,
    X_INDEXED: tl.constexpr,
    Y_INDEXED: tl.constexpr,
    RUN_IN: tl.constexpr,
    RUN_OUT: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    tiles_k = tl.cdiv(kept_in, BLOCK_K)
    pid = tl.program_id(0)
    tap = tl.program_id(1)
    split = tl.program_id(2)
    m = (pid // tiles_k) * BLOCK_M + tl.arange(0, BLOCK_M)
    j = (pid % tiles_k) * BLOCK_K + tl.arange(0, BLOCK_K)
    m_in, j_in = m < kept_out, j < kept_in
    y_channel, x_channel = m, j
    if Y_INDEXED:
        y_channel = tl.load(out_index_ptr + m, mask=m_in, other=0)
        y_channel = tl.max_contiguous(tl.multiple_of(y_channel, RUN_OUT), RUN_OUT)
    if X_INDEXED:
        x_channel = tl.load(in_ptr + j, mask=j_in, other=0)
        x_channel = tl.max_contiguous(tl.multiple_of(x_channel, RUN_IN), RUN_IN)
    r = tap // S
    s = tap % S
    steps = tl.cdiv(pixels, BLOCK_P)
    each = tl.cdiv(steps, tl.num_programs(2))
    acc = tl.zeros((BLOCK_M, BLOCK_K), tl.float32)
    for step in range(split * each, tl.minimum((split + 1) * each, steps)):
        p = step * BLOCK_P + tl.arange(0, BLOCK_P)
        ih = (p // out_width) % out_height * SH - PH + r * DH
        iw = p % out_width * SW - PW + s * DW
        hit = (p < pixels) & (ih >= 0) & (iw >= 0) & (ih < height) & (iw < width)
        dy_place = p.to(tl.int64) * y_channels
        dy = tl.load(dy_ptr + dy_place[None, :] + y_channel[:, None], mask=hit[None, :] & m_in[:, None], other=0.0)
        x_place = ((p // out_width // out_height).to(tl.int64) * (height * width) + ih * width + iw) * x_channels
        x = tl.load(x_ptr + x_place[:, None] + x_channel[None, :], mask=hit[:, None] & j_in[None, :], other=0.0)
        acc = tl.dot(dy, x, acc, input_precision=PRECISION)
    row = (split.to(tl.int64) * kept_out + m) * TAPS + tap
    inside = m_in[:, None] & j_in[None, :]
    tl.store(dw_ptr + row[:, None] * kept_in + j[None, :], acc.to(dw_ptr.dtype.element_ty), mask=inside)


@on_its_device
def channel_conv(
    x: torch.Tensor,
    weight: torch.Tensor,
    inputs: ChannelList,
    outputs: ChannelList,
    geometry: ConvGeometry,
    bias: torch.Tensor | None = None,
    activation: str | None = None,
    slope: float = 0.01,
    full_output: bool = True,
) -> torch.Tensor:
    """A convolution that reads the kept input channels and computes the kept output channels.

    Example:
        >>> y = channel_conv(x, w, channel_list(keep_in), channel_list(keep_out), ConvGeometry((3, 3), padding=(1, 1)))
        ... # doctest: +SKIP

    Args:
        x: [N, C, H, W] or, holding the kept channels only, [N, kept, H, W]; channels_last (others are copied).
        weight: [M, C, R, S], channels_last; numbers of pruned channels are not read.
        inputs, outputs: lists over the weight's C and M, from `channel_list`.
        bias: [M] or None. activation: applied to the kept channels.
        full_output: return [N, M, OH, OW] with zeros in the pruned channels, else [N, kept, OH, OW].

    Raises:
        ShapeError: sizes that do not fit.
    """
    name = "channel_conv"
    device = check_tensors(name, x, weight, inputs.index, outputs.index, bias)
    dtype = check_float(name, x, weight)
    activation = check_activation(name, activation)
    _check_weight(name, weight, inputs, outputs, geometry)
    if bias is not None:
        check_lengths(name, bias=(bias.numel(), outputs.channels))
    x_indexed = _indexed(name, "input", x.shape[1], inputs)
    batch, _, height, width = x.shape
    out_height, out_width = geometry.output(height, width)
    shape = (batch, outputs.channels if full_output else outputs.kept, out_height, out_width)
    y = _new_nhwc(x, shape, zero=full_output and outputs.kept < outputs.channels)
    _launch(
        _nhwc(x), _nhwc(weight), inputs, outputs, bias, y, (height, width), (out_height, out_width), geometry, False,
        x_indexed, full_output, activation, slope, generation(device), precision(dtype),
    )  # fmt: skip
    return y


@on_its_device
def channel_conv_input_gradient(
    dy: torch.Tensor,
    weight: torch.Tensor,
    inputs: ChannelList,
    outputs: ChannelList,
    geometry: ConvGeometry,
    size: tuple[int, int],
    full_input: bool = True,
) -> torch.Tensor:
    """The gradient of `channel_conv`'s input, zero in pruned channels.

    Args:
        dy: [N, M or kept, OH, OW]. size: height and width of the input.
        full_input: return [N, C, H, W], else [N, kept, H, W].
    """
    name = "channel_conv_input_gradient"
    device = check_tensors(name, dy, weight, inputs.index, outputs.index)
    dtype = check_float(name, dy, weight)
    _check_weight(name, weight, inputs, outputs, geometry)
    dy_indexed = _indexed(name, "output gradient", dy.shape[1], outputs)
    check_lengths(name, **{"output size": (tuple(dy.shape[2:]), geometry.output(*size))})  # type: ignore[dict-item]
    dx = _new_nhwc(
        dy,
        (dy.shape[0], inputs.channels if full_input else inputs.kept, *size),
        zero=full_input and inputs.kept < inputs.channels,
    )
    _launch(
        _nhwc(dy), _nhwc(weight), outputs, inputs, None, dx, tuple(dy.shape[2:]), size, geometry, True,
        dy_indexed, full_input, "none", 0.0, generation(device), precision(dtype),
    )  # fmt: skip
    return dx


@on_its_device
def channel_conv_weight_gradient(
    dy: torch.Tensor, x: torch.Tensor, inputs: ChannelList, outputs: ChannelList, geometry: ConvGeometry
) -> torch.Tensor:
    """The gradient of the weight, [M, C, R, S] channels_last, zero in pruned rows and channels. No atomics."""
    name = "channel_conv_weight_gradient"
    device = check_tensors(name, dy, x, inputs.index, outputs.index)
    dtype = check_float(name, dy, x)
    x_indexed = _indexed(name, "input", x.shape[1], inputs)
    y_indexed = _indexed(name, "output gradient", dy.shape[1], outputs)
    batch, _, height, width = x.shape
    out_height, out_width = geometry.output(height, width)
    check_lengths(
        name,
        batch=(dy.shape[0], batch),
        **{"output size": (tuple(dy.shape[2:]), (out_height, out_width))},  # type: ignore[dict-item]
    )
    taps = geometry.kernel[0] * geometry.kernel[1]
    full = _new_nhwc(x, (outputs.channels, inputs.channels, *geometry.kernel), zero=True)
    pixels = batch * out_height * out_width
    if not pixels or not inputs.kept or not outputs.kept:
        return full
    config = gradient_config(generation(device), dtype == torch.float32)
    tiles = triton.cdiv(outputs.kept, config["BLOCK_M"]) * triton.cdiv(inputs.kept, config["BLOCK_K"])
    splits = max(1, min(528 // (tiles * taps), -(-pixels // (8 * config["BLOCK_P"]))))
    part = x.new_empty(splits, outputs.kept, taps, inputs.kept, dtype=dtype if splits == 1 else torch.float32)
    channel_conv_weight_kernel[(tiles, taps, splits)](
        _nhwc(dy), _nhwc(x), inputs.index, outputs.index, part, pixels, height, width, out_height, out_width,
        x.shape[1], dy.shape[1], inputs.kept, outputs.kept, S=geometry.kernel[1], TAPS=taps, SH=geometry.stride[0],
        SW=geometry.stride[1], PH=geometry.padding[0], PW=geometry.padding[1], DH=geometry.dilation[0],
        DW=geometry.dilation[1], X_INDEXED=x_indexed, Y_INDEXED=y_indexed, RUN_IN=inputs.run, RUN_OUT=outputs.run,
        PRECISION=precision(dtype), **config,
    )  # fmt: skip
    compact = part[0] if splits == 1 else part.sum(0).to(dtype)
    rows = full.permute(0, 2, 3, 1).view(outputs.channels, taps, inputs.channels)
    rows[outputs.index.long()[:, None], :, inputs.index.long()[None, :]] = compact.transpose(1, 2)
    return full


def gradient_config(arch: str, fp32: bool) -> dict[str, int]:
    """The configuration of one launch of the weight gradient."""
    config = dict(GRADIENT_CONFIGS[arch])
    if fp32:
        config["BLOCK_P"] //= 2
    return config


def conv_config(arch: str, kept_in: int, kept_out: int, pixels: int, run: int, fp32: bool) -> dict[str, int]:
    """The configuration of one launch: the table's row, narrowed to what there is to do."""
    config = dict(CONFIGS[arch])
    config["BLOCK_M"] = min(config["BLOCK_M"], power_of_two(kept_out))
    config["BLOCK_K"] = min(config["BLOCK_K"], power_of_two(kept_in))
    config["BLOCK_P"] = min(config["BLOCK_P"], power_of_two(pixels))
    if fp32:
        config["BLOCK_K"] = max(16, config["BLOCK_K"] // 2)
        config["num_stages"] = 3
    if run * 2 <= (8 if fp32 else 4):  # one address per number or two, held in registers: a smaller tile
        config["BLOCK_P"] = min(config["BLOCK_P"], 64 if arch == "sm_80" else 128)
        config["BLOCK_M"] = min(config["BLOCK_M"], 64)
        config["BLOCK_K"] = min(config["BLOCK_K"], 32)
    if config["BLOCK_P"] * config["BLOCK_M"] < 64 * 128:
        config["num_warps"] = 4
    return config


def _launch(
    x: torch.Tensor,
    weight: torch.Tensor,
    inputs: ChannelList,
    outputs: ChannelList,
    bias: torch.Tensor | None,
    y: torch.Tensor,
    size: tuple[int, ...],
    out_size: tuple[int, int],
    geometry: ConvGeometry,
    gradient: bool,
    x_indexed: bool,
    y_indexed: bool,
    activation: str,
    slope: float,
    arch: str,
    how: str,
) -> None:
    pixels = y.shape[0] * out_size[0] * out_size[1]
    if not pixels or not outputs.kept:
        return
    config = conv_config(arch, inputs.kept, outputs.kept, pixels, inputs.run, x.dtype == torch.float32)
    grid = (grid_size(triton.cdiv(pixels, config["BLOCK_P"]), triton.cdiv(outputs.kept, config["BLOCK_M"])),)
    channel_conv_kernel[grid](
        x, weight, inputs.index, outputs.index, x if bias is None else bias, y, pixels, *size, *out_size, x.shape[-1],
        y.shape[1], weight.shape[-1], inputs.kept, outputs.kept, slope, R=geometry.kernel[0], S=geometry.kernel[1],
        SH=geometry.stride[0], SW=geometry.stride[1], PH=geometry.padding[0], PW=geometry.padding[1],
        DH=geometry.dilation[0], DW=geometry.dilation[1], GRADIENT=gradient, X_INDEXED=x_indexed, Y_INDEXED=y_indexed,
        RUN_IN=inputs.run, RUN_OUT=outputs.run, HAS_BIAS=bias is not None, ACTIVATION=activation, PRECISION=how,
        **config,
    )  # fmt: skip


def _check_weight(
    name: str, weight: torch.Tensor, inputs: ChannelList, outputs: ChannelList, geometry: ConvGeometry
) -> None:
    wanted = (outputs.channels, inputs.channels, *geometry.kernel)
    check_lengths(name, weight=(tuple(weight.shape), wanted))  # type: ignore[arg-type]


def _indexed(name: str, what: str, channels: int, lists: ChannelList) -> bool:
    """Whether a feature map holds all channels (True) or the kept ones only."""
    if channels not in (lists.channels, lists.kept):
        raise ShapeError(f"{name}: {what} has {channels} channels; {lists.channels} or the {lists.kept} kept ones fit")
    return channels == lists.channels


def _nhwc(tensor: torch.Tensor) -> torch.Tensor:
    """[N, C, H, W] in any memory order → [N, H, W, C] contiguous; no copy of a channels_last tensor."""
    return tensor.permute(0, 2, 3, 1).contiguous()


def _new_nhwc(like: torch.Tensor, shape: tuple[int, int, int, int], zero: bool) -> torch.Tensor:
    batch, channels, height, width = shape
    make = like.new_zeros if zero else like.new_empty
    return make(batch, height, width, channels).permute(0, 3, 1, 2)


def aot_cases(arch: str) -> list:
    """3×3 and 1×1, strided and dilated, every run, few channels and many, forward and gradients, in every type."""
    from .aot import KINDS, AotCase, expected_instruction

    found = []
    sizes = ("pixels", "height", "width", "out_height", "out_width", "x_channels", "y_channels", "kept_in", "kept_out")
    # side, run, channels kept, gradient, stride and dilation
    every = [(3, 8, 128, False, 1), (3, 2, 128, False, 1), (3, 1, 128, False, 1), (1, 8, 128, False, 1)]
    every += [(3, 8, 128, True, 1), (3, 1, 128, True, 1)]
    more = [(3, 4, 128, False, 1), (3, 8, 16, False, 1), (3, 8, 64, False, 1), (3, 8, 128, False, 2)]
    more += [(3, 2, 128, True, 1), (3, 8, 16, True, 1), (1, 8, 128, True, 1), (3, 8, 128, True, 2)]
    for kind, (pointer, name, multiply) in KINDS.items():
        wide = name == "float32"
        for side, run, kept, gradient, step in every + (more if kind == "bf16" else []):
            config = conv_config(arch, kept, kept, 1 << 20, run, wide)
            found.append(
                AotCase(
                    name=f"{kind} {side}×{side}, {kept} channels in runs of {run}"
                    + (f", stride and dilation {step}" if step > 1 else "")
                    + (" gradient" if gradient else ""),
                    kernel=channel_conv_kernel,
                    signature=dict.fromkeys(("x_ptr", "w_ptr", "bias_ptr", "y_ptr"), pointer)
                    | {"in_ptr": "*i32", "out_index_ptr": "*i32", "w_channels": "i32", "slope": "fp32"}
                    | dict.fromkeys(sizes, "i32"),
                    constants={"R": side, "S": side, "PH": side // 2, "PW": side // 2, "GRADIENT": gradient}
                    | dict.fromkeys(("SH", "SW", "DH", "DW"), step)
                    | {"X_INDEXED": True, "Y_INDEXED": True, "RUN_IN": run, "RUN_OUT": run, "HAS_BIAS": not gradient}
                    | {"ACTIVATION": "none" if gradient else "relu", "PRECISION": multiply}
                    | {name: config[name] for name in ("BLOCK_P", "BLOCK_M", "BLOCK_K")},
                    options={"num_warps": config["num_warps"], "num_stages": config["num_stages"]},
                    expects=expected_instruction(kind, arch, config["num_warps"] % 4 == 0),
                    quick=kind in ("bf16", "fp32") and side == 3 and run == 8 and kept == 128 and step == 1,
                    divisible=("x_channels", "y_channels", "w_channels", "kept_in", "kept_out"),
                )
            )
        config = gradient_config(arch, wide)
        found += [
            AotCase(
                name=f"{kind} 3×3, runs of {run}",
                kernel=channel_conv_weight_kernel,
                signature=dict.fromkeys(("dy_ptr", "x_ptr", "dw_ptr"), pointer)
                | {"in_ptr": "*i32", "out_index_ptr": "*i32"}
                | dict.fromkeys(sizes, "i32"),
                constants={"S": 3, "TAPS": 9, "PH": 1, "PW": 1, "X_INDEXED": True, "Y_INDEXED": True}
                | {"RUN_IN": run, "RUN_OUT": run, "PRECISION": multiply}
                | dict.fromkeys(("SH", "SW", "DH", "DW"), 1)
                | {name: config[name] for name in ("BLOCK_P", "BLOCK_M", "BLOCK_K")},
                options={"num_warps": config["num_warps"], "num_stages": config["num_stages"]},
                expects=expected_instruction(kind, arch, True),
                quick=kind == "bf16" and run == 8,
                divisible=("x_channels", "y_channels", "kept_in", "kept_out"),
            )
            for run in (8, 1)
        ]
    return found
