"""The `triton` and `cuda` candidates of the ops: compiled and run on the CPU in the tests, for NVIDIA GPUs.

`triton` takes weights in blocks with sides of 16 to 128, all three products. `cuda` takes unstructured weights that are
not being trained, forward only. Whatever they derive from a pattern is built once and kept with it (`pattern.cached`),
so that later calls can be captured in a CUDA graph.
"""

from __future__ import annotations

from typing import Any

import torch

from sparse_engine import kernels
from sparse_engine.ops import cuda_library, registry
from sparse_engine.ops.pattern import LastSeen, cached, cell_index, gather_matrix, scatter_matrix

_SIDES = (16, 32, 64, 128)
_FLOATS = (torch.float32, torch.float16, torch.bfloat16)


def _why_not_operands(tensors: dict[str, torch.Tensor | None], cols: torch.Tensor, interpret: bool) -> list[str]:
    present = {name: tensor for name, tensor in tensors.items() if tensor is not None}
    reasons = []
    wanted = "cpu" if interpret else "cuda"
    for name, tensor in [*present.items(), ("the pattern", cols)]:
        if tensor.device.type != wanted:
            reasons.append(f"{name} is on {tensor.device}, not on an NVIDIA GPU")
    kinds = {tensor.dtype for tensor in present.values()}
    if len(kinds) > 1:
        reasons.append(f"operands have different dtypes: {', '.join(sorted(map(str, kinds)))}")
    return reasons


def _interpreted(op: str) -> bool:
    """Whether CPU tensors may be interpreted: only where the tests ask for this backend by name, for it is very
    slow."""
    return registry.forced(op) == "triton" and kernels.available() and not torch.cuda.is_available()


def _why_not_triton(
    op: str, tensors: dict[str, torch.Tensor | None], cols: torch.Tensor, block: list[int]
) -> list[str]:
    reasons = _why_not_operands(tensors, cols, _interpreted(op))
    if reasons:
        return reasons
    reasons = kernels.why_not()
    if block[0] not in _SIDES or block[1] not in _SIDES:
        reasons.append(f"blocks of {block[0]} x {block[1]}; the kernels take sides of {', '.join(map(str, _SIDES))}")
    for name, tensor in tensors.items():
        if tensor is not None and tensor.dtype not in _FLOATS:
            reasons.append(f"{name} is {tensor.dtype}")
    return reasons


