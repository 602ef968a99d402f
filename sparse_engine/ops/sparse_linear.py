"""`sparse_linear`: y = x Wᵀ + b for a weight whose pattern is fixed and whose values are a dense 1-D tensor.

Three ops, closed under differentiation (each one's gradients are the other two):

    sparse_linear              y[n, m]  = sum over kept (m, k) of x[n, k] · W[m, k]      + bias[m]
    sparse_linear_input_grad   dx[n, k] = sum over kept (m, k) of dy[n, m] · W[m, k]
    sparse_linear_weight_grad  dW[m, k] = sum over n of dy[n, m] · x[n, k], at kept (m, k) only

Inputs of every candidate: x or dy of any leading dimensions, `values` (cells · block area,), `row_ptr` int64 and `cols`
int32 (see `sparse_engine.ops.pattern.Pattern`), out_features, in_features, block = [rows, cols].
"""

import math
from typing import Any

import torch

from sparse_engine.errors import ShapeError
from sparse_engine.ops import native, registry
from sparse_engine.ops.pattern import (
    LastSeen,
    Pattern,
    cached,
    cell_index,
    gather_matrix,
    scatter_matrix,
    under_transform,
)

__all__ = ["explain_linear", "sparse_linear"]

_library = torch.library.Library("sparse_engine", "FRAGMENT")
_PATTERN_SCHEMA = "Tensor row_ptr, Tensor cols, int out_features, int in_features, int[2] block, str impl"

# A dense weight gradient is never held as a whole: the reference computes it in panels of at most this many entries.
_PANEL_ENTRIES = 1 << 20


def sparse_linear(
    x: torch.Tensor, values: torch.Tensor, pattern: Pattern, bias: torch.Tensor | None = None, *, impl: str = "auto"
) -> torch.Tensor:
    """Apply a linear layer whose weight is sparse.

    Example:
        >>> packed = PackedWeight.from_dense(torch.tensor([[0.0, 2.0], [1.0, 0.0]]))
        >>> sparse_linear(torch.tensor([[1.0, 10.0]]), packed.values, Pattern.from_packed(packed))
        tensor([[20.,  1.]])

    Args:
        x: (..., K) input, any number of leading dimensions.
        values: (pattern.num_values,) in the order of the packed weight.
        pattern: of a weight (M, K).
        bias: (M,) or None.
        impl: "auto", or a backend's name ("cpu", "torch", "triton", "cuda").

    Returns:
        (..., M). Differentiable in x, values and bias; the gradient of values is computed at the pattern only. Under
        autocast the product runs in float32 on the CPU and in the autocast dtype elsewhere.

    Raises:
        ShapeError: when sizes do not fit together.
        BackendError: when the backend asked for cannot run the call; it lists every backend and its reasons.
    """
    _check(x, values, pattern, bias)
    if values.requires_grad and not torch.is_grad_enabled():
        values = values.detach()  # nobody trains here: kernels that pack the values once may run
    x, values, bias = autocast(x, values, bias, pattern)
    if not torch.compiler.is_compiling() and under_transform() and impl in ("auto", "torch"):
        # Ops with gradients written in Python have none under `torch.func`; the reference consists of ops that have.
        matrix = (pattern.row_ptr, pattern.cols, pattern.rows, pattern.columns, list(pattern.block))
        return reference(x, values, bias, *matrix)
    return torch.ops.sparse_engine.sparse_linear(
        x, values, bias, pattern.row_ptr, pattern.cols, pattern.rows, pattern.columns, list(pattern.block), impl
    )


def explain_linear(
    x: torch.Tensor, values: torch.Tensor, pattern: Pattern, bias: torch.Tensor | None = None
) -> registry.Explanation:
    """Say which backend `sparse_linear` takes for these inputs and why not the others."""
    _check(x, values, pattern, bias)
    return registry.explain(
        "sparse_linear",
        x,
        values,
        bias,
        pattern.row_ptr,
        pattern.cols,
        pattern.rows,
        pattern.columns,
        list(pattern.block),
    )


