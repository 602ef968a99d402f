"""The C++ objects behind the `cpu` candidates: one per pattern (and geometry), holding the values it was last given."""

import importlib.util
import math
import multiprocessing
import os
import threading
from collections.abc import Callable
from types import ModuleType
from typing import Any

import numpy
import torch
from torch import Tensor, float32, is_grad_enabled
from torch.autograd import forward_ad
from torch.nn import Parameter

from sparse_engine.errors import ExtensionError
from sparse_engine.ops.pattern import Pattern, cached

__all__ = [
    "NativeProduct",
    "empty",
    "extension",
    "is_plain",
    "is_plain_input",
    "native_product",
    "peak_gflops",
    "wants_gradient",
    "why_not_extension",
    "why_not_float32_cpu",
    "why_not_float_cpu",
]

# Values compared on every call to notice edits that PyTorch's version counter does not see
# (`parameter.data.mul_(...)`).
_PROBES = 64

# Bytes from which memory is used again.
_LARGE = 2**19

# What this code expects of the C++ module. Raised here and in csrc/bind/module.cpp together when a name, an argument or
# a meaning changes there: an old module beside newer Python is then refused instead of failing somewhere.
INTERFACE = 12


def _checked(module: ModuleType) -> ModuleType:
    built = getattr(module, "interface", 0)
    if built != INTERFACE:
        raise ExtensionError(
            f"{module.__file__} was built from other sources than the Python code beside it (interface {built}, "
            f"{INTERFACE} expected). Build it again: `make build` in a checkout, `pip install .` otherwise"
        )
    return module


if importlib.util.find_spec("sparse_engine._C") is None:
    _extension = None
    _import_error = "the C++ extension is not built; `pip install .` builds it"
else:
    try:
        from sparse_engine import _C as _extension
    except ImportError as _error:
        _extension = None
        _import_error = f"the C++ extension cannot be loaded: {_error}"
    else:
        _checked(_extension)
        # In a child that multiprocessing has forked, PyTorch's threads may exist only in what it remembers of them.
        if multiprocessing.parent_process() and multiprocessing.get_start_method(allow_none=True) in (None, "fork"):
            _extension.leave_host_team()


def extension() -> ModuleType | None:
    """Return the C++ extension module, or None where it is not built."""
    return _extension


def empty(*shape: int) -> torch.Tensor:
    """Like `torch.empty` in float32 on the CPU, in memory that is used again where it is large.

    PyTorch takes large tensors fresh from the system, which clears every page of them: longer than it takes to write
    them. A block that the last tensor gave back is taken instead, and is on huge pages.

    Example:
        >>> empty(2, 3).shape
        torch.Size([2, 3])
    """
    elements = math.prod(shape)
    if 4 * elements < _LARGE or _extension is None:
        return torch.empty(shape, dtype=float32)
    return torch.frombuffer(_extension.RecycledMemory(4 * elements), dtype=float32).view(shape)


def peak_gflops(threads: int = 0, seconds: float = 0.05) -> float | None:
    """Measure the GFLOP/s of fused multiply-adds on registers; None without the C++ extension.

    Example:
        >>> peak = peak_gflops(1, 0.01)
        >>> peak is None or peak > 0
        True

    Args:
        threads: running at the same time; 0 = as many as the kernels use.
        seconds: of each thread's measurement.
    """
    if why_not_extension("fma_peak"):
        return None
    return _extension.fma_peak(seconds, threads) / 1e9


def why_not_extension(*names: str) -> list[str]:
    """Say what the C++ extension lacks."""
    if _extension is None:
        return [_import_error]
    return [f"this build of the C++ extension has no {name}" for name in names if not hasattr(_extension, name)]


def why_not_float32_cpu(cols: torch.Tensor | None, **tensors: torch.Tensor | None) -> list[str]:
    """Say which tensors are not float32 on the CPU, and whether the pattern is elsewhere."""
    reasons = [] if cols is None or cols.device.type == "cpu" else [f"the pattern is on {cols.device}, not on the CPU"]
    for name, tensor in tensors.items():
        if tensor is None:
            continue
        if tensor.device.type != "cpu":
            reasons.append(f"{name} is on {tensor.device}, not on the CPU")
        elif tensor.dtype is not torch.float32:
            reasons.append(f"{name} is {tensor.dtype}, not torch.float32")
    return reasons


