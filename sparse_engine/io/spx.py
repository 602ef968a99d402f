"""The `.spx` file: a graph as versioned JSON, its constants as tensors, sparse ones packed; see docs/spx.md.

A `.spx` file is a safetensors file whose `__metadata__` holds exactly the keys `format`, `version`, `requires`,
`document` and `crc32`. The document is JSON: `producer`, `graph`, `constants` (which tensors make up each constant),
`tensors` (dtype, shape and CRC-32 of each tensor) and `attributes`. Nothing in it is ever executed, and nothing is used
before it was checked.
"""

from __future__ import annotations

import math
import os
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from sparse_engine.errors import FileFormatError, StructureError
from sparse_engine.io import strict_json
from sparse_engine.io.container import DTYPE_NAMES, Container, is_size, tensor_bytes, write_container
from sparse_engine.packed import PackedWeight
from sparse_engine.rounded import RoundedWeight

Constant = torch.Tensor | PackedWeight | RoundedWeight

FORMAT = "sparse_engine.spx"
VERSION = 2
"""The newest format that is read; version 1 has no rounded weights, and files without any are written as such."""
REQUIRES = "sparse_engine >= 0.1.0"
"""The first release that reads files of `VERSION`; a file carries it so that an older reader can say what it needs."""

_METADATA_KEYS = {"format", "version", "requires", "document", "crc32"}
_DOCUMENT_KEYS = {"producer", "graph", "constants", "tensors", "attributes"}
_PACKABLE = (torch.float32, torch.float16, torch.bfloat16, torch.float64)

# Packed weights may unpack to this many bytes in all: a small file cannot ask for an absurd amount of memory.
_DENSE_BYTES_BASE = 64 * 2**20
_DENSE_BYTES_PER_FILE_BYTE = 4096


@dataclass(frozen=True)
class SpxContents:
    """What a `.spx` file holds, checked.

    Attributes:
        graph: the graph as plain JSON; `sparse_engine.convert.graph` gives it meaning and checks it further.
        constants: tensor or packed weight by constant name, mapped from the file.
        attributes: further plain JSON that the writer kept with the graph.
        version: the format version of the file.
        producer: what wrote the file.
        file_bytes: size of the file.
    """

    graph: dict[str, Any]
    constants: dict[str, Constant]
    attributes: dict[str, Any]
    version: int
    producer: str
    file_bytes: int

    def outline(self) -> dict[str, torch.Tensor]:
        """Shape and dtype of every constant, as a tensor without memory where it is packed.

        The pattern of each one is decoded for a moment, which shows whether it can be.
        """
        found = {}
        for name, constant in self.constants.items():
            if not isinstance(constant, torch.Tensor):
                constant.csr()
                constant = torch.empty(constant.shape, dtype=constant.dtype, device="meta")
            found[name] = constant
        return found

    def dense(self) -> dict[str, torch.Tensor]:
        """Every constant as a dense tensor; those that were never packed stay mapped from the file."""
        return {
            name: constant if isinstance(constant, torch.Tensor) else constant.to_dense()
            for name, constant in self.constants.items()
        }


@dataclass(frozen=True)
class SpxSizes:
    """What was written: bytes of the file, of the constants in it, and of the same constants stored densely."""

    file_bytes: int
    constant_bytes: int
    dense_bytes: int


@dataclass
class _Draft:
    """Constants on their way into a file: the tensors to store and the table that says what they make up."""

    tensors: dict[str, torch.Tensor] = field(default_factory=dict)
    table: dict[str, dict[str, Any]] = field(default_factory=dict)


