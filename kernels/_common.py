"""What every Triton kernel here shares: which GPU generation is being compiled for, the activation epilogue, and the
checks of launchers."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Sequence
from typing import ParamSpec, TypeVar

import torch
import triton
import triton.language as tl

from sparse_engine.errors import BackendError, ShapeError

P = ParamSpec("P")
T = TypeVar("T")

ACTIVATIONS = ("none", "relu", "leaky_relu", "gelu", "gelu_tanh", "silu", "sigmoid", "tanh", "hardswish")
FLOAT_TYPES = (torch.float32, torch.float16, torch.bfloat16)


def interpreted() -> bool:
    """Whether Triton runs these kernels in its interpreter, on CPU tensors (``TRITON_INTERPRET=1`` when this package
    was imported)."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


def on_its_device(launcher: Callable[P, T]) -> Callable[P, T]:
    """Makes a launcher run on the GPU of its first tensor: Triton launches on the current device, whatever it gets."""

    @functools.wraps(launcher)
    def call(*arguments: P.args, **named: P.kwargs) -> T:
        first = next(a for a in (*arguments, *named.values()) if isinstance(a, torch.Tensor))
        if first.device.type != "cuda" or first.device.index == torch.cuda.current_device():
            return launcher(*arguments, **named)
        with torch.cuda.device(first.device):
            return launcher(*arguments, **named)

    return call


def generation(device: torch.device) -> str:
    """The row of the configuration tables for a device: ``"sm_80"`` (Ampere, Ada) or ``"sm_90"`` (Hopper and later).

    The interpreter uses the Hopper row, so that what is tested is what Hopper runs.

    Raises:
        BackendError: the GPU is older than Ampere, and has neither bf16 matrix instructions nor asynchronous copies.
    """
    if device.type != "cuda":
        return "sm_90"
    major, minor = torch.cuda.get_device_capability(device)
    if major < 8:
        raise BackendError(
            f"the Triton kernels need compute capability 8.0 (Ampere) or newer; "
            f"{torch.cuda.get_device_name(device)} has {major}.{minor}: use impl='torch'"
        )
    return "sm_90" if major >= 9 else "sm_80"


def check_tensors(name: str, *tensors: torch.Tensor | None) -> torch.device:
    """The one device of all the tensors given; refuses what a kernel could not read."""
    present = [tensor for tensor in tensors if tensor is not None]
    device = present[0].device
    for tensor in present:
        if tensor.device != device:
            raise ShapeError(f"{name}: operands on {device} and {tensor.device}; move them to one device")
    if device.type != "cuda" and not interpreted():
        raise BackendError(
            f"{name}: a Triton kernel needs tensors on an NVIDIA GPU, got {device}; set TRITON_INTERPRET=1 before the "
            "import to interpret it"
        )
    return device


def check_float(name: str, *tensors: torch.Tensor | None) -> torch.dtype:
    """The one floating-point type of all the tensors given."""
    present = [tensor for tensor in tensors if tensor is not None]
    types = {tensor.dtype for tensor in present}
    if len(types) != 1 or present[0].dtype not in FLOAT_TYPES:
        raise ShapeError(
            f"{name}: operands must share one of float32, float16, bfloat16; got {sorted(str(t) for t in types)}"
        )
    return present[0].dtype


def check_activation(name: str, activation: str | None) -> str:
    """The activation's name as kernels spell it; None means none."""
    if activation is None:
        return "none"
    if activation not in ACTIVATIONS:
        raise ShapeError(f"{name}: activation {activation!r} is not one of {', '.join(ACTIVATIONS)}")
    return activation


def precision(dtype: torch.dtype) -> str:
    """How fp32 operands are multiplied: TF32 only where PyTorch is allowed to, as for its own products."""
    return "tf32" if dtype == torch.float32 and torch.backends.cuda.matmul.allow_tf32 else "ieee"


def power_of_two(value: int, least: int = 16) -> int:
    """The smallest power of two ≥ value and ≥ least."""
    return max(least, triton.next_power_of_2(value))


def grid_size(*counts: int) -> int:
    """The product of tile counts, refused where it passes what one launch takes."""
    total = 1
    for count in counts:
        total *= count
    if total >= 2**31:
        raise ShapeError(f"{total} tiles in one launch; at most {2**31 - 1}: split the batch")
    return total


def check_lengths(name: str, **lengths: tuple[int, int]) -> None:
    """Raises ShapeError naming every (got, wanted) pair that differs."""
    wrong = [f"{what} {got}, expected {wanted}" for what, (got, wanted) in lengths.items() if got != wanted]
    if wrong:
        raise ShapeError(f"{name}: " + "; ".join(wrong))


def as_rows(x: torch.Tensor) -> torch.Tensor:
    """x as a matrix of rows whose last dimension is contiguous; copies only where it must."""
    rows = x.reshape(-1, x.shape[-1]) if x.numel() else x.new_empty(_product(x.shape[:-1]), x.shape[-1])
    return rows if rows.stride(-1) == 1 or rows.shape[-1] <= 1 else rows.contiguous()


def _product(sizes: Sequence[int]) -> int:
    total = 1
    for size in sizes:
        total *= size
    return total


@triton.jit
def activate(x, ACTIVATION: tl.constexpr, slope):
    """The epilogue's activation, in fp32. x: any shape."""
    if ACTIVATION == "relu":
        x = tl.where(x > 0, x, tl.where(x != x, x, 0.0))  # max(NaN, 0) would be 0
    elif ACTIVATION == "leaky_relu":
        x = tl.where(x > 0, x, x * slope)
    elif ACTIVATION == "gelu":
        x = 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))
    elif ACTIVATION == "gelu_tanh":
        inner = 0.7978845608028654 * (x + 0.044715 * x * x * x)
        x = x * tl.sigmoid(2.0 * inner)  # (1 + tanh u) / 2 = sigmoid(2u)
    elif ACTIVATION == "silu":
        x = x * tl.sigmoid(x)
    elif ACTIVATION == "sigmoid":
        x = tl.sigmoid(x)
    elif ACTIVATION == "tanh":
        x = 2.0 * tl.sigmoid(2.0 * x) - 1.0
    elif ACTIVATION == "hardswish":
        x = x * tl.minimum(tl.maximum(x + 3.0, 0.0), 6.0) * 0.16666666666666666
    return x
