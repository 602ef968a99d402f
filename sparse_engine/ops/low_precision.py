"""`low_precision_linear`: y = x Wᵀ + b for a weight stored in bfloat16 or int8, with x, the sums and y in float32.

For batch 1, where reading the weight is all that takes time: int8 reads a quarter of what float32 does, bfloat16 half.
A sparse weight keeps its pattern in compressed rows. int8 weights are symmetric with one scale for each output:

    W[m, k] = scales[m] · q[m, k],     scales[m] = max_k |W[m, k]| / 127,     q = round(W / scales)

Only the weight is rounded: the error of y is that of W, at most scales[m] / 2 · Σ_k |x[k]| over the kept k for int8.
There are gradients for x and the bias, none for the weight.
"""

from dataclasses import dataclass
from typing import Any

import numpy
import torch

from sparse_engine.errors import ShapeError, SparseEngineError
from sparse_engine.ops import native, registry
from sparse_engine.ops.pattern import cached
from sparse_engine.packed import PackedWeight
from sparse_engine.rounded import PRECISIONS, round_weight

__all__ = ["PRECISIONS", "LowPrecisionWeight", "explain_low_precision_linear", "low_precision_linear"]

_library = torch.library.Library("sparse_engine", "FRAGMENT")

# Stored bytes per kept weight of the sparse layout over those of the dense one at most; a dense row is read with less
# arithmetic for each byte.
_SPARSE_FROM = 0.6

# Up to so many rows the kernel takes them one by one. For more a product in float32 is faster, converted for the call.
_FEW_ROWS = 16


@dataclass(frozen=True, eq=False)
class LowPrecisionWeight:
    """A weight in bfloat16 or int8, dense or with a pattern in compressed rows.

    Example:
        >>> weight = LowPrecisionWeight.from_dense(torch.tensor([[0.0, 2.0], [1.0, 0.0]]), "int8")
        >>> weight.to_dense()
        tensor([[0., 2.],
                [1., 0.]])

    Attributes:
        precision: "bf16" or "int8".
        shape: (M, K).
        values: bfloat16 or int8; (M · K,) row by row, or (kept weights,) in the order of the pattern.
        scales: float32 (M,) for int8, None for bfloat16.
        row_ptr: int64 (M + 1,), or None for a dense weight.
        cols: int32 (kept weights,), ascending in each row, or None for a dense weight.
    """

    precision: str
    shape: tuple[int, int]
    values: torch.Tensor
    scales: torch.Tensor | None
    row_ptr: torch.Tensor | None
    cols: torch.Tensor | None

    @classmethod
    def from_dense(
        cls,
        weight: torch.Tensor | PackedWeight,
        precision: str = "int8",
        mask: torch.Tensor | None = None,
        *,
        sparse: bool | None = None,
    ) -> "LowPrecisionWeight":
        """Round a weight.

        Args:
            weight: (M, K) float, on the CPU, or a packed weight of that shape.
            precision: "bf16" or "int8".
            mask: bool (M, K), True = kept; by default everything but exact zeros.
            sparse: whether to keep a pattern; by default where that reads less.

        Raises:
            ShapeError: when the weight is no float matrix.
            SparseEngineError: for an unknown precision, or a weight with NaN or infinity in int8.
        """
        if precision not in PRECISIONS:
            raise SparseEngineError(f"precision is {precision!r}; one of {', '.join(PRECISIONS)} expected")
        if isinstance(weight, PackedWeight):
            mask = weight.mask() if mask is None else mask
            weight = weight.to_dense()
        if weight.dim() != 2 or not weight.is_floating_point():
            raise ShapeError(f"the weight is {weight.dtype} {tuple(weight.shape)}; a float matrix expected")
        weight = weight.detach().to("cpu", torch.float32)
        kept = weight != 0 if mask is None else mask.to("cpu", torch.bool)
        if kept.shape != weight.shape:
            raise ShapeError(f"mask of shape {tuple(kept.shape)} for a weight of {tuple(weight.shape)}")
        weight = weight.where(kept, 0.0)
        rounded, scales = round_weight(weight, precision)
        count, size = int(kept.sum()), rounded.element_size()
        if sparse is None:
            # About two and a half places per kept weight, each with a value and a byte for its column.
            sparse = count * 2.5 * (1 + size) < _SPARSE_FROM * size * weight.numel()
        shape = (int(weight.shape[0]), int(weight.shape[1]))
        if not sparse:
            return cls(precision, shape, rounded.reshape(-1), scales, None, None)
        row_ptr = torch.zeros(shape[0] + 1, dtype=torch.int64)
        row_ptr[1:] = kept.sum(1).cumsum(0)
        return cls(precision, shape, rounded[kept], scales, row_ptr, kept.nonzero()[:, 1].to(torch.int32))

    @property
    def sparsity(self) -> float:
        """Share of weights removed; 0 for a dense weight, zeros or not."""
        return 0.0 if self.cols is None else 1 - self.cols.numel() / max(1, self.shape[0] * self.shape[1])

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        tensors = (self.values, self.scales, self.row_ptr, self.cols)
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors if tensor is not None)

    def to_dense(self) -> torch.Tensor:
        """Return the rounded weight as float32 (M, K)."""
        return _dense(self.values, self.scales, self.row_ptr, self.cols, *self.shape)


