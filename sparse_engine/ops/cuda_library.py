"""The CUDA C++ kernels (csrc/cuda) behind plain functions on tensors; the library is opened the first time that one is
called.

Example:
    >>> from sparse_engine.ops import cuda_library
    >>> packed = cuda_library.pack_bitmask(weight.bfloat16()).to("cuda")             # doctest: +SKIP
    >>> y = cuda_library.library().bitmask_linear(x, packed)                           # doctest: +SKIP
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from sparse_engine.errors import BackendError, ShapeError

__all__ = ["BitmaskWeight", "Library", "emulated", "gather_weight", "library", "pack_bitmask", "use", "why_not"]

_VERSION = 1
_FILE = Path(__file__).parents[1] / "_cuda_kernels.so"
_TYPES = {torch.bfloat16: 0, torch.float16: 1}
ACTIVATIONS = {None: 0, "relu": 1, "gelu": 2, "silu": 3}
DECODE_TOKENS = 16
_TILE_ROWS, _TILE_INPUTS, _MASK_BYTES = 16, 64, 128


@dataclass(frozen=True)
class BitmaskWeight:
    """An unstructured weight as records of a bitmask and packed values, one per 16 × 64 tile
    (csrc/cuda/bitmask_format.h).

    Attributes:
        shape: (M, K). dtype: bf16 or fp16.
        start: int32 [tiles + 1], each record's place in units of 16 bytes.
        records: uint8.
        largest: bytes of the largest record.
    """

    shape: tuple[int, int]
    dtype: torch.dtype
    start: torch.Tensor
    records: torch.Tensor
    largest: int

    @property
    def nbytes(self) -> int:
        """Bytes of the records and their table."""
        return self.start.nbytes + self.records.nbytes

    def to(self, device: torch.device | str) -> BitmaskWeight:
        """The same weight on another device."""
        return BitmaskWeight(self.shape, self.dtype, self.start.to(device), self.records.to(device), self.largest)

    def to_dense(self) -> torch.Tensor:
        """The weight [M, K], bit for bit but for the sign of zeros."""
        rows, inputs = self.shape
        bits, row, column = _places(self.shape)
        words = self.records.cpu()
        first = self.start.cpu().long()[:-1, None] * 16
        masks = words[first + torch.arange(_MASK_BYTES)].reshape(-1, 32, 4).int()
        masks = (masks << (8 * torch.arange(4, dtype=torch.int32))).sum(-1, dtype=torch.int32)
        kept = ((masks[..., None] >> bits) & 1).reshape(masks.shape[0], -1).bool()  # [tiles, 1024]
        rank = kept.long().cumsum(1) - 1
        place = (first + _MASK_BYTES + 2 * rank)[kept]
        values = torch.stack([words[place], words[place + 1]], 1).reshape(-1).view(self.dtype)
        tiles = torch.zeros(kept.shape, dtype=self.dtype)
        tiles[kept] = values
        down, across = -(-rows // _TILE_ROWS), -(-inputs // _TILE_INPUTS)
        dense = torch.zeros(down * _TILE_ROWS, across * _TILE_INPUTS, dtype=self.dtype)
        tile = torch.arange(down * across)[:, None]
        dense[tile // across * _TILE_ROWS + row, tile % across * _TILE_INPUTS + column] = tiles
        return dense[:rows, :inputs].contiguous()


def pack_bitmask(weight: torch.Tensor) -> BitmaskWeight:
    """Pack a dense weight; exact zeros of either sign are left out.

    Args:
        weight: [M, K] bf16 or fp16, on any device; the records come out on the same one. Runs on the CPU.

    Raises:
        ShapeError: another dtype, or not a matrix.
    """
    if weight.dim() != 2 or weight.dtype not in _TYPES:
        raise ShapeError(f"pack_bitmask: a bf16 or fp16 matrix, got {weight.dtype} {tuple(weight.shape)}")
    rows, inputs = weight.shape
    device, host = weight.device, weight.detach().cpu()
    down, across = -(-rows // _TILE_ROWS), -(-inputs // _TILE_INPUTS)
    padded = torch.nn.functional.pad(host, (0, across * _TILE_INPUTS - inputs, 0, down * _TILE_ROWS - rows))
    bits, row, column = _places((rows, inputs))
    tile = torch.arange(down * across)[:, None]
    tiles = padded[tile // max(across, 1) * _TILE_ROWS + row, tile % max(across, 1) * _TILE_INPUTS + column]
    kept = tiles != 0  # [tiles, 1024] in the order of the records
    masks = (kept.reshape(-1, 32, 32).long() << bits.long()).sum(-1)
    masks = torch.where(masks >= 2**31, masks - 2**32, masks).int()
    sizes = _MASK_BYTES + 2 * kept.sum(1)
    units = (sizes + 15) // 16
    start = torch.zeros(tiles.shape[0] + 1, dtype=torch.int64)
    torch.cumsum(units, 0, out=start[1:])
    if int(start[-1]) >= 2**31:
        raise ShapeError(f"pack_bitmask: {int(start[-1]) * 16} bytes of records; at most {2**35}: split the weight")
    records = torch.zeros(int(start[-1]) * 16, dtype=torch.uint8)
    first = start[:-1, None] * 16
    records[first + torch.arange(_MASK_BYTES)] = masks.contiguous().view(torch.uint8).reshape(-1, _MASK_BYTES)
    place = (first + _MASK_BYTES + 2 * (kept.long().cumsum(1) - 1))[kept]
    values = tiles[kept].contiguous().view(torch.uint8).reshape(-1, 2)
    records[place], records[place + 1] = values[:, 0], values[:, 1]
    largest = int(units.max()) * 16 if units.numel() else _MASK_BYTES
    return BitmaskWeight((rows, inputs), weight.dtype, start.int().to(device), records.to(device), largest)


def gather_weight(weight: torch.Tensor, in_index: torch.Tensor, out_index: torch.Tensor) -> torch.Tensor:
    """The kept part of a convolution's weight as gather_conv reads it: [kept outputs, taps, kept inputs up to a
    multiple of 64].

    Args:
        weight: [M, C, R, S]. in_index, out_index: kept channels.
    """
    kept = weight[out_index.long()][:, in_index.long()].flatten(2).transpose(1, 2)
    return torch.nn.functional.pad(kept, (0, -kept.shape[2] % 64)).contiguous()


class Library:
    """The functions of one build of csrc/cuda, on tensors.

    Args:
        path: the shared library. One that was built for the CPU (for tests) takes CPU tensors.

    Raises:
        BackendError: it cannot be opened or is of another version.
    """

    def __init__(self, path: str | Path) -> None:
        try:
            self._functions = ctypes.CDLL(str(path))
        except OSError as error:
            raise BackendError(
                f"the CUDA kernels cannot be loaded ({error}); build them with `make build-cuda`"
            ) from None
        found = self._functions.se_cuda_version()
        if found != _VERSION:
            raise BackendError(
                f"{path} has version {found} of the CUDA kernels, {_VERSION} is needed: run `make build-cuda`"
            )
        self._functions.se_cuda_error.restype = ctypes.c_char_p
        self.on_device = bool(self._functions.se_cuda_on_device())

    def bitmask_linear(
        self,
        x: torch.Tensor,
        weight: BitmaskWeight,
        bias: torch.Tensor | None = None,
        activation: str | None = None,
        decode: bool | None = None,
    ) -> torch.Tensor:
        """`activation(x · Wᵀ + bias)`; `decode` None takes the kernel for few tokens where there are at most 16.

        Args:
            x: [..., K], K a multiple of 8, of the weight's dtype. bias: [M] or None. activation: None, relu, gelu,
                silu.
        """
        outputs, inputs = weight.shape
        rows, type_, out = self._prepare("bitmask_linear", x, inputs, outputs, weight.dtype, bias, weight.records)
        decode = rows.shape[0] <= DECODE_TOKENS if decode is None else decode
        self._run(
            "se_cuda_bitmask_linear", rows, weight.start, weight.records, bias, out, rows.shape[0], outputs, inputs,
            weight.largest, type_, _activation(activation), int(decode),
        )  # fmt: skip
        return out.reshape(*x.shape[:-1], outputs)

    def block_linear(
        self,
        x: torch.Tensor,
        values: torch.Tensor,
        row_ptr: torch.Tensor,
        cols: torch.Tensor,
        row_order: torch.Tensor,
        shape: tuple[int, int],
        bias: torch.Tensor | None = None,
        activation: str | None = None,
    ) -> torch.Tensor:
        """Block-sparse linear; values [B, R, C] with sides that are multiples of 64, tables as in
        `kernels.BlockPattern`."""
        outputs, inputs = shape
        rows, type_, out = self._prepare("block_linear", x, inputs, outputs, values.dtype, bias, values)
        self._run(
            "se_cuda_block_linear", rows, values.contiguous(), row_ptr, cols, row_order, bias, out, rows.shape[0],
            outputs, inputs, values.shape[1], values.shape[2], type_, _activation(activation),
        )  # fmt: skip
        return out.reshape(*x.shape[:-1], outputs)

    def gather_conv(
        self,
        x: torch.Tensor,
        weight: torch.Tensor,
        in_index: torch.Tensor,
        out_index: torch.Tensor,
        run: int,
        out_channels: int,
        kernel: tuple[int, int],
        stride: tuple[int, int] = (1, 1),
        padding: tuple[int, int] = (0, 0),
        dilation: tuple[int, int] = (1, 1),
        bias: torch.Tensor | None = None,
        activation: str | None = None,
    ) -> torch.Tensor:
        """Convolution of kept channels; pruned channels of the output are zero.

        Args:
            x: [N, C, H, W] channels_last. weight: from `gather_weight`. bias: [kept outputs] or None.
            in_index, out_index: int32 kept channels; run: 8, 4, 2 or 1, the inputs come in aligned runs of so many.
        """
        if x.dim() != 4 or x.dtype not in _TYPES or weight.dtype != x.dtype:
            raise ShapeError(
                f"gather_conv: bf16 or fp16 [N, C, H, W], got {x.dtype} {tuple(x.shape)} and {weight.dtype}"
            )
        self._check_device("gather_conv", x, weight, in_index, out_index, bias)
        nhwc = x.permute(0, 2, 3, 1).contiguous()
        batch, height, width, channels = nhwc.shape
        size = [
            (length + 2 * p - d * (k - 1) - 1) // s + 1
            for length, k, s, p, d in zip((height, width), kernel, stride, padding, dilation, strict=True)
        ]
        make = nhwc.new_empty if out_index.numel() == out_channels else nhwc.new_zeros
        y = make(batch, max(size[0], 0), max(size[1], 0), out_channels)
        if y.numel() and in_index.numel() and out_index.numel():
            sizes = (batch, height, width, channels, size[0], size[1], out_channels, in_index.numel(), weight.shape[2])
            sizes += (out_index.numel(), *kernel, *stride, *padding, *dilation)
            self._run(
                "se_cuda_gather_conv", nhwc, weight, in_index, out_index, bias, y, (ctypes.c_int * 18)(*sizes), run,
                _TYPES[x.dtype], _activation(activation),
            )  # fmt: skip
        return y.permute(0, 3, 1, 2)

    def _prepare(
        self,
        name: str,
        x: torch.Tensor,
        inputs: int,
        outputs: int,
        dtype: torch.dtype,
        bias: torch.Tensor | None,
        weight: torch.Tensor,
    ) -> tuple[torch.Tensor, int, torch.Tensor]:
        if x.dtype not in _TYPES or dtype != x.dtype or (bias is not None and bias.dtype != x.dtype):
            raise ShapeError(f"{name}: operands must share bf16 or fp16; x is {x.dtype}, the weight {dtype}")
        if x.shape[-1] != inputs or (bias is not None and bias.numel() != outputs):
            raise ShapeError(f"{name}: x {tuple(x.shape)} for a weight of {outputs} × {inputs}")
        self._check_device(name, x, weight, bias)
        rows = x.reshape(-1, inputs).contiguous()
        return rows, _TYPES[x.dtype], rows.new_empty(rows.shape[0], outputs)

    def _check_device(self, name: str, *tensors: torch.Tensor | None) -> None:
        devices = {tensor.device for tensor in tensors if tensor is not None}
        if len(devices) != 1 or (next(iter(devices)).type == "cuda") != self.on_device:
            place = "an NVIDIA GPU" if self.on_device else "the CPU"
            raise BackendError(f"{name}: this build needs all operands on {place}, got {sorted(map(str, devices))}")

    def _run(self, function: str, *arguments: object) -> None:
        device = next(argument.device for argument in arguments if isinstance(argument, torch.Tensor))
        if self.on_device:
            with torch.cuda.device(device):
                stream = torch.cuda.current_stream().cuda_stream
                code = getattr(self._functions, function)(*_plain(arguments), ctypes.c_void_p(stream))
        else:
            code = getattr(self._functions, function)(*_plain(arguments), None)
        if code:
            reason = self._functions.se_cuda_error(code).decode()
            raise BackendError(f"{function}: {reason} (code {code})")


def why_not() -> list[str]:
    """Reasons why the CUDA kernels cannot run in this process; empty where they can. Opens nothing."""
    if emulated():
        return []
    if not _FILE.exists():
        return ["the CUDA kernels are not built (`make build-cuda`, needs nvcc)"]
    if not torch.cuda.is_available():
        return ["PyTorch sees no NVIDIA GPU"]
    major, minor = torch.cuda.get_device_capability()
    return [] if major >= 8 else [f"compute capability {major}.{minor} is below 8.0 (Ampere)"]


_instead: Library | None = None


def use(instead: Library | None) -> None:
    """Takes another build in place of the installed one, or that one again with None. For tests: a build for the CPU
    takes CPU tensors."""
    global _instead
    _instead = instead


def emulated() -> bool:
    """Whether a build that runs on the CPU is in use."""
    return _instead is not None and not _instead.on_device


def library() -> Library:
    """The build in use, opened once.

    Raises:
        BackendError: it is not built or cannot be opened.
    """
    return _installed() if _instead is None else _instead


@functools.cache
def _installed() -> Library:
    return Library(_FILE)


def _places(shape: tuple[int, int]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(bit numbers [32], row [1024], column [1024]) of the numbers of a tile, lane by lane and bit by bit."""
    lane, bit = torch.arange(32)[:, None], torch.arange(32)[None, :]
    operand, register, half = bit // 8, bit // 2 % 4, bit % 2
    row = lane // 4 + 8 * (register % 2)
    column = 16 * operand + 2 * (lane % 4) + half + 8 * (register // 2)
    return torch.arange(32), row.reshape(-1), column.reshape(-1)


def _activation(activation: str | None) -> int:
    if activation not in ACTIVATIONS:
        raise ShapeError(f"activation {activation!r} is not one of {', '.join(str(name) for name in ACTIVATIONS)}")
    return ACTIVATIONS[activation]


def _plain(arguments: Sequence[object]) -> list[object]:
    """Tensors as pointers, None as the null pointer, ints as C ints."""
    plain: list[object] = []
    for argument in arguments:
        if isinstance(argument, torch.Tensor):
            plain.append(ctypes.c_void_p(argument.data_ptr()))
        elif isinstance(argument, int):
            plain.append(ctypes.c_int(argument))
        else:
            plain.append(argument)
    return plain
