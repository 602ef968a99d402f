"""`sparse_conv2d`: a 2-D convolution whose weight has a fixed pattern and a dense 1-D tensor of values.

Three ops, closed under differentiation like those of `sparse_linear`:

    sparse_conv2d              y  = conv2d(pad(x), W) + bias
    sparse_conv2d_input_grad   dx = the transposed convolution of dy with W
    sparse_conv2d_weight_grad  dW = the correlation of dy with pad(x), at kept weights only

The pattern is that of the matrix (M, C/groups · R · S), channel-major, `weight.reshape(M, -1)`. Padding is [top, left,
bottom, right].
"""

from typing import Any, NamedTuple

import torch
from torch.nn import functional

from sparse_engine.errors import ShapeError
from sparse_engine.ops import native, registry
from sparse_engine.ops.pattern import Pattern, cell_index, gather_matrix, scatter_matrix, under_transform
from sparse_engine.ops.sparse_linear import _why_not_torch, autocast
from sparse_engine.packed import PackedWeight
from sparse_engine.structure import Channel

__all__ = ["explain_conv2d", "resolve_padding", "sparse_conv2d"]

_library = torch.library.Library("sparse_engine", "FRAGMENT")
_GEOMETRY_SCHEMA = (
    "Tensor row_ptr, Tensor cols, int[4] weight_shape, int[2] stride, int[4] padding, int[2] dilation, int groups, "
    "int[2] block, str impl"
)


def sparse_conv2d(
    x: torch.Tensor,
    values: torch.Tensor,
    pattern: Pattern,
    bias: torch.Tensor | None = None,
    *,
    stride: int | tuple[int, int] = 1,
    padding: int | tuple[int, ...] | str = 0,
    dilation: int | tuple[int, int] = 1,
    groups: int = 1,
    impl: str = "auto",
) -> torch.Tensor:
    """Convolve with a sparse weight.

    Example:
        >>> packed = PackedWeight.from_dense(torch.ones(1, 1, 3, 3))
        >>> sparse_conv2d(torch.ones(1, 1, 3, 3), packed.values, Pattern.from_packed(packed), padding="same")
        tensor([[[[4., 6., 4.],
                  [6., 9., 6.],
                  [4., 6., 4.]]]])

    Args:
        x: (N, C, H, W), or (C, H, W) without a batch.
        values: (pattern.num_values,) in the order of the packed weight.
        pattern: of a weight (M, C/groups, R, S).
        bias: (M,) or None.
        stride, dilation: one number, or (vertical, horizontal).
        padding: one number, (vertical, horizontal), (top, left, bottom, right), "same" (stride 1 only) or "valid".
        groups: as in `torch.nn.Conv2d`; groups = C is a depthwise convolution.
        impl: "auto", or a backend's name.

    Returns:
        (N, M, H', W') or (M, H', W'). Differentiable in x, values and bias; the gradient of values is that at the
        pattern. Under autocast it runs in float32 on the CPU and in the autocast dtype elsewhere.

    Raises:
        ShapeError: when sizes do not fit together.
        BackendError: when the backend asked for cannot run the call; it lists every backend and its reasons.
    """
    x, batched, arguments = _prepare(x, values, pattern, bias, stride, padding, dilation, groups)
    x, values, bias = autocast(x, values, bias)
    if not torch.compiler.is_compiling() and under_transform() and impl in ("auto", "torch"):
        y = reference(x, values, bias, pattern.row_ptr, pattern.cols, *arguments)
    else:
        y = torch.ops.sparse_engine.sparse_conv2d(x, values, bias, pattern.row_ptr, pattern.cols, *arguments, impl)
    return y if batched else y.squeeze(0)