def write_spx(
    path: str | os.PathLike[str],
    graph: Mapping[str, Any],
    constants: Mapping[str, Constant],
    *,
    attributes: Mapping[str, Any] | None = None,
    pack: bool = True,
) -> SpxSizes:
    """Write a graph and its constants atomically; weights with zeros are stored packed where that is smaller.

    Example:
        >>> write_spx("model.spx", graph.to_json(), graph.constants)          # doctest: +SKIP
        SpxSizes(file_bytes=11894336, constant_bytes=11805184, dense_bytes=102228128)

    Args:
        path: the file to write.
        graph: plain JSON.
        constants: by name, any of the dtypes that safetensors knows; packed weights are stored as they are.
        attributes: further plain JSON to keep (the report, the choice of kernels, …).
        pack: store weights with zeros packed; False stores every tensor as it is given.

    Returns:
        The sizes.

    Raises:
        FileFormatError: something in the graph or the attributes is not plain JSON, or a dtype cannot be stored.
        OSError: the file cannot be written; nothing half-written is left behind.
    """
    import sparse_engine

    packed = {name: _pack(constant) if pack else constant for name, constant in constants.items()}
    _keep_readable(packed)
    draft = _lay_out(packed)
    table = {}
    for name, tensor in draft.tensors.items():
        if tensor.dtype not in DTYPE_NAMES:
            raise FileFormatError(f"constant {name!r}: dtype {tensor.dtype} cannot be stored in a .spx file")
        table[name] = [DTYPE_NAMES[tensor.dtype], list(tensor.shape), zlib.crc32(tensor_bytes(tensor))]
    document = strict_json.dump(
        {
            "producer": f"sparse_engine {sparse_engine.__version__}",
            "graph": dict(graph),
            "constants": draft.table,
            "tensors": table,
            "attributes": dict(attributes or {}),
        },
        "graph",
    )
    # What is written must be readable: the reader's own rules on nesting, numbers and texts apply here too.
    strict_json.parse(document.encode("utf-8"), "graph")
    version = 2 if any("rounded" in entry for entry in draft.table.values()) else 1
    metadata = {"format": FORMAT, "version": str(version), "requires": REQUIRES, "document": document}
    metadata["crc32"] = _checksum(metadata)
    file_bytes = write_container(path, draft.tensors, metadata)
    return SpxSizes(
        file_bytes,
        sum(tensor.numel() * tensor.dtype.itemsize for tensor in draft.tensors.values()),
        sum(_dense_bytes(constant) for constant in constants.values()),
    )


def read_spx(path: str | os.PathLike[str], *, verify: bool = True) -> SpxContents:
    """Read a `.spx` file by memory map, trusting nothing in it and running nothing from it.

    Example:
        >>> contents = read_spx("model.spx")                       # doctest: +SKIP
        >>> graph = Graph.from_json(contents.graph, contents.dense())         # doctest: +SKIP

    Args:
        path: the file.
        verify: compare the checksum of every tensor (about a second per gigabyte). Without it damaged *values* go
            unnoticed; everything that could lead outside a buffer is checked either way.

    Returns:
        The contents.

    Raises:
        FileFormatError: the file is damaged, of a newer version, or no `.spx` file; the message names what is wrong
            and where.
        OSError: the file does not exist or cannot be read.
    """
    container = Container(path)
    document = _read_document(container)
    _check_tensor_table(container, document["tensors"], verify)
    _check_dense_bytes(container, document["constants"])
    constants = _read_constants(container, document["constants"])
    return SpxContents(
        graph=document["graph"],
        constants=constants,
        attributes=document["attributes"],
        version=int(container.metadata["version"]),
        producer=document["producer"],
        file_bytes=container.size,
    )


def is_spx(path: str | os.PathLike[str]) -> bool:
    """Whether the file claims to be a `.spx` file, of whatever version; False for anything unreadable."""
    try:
        return Container(path).metadata.get("format") == FORMAT
    except (FileFormatError, OSError):
        return False


# -- writing -----------------------------------------------------------------------------------------------------------


def _pack(constant: Constant) -> Constant:
    if not isinstance(constant, torch.Tensor) or constant.dtype not in _PACKABLE:
        return constant
    if constant.dim() < 2 or constant.dim() > 8 or not 0 < constant.numel() < 2**31:
        return constant
    # A weight with hardly any zeros can never pay for its pattern: a bitmask alone is 1/32 of fp32.
    zeros = constant.numel() - int(torch.count_nonzero(constant))
    if zeros * constant.dtype.itemsize * 8 <= constant.numel():
        return constant
    try:
        packed = PackedWeight.from_dense(constant.detach().cpu())
    except StructureError:
        return constant
    return packed if packed.nbytes < packed.dense_nbytes else constant


def _keep_readable(constants: dict[str, Constant]) -> None:
    """Store the emptiest weights densely where the reader's bound on unpacked bytes would otherwise refuse the file."""

    def stored() -> int:
        return sum(_stored_bytes(constant) for constant in constants.values())

    def unpacked() -> int:
        return sum(_dense_bytes(constant) for constant in constants.values() if not isinstance(constant, torch.Tensor))

    while unpacked() > _DENSE_BYTES_BASE + _DENSE_BYTES_PER_FILE_BYTE * stored():
        packed = {name: item for name, item in constants.items() if not isinstance(item, torch.Tensor)}
        emptiest = max(packed, key=lambda name: _dense_bytes(packed[name]) / (_stored_bytes(packed[name]) + 1))
        constants[emptiest] = packed[emptiest].to_dense()