def autocast(
    x: torch.Tensor, values: torch.Tensor, bias: torch.Tensor | None, pattern: Pattern | None = None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Cast the operands as a surrounding autocast asks: to its dtype, but to float32 on the CPU. With the pattern,
    values that nobody trains are cast once and kept with it."""
    device = x.device.type
    if not torch.amp.is_autocast_available(device) or not torch.is_autocast_enabled(device):
        return x, values, bias
    dtype = torch.float32 if device == "cpu" else torch.get_autocast_dtype(device)
    if pattern is None or values.requires_grad or torch.compiler.is_compiling() or under_transform():
        cast = values.to(dtype)
    else:
        cast = cast_once(values, dtype, pattern)
    return x.to(dtype), cast, None if bias is None else bias.to(dtype)


def cast_once(values: torch.Tensor, dtype: torch.dtype, pattern: Pattern) -> torch.Tensor:
    """Values in another dtype, the same tensor as long as neither they nor the pattern change."""
    if values.dtype == dtype:
        return values
    slot = cached(pattern.row_ptr, pattern.cols, ("cast", dtype), LastSeen)
    return slot.get(values, lambda: values.to(dtype))


def _check(x: torch.Tensor, values: torch.Tensor, pattern: Pattern, bias: torch.Tensor | None) -> None:
    if x.dim() < 1 or x.shape[-1] != pattern.columns:
        raise ShapeError(
            f"sparse_linear: input of shape {tuple(x.shape)} for a weight of {pattern.rows} x {pattern.columns}; its "
            f"last dimension must be {pattern.columns}"
        )
    if values.dim() != 1 or values.shape[0] != pattern.num_values:
        raise ShapeError(
            f"sparse_linear: values of shape {tuple(values.shape)} for a pattern of {pattern.num_values} values"
        )
    if bias is not None and tuple(bias.shape) != (pattern.rows,):
        raise ShapeError(f"sparse_linear: bias of shape {tuple(bias.shape)} for {pattern.rows} outputs")


# -- op: schema, choice of the backend, shapes, gradients ------------------------------------------------------------

_library.define(f"sparse_linear(Tensor x, Tensor values, Tensor? bias, {_PATTERN_SCHEMA}) -> Tensor")
_library.define(f"sparse_linear_input_grad(Tensor grad, Tensor values, {_PATTERN_SCHEMA}) -> Tensor")
_library.define(f"sparse_linear_weight_grad(Tensor grad, Tensor x, {_PATTERN_SCHEMA}) -> Tensor")


def _dispatch(op: str, *inputs: Any) -> torch.Tensor:
    *operands, impl = inputs
    return registry.choose(op, impl, *operands).run(*operands)


_library.impl("sparse_linear", lambda *inputs: _dispatch("sparse_linear", *inputs), "CompositeExplicitAutograd")
_library.impl(
    "sparse_linear_input_grad",
    lambda *inputs: _dispatch("sparse_linear_input_grad", *inputs),
    "CompositeExplicitAutograd",
)
_library.impl(
    "sparse_linear_weight_grad",
    lambda *inputs: _dispatch("sparse_linear_weight_grad", *inputs),
    "CompositeExplicitAutograd",
)


@torch.library.register_fake("sparse_engine::sparse_linear", lib=_library)
def _fake(x, values, bias, row_ptr, cols, out_features, in_features, block, impl):
    return x.new_empty((*x.shape[:-1], out_features))


@torch.library.register_fake("sparse_engine::sparse_linear_input_grad", lib=_library)
def _fake_input_grad(grad, values, row_ptr, cols, out_features, in_features, block, impl):
    return grad.new_empty((*grad.shape[:-1], in_features))


@torch.library.register_fake("sparse_engine::sparse_linear_weight_grad", lib=_library)
def _fake_weight_grad(grad, x, row_ptr, cols, out_features, in_features, block, impl):
    return grad.new_empty((cols.shape[0] * block[0] * block[1],))


def _setup_forward(ctx, inputs, output):
    x, values, _bias, row_ptr, cols, *ctx.rest = inputs
    wants_x, wants_values = ctx.needs_input_grad[:2]
    ctx.save_for_backward(x if wants_values else None, values if wants_x else None, row_ptr, cols)


def _backward_forward(ctx, grad):
    x, values, row_ptr, cols = ctx.saved_tensors
    wants_x, wants_values, wants_bias = ctx.needs_input_grad[:3]
    op = torch.ops.sparse_engine
    dx = op.sparse_linear_input_grad(grad, values, row_ptr, cols, *ctx.rest) if wants_x else None
    dvalues = op.sparse_linear_weight_grad(grad, x, row_ptr, cols, *ctx.rest) if wants_values else None
    dbias = bias_gradient(grad) if wants_bias else None
    return dx, dvalues, dbias, None, None, None, None, None, None


def bias_gradient(grad: torch.Tensor) -> torch.Tensor:
    """Sum (..., M) over everything but the outputs."""
    return grad.sum(list(range(grad.dim() - 1))) if grad.dim() > 1 else grad.clone()


def _setup_gradient(ctx, inputs, output):
    first, second, row_ptr, cols, *ctx.rest = inputs
    ctx.save_for_backward(first, second, row_ptr, cols)


def _backward_input_grad(ctx, grad):
    # dx = dy W: linear in dy (its gradient is the forward product) and in W (its gradient is the sampled product).
    dy, values, row_ptr, cols = ctx.saved_tensors
    op = torch.ops.sparse_engine
    ddy = op.sparse_linear(grad, values, None, row_ptr, cols, *ctx.rest) if ctx.needs_input_grad[0] else None
    dvalues = op.sparse_linear_weight_grad(dy, grad, row_ptr, cols, *ctx.rest) if ctx.needs_input_grad[1] else None
    return ddy, dvalues, None, None, None, None, None, None


def _backward_weight_grad(ctx, grad):
    # dW = dyᵀ x at the pattern: its gradients are products with the incoming gradient as the weight's values.
    dy, x, row_ptr, cols = ctx.saved_tensors
    op = torch.ops.sparse_engine
    ddy = op.sparse_linear(x, grad, None, row_ptr, cols, *ctx.rest) if ctx.needs_input_grad[0] else None
    dx = op.sparse_linear_input_grad(dy, grad, row_ptr, cols, *ctx.rest) if ctx.needs_input_grad[1] else None
    return ddy, dx, None, None, None, None, None, None


torch.library.register_autograd(
    "sparse_engine::sparse_linear", _backward_forward, setup_context=_setup_forward, lib=_library
)
torch.library.register_autograd(
    "sparse_engine::sparse_linear_input_grad", _backward_input_grad, setup_context=_setup_gradient, lib=_library
)
torch.library.register_autograd(
    "sparse_engine::sparse_linear_weight_grad", _backward_weight_grad, setup_context=_setup_gradient, lib=_library
)

# -- torch: the reference; dense products on the scattered weight ----------------------------------------------------


def _why_not_torch(*inputs: Any) -> list[str]:
    tensors = [tensor for tensor in inputs if isinstance(tensor, torch.Tensor) and tensor.is_floating_point()]
    kinds = sorted({str(tensor.dtype) for tensor in tensors})
    places = sorted({str(tensor.device) for tensor in inputs if isinstance(tensor, torch.Tensor)})
    reasons = [f"operands have different dtypes: {', '.join(kinds)}"] if len(kinds) > 1 else []
    return reasons + ([f"operands are on different devices: {', '.join(places)}"] if len(places) > 1 else [])


@registry.register("sparse_linear", "torch", why_not=_why_not_torch)
def reference(x, values, bias, row_ptr, cols, out_features, in_features, block):
    """y = x Wᵀ + b with the weight scattered into a dense matrix."""
    weight = scatter_matrix(values, row_ptr, cols, out_features, in_features, tuple(block))  # [M, K]
    return torch.nn.functional.linear(x, weight, bias)  # [..., M]


@registry.register("sparse_linear_input_grad", "torch", why_not=_why_not_torch)
def reference_input_grad(grad, values, row_ptr, cols, out_features, in_features, block):
    """dx = dy W with the weight scattered into a dense matrix."""
    return grad @ scatter_matrix(values, row_ptr, cols, out_features, in_features, tuple(block))  # [..., K]


@registry.register("sparse_linear_weight_grad", "torch", why_not=_why_not_torch)
def reference_weight_grad(grad, x, row_ptr, cols, out_features, in_features, block):
    """dW = dyᵀ x read at the pattern, in panels of whole block rows so that no dense gradient exists at once."""
    count = math.prod(grad.shape[:-1])
    grad, x = grad.reshape(count, out_features), x.reshape(count, in_features)  # [N, M], [N, K]
    height, width = block
    block_rows, grid_cols = row_ptr.numel() - 1, -(-in_features // width)
    index = cell_index(row_ptr, cols, grid_cols)
    panel = max(1, _PANEL_ENTRIES // max(1, in_features * height))
    if panel >= block_rows:
        return gather_matrix(grad.T @ x, index, (height, width))
    starts = range(0, block_rows, panel)
    cuts = [*row_ptr[list(starts)].tolist(), cols.numel()]
    parts = []
    for start, first, last in zip(starts, cuts[:-1], cuts[1:], strict=True):
        product = grad[:, start * height : (start + panel) * height].T @ x  # [panel rows, K]
        parts.append(gather_matrix(product, index[first:last] - start * grid_cols, (height, width)))
    return torch.cat(parts)


# -- cpu: the C++ kernels; bfloat16 is widened on the way in, summed in float32 and rounded on the way out -----------


def _why_not_cpu(x, values, bias, row_ptr, cols, out_features, in_features, block):
    return native.why_not_extension("Linear") + native.why_not_float_cpu(cols, x=x, values=values, bias=bias)


def _why_not_cpu_gradient(first, second, row_ptr, cols, out_features, in_features, block):
    return native.why_not_extension("Linear") + native.why_not_float_cpu(cols, grad=first, operand=second)


def product(
    row_ptr: torch.Tensor, cols: torch.Tensor, out_features: int, in_features: int, block: list[int]
) -> native.NativeProduct:
    """Return the C++ object for a pattern, building it the first time."""
    shape = (out_features, in_features)
    return native.native_product(row_ptr, cols, shape, tuple(block), ("linear",), native.extension().Linear)


def rows_of(x: torch.Tensor, features: int) -> torch.Tensor:
    """View (..., features) as rows (N, features) whose elements are adjacent; copies only where that is impossible."""
    rows = x.reshape(-1, features)
    return rows if rows.stride(1) == 1 and rows.stride(0) >= features else rows.contiguous()


@registry.register("sparse_linear", "cpu", why_not=_why_not_cpu)
def _cpu_forward(x, values, bias, row_ptr, cols, out_features, in_features, block):
    y = torch.empty((*x.shape[:-1], out_features), dtype=torch.float32)
    if y.numel() == 0:
        return y.to(x.dtype)
    if in_features == 0 or cols.numel() == 0:
        return (y.zero_() if bias is None else y.copy_(bias)).to(x.dtype)
    native_linear = product(row_ptr, cols, out_features, in_features, block)
    wide = None if bias is None else bias.to(torch.float32)
    forward_into(y, native_linear, x.to(torch.float32), values, wide, force=values.requires_grad)
    return y.to(x.dtype)


def forward_into(
    y: torch.Tensor,
    native_linear: native.NativeProduct,
    x: torch.Tensor,
    values: torch.Tensor,
    bias: torch.Tensor | None,
    force: bool = False,
) -> None:
    """Run the C++ forward product into a contiguous output (..., M)."""
    features = x.shape[-1]
    if x.is_contiguous():
        rows, pitch, count = x, features, x.numel() // features
    else:
        rows = rows_of(x, features)
        pitch, count = rows.stride(0), rows.shape[0]
    bias = bias if bias is None or bias.is_contiguous() else bias.contiguous()
    with native_linear.lock:
        native_linear.load(values, force)
        native_linear.handle.forward(
            rows.data_ptr(), pitch, count, y.data_ptr(), y.shape[-1], 0 if bias is None else bias.data_ptr()
        )


@registry.register("sparse_linear_input_grad", "cpu", why_not=_why_not_cpu_gradient)
def _cpu_input_grad(grad, values, row_ptr, cols, out_features, in_features, block):
    if grad.numel() == 0 or in_features == 0 or cols.numel() == 0:
        return grad.new_zeros((*grad.shape[:-1], in_features))
    return _native_input_grad(grad, values, product(row_ptr, cols, out_features, in_features, block), in_features)


def _native_input_grad(
    grad: torch.Tensor, values: torch.Tensor, native_linear: native.NativeProduct, in_features: int
) -> torch.Tensor:
    dx = torch.empty((*grad.shape[:-1], in_features), dtype=torch.float32)
    dy = rows_of(grad.to(torch.float32), grad.shape[-1])
    with native_linear.lock:
        native_linear.load(values)
        native_linear.handle.input_grad(dy.data_ptr(), _pitch(dy), dy.shape[0], dx.data_ptr(), in_features)
    return dx.to(grad.dtype)


@registry.register("sparse_linear_weight_grad", "cpu", why_not=_why_not_cpu_gradient)
def _cpu_weight_grad(grad, x, row_ptr, cols, out_features, in_features, block):
    count = cols.numel() * block[0] * block[1]
    if count == 0 or grad.numel() == 0 or x.numel() == 0:
        return grad.new_zeros(count)
    return _native_weight_grad(grad, x, product(row_ptr, cols, out_features, in_features, block), count)


def _native_weight_grad(
    grad: torch.Tensor, x: torch.Tensor, native_linear: native.NativeProduct, count: int
) -> torch.Tensor:
    dy, rows = rows_of(grad.to(torch.float32), grad.shape[-1]), rows_of(x.to(torch.float32), x.shape[-1])
    entries = torch.empty(native_linear.handle.nnz, dtype=torch.float32)
    with native_linear.lock:
        native_linear.handle.weight_grad(
            dy.data_ptr(), _pitch(dy), rows.data_ptr(), _pitch(rows), rows.shape[0], entries.data_ptr()
        )
    return native_linear.entries_to_values(entries, count).to(grad.dtype)


def _pitch(rows: torch.Tensor) -> int:
    """Elements from one row to the next; PyTorch may report any stride for a single row."""
    return rows.stride(0) if rows.shape[0] > 1 else rows.shape[1]


class EagerLinear(torch.autograd.Function):
    """The cpu candidate with its gradients, called without PyTorch's dispatcher.

    The dispatcher's Python layers cost more than a small kernel. For plain float32 CPU tensors only (see
    `native.is_plain`); where gradients of gradients are wanted, the backward pass goes through the ops.
    """

    @staticmethod
    def forward(ctx, x, values, bias, pattern, native_linear):
        y = torch.empty((*x.shape[:-1], pattern.rows), dtype=torch.float32)
        # Loaded even if they look unchanged: in training they change at every step, by whatever means.
        forward_into(y, native_linear, x, values, bias, force=True)
        ctx.save_for_backward(x, values)
        ctx.pattern, ctx.native_linear = pattern, native_linear
        return y

    @staticmethod
    def backward(ctx, grad):
        x, values = ctx.saved_tensors
        pattern, native_linear = ctx.pattern, ctx.native_linear
        wants_x, wants_values, wants_bias = ctx.needs_input_grad[:3]
        if torch.is_grad_enabled() or not native.is_plain_input(grad):
            op = torch.ops.sparse_engine
            rest = (pattern.row_ptr, pattern.cols, pattern.rows, pattern.columns, list(pattern.block), "auto")
            dx = op.sparse_linear_input_grad(grad, values, *rest) if wants_x else None
            dvalues = op.sparse_linear_weight_grad(grad, x, *rest) if wants_values else None
            return dx, dvalues, bias_gradient(grad) if wants_bias else None, None, None
        made = {"dtype": torch.float32, "device": "cpu"}
        dx = torch.empty(x.shape, **made) if wants_x else None
        dvalues = torch.empty(native_linear.handle.nnz, **made) if wants_values else None
        dbias = torch.empty(pattern.rows, **made) if wants_bias else None
        dy = rows_of(grad, pattern.rows)
        rows = rows_of(x, pattern.columns) if wants_values else dy  # not read for the others
        with native_linear.lock:
            if wants_x:
                native_linear.load(values)
            native_linear.handle.gradients(
                dy.data_ptr(),
                _pitch(dy),
                rows.data_ptr(),
                _pitch(rows),
                dy.shape[0],
                0 if dx is None else dx.data_ptr(),
                pattern.columns,
                0 if dvalues is None else dvalues.data_ptr(),
                0 if dbias is None else dbias.data_ptr(),
            )
        if dvalues is not None:
            dvalues = native_linear.entries_to_values(dvalues, pattern.num_values)
        return dx, dvalues, dbias, None, None
