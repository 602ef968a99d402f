"""The safetensors container, read strictly by memory map and written atomically.

Layout of the file: 8 bytes with the little-endian length of the header, the header (JSON: tensor name -> dtype, shape,
data_offsets, and `__metadata__`, a dict of strings), then the tensors' bytes without gaps. Source: the format
description of the safetensors project.
"""

from __future__ import annotations

import mmap
import os
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from sparse_engine.errors import FileFormatError
from sparse_engine.io import strict_json
from sparse_engine.io.atomic import atomic_write

MAX_HEADER_BYTES = 32 * 2**20
MAX_TENSORS = 200_000
MAX_NAME_LENGTH = 600
MAX_DIMENSIONS = 16
MAX_ELEMENTS = 2**40

DTYPES: dict[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """Where one tensor lies in the file, after every check."""

    name: str
    dtype_name: str
    shape: tuple[int, ...]
    start: int
    stop: int

    @property
    def dtype(self) -> torch.dtype:
        return DTYPES[self.dtype_name]


class Container:
    """A safetensors file mapped into memory; every offset was checked when it was opened.

    Example:
        >>> container = Container("model.safetensors")             # doctest: +SKIP
        >>> container.entries["fc.weight"].shape                   # doctest: +SKIP
        (10, 512)
        >>> weight = container.tensor("fc.weight")                 # doctest: +SKIP

    Args:
        path: the file.

    Raises:
        FileFormatError: the file is not a well-formed safetensors file; the message names the place.
        OSError: the file does not exist or cannot be read.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        with open(self.path, "rb") as file:
            self.size = os.fstat(file.fileno()).st_size
            if self.size < 10:
                raise FileFormatError(f"{self.path}: {self.size} bytes are too few for a safetensors file")
            # Copy-on-write: tensors look writable to PyTorch, and the file can never change through them.
            self._map = mmap.mmap(file.fileno(), self.size, access=mmap.ACCESS_COPY)
        header = self._header()
        self.metadata = self._take_metadata(header)
        self.entries = self._check_entries(header)

    def tensor(self, name: str) -> torch.Tensor:
        """The tensor `name`, backed by the map where its bytes are aligned (writing to it never reaches the file)."""
        entry = self.entries[name]
        count = _product(entry.shape)
        if count == 0:
            return torch.empty(entry.shape, dtype=entry.dtype)
        if entry.start % entry.dtype.itemsize == 0:
            flat = torch.frombuffer(self._map, dtype=entry.dtype, count=count, offset=entry.start)
        else:
            flat = torch.frombuffer(bytearray(self._map[entry.start : entry.stop]), dtype=entry.dtype, count=count)
        if entry.dtype is torch.bool and int(flat.view(torch.uint8).max()) > 1:
            raise FileFormatError(f"{self.path}: tensor {name!r} is BOOL but holds a byte other than 0 and 1")
        return flat.reshape(entry.shape)

    def tensors(self) -> dict[str, torch.Tensor]:
        """All tensors by name."""
        return {name: self.tensor(name) for name in self.entries}

    def crc32(self, name: str) -> int:
        """CRC-32 of the tensor's bytes."""
        entry = self.entries[name]
        with memoryview(self._map) as view, view[entry.start : entry.stop] as part:
            return zlib.crc32(part)

    def _header(self) -> dict[str, Any]:
        length = int.from_bytes(self._map[:8], "little")
        if length > self.size - 8:
            raise FileFormatError(
                f"{self.path}: the header claims {length} bytes but only {self.size - 8} follow: "
                "the file is truncated or no safetensors file"
            )
        if length > MAX_HEADER_BYTES:
            raise FileFormatError(f"{self.path}: the header claims {length} bytes; at most {MAX_HEADER_BYTES} are read")
        self._data_start = 8 + length
        raw = bytes(self._map[8 : self._data_start])
        if raw[:1] != b"{":
            raise FileFormatError(f"{self.path}: the header does not start with '{{': no safetensors file")
        header = strict_json.parse(raw, f"{self.path}: header")
        if len(header) > MAX_TENSORS:
            raise FileFormatError(f"{self.path}: {len(header)} tensors; at most {MAX_TENSORS} are read")
        return header

    def _take_metadata(self, header: dict[str, Any]) -> dict[str, str]:
        metadata = header.pop("__metadata__", {})
        if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
            raise FileFormatError(f"{self.path}: __metadata__ must map strings to strings")
        return metadata

    def _check_entries(self, header: dict[str, Any]) -> dict[str, TensorEntry]:
        entries = [self._check_entry(name, fields) for name, fields in header.items()]
        position = self._data_start
        for entry in sorted(entries, key=lambda entry: (entry.start, entry.stop)):
            if entry.start != position:
                kind = "overlap" if entry.start < position else "leave a gap"
                raise FileFormatError(
                    f"{self.path}: the bytes of tensor {entry.name[:80]!r} start at {entry.start - self._data_start} "
                    f"and {kind}; {position - self._data_start} was expected"
                )
            position = entry.stop
        if position != self.size:
            raise FileFormatError(
                f"{self.path}: {self.size - position} bytes follow the last tensor: "
                "the file is over-long or was damaged"
            )
        return {entry.name: entry for entry in entries}

    def _check_entry(self, name: str, fields: Any) -> TensorEntry:
        where = f"{self.path}: tensor {name[:80]!r}"
        if len(name) > MAX_NAME_LENGTH or not name.isprintable():
            raise FileFormatError(f"{where}: names have at most {MAX_NAME_LENGTH} printable characters")
        if not isinstance(fields, dict) or set(fields) != {"dtype", "shape", "data_offsets"}:
            raise FileFormatError(f"{where}: needs exactly dtype, shape and data_offsets")
        dtype_name, shape, offsets = fields["dtype"], fields["shape"], fields["data_offsets"]
        if not isinstance(dtype_name, str) or dtype_name not in DTYPES:
            raise FileFormatError(f"{where}: dtype {str(dtype_name)[:40]!r} is not one of {', '.join(DTYPES)}")
        if not isinstance(shape, list) or not all(is_size(size) for size in shape) or len(shape) > MAX_DIMENSIONS:
            raise FileFormatError(
                f"{where}: shape must be a list of at most {MAX_DIMENSIONS} non-negative integers, "
                f"not {str(shape)[:80]}"
            )
        if not isinstance(offsets, list) or len(offsets) != 2 or not all(is_size(offset) for offset in offsets):
            raise FileFormatError(f"{where}: data_offsets must be two non-negative integers, not {str(offsets)[:80]}")
        start, stop = offsets
        available = self.size - self._data_start
        if not start <= stop <= available:
            raise FileFormatError(
                f"{where}: bytes {start} to {stop} lie outside the file's {available} bytes of data: "
                "truncated or damaged"
            )
        needed = _product(shape) * DTYPES[dtype_name].itemsize
        # With an empty dimension the product says nothing about the others, which still may not be absurd.
        if _product([max(size, 1) for size in shape]) > MAX_ELEMENTS:
            raise FileFormatError(f"{where}: shape {shape} is larger than any file this version reads")
        if needed != stop - start:
            raise FileFormatError(f"{where}: shape {shape} of {dtype_name} needs {needed} bytes but has {stop - start}")
        return TensorEntry(name, dtype_name, tuple(shape), self._data_start + start, self._data_start + stop)


def write_container(
    path: str | os.PathLike[str], tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str] | None = None
) -> int:
    """Write a safetensors file atomically.

    Example:
        >>> write_container("weights.safetensors", {"weight": torch.zeros(2, 3)}, {"source": "me"})  # doctest: +SKIP
        152

    Args:
        path: the file to write.
        tensors: name -> tensor of any dtype in `DTYPES`, any device, any strides.
        metadata: strings by name.

    Returns:
        The size of the file in bytes.

    Raises:
        FileFormatError: a tensor's dtype, or its name, has no place in the format.
        OSError: the file cannot be written.
    """
    for name, tensor in tensors.items():
        if tensor.dtype not in DTYPE_NAMES:
            raise FileFormatError(
                f"tensor {name!r}: dtype {tensor.dtype} cannot be stored; convert it to one of {', '.join(DTYPES)}"
            )
        if name == "__metadata__" or len(name) > MAX_NAME_LENGTH or not name.isprintable():
            raise FileFormatError(
                f"tensor {name[:80]!r}: the name must be printable, at most {MAX_NAME_LENGTH} characters, "
                "and not __metadata__"
            )
    # Widest dtype first: then every tensor is aligned for its own dtype although the format allows no gaps.
    order = sorted(tensors, key=lambda name: (-tensors[name].dtype.itemsize, name))
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    position = 0
    for name in order:
        tensor = tensors[name]
        size = tensor.numel() * tensor.dtype.itemsize
        header[name] = {
            "dtype": DTYPE_NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [position, position + size],
        }
        position += size
    raw = strict_json.dump(header, "header").encode("utf-8")
    raw += b" " * (-(8 + len(raw)) % 64)
    if len(raw) > MAX_HEADER_BYTES:
        raise FileFormatError(f"the header needs {len(raw)} bytes; at most {MAX_HEADER_BYTES} can be read back")
    with atomic_write(path) as file:
        file.write(len(raw).to_bytes(8, "little"))
        file.write(raw)
        for name in order:
            if tensors[name].numel():
                file.write(tensor_bytes(tensors[name]))
    return 8 + len(raw) + position


def tensor_bytes(tensor: torch.Tensor) -> memoryview:
    """The tensor's elements in row-major order as bytes; a view where the tensor is contiguous and on the CPU."""
    flat = tensor.detach().to("cpu").contiguous().reshape(-1)
    if flat.numel() == 0:
        return memoryview(b"")
    return memoryview(flat.view(torch.uint8).numpy())


def is_size(value: Any) -> bool:
    """Whether a JSON value is a non-negative integer (JSON's true is not)."""
    return type(value) is int and value >= 0


def _product(sizes: tuple[int, ...] | list[int]) -> int:
    result = 1
    for size in sizes:
        result *= size
    return result