def _lay_out(constants: Mapping[str, Constant]) -> _Draft:
    draft = _Draft()
    stored: dict[tuple[Any, ...], str] = {}
    for name, constant in constants.items():
        if not isinstance(constant, torch.Tensor):
            tensors, meta = constant.state()
            names = {role: _free_name(f"{name}/{role}", constants, draft.tensors) for role in tensors}
            draft.table[name] = {"packed": meta, "tensors": names}
            if isinstance(constant, RoundedWeight):
                draft.table[name]["rounded"] = constant.precision
            draft.tensors.update({names[role]: tensor for role, tensor in tensors.items()})
            continue
        # A weight that two layers share is stored once.
        key = (constant.device, constant.data_ptr(), constant.dtype, tuple(constant.shape), constant.stride())
        if constant.numel() == 0 or key not in stored:
            stored[key] = name
            draft.tensors[name] = constant
        draft.table[name] = {"tensor": stored[key] if constant.numel() else name}
    return draft


def _free_name(stem: str, *taken: Mapping[str, Any]) -> str:
    name, number = stem, 1
    while any(name in names for names in taken):
        name, number = f"{stem}.{number}", number + 1
    return name


def _dense_bytes(constant: Constant) -> int:
    if isinstance(constant, torch.Tensor):
        return constant.numel() * constant.dtype.itemsize
    return constant.dense_nbytes


def _stored_bytes(constant: Constant) -> int:
    return _dense_bytes(constant) if isinstance(constant, torch.Tensor) else constant.nbytes


def _checksum(metadata: Mapping[str, str]) -> str:
    """CRC-32, as eight hexadecimal digits, of the metadata's other entries, each ended by a zero byte."""
    crc = 0
    for key in ("format", "version", "requires", "document"):
        crc = zlib.crc32(metadata[key].encode("utf-8") + b"\0", crc)
    return f"{crc:08x}"


# -- reading -----------------------------------------------------------------------------------------------------------


def _read_document(container: Container) -> dict[str, Any]:
    path, metadata = container.path, container.metadata
    if metadata.get("format") != FORMAT:
        raise FileFormatError(
            f"{path}: a safetensors file, but not a .spx file (its metadata does not say format = {FORMAT}). "
            "Weights alone are no executable: convert the model they belong to with `sparse-engine convert`"
        )
    _check_version(path, metadata)
    if set(metadata) != _METADATA_KEYS:
        raise FileFormatError(
            f"{path}: metadata must have exactly the keys {', '.join(sorted(_METADATA_KEYS))}; "
            f"it has {', '.join(sorted(metadata))[:200]}"
        )
    expected = _checksum(metadata)
    if metadata["crc32"] != expected:
        raise FileFormatError(
            f"{path}: the graph is damaged: its checksum is {expected}, the file says {metadata['crc32'][:16]!r}"
        )
    document = strict_json.parse(metadata["document"].encode("utf-8"), f"{path}: document")
    if not isinstance(document, dict) or set(document) != _DOCUMENT_KEYS:
        raise FileFormatError(
            f"{path}: the document must be an object with the keys {', '.join(sorted(_DOCUMENT_KEYS))}"
        )
    for key in ("graph", "constants", "tensors", "attributes"):
        if not isinstance(document[key], dict):
            raise FileFormatError(f"{path}: document.{key} must be an object, not {type(document[key]).__name__}")
    if not isinstance(document["producer"], str):
        raise FileFormatError(f"{path}: document.producer must be a string")
    return document


def _check_version(path: Path, metadata: Mapping[str, str]) -> None:
    import sparse_engine

    text = metadata.get("version", "")
    if not (text.isascii() and text.isdigit() and 0 < len(text) <= 6 and int(text) > 0):
        raise FileFormatError(f"{path}: the format version {text[:20]!r} is not a positive number")
    if int(text) > VERSION:
        needed = metadata.get("requires", "a newer sparse_engine")[:60]
        raise FileFormatError(
            f"{path}: .spx format version {int(text)} needs {needed}; this is sparse_engine "
            f"{sparse_engine.__version__}, which reads up to version {VERSION}. "
            "Upgrade with: pip install --upgrade sparse-engine"
        )