def explain_conv2d(
    x: torch.Tensor,
    values: torch.Tensor,
    pattern: Pattern,
    bias: torch.Tensor | None = None,
    *,
    stride: int | tuple[int, int] = 1,
    padding: int | tuple[int, ...] | str = 0,
    dilation: int | tuple[int, int] = 1,
    groups: int = 1,
) -> registry.Explanation:
    """Say which backend `sparse_conv2d` takes for these inputs and why not the others."""
    x, _, arguments = _prepare(x, values, pattern, bias, stride, padding, dilation, groups)
    return registry.explain("sparse_conv2d", x, values, bias, pattern.row_ptr, pattern.cols, *arguments)


def resolve_padding(
    padding: int | tuple[int, ...] | str,
    kernel: tuple[int, int],
    stride: tuple[int, int],
    dilation: tuple[int, int],
) -> list[int]:
    """Return [top, left, bottom, right] for any way of writing a padding.

    Example:
        >>> resolve_padding("same", (4, 3), (1, 1), (1, 1))
        [1, 1, 2, 1]

    Raises:
        ShapeError: for "same" with a stride, another word, a negative number, or another count than 1, 2 or 4.
    """
    if isinstance(padding, str):
        if padding == "valid":
            return [0, 0, 0, 0]
        if padding != "same":
            raise ShapeError(f'padding is {padding!r}; "same", "valid" or numbers expected')
        if stride != (1, 1):
            raise ShapeError(f'padding "same" needs stride 1, got {stride}')
        total = [reach * (size - 1) for reach, size in zip(dilation, kernel, strict=True)]
        return [total[0] // 2, total[1] // 2, total[0] - total[0] // 2, total[1] - total[1] // 2]
    numbers = [padding] if isinstance(padding, int) else list(padding)
    if len(numbers) not in (1, 2, 4) or any(number < 0 for number in numbers):
        raise ShapeError(f"padding is {padding!r}; one, two or four (top, left, bottom, right) numbers >= 0 expected")
    return numbers * (4 // len(numbers))


def output_size(
    height: int, width: int, kernel: list[int], stride: list[int], padding: list[int], dilation: list[int]
) -> tuple[int, int]:
    """Return (H', W') of a convolution."""
    tall = (height + padding[0] + padding[2] - dilation[0] * (kernel[0] - 1) - 1) // stride[0] + 1
    wide = (width + padding[1] + padding[3] - dilation[1] * (kernel[1] - 1) - 1) // stride[1] + 1
    return tall, wide


def _pair(value: int | tuple[int, ...], name: str) -> tuple[int, int]:
    numbers = (value, value) if isinstance(value, int) else tuple(value)
    if len(numbers) == 1:
        numbers = numbers * 2
    if len(numbers) != 2 or any(number < 1 for number in numbers):
        raise ShapeError(f"sparse_conv2d: {name} is {value!r}; one or two numbers >= 1 expected")
    return numbers


def _prepare(
    x: torch.Tensor,
    values: torch.Tensor,
    pattern: Pattern,
    bias: torch.Tensor | None,
    stride: int | tuple[int, int],
    padding: int | tuple[int, ...] | str,
    dilation: int | tuple[int, int],
    groups: int,
) -> tuple[torch.Tensor, bool, tuple[Any, ...]]:
    """Check the sizes; return x with a batch dimension, whether it had one, and the op's geometry."""
    if len(pattern.shape) != 4:
        raise ShapeError(
            f"sparse_conv2d: weight of shape {pattern.shape}; four dimensions (M, C/groups, R, S) expected"
        )
    rows, group_channels, *kernel = pattern.shape
    strides, dilations = _pair(stride, "stride"), _pair(dilation, "dilation")
    edges = resolve_padding(padding, (kernel[0], kernel[1]), strides, dilations)
    if not isinstance(groups, int) or groups < 1 or rows % groups:
        raise ShapeError(f"sparse_conv2d: {rows} output channels do not divide into groups={groups}")
    if x.dim() not in (3, 4) or x.shape[-3] != group_channels * groups:
        raise ShapeError(
            f"sparse_conv2d: input of shape {tuple(x.shape)} for a weight of shape {pattern.shape} and {groups} "
            f"groups; (N, {group_channels * groups}, H, W) or ({group_channels * groups}, H, W) expected"
        )
    if values.dim() != 1 or values.shape[0] != pattern.num_values:
        raise ShapeError(
            f"sparse_conv2d: values of shape {tuple(values.shape)} for a pattern of {pattern.num_values} values"
        )
    if bias is not None and tuple(bias.shape) != (rows,):
        raise ShapeError(f"sparse_conv2d: bias of shape {tuple(bias.shape)} for {rows} output channels")
    tall, wide = output_size(x.shape[-2], x.shape[-1], kernel, strides, edges, dilations)
    if tall < 1 or wide < 1:
        raise ShapeError(
            f"sparse_conv2d: input of {x.shape[-2]} x {x.shape[-1]} with padding {edges} is smaller than the kernel of "
            f"{kernel[0]} x {kernel[1]} with dilation {dilations}"
        )
    geometry = (list(pattern.shape), list(strides), edges, list(dilations), groups, list(pattern.block))
    return (x if x.dim() == 4 else x.unsqueeze(0)), x.dim() == 4, geometry


# -- op: schema, choice of the backend, shapes, gradients ------------------------------------------------------------

_library.define(f"sparse_conv2d(Tensor x, Tensor values, Tensor? bias, {_GEOMETRY_SCHEMA}) -> Tensor")
_library.define(
    f"sparse_conv2d_input_grad(Tensor grad, Tensor values, SymInt[2] input_size, {_GEOMETRY_SCHEMA}) -> Tensor"
)
_library.define(f"sparse_conv2d_weight_grad(Tensor grad, Tensor x, {_GEOMETRY_SCHEMA}) -> Tensor")


def _dispatch(op: str, *inputs: Any) -> torch.Tensor:
    *operands, impl = inputs
    return registry.choose(op, impl, *operands).run(*operands)


for _name in ("sparse_conv2d", "sparse_conv2d_input_grad", "sparse_conv2d_weight_grad"):
    _library.impl(_name, lambda *inputs, _name=_name: _dispatch(_name, *inputs), "CompositeExplicitAutograd")


@torch.library.register_fake("sparse_engine::sparse_conv2d", lib=_library)
def _fake(x, values, bias, row_ptr, cols, weight_shape, stride, padding, dilation, groups, block, impl):
    size = output_size(x.shape[2], x.shape[3], weight_shape[2:], stride, padding, dilation)
    return x.new_empty((x.shape[0], weight_shape[0], *size))


@torch.library.register_fake("sparse_engine::sparse_conv2d_input_grad", lib=_library)
def _fake_input_grad(
    grad, values, input_size, row_ptr, cols, weight_shape, stride, padding, dilation, groups, block, impl
):
    return grad.new_empty((grad.shape[0], weight_shape[1] * groups, *input_size))


@torch.library.register_fake("sparse_engine::sparse_conv2d_weight_grad", lib=_library)
def _fake_weight_grad(grad, x, row_ptr, cols, weight_shape, stride, padding, dilation, groups, block, impl):
    return grad.new_empty((cols.shape[0] * block[0] * block[1],))


def _setup_forward(ctx, inputs, output):
    x, values, _bias, row_ptr, cols, *ctx.rest = inputs
    wants_x, wants_values = ctx.needs_input_grad[:2]
    ctx.size = (x.shape[2], x.shape[3])
    ctx.save_for_backward(x if wants_values else None, values if wants_x else None, row_ptr, cols)


def _backward_forward(ctx, grad):
    x, values, row_ptr, cols = ctx.saved_tensors
    wants_x, wants_values, wants_bias = ctx.needs_input_grad[:3]
    op = torch.ops.sparse_engine
    dx = op.sparse_conv2d_input_grad(grad, values, ctx.size, row_ptr, cols, *ctx.rest) if wants_x else None
    dvalues = op.sparse_conv2d_weight_grad(grad, x, row_ptr, cols, *ctx.rest) if wants_values else None
    return (dx, dvalues, grad.sum((0, 2, 3)) if wants_bias else None, *[None] * 9)


def _setup_input_grad(ctx, inputs, output):
    grad, values, ctx.size, row_ptr, cols, *ctx.rest = inputs
    ctx.save_for_backward(grad, values, row_ptr, cols)


def _backward_input_grad(ctx, grad):
    dy, values, row_ptr, cols = ctx.saved_tensors
    op = torch.ops.sparse_engine
    ddy = op.sparse_conv2d(grad, values, None, row_ptr, cols, *ctx.rest) if ctx.needs_input_grad[0] else None
    dvalues = op.sparse_conv2d_weight_grad(dy, grad, row_ptr, cols, *ctx.rest) if ctx.needs_input_grad[1] else None
    return (ddy, dvalues, *[None] * 10)


def _setup_weight_grad(ctx, inputs, output):
    grad, x, row_ptr, cols, *ctx.rest = inputs
    ctx.size = (x.shape[2], x.shape[3])
    ctx.save_for_backward(grad, x, row_ptr, cols)


def _backward_weight_grad(ctx, grad):
    dy, x, row_ptr, cols = ctx.saved_tensors
    op = torch.ops.sparse_engine
    ddy = op.sparse_conv2d(x, grad, None, row_ptr, cols, *ctx.rest) if ctx.needs_input_grad[0] else None
    dx = op.sparse_conv2d_input_grad(dy, grad, ctx.size, row_ptr, cols, *ctx.rest) if ctx.needs_input_grad[1] else None
    return (ddy, dx, *[None] * 9)


torch.library.register_autograd(
    "sparse_engine::sparse_conv2d", _backward_forward, setup_context=_setup_forward, lib=_library
)
torch.library.register_autograd(
    "sparse_engine::sparse_conv2d_input_grad", _backward_input_grad, setup_context=_setup_input_grad, lib=_library
)
torch.library.register_autograd(
    "sparse_engine::sparse_conv2d_weight_grad", _backward_weight_grad, setup_context=_setup_weight_grad, lib=_library
)

# -- torch: the reference; dense convolutions with the scattered weight ----------------------------------------------


def _matrix_shape(weight_shape: list[int]) -> tuple[int, int]:
    return weight_shape[0], weight_shape[1] * weight_shape[2] * weight_shape[3]


def _dense_weight(values, row_ptr, cols, weight_shape, block):
    return scatter_matrix(values, row_ptr, cols, *_matrix_shape(weight_shape), tuple(block)).reshape(weight_shape)


def _pad(x: torch.Tensor, padding: list[int]) -> torch.Tensor:
    top, left, bottom, right = padding
    return functional.pad(x, (left, right, top, bottom)) if any(padding) else x


@registry.register("sparse_conv2d", "torch", why_not=_why_not_torch)
def reference(x, values, bias, row_ptr, cols, weight_shape, stride, padding, dilation, groups, block):
    """y = conv2d(pad(x), W) + bias with the weight scattered into a dense one."""
    weight = _dense_weight(values, row_ptr, cols, weight_shape, block)  # [M, C/g, R, S]
    if 0 in weight_shape or 0 in x.shape:
        size = output_size(x.shape[2], x.shape[3], weight_shape[2:], stride, padding, dilation)
        y = x.new_zeros(x.shape[0], weight_shape[0], *size)
        return y if bias is None else y + bias[:, None, None]
    return functional.conv2d(_pad(x, padding), weight, bias, stride, 0, dilation, groups)  # [N, M, H', W']


@registry.register("sparse_conv2d_input_grad", "torch", why_not=_why_not_torch)
def reference_input_grad(
    grad, values, input_size, row_ptr, cols, weight_shape, stride, padding, dilation, groups, block
):
    """dx = the transposed convolution of dy with the scattered weight, without the padding's share."""
    weight = _dense_weight(values, row_ptr, cols, weight_shape, block)
    top, left, bottom, right = padding
    height, width = input_size
    channels = weight_shape[1] * groups
    if 0 in weight_shape or grad.numel() == 0:
        return grad.new_zeros(grad.shape[0], channels, height, width)
    padded = (grad.shape[0], channels, height + top + bottom, width + left + right)
    dx = torch.nn.grad.conv2d_input(padded, weight, grad, stride, 0, dilation, groups)
    return dx[:, :, top : top + height, left : left + width].contiguous()  # [N, C, H, W]


@registry.register("sparse_conv2d_weight_grad", "torch", why_not=_why_not_torch)
def reference_weight_grad(grad, x, row_ptr, cols, weight_shape, stride, padding, dilation, groups, block):
    """dW = the correlation of dy with pad(x), read at the pattern."""
    if 0 in weight_shape or grad.numel() == 0:
        return grad.new_zeros(cols.numel() * block[0] * block[1])
    dense = torch.nn.grad.conv2d_weight(_pad(x, padding), weight_shape, grad, stride, 0, dilation, groups)
    rows, columns = _matrix_shape(weight_shape)
    index = cell_index(row_ptr, cols, -(-columns // block[1]))
    return gather_matrix(dense.reshape(rows, columns), index, tuple(block))


# -- cpu: the C++ kernels --------------------------------------------------------------------------------------------


def _why_not_cpu(x, values, bias, row_ptr, cols, *geometry):
    return native.why_not_extension("Conv2d") + native.why_not_float32_cpu(cols, x=x, values=values, bias=bias)


def _why_not_cpu_input_grad(grad, values, input_size, row_ptr, cols, *geometry):
    return native.why_not_extension("Conv2d") + native.why_not_float32_cpu(cols, grad=grad, values=values)


def _why_not_cpu_weight_grad(grad, x, row_ptr, cols, *geometry):
    return native.why_not_extension("Conv2d") + native.why_not_float32_cpu(cols, grad=grad, x=x)


def product(row_ptr, cols, weight_shape, stride, padding, dilation, groups, block) -> native.NativeProduct:
    """Return the C++ object for a pattern and geometry, building it the first time."""
    rows, group_channels, kernel_rows, kernel_cols = weight_shape
    geometry = {
        "c": group_channels * groups,
        "m": rows,
        "r": kernel_rows,
        "s": kernel_cols,
        "stride": list(stride),
        "padding": list(padding),
        "dilation": list(dilation),
        "groups": groups,
    }
    key = ("conv2d", tuple(stride), tuple(padding), tuple(dilation), groups)

    def make(row_pointers, columns, _rows, _columns):
        return native.extension().Conv2d(row_pointers, columns, geometry)

    return native.native_product(row_ptr, cols, tuple(weight_shape), tuple(block), key, make)


@registry.register("sparse_conv2d", "cpu", why_not=_why_not_cpu)
def _cpu_forward(x, values, bias, row_ptr, cols, weight_shape, stride, padding, dilation, groups, block):
    size = output_size(x.shape[2], x.shape[3], weight_shape[2:], stride, padding, dilation)
    y = torch.empty((x.shape[0], weight_shape[0], *size), dtype=x.dtype)
    if y.numel() == 0:
        return y
    if cols.numel() == 0 or x.numel() == 0:
        return y.zero_() if bias is None else y.copy_(bias[:, None, None].expand_as(y))
    native_conv = product(row_ptr, cols, weight_shape, stride, padding, dilation, groups, block)
    forward_into(y, native_conv, x, values, bias, force=values.requires_grad)
    return y


def forward_into(
    y: torch.Tensor,
    native_conv: native.NativeProduct,
    x: torch.Tensor,
    values: torch.Tensor,
    bias: torch.Tensor | None,
    force: bool = False,
) -> None:
    """Run the C++ forward convolution into an output (N, M, H', W'), contiguous or channels-last."""
    bias = bias if bias is None or bias.is_contiguous() else bias.contiguous()
    with native_conv.lock:
        native_conv.load(values, force)
        planes = _plain_or_last(x)
        x_last, y_last = _is_last(planes), _is_last(y)
        arguments = (y.data_ptr(), 0 if bias is None else bias.data_ptr())
        if native_conv.handle.forward(planes.data_ptr(), *_batch(planes), *arguments, x_last, y_last):
            return
        # A batch too small for the kernels that take both memory orders.
        planes, out = planes.contiguous(), y.contiguous()
        native_conv.handle.forward(planes.data_ptr(), *_batch(planes), out.data_ptr(), arguments[1])
    if out is not y:
        y.copy_(out)


def _is_last(x: torch.Tensor) -> bool:
    """Say whether images lie in memory with their channels next to each other, and not also the usual way."""
    return not x.is_contiguous() and x.is_contiguous(memory_format=torch.channels_last)


def _plain_or_last(x: torch.Tensor) -> torch.Tensor:
    return x if x.is_contiguous(memory_format=torch.channels_last) else x.contiguous()


def memory_format(x: torch.Tensor, native_conv: native.NativeProduct) -> torch.memory_format:
    """Return the memory order of what is computed from x: its own where the kernels write it directly."""
    last = _is_last(x) and x.shape[0] >= native_conv.handle.batch_lanes
    return torch.channels_last if last else torch.contiguous_format


def _batch(x: torch.Tensor) -> tuple[int, int, int]:
    return x.shape[0], x.shape[2], x.shape[3]


@registry.register("sparse_conv2d_input_grad", "cpu", why_not=_why_not_cpu_input_grad)
def _cpu_input_grad(grad, values, input_size, row_ptr, cols, weight_shape, stride, padding, dilation, groups, block):
    size = (grad.shape[0], weight_shape[1] * groups, *input_size)
    if cols.numel() == 0 or grad.numel() == 0 or 0 in size:
        return grad.new_zeros(size)
    native_conv = product(row_ptr, cols, weight_shape, stride, padding, dilation, groups, block)
    dx = _native_input_grad(grad, values, native_conv, size)
    if dx is None:
        geometry = (weight_shape, stride, padding, dilation, groups, block)
        dx = reference_input_grad(grad, values, input_size, row_ptr, cols, *geometry)
    return dx


def _native_input_grad(
    grad: torch.Tensor,
    values: torch.Tensor,
    native_conv: native.NativeProduct,
    size: tuple[int, ...],
    order: torch.memory_format = torch.contiguous_format,
) -> torch.Tensor | None:
    """The input gradient; None where a weight is infinite or NaN, which the kernel would multiply with the zeros that
    it reads around the upstream gradient: a border that stays finite in a dense layer would become NaN.
    """
    dx = torch.empty(size, dtype=torch.float32, memory_format=order)
    planes = _plain_or_last(grad)
    with native_conv.lock:
        native_conv.load(values)
        call = native_conv.handle.input_grad
        if call(planes.data_ptr(), *_batch(dx), dx.data_ptr(), _is_last(planes), _is_last(dx)):
            return dx
        if not _is_last(planes) and not _is_last(dx):
            return None
        planes, dx = planes.contiguous(), torch.empty(size, dtype=torch.float32)
        return dx if call(planes.data_ptr(), *_batch(dx), dx.data_ptr()) else None


@registry.register("sparse_conv2d_weight_grad", "cpu", why_not=_why_not_cpu_weight_grad)
def _cpu_weight_grad(grad, x, row_ptr, cols, weight_shape, stride, padding, dilation, groups, block):
    count = cols.numel() * block[0] * block[1]
    if count == 0 or grad.numel() == 0 or x.numel() == 0:
        return grad.new_zeros(count)
    native_conv = product(row_ptr, cols, weight_shape, stride, padding, dilation, groups, block)
    return _native_weight_grad(grad, x, native_conv, count)


def _native_weight_grad(
    grad: torch.Tensor, x: torch.Tensor, native_conv: native.NativeProduct, count: int
) -> torch.Tensor:
    dy, planes = _plain_or_last(grad), _plain_or_last(x)
    entries = torch.empty(native_conv.handle.nnz, dtype=torch.float32)
    with native_conv.lock:
        call = native_conv.handle.weight_grad
        batch = _batch(planes)
        if not call(dy.data_ptr(), planes.data_ptr(), *batch, entries.data_ptr(), _is_last(dy), _is_last(planes)):
            dy, planes = dy.contiguous(), planes.contiguous()
            call(dy.data_ptr(), planes.data_ptr(), *batch, entries.data_ptr())
    return native_conv.entries_to_values(entries, count)


class EagerConv2d(torch.autograd.Function):
    """The cpu candidate with its gradients, called without PyTorch's dispatcher; see `sparse_linear.EagerLinear`."""

    @staticmethod
    def forward(ctx, x, values, bias, pattern, native_conv, size, geometry):
        order = memory_format(x, native_conv)
        y = torch.empty((x.shape[0], pattern.rows, *size), dtype=torch.float32, memory_format=order)
        forward_into(y, native_conv, x, values, bias, force=True)
        ctx.save_for_backward(x, values)
        ctx.pattern, ctx.native_conv, ctx.geometry = pattern, native_conv, geometry
        return y

    @staticmethod
    def backward(ctx, grad):
        x, values = ctx.saved_tensors
        pattern, native_conv = ctx.pattern, ctx.native_conv
        wants_x, wants_values, wants_bias = ctx.needs_input_grad[:3]
        if torch.is_grad_enabled() or type(grad) is not torch.Tensor or grad.dtype is not torch.float32:
            op = torch.ops.sparse_engine
            rest = (pattern.row_ptr, pattern.cols, *ctx.geometry, "auto")
            size = (x.shape[2], x.shape[3])
            dx = op.sparse_conv2d_input_grad(grad, values, size, *rest) if wants_x else None
            dvalues = op.sparse_conv2d_weight_grad(grad, x, *rest) if wants_values else None
        else:
            order = memory_format(x, native_conv)
            dx = _native_input_grad(grad, values, native_conv, x.shape, order) if wants_x else None
            if dx is None and wants_x:
                size = (x.shape[2], x.shape[3])
                dx = reference_input_grad(grad, values, size, pattern.row_ptr, pattern.cols, *ctx.geometry)
            dvalues = _native_weight_grad(grad, x, native_conv, pattern.num_values) if wants_values else None
        return dx, dvalues, grad.sum((0, 2, 3)) if wants_bias else None, None, None, None, None


# -- training with whole channels pruned: index lists around a smaller dense convolution -----------------------------

# Multiplications per channel that is moved, from which copying the kept channels out and in pays against the kernels
# that read them in place. Measured by `python -m bench.structured training`: at 51 and above the copies win (up to
# twice as fast), at 36 and below they lose.
_WORTH_MOVING = 48


class ChannelLists(NamedTuple):
    """Which channels a weight keeps, as index lists: rows of the weight (outputs) and inputs; None = all.

    Attributes:
        inputs, outputs: int64 (kept), ascending, or None.
        shape: of the weight without its pruned channels.
    """

    inputs: torch.Tensor | None
    outputs: torch.Tensor | None
    shape: tuple[int, int, int, int]


def channel_lists(packed: PackedWeight, geometry: tuple[Any, ...]) -> ChannelLists | None:
    """Return the lists of a weight of whole channels where a training step is faster with them; None elsewhere.

    Example:
        >>> weight = torch.randn(64, 64, 3, 3)
        >>> weight[::2] = 0
        >>> packed = PackedWeight.from_dense(weight, structure="channel")
        >>> channel_lists(packed, ([64, 64, 3, 3], [1, 1], [1, 1, 1, 1], [1, 1], 1, [1, 1])).outputs.tolist()[:3]
        [1, 3, 5]

    Args:
        packed: a weight (M, C, R, S).
        geometry: as the op takes it, from the weight's shape to the block.
    """
    shape, _stride, padding, _dilation, groups, _block = geometry
    if not isinstance(packed.structure, Channel) or packed.order is not None or groups != 1:
        return None
    if padding[0] != padding[2] or padding[1] != padding[3]:
        return None
    rows, channels = packed.pattern["rows"].long(), packed.pattern["channels"].long()
    multiplications = rows.numel() * channels.numel() * shape[2] * shape[3]
    if multiplications == 0 or multiplications < _WORTH_MOVING * (shape[0] + shape[1]):
        return None
    return ChannelLists(
        None if channels.numel() == shape[1] else channels,
        None if rows.numel() == shape[0] else rows,
        (rows.numel(), channels.numel(), shape[2], shape[3]),
    )


class ListedConv2d(torch.autograd.Function):
    """A training step of a convolution without its pruned channels: kept channels are copied out, PyTorch's dense
    convolution of the smaller size runs, and the results are copied to their places. The feature maps keep all
    channels, as a residual sum needs them.
    """

    @staticmethod
    def forward(ctx, x, values, bias, pattern, lists, geometry):
        _, stride, padding, dilation, _, _ = geometry
        kept = x if lists.inputs is None else x.index_select(1, lists.inputs)
        if lists.outputs is None:
            y = functional.conv2d(kept, values.view(lists.shape), bias, stride, padding[:2], dilation)
        else:
            own = None if bias is None else bias[lists.outputs]
            part = functional.conv2d(kept, values.view(lists.shape), own, stride, padding[:2], dilation)
            y = part.new_zeros(len(part), pattern.rows, *part.shape[2:])
            if bias is not None:
                y += bias[:, None, None]
            y.index_copy_(1, lists.outputs, part)
        ctx.save_for_backward(x, values)
        ctx.pattern, ctx.lists, ctx.geometry = pattern, lists, geometry
        return y

    @staticmethod
    def backward(ctx, grad):
        x, values = ctx.saved_tensors
        wants_x, wants_values, wants_bias = ctx.needs_input_grad[:3]
        dx = dvalues = None
        if torch.is_grad_enabled() or type(grad) is not torch.Tensor or grad.dtype is not torch.float32:
            op = torch.ops.sparse_engine
            rest = (ctx.pattern.row_ptr, ctx.pattern.cols, *ctx.geometry, "auto")
            dx = op.sparse_conv2d_input_grad(grad, values, (x.shape[2], x.shape[3]), *rest) if wants_x else None
            dvalues = op.sparse_conv2d_weight_grad(grad, x, *rest) if wants_values else None
        elif wants_x or wants_values:
            lists, (_, stride, padding, dilation, _, _) = ctx.lists, ctx.geometry
            kept = x if lists.inputs is None else x.index_select(1, lists.inputs)
            dy = grad if lists.outputs is None else grad.index_select(1, lists.outputs)
            part, dweight, _ = torch.ops.aten.convolution_backward(
                dy, kept, values.view(lists.shape), None, stride, padding[:2], dilation, False, [0, 0], 1,
                [wants_x, wants_values, False],
            )  # fmt: skip
            dvalues = dweight.reshape(-1) if wants_values else None
            dx = part
            if wants_x and lists.inputs is not None:
                dx = torch.zeros_like(x).index_copy_(1, lists.inputs, part)
        return dx, dvalues, grad.sum((0, 2, 3)) if wants_bias else None, None, None, None