def why_not_float_cpu(cols: torch.Tensor | None, **tensors: torch.Tensor | None) -> list[str]:
    """The same for kernels that also take bfloat16, all of it: it is widened for them, and the result rounded."""
    kinds = {tensor.dtype for tensor in tensors.values() if tensor is not None}
    if kinds == {torch.bfloat16}:
        tensors = {
            name: None if tensor is None else tensor.new_empty(0, dtype=float32) for name, tensor in tensors.items()
        }
    return why_not_float32_cpu(cols, **tensors)


# Looked up once: these run on every call, whose cost beside the kernel is to stay below ten microseconds.
_dispatch_modes = torch._C._len_torch_dispatch_stack
_function_modes = torch._C._len_torch_function_stack
_transforms = torch._C._functorch.peek_interpreter_stack
_tracing = torch._C._get_tracing_state
# The dictionary behind `os.environ`: asking that itself costs as much as all other questions together.
_ENVIRONMENT = getattr(os.environ, "_data", os.environ)
_OVERRIDE = os.environ.encodekey("SPARSE_ENGINE_IMPL") if hasattr(os.environ, "encodekey") else "SPARSE_ENGINE_IMPL"


def is_plain(x: torch.Tensor, values: torch.Tensor | None, bias: torch.Tensor | None) -> bool:
    """Say whether no transform, mode or tracer needs to see a call, and all its tensors are float32 on the CPU."""
    return (
        type(x) is Tensor
        and type(values) is Parameter
        and x.dtype is float32
        and values.dtype is float32
        and x.is_cpu
        and values.is_cpu
        and (bias is None or (type(bias) is Parameter and bias.dtype is float32 and bias.is_cpu))
        and not x.is_neg()
        and _dispatch_modes() == 0
        and _function_modes() == 0
        and _transforms() is None
        and _tracing() is None
        and forward_ad._current_level < 0
        and _OVERRIDE not in _ENVIRONMENT
    )


def is_plain_input(x: torch.Tensor) -> bool:
    """Say whether x is a float32 tensor on the CPU and no transform, mode or tracer needs to see what is done to it."""
    return (
        type(x) is Tensor
        and x.dtype is float32
        and x.is_cpu
        and not x.is_neg()
        and _dispatch_modes() == 0
        and _function_modes() == 0
        and _transforms() is None
        and _tracing() is None
        and forward_ad._current_level < 0
        and _OVERRIDE not in _ENVIRONMENT
    )


def is_untraced() -> bool:
    """Say whether no transform, mode or tracer needs to see what is done to tensors now."""
    return (
        _dispatch_modes() == 0
        and _function_modes() == 0
        and _transforms() is None
        and _tracing() is None
        and forward_ad._current_level < 0
    )


def wants_gradient(x: torch.Tensor, values: torch.Tensor, bias: torch.Tensor | None) -> bool:
    """Say whether autograd has to record this call."""
    return is_grad_enabled() and (x.requires_grad or values.requires_grad or (bias is not None and bias.requires_grad))