def _check_tensor_table(container: Container, table: dict[str, Any], verify: bool) -> None:
    path = container.path
    if table.keys() != container.entries.keys():
        odd = sorted(table.keys() ^ container.entries.keys())
        raise FileFormatError(
            f"{path}: the document and the file disagree on {len(odd)} tensors (first: {odd[0][:80]!r})"
        )
    for name, fields in table.items():
        entry = container.entries[name]
        if not isinstance(fields, list) or len(fields) != 3 or not is_size(fields[2]):
            raise FileFormatError(f"{path}: document.tensors[{name[:80]!r}] must be [dtype, shape, crc32]")
        if fields[0] != entry.dtype_name or fields[1] != list(entry.shape):
            raise FileFormatError(
                f"{path}: tensor {name[:80]!r} is {entry.dtype_name} {list(entry.shape)} in the file "
                f"but {str(fields[0])[:20]} {str(fields[1])[:80]} in the document"
            )
        if verify and container.crc32(name) != fields[2]:
            raise FileFormatError(
                f"{path}: the values of tensor {name[:80]!r} are damaged: "
                f"checksum {container.crc32(name)}, expected {fields[2]}"
            )


def _read_constants(container: Container, table: dict[str, Any]) -> dict[str, Constant]:
    constants: dict[str, Constant] = {}
    used: set[str] = set()
    for name, fields in table.items():
        where = f"{container.path}: constant {name[:80]!r}"
        tensors = _named_tensors(container, fields, where)
        used.update(tensors.values())
        if "tensor" in fields:
            constants[name] = container.tensor(fields["tensor"])
            continue
        try:
            found = {role: container.tensor(tensor) for role, tensor in tensors.items()}
            constants[name] = (
                RoundedWeight.from_state(found, fields["packed"], fields["rounded"])
                if "rounded" in fields
                else PackedWeight.from_state(found, fields["packed"])
            )
        except FileFormatError as error:
            raise FileFormatError(f"{where}: {error}") from None
    unused = sorted(container.entries.keys() - used)
    if unused:
        raise FileFormatError(
            f"{container.path}: {len(unused)} tensors belong to no constant (first: {unused[0][:80]!r})"
        )
    return constants


def _named_tensors(container: Container, fields: Any, where: str) -> dict[str, str]:
    """Role -> tensor name of one constant, after checking that the tensors are there."""
    if isinstance(fields, dict) and set(fields) == {"tensor"}:
        tensors = {"values": fields["tensor"]}
    elif isinstance(fields, dict) and set(fields) - {"rounded"} == {"packed", "tensors"}:
        tensors = fields["tensors"]
        if not isinstance(fields["packed"], dict):
            raise FileFormatError(f"{where}: packed must be an object")
    else:
        raise FileFormatError(f"{where}: must have the key tensor, or the keys packed and tensors")
    if not isinstance(tensors, dict):
        raise FileFormatError(f"{where}: tensors must be an object")
    for tensor in tensors.values():
        if not isinstance(tensor, str) or tensor not in container.entries:
            raise FileFormatError(f"{where}: names the tensor {str(tensor)[:80]!r}, which the file does not have")
    return tensors


def _check_dense_bytes(container: Container, table: dict[str, Any]) -> None:
    """Bound what the packed weights claim to unpack to, before anything of that size is allocated."""
    allowed = _DENSE_BYTES_BASE + _DENSE_BYTES_PER_FILE_BYTE * container.size
    claimed = 0
    for name, fields in table.items():
        where = f"{container.path}: constant {name[:80]!r}"
        tensors = _named_tensors(container, fields, where)
        if "packed" not in fields:
            continue
        shape, coding = fields["packed"].get("shape"), fields["packed"].get("coding")
        if not isinstance(shape, list) or not 2 <= len(shape) <= 8 or not all(is_size(size) for size in shape):
            raise FileFormatError(
                f"{where}: shape must be a list of two to eight non-negative integers, not {str(shape)[:80]}"
            )
        if not isinstance(coding, str):
            raise FileFormatError(f"{where}: coding must be a string, not {str(coding)[:80]}")
        if "values" not in tensors:
            raise FileFormatError(f"{where}: has no values")
        values = container.entries[tensors["values"]]
        # An empty dimension makes the product zero while index lists over the others could still be long.
        size_of_each = 4 if "rounded" in fields else values.dtype.itemsize
        claimed += math.prod(max(size, 1) for size in shape) * size_of_each
        if claimed > allowed:
            raise FileFormatError(
                f"{where}: shape {shape} brings the unpacked weights to {claimed} bytes; "
                f"a file of {container.size} bytes may unpack to {allowed}"
            )
        # A weight stored as full has no pattern that could be compared with its shape, so its values are.
        if coding == "full" and math.prod(values.shape) < math.prod(shape):
            raise FileFormatError(f"{where}: {math.prod(values.shape)} values for a full weight of shape {shape}")