def low_precision_linear(
    x: torch.Tensor, weight: LowPrecisionWeight, bias: torch.Tensor | None = None, *, impl: str = "auto"
) -> torch.Tensor:
    """Apply a linear layer whose weight is stored in bfloat16 or int8.

    Example:
        >>> weight = LowPrecisionWeight.from_dense(torch.tensor([[0.0, 2.0], [1.0, 0.0]]), "int8")
        >>> low_precision_linear(torch.tensor([[1.0, 10.0]]), weight)
        tensor([[20.,  1.]])

    Args:
        x: (..., K); float32, or bfloat16 with arithmetic in float32 and a result in bfloat16.
        weight: (M, K).
        bias: (M,) of x's dtype or None.
        impl: "auto", or a backend's name ("cpu", "torch").

    Returns:
        (..., M). Differentiable in x and bias.

    Raises:
        ShapeError: when sizes do not fit together.
        BackendError: when the backend asked for cannot run the call; it lists every backend and its reasons.
    """
    _check(x, weight, bias)
    return torch.ops.sparse_engine.low_precision_linear(x, *_operands(weight, bias), impl)


def explain_low_precision_linear(
    x: torch.Tensor, weight: LowPrecisionWeight, bias: torch.Tensor | None = None
) -> registry.Explanation:
    """Say which backend `low_precision_linear` takes for these inputs and why not the others."""
    _check(x, weight, bias)
    return registry.explain("low_precision_linear", x, *_operands(weight, bias))


def _operands(weight: LowPrecisionWeight, bias: torch.Tensor | None) -> tuple[Any, ...]:
    return weight.values, weight.scales, bias, weight.row_ptr, weight.cols, *weight.shape


def _check(x: torch.Tensor, weight: LowPrecisionWeight, bias: torch.Tensor | None) -> None:
    rows, columns = weight.shape
    if x.dim() < 1 or x.shape[-1] != columns:
        raise ShapeError(
            f"low_precision_linear: input of shape {tuple(x.shape)} for a weight of {rows} x {columns}; its last "
            f"dimension must be {columns}"
        )
    if x.dtype not in (torch.float32, torch.bfloat16):
        raise ShapeError(f"low_precision_linear: x is {x.dtype}; float32 or bfloat16 expected")
    if bias is not None and (tuple(bias.shape) != (rows,) or bias.dtype != x.dtype):
        raise ShapeError(f"low_precision_linear: bias {bias.dtype} {tuple(bias.shape)} for {rows} outputs of {x.dtype}")


# -- op: schema, choice of the backend, shapes, gradients --------------------------------------------------------------

_WEIGHT_SCHEMA = "Tensor? row_ptr, Tensor? cols, int out_features, int in_features, str impl"
_library.define(
    f"low_precision_linear(Tensor x, Tensor values, Tensor? scales, Tensor? bias, {_WEIGHT_SCHEMA}) -> Tensor"
)


def _dispatch(*inputs: Any) -> torch.Tensor:
    *operands, impl = inputs
    return registry.choose("low_precision_linear", impl, *operands).run(*operands)


_library.impl("low_precision_linear", _dispatch, "CompositeExplicitAutograd")


@torch.library.register_fake("sparse_engine::low_precision_linear", lib=_library)
def _fake(x, values, scales, bias, row_ptr, cols, out_features, in_features, impl):
    return x.new_empty((*x.shape[:-1], out_features))


def _setup(ctx, inputs, output):
    _, values, scales, _, row_ptr, cols, *ctx.sizes, _ = inputs
    ctx.save_for_backward(values, scales, row_ptr, cols)


def _backward(ctx, grad):
    values, scales, row_ptr, cols = ctx.saved_tensors
    wants_x, _, _, wants_bias = ctx.needs_input_grad[:4]
    weight = _dense(values, scales, row_ptr, cols, *ctx.sizes).to(grad.dtype) if wants_x else None
    dbias = grad.reshape(-1, grad.shape[-1]).sum(0) if wants_bias else None
    return None if weight is None else grad @ weight, None, None, dbias, None, None, None, None, None