class NativeProduct:
    """A C++ sparse product for one pattern, and which values it holds.

    Calls from several threads take turns: a call's values and its kernel belong together.
    """

    __slots__ = ("_held", "_pointer", "_probe", "_probed", "_version", "handle", "lock", "order")

    def __init__(self, handle: Any, order: torch.Tensor | None) -> None:
        self.handle = handle
        self.order = order
        self.lock = threading.Lock()
        self._held: torch.Tensor | None = None
        self._pointer = -1
        self._version = -1
        self._probe = numpy.empty(0, dtype=numpy.float32)
        self._probed = b""

    def holds(self, values: torch.Tensor) -> bool:
        """Say whether the C++ object was last given exactly these values; to be asked with the lock held."""
        # The tensor that was given is kept alive, so no other tensor can have come to lie at its address.
        return (
            self._pointer == values.data_ptr()
            and self._version == values._version
            and values.is_contiguous()
            and self._probed == self._probe.tobytes()
        )

    def load(self, values: torch.Tensor, force: bool = False) -> None:
        """Give values (float32 or bfloat16) to the C++ object unless it holds them; to be called with the lock held."""
        if values.is_inference() or not values.is_contiguous():
            # Without a version counter edits go unnoticed, and a strided view shares its address with others.
            self._set(values)
            self._pointer = -1
            return
        if not force and self.holds(values):
            return
        self._set(values)
        self._held = held = values.detach()
        numbers = held.view(torch.int16) if held.dtype is torch.bfloat16 else held
        self._probe = numbers.numpy()[:: max(1, held.numel() // _PROBES)]
        self._probed = self._probe.tobytes()
        self._version = values._version
        self._pointer = values.data_ptr()

    def forget(self) -> None:
        """Make the next call load its values again, whatever they look like."""
        with self.lock:
            self._pointer = -1
            self._held = None

    def entries_to_values(self, entries: torch.Tensor, count: int) -> torch.Tensor:
        """Bring per-entry results from compressed-row order into the order of the values; padding gets zero."""
        if self.order is None:
            return entries
        return entries.new_zeros(count).index_copy_(0, self.order, entries)

    def _set(self, values: torch.Tensor) -> None:
        entries = values.detach() if self.order is None else values.detach()[self.order]
        entries = entries.to(float32).contiguous()
        self.handle.set_values(entries.data_ptr(), entries.numel())


def native_product(
    row_ptr: torch.Tensor,
    cols: torch.Tensor,
    shape: tuple[int, ...],
    block: tuple[int, int],
    key: tuple[Any, ...],
    make: Callable[[numpy.ndarray, numpy.ndarray, int, int], Any],
) -> NativeProduct:
    """Return the C++ object for a pattern, building it the first time.

    Args:
        row_ptr, cols, shape, block: the pattern, as in `Pattern`.
        key: what else the object depends on.
        make: builds it from row_ptr int64 [M + 1], cols int32 [entries], M and the number of columns.
    """

    def build() -> NativeProduct:
        row_pointers, columns, order = compressed_rows(Pattern(row_ptr, cols, shape, block))
        matrix_columns = 1
        for size in shape[1:]:
            matrix_columns *= size
        return NativeProduct(make(row_pointers, columns, shape[0], matrix_columns), order)

    return cached(row_ptr, cols, ("native", tuple(shape), tuple(block), *key), build)


def compressed_rows(pattern: Pattern) -> tuple[numpy.ndarray, numpy.ndarray, torch.Tensor | None]:
    """Return (row_ptr, cols, order) of single entries; entry i has value `values[order[i]]` (None: `values[i]`)."""
    if pattern.block == (1, 1):
        return (
            numpy.ascontiguousarray(pattern.row_ptr.numpy(), dtype=numpy.int64),
            numpy.ascontiguousarray(pattern.cols.numpy(), dtype=numpy.int32),
            None,
        )
    height, width = pattern.block
    block_rows = torch.repeat_interleave(torch.arange(pattern.row_ptr.numel() - 1), pattern.row_ptr.diff())
    rows = block_rows[:, None, None] * height + torch.arange(height)[None, :, None]
    cols = pattern.cols.long()[:, None, None] * width + torch.arange(width)[None, None, :]
    inside = ((rows < pattern.rows) & (cols < pattern.columns)).reshape(-1).nonzero().reshape(-1)
    flat = (rows * pattern.columns + cols).reshape(-1)[inside]
    flat, by_row = flat.sort()
    entry_rows = torch.div(flat, max(pattern.columns, 1), rounding_mode="floor")
    row_ptr = torch.zeros(pattern.rows + 1, dtype=torch.int64)
    row_ptr[1:] = torch.bincount(entry_rows, minlength=pattern.rows).cumsum(0)
    entry_cols = (flat - entry_rows * pattern.columns).to(torch.int32)
    return row_ptr.numpy(), entry_cols.numpy(), inside[by_row]