def _pattern(
    row_ptr: torch.Tensor, cols: torch.Tensor, out_features: int, in_features: int, block: list[int]
) -> kernels.BlockPattern:
    height, width = block

    def build() -> kernels.BlockPattern:
        kept = torch.zeros(-(-out_features // height), -(-in_features // width), dtype=torch.bool, device=cols.device)
        rows = torch.repeat_interleave(torch.arange(kept.shape[0], device=cols.device), row_ptr.diff())
        kept[rows, cols.long()] = True
        return kernels.block_pattern(kept, (height, width), (out_features, in_features))

    return cached(row_ptr, cols, ("triton blocks", out_features, in_features, height, width), build)


# -- triton: block-sparse --------------------------------------------------------------------------------------------


def _why_not_triton_forward(x, values, bias, row_ptr, cols, out_features, in_features, block):
    return _why_not_triton("sparse_linear", {"x": x, "values": values, "bias": bias}, cols, block)


@registry.register("sparse_linear", "triton", why_not=_why_not_triton_forward)
def _triton_forward(x, values, bias, row_ptr, cols, out_features, in_features, block):
    pattern = _pattern(row_ptr, cols, out_features, in_features, block)
    return kernels.block_sparse_linear(x.detach(), values.detach().reshape(-1, *block), pattern, bias)


def _why_not_triton_input_grad(grad, values, row_ptr, cols, out_features, in_features, block):
    return _why_not_triton("sparse_linear_input_grad", {"grad": grad, "values": values}, cols, block)


@registry.register("sparse_linear_input_grad", "triton", why_not=_why_not_triton_input_grad)
def _triton_input_grad(grad, values, row_ptr, cols, out_features, in_features, block):
    pattern = _pattern(row_ptr, cols, out_features, in_features, block)
    return kernels.block_sparse_input_gradient(grad.detach(), values.detach().reshape(-1, *block), pattern)


def _why_not_triton_weight_grad(grad, x, row_ptr, cols, out_features, in_features, block):
    return _why_not_triton("sparse_linear_weight_grad", {"grad": grad, "x": x}, cols, block)


@registry.register("sparse_linear_weight_grad", "triton", why_not=_why_not_triton_weight_grad)
def _triton_weight_grad(grad, x, row_ptr, cols, out_features, in_features, block):
    pattern = _pattern(row_ptr, cols, out_features, in_features, block)
    return kernels.block_sparse_weight_gradient(grad.detach(), x.detach(), pattern).reshape(-1)


# -- triton: convolutions whose channels are pruned --------------------------------------------------------------------


def _channels(
    row_ptr: torch.Tensor, cols: torch.Tensor, weight_shape: list[int]
) -> tuple[kernels.ChannelList, kernels.ChannelList] | None:
    """Kept input and output channels of a pattern that is made of whole channels, else None; looked at once."""
    _outputs, channels, *kernel = weight_shape
    taps = kernel[0] * kernel[1]

    def build() -> tuple[kernels.ChannelList, kernels.ChannelList] | None:
        counts = row_ptr.diff().cpu()
        keep_out = counts > 0
        columns = torch.zeros(channels * taps, dtype=torch.bool)
        columns[cols.cpu().long()] = True
        per_channel = columns.reshape(channels, taps)
        keep_in = per_channel.any(1)
        whole = bool((per_channel.all(1) == keep_in).all()) and bool((counts[keep_out] == int(columns.sum())).all())
        if not whole:
            return None
        return kernels.channel_list(keep_in, cols.device), kernels.channel_list(keep_out, cols.device)

    return cached(row_ptr, cols, ("triton channels", *weight_shape), build)


def _why_not_triton_conv(tensors, row_ptr, cols, weight_shape, padding, groups, block) -> list[str]:
    reasons = _why_not_operands(tensors, cols, _interpreted("sparse_conv2d"))
    if reasons:
        return reasons
    reasons = kernels.why_not()
    for name, tensor in tensors.items():
        if tensor is not None and tensor.dtype not in _FLOATS:
            reasons.append(f"{name} is {tensor.dtype}")
    if groups != 1:
        reasons.append(f"{groups} groups")
    if padding[0] != padding[2] or padding[1] != padding[3]:
        reasons.append(f"uneven padding {list(padding)}")
    if 0 in weight_shape or list(block) != [1, 1] or _channels(row_ptr, cols, weight_shape) is None:
        reasons.append("the pattern is not made of whole channels; pack with structure=Channel()")
    return reasons


def _geometry(weight_shape: list[int], stride: list[int], padding: list[int], dilation: list[int]) -> Any:
    kernel = (weight_shape[2], weight_shape[3])
    return kernels.ConvGeometry(kernel, (stride[0], stride[1]), (padding[0], padding[1]), (dilation[0], dilation[1]))


def _conv_weight(values: torch.Tensor, row_ptr: torch.Tensor, cols: torch.Tensor, shape: list[int]) -> torch.Tensor:
    columns = shape[1] * shape[2] * shape[3]
    weight = scatter_matrix(values.detach(), row_ptr, cols, shape[0], columns, (1, 1)).reshape(shape)
    return weight.contiguous(memory_format=torch.channels_last)


def _why_not_triton_conv_forward(
    x, values, bias, row_ptr, cols, weight_shape, stride, padding, dilation, groups, block
):
    tensors = {"x": x, "values": values, "bias": bias}
    return _why_not_triton_conv(tensors, row_ptr, cols, weight_shape, padding, groups, block)


@registry.register("sparse_conv2d", "triton", why_not=_why_not_triton_conv_forward)
def _triton_conv(x, values, bias, row_ptr, cols, weight_shape, stride, padding, dilation, groups, block):
    inputs, outputs = _channels(row_ptr, cols, weight_shape)
    weight = _conv_weight(values, row_ptr, cols, weight_shape)
    geometry = _geometry(weight_shape, stride, padding, dilation)
    y = kernels.channel_conv(x.detach(), weight, inputs, outputs, geometry, bias)
    if bias is not None and outputs.kept < outputs.channels:  # the kernel leaves pruned channels at zero
        kept = torch.zeros(outputs.channels, dtype=torch.bool, device=y.device)
        kept.index_fill_(0, outputs.index.long(), True)
        y = y + torch.where(kept, 0, bias.detach())[:, None, None]
    return y.contiguous()


def _why_not_triton_conv_input_grad(
    grad, values, input_size, row_ptr, cols, weight_shape, stride, padding, dilation, groups, block
):
    tensors = {"grad": grad, "values": values}
    return _why_not_triton_conv(tensors, row_ptr, cols, weight_shape, padding, groups, block)


@registry.register("sparse_conv2d_input_grad", "triton", why_not=_why_not_triton_conv_input_grad)
def _triton_conv_input_grad(
    grad, values, input_size, row_ptr, cols, weight_shape, stride, padding, dilation, groups, block
):
    inputs, outputs = _channels(row_ptr, cols, weight_shape)
    weight = _conv_weight(values, row_ptr, cols, weight_shape)
    geometry = _geometry(weight_shape, stride, padding, dilation)
    size = (int(input_size[0]), int(input_size[1]))
    return kernels.channel_conv_input_gradient(grad.detach(), weight, inputs, outputs, geometry, size).contiguous()


def _why_not_triton_conv_weight_grad(grad, x, row_ptr, cols, weight_shape, stride, padding, dilation, groups, block):
    tensors = {"grad": grad, "x": x}
    return _why_not_triton_conv(tensors, row_ptr, cols, weight_shape, padding, groups, block)


@registry.register("sparse_conv2d_weight_grad", "triton", why_not=_why_not_triton_conv_weight_grad)
def _triton_conv_weight_grad(grad, x, row_ptr, cols, weight_shape, stride, padding, dilation, groups, block):
    inputs, outputs = _channels(row_ptr, cols, weight_shape)
    geometry = _geometry(weight_shape, stride, padding, dilation)
    full = kernels.channel_conv_weight_gradient(grad.detach(), x.detach(), inputs, outputs, geometry)
    columns = weight_shape[1] * weight_shape[2] * weight_shape[3]
    return gather_matrix(full.reshape(weight_shape[0], columns), cell_index(row_ptr, cols, columns), (1, 1))


# -- triton: distillation loss ---------------------------------------------------------------------------------------


def _why_not_triton_rows(
    logits, targets, teacher, class_weights, hard_scale, soft_scale, temperature, soft_targets, kl, hard,
    label_smoothing, ignore_index, gradient,
):  # fmt: skip
    wanted = "cpu" if _interpreted("kd_rows") else "cuda"
    tensors = {"logits": logits, "targets": targets, "teacher": teacher, "class_weights": class_weights}
    tensors |= {"hard_scale": hard_scale, "soft_scale": soft_scale}
    reasons = [
        f"{name} is on {tensor.device}, not on an NVIDIA GPU"
        for name, tensor in tensors.items()
        if tensor is not None and tensor.device.type != wanted
    ]
    if reasons:
        return reasons
    reasons = kernels.why_not()
    reasons += [f"{name} is {t.dtype}" for name, t in tensors.items() if t is not None and t.dtype == torch.float64]
    if class_weights is not None and hard and targets is not None:
        reasons.append("class weights")
    if label_smoothing == 1:
        reasons.append("label smoothing of 1")
    if not 1 <= logits.shape[1] <= 262144:
        reasons.append(f"{logits.shape[1]} classes; the kernel takes 1 to 262144")
    return reasons


@registry.register("kd_rows", "triton", why_not=_why_not_triton_rows)
def _triton_rows(
    logits, targets, teacher, class_weights, hard_scale, soft_scale, temperature, soft_targets, kl, hard,
    label_smoothing, ignore_index, gradient,
):  # fmt: skip
    rows, classes = logits.shape
    device = logits.device
    losses = torch.zeros((2, rows), dtype=torch.float32, device=device)
    hard_on = hard and targets is not None
    if not rows or not (hard_on or teacher is not None):
        return losses[0].clone(), losses[1].clone(), logits.new_zeros((rows if gradient else 0, classes))
    ones = torch.ones(rows, dtype=torch.float32, device=device)
    result = kernels.distill_rows(
        logits.detach(),
        teacher,
        targets,
        (ones if hard_scale is None else hard_scale) if hard_on else None,
        (ones if soft_scale is None else soft_scale) if teacher is not None else None,
        temperature=temperature,
        soft_targets=soft_targets,
        kl=kl,
        label_smoothing=label_smoothing,
        ignore_index=ignore_index,
        gradient=gradient,
    )
    return (
        losses[0].clone() if result.hard is None else result.hard,
        losses[1].clone() if result.soft is None else result.soft,
        logits.new_empty((0, classes)) if result.gradient is None else result.gradient,
    )


# -- cuda: unstructured ----------------------------------------------------------------------------------------------


def _why_not_cuda(x, values, bias, row_ptr, cols, out_features, in_features, block) -> list[str]:
    emulated = registry.forced("sparse_linear") == "cuda" and cuda_library.emulated()
    reasons = _why_not_operands({"x": x, "values": values, "bias": bias}, cols, emulated)
    if reasons:
        return reasons
    reasons = cuda_library.why_not()
    if x.dtype not in (torch.bfloat16, torch.float16):
        reasons.append(f"x is {x.dtype}; the kernel computes in bfloat16 and float16")
    if list(block) != [1, 1]:
        reasons.append(f"blocks of {block[0]} x {block[1]}; this kernel is for unstructured weights")
    if in_features % 8:
        reasons.append(f"{in_features} inputs; the kernel copies 8 at a time")
    if values.requires_grad:
        reasons.append("the values are being trained, and would be packed again at every step")
    return reasons


@registry.register("sparse_linear", "cuda", why_not=_why_not_cuda)
def _cuda_forward(x, values, bias, row_ptr, cols, out_features, in_features, block):
    def pack() -> cuda_library.BitmaskWeight:
        dense = scatter_matrix(values.detach(), row_ptr, cols, out_features, in_features, (1, 1))
        return cuda_library.pack_bitmask(dense)

    # packed on the host, once; any later call starts one kernel
    slot = cached(row_ptr, cols, ("cuda bitmask", out_features, in_features, values.dtype), LastSeen)
    return cuda_library.library().bitmask_linear(x.detach(), slot.get(values, pack), bias)