torch.library.register_autograd("sparse_engine::low_precision_linear", _backward, setup_context=_setup, lib=_library)

# -- torch: the reference ----------------------------------------------------------------------------------------------


def _dense(values, scales, row_ptr, cols, out_features, in_features):
    """The rounded weight in float32, [M, K]."""
    weight = values.to(torch.float32)
    if cols is None:
        matrix = weight.reshape(out_features, in_features)
    else:
        rows = torch.repeat_interleave(torch.arange(out_features), row_ptr.diff(), output_size=cols.numel())
        matrix = weight.new_zeros(out_features * in_features)
        matrix = matrix.index_copy(0, rows * in_features + cols, weight).reshape(out_features, in_features)
    return matrix if scales is None else matrix * scales[:, None]


def _why_not_torch(x, values, scales, bias, row_ptr, cols, out_features, in_features):
    places = {str(tensor.device) for tensor in (x, values, scales, bias, row_ptr, cols) if tensor is not None}
    return [f"operands are on different devices: {', '.join(sorted(places))}"] if len(places) > 1 else []


@registry.register("low_precision_linear", "torch", why_not=_why_not_torch)
def reference(x, values, scales, bias, row_ptr, cols, out_features, in_features):
    """y = x Wᵀ + b in float32 with the rounded weight."""
    weight = _dense(values, scales, row_ptr, cols, out_features, in_features)
    y = torch.nn.functional.linear(x.float(), weight, None if bias is None else bias.float())
    return y.to(x.dtype)


# -- cpu: the C++ kernels ----------------------------------------------------------------------------------------------


def _why_not_cpu(x, values, scales, bias, row_ptr, cols, out_features, in_features):
    reasons = native.why_not_extension("VectorLinear")
    for name, tensor in (("x", x), ("values", values), ("bias", bias), ("the pattern", cols)):
        if tensor is not None and tensor.device.type != "cpu":
            reasons.append(f"{name} is on {tensor.device}, not on the CPU")
    rows = x.numel() // max(1, in_features)
    if rows > _FEW_ROWS:
        reasons.append(f"{rows} rows; the kernel is for {_FEW_ROWS} at most")
    return reasons


@registry.register("low_precision_linear", "cpu", why_not=_why_not_cpu)
def _cpu(x, values, scales, bias, row_ptr, cols, out_features, in_features):
    y = torch.empty((*x.shape[:-1], out_features), dtype=torch.float32)
    if in_features == 0:
        return y.zero_().to(x.dtype) if bias is None else y.copy_(bias).to(x.dtype)
    if y.numel():
        layer = _layer(values, scales, row_ptr, cols, out_features, in_features)
        rows = x.reshape(-1, in_features).to(torch.float32).contiguous()
        floats = None if bias is None else bias.to(torch.float32).contiguous()
        layer.forward(
            rows.data_ptr(),
            in_features,
            rows.shape[0],
            y.data_ptr(),
            out_features,
            0 if floats is None else floats.data_ptr(),
        )
    return y.to(x.dtype)


def layer_of(weight: LowPrecisionWeight) -> Any:
    """The C++ object that the `cpu` candidate runs a weight with; None where the extension is not built."""
    if native.why_not_extension("VectorLinear"):
        return None
    return _layer(weight.values, weight.scales, weight.row_ptr, weight.cols, *weight.shape)


def looks_up_bytes(precision: str) -> bool:
    """Whether the kernels have instructions for tables of 255 columns, which read less than those of 31."""
    info = native.extension().cpu_info()
    needed = {"avx512_vbmi", "avx512_vnni" if precision == "int8" else "avx512_bf16"}
    return info["isa"] == "avx512" and needed <= set(info["features"])


def _layer(values, scales, row_ptr, cols, out_features, in_features):
    """The C++ object of a weight, built the first time; forgotten with the tensors."""

    def build() -> Any:
        bits = values.view(torch.int16).numpy().view(numpy.uint16) if scales is None else values.numpy()
        pattern = (None, None) if cols is None else (row_ptr.numpy(), cols.numpy())
        scale = None if scales is None else scales.numpy()
        small = cols is not None and looks_up_bytes("bf16" if scales is None else "int8")
        return native.extension().VectorLinear(*pattern, bits, scale, out_features, in_features, small)

    second = values if cols is None else cols
    scaled = None if scales is None else (scales.data_ptr(), scales._version)
    return cached(values, second, ("low_precision", out_features, in_features, scaled), build)
