"""Small `.spx` files, made when asked for, and ways to damage them; shared by the tests and the fuzzer."""

from __future__ import annotations

import json
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from sparse_engine.io.spx import write_spx
from sparse_engine.packed import PackedWeight

GRAPH = {"version": 1, "inputs": ["x"], "outputs": ["y"], "nodes": [{"name": "é∑", "attrs": {"eps": 1e-5, "on": True}}]}


def constants() -> dict[str, torch.Tensor | PackedWeight]:
    """One constant per way of storing one: every packed coding, every kind of dense tensor."""
    generator = torch.Generator().manual_seed(0)

    def sparse(*shape: int, density: float) -> torch.Tensor:
        return torch.randn(shape, generator=generator) * (torch.rand(shape, generator=generator) < density)

    blocks = torch.ones(16, 16)
    blocks[:8, 8:] = 0
    channels = torch.randn(12, 6, 3, 3, generator=generator)
    channels[3:9] = 0
    channels[:, 2] = 0
    fan_in = torch.zeros(8, 300)
    fan_in[torch.arange(8), torch.arange(8) * 33] = 2.0
    packed = PackedWeight.from_dense
    return {
        "bitmask": packed(sparse(23, 30, density=0.4), structure="unstructured"),
        "delta8": packed(sparse(24, 60, density=0.05), structure="unstructured"),
        "index16": packed(torch.eye(4, 4000), structure="unstructured"),
        "index32": packed(_wide(), structure="unstructured"),
        "block": packed(blocks, structure="block(8, 8)"),
        "block_cut_by_the_edge": packed(blocks[:13, :11], structure="block(8, 8)"),
        "channel": packed(channels),
        "fan_in": packed(fan_in, structure="fan_in(1)"),
        "nm": packed(torch.tensor([[1.0, 0.0, 2.0, 0.0]] * 8), structure="nm(2, 4)"),
        "transposed": packed(sparse(9, 7, density=0.5), structure="unstructured").transpose(),
        "all_zero": packed(torch.zeros(5, 6)),
        "bfloat16": packed(sparse(16, 40, density=0.1).bfloat16()),
        "dense": torch.randn(3, 5, generator=generator),
        "scalar": torch.tensor(3.5),
        "empty": torch.zeros(0, 4),
        "flags": torch.tensor([True, False, True]),
        "counts": torch.arange(6, dtype=torch.int64),
        "double": torch.randn(3, generator=generator, dtype=torch.float64),
    }


def _wide() -> torch.Tensor:
    weight = torch.zeros(2, 70_000)
    weight[0, 5] = weight[1, 69_999] = 1.0
    return weight


def write_sample(path: Path) -> Path:
    """Write a file with all of `constants()`."""
    write_spx(path, GRAPH, constants(), attributes={"note": "sample", "numbers": [1, 2.5, None]})
    return path


def write_tiny(path: Path) -> Path:
    """Write the smallest file that still has a packed and a dense constant."""
    weight = torch.zeros(4, 64)
    weight[1, 3] = 5.0
    write_spx(path, {"n": 1}, {"w": weight, "b": torch.tensor([1.0, 2.0])})
    return path


# -- taking files apart and putting them together ----------------------------------------------------------------------


@dataclass
class Parts:
    """A file in pieces: the header without its metadata, the metadata, the document in it, and the tensors' bytes."""

    header: dict[str, Any]
    metadata: dict[str, str]
    document: dict[str, Any]
    data: bytes

    def join(self, *, seal: bool = True) -> bytes:
        """The file again; `seal` brings the document and its checksum up to date, so that deeper checks are reached."""
        metadata = dict(self.metadata)
        if seal:
            metadata["document"] = json.dumps(self.document)
            reseal(metadata)
        return raw({"__metadata__": metadata, **self.header}, self.data)

    def retouch(self, name: str, data: bytes) -> None:
        """Replace the bytes of a tensor by as many others and correct its checksum."""
        start, stop = self.header[name]["data_offsets"]
        assert len(data) == stop - start
        self.data = self.data[:start] + data + self.data[stop:]
        self.document["tensors"][name][2] = zlib.crc32(data)

    def bytes_of(self, name: str) -> bytes:
        start, stop = self.header[name]["data_offsets"]
        return self.data[start:stop]


def reseal(metadata: dict[str, str]) -> None:
    """Correct the checksum of the metadata, by the rule in docs/spx.md."""
    text = "".join(metadata.get(key, "") + "\0" for key in ("format", "version", "requires", "document"))
    metadata["crc32"] = f"{zlib.crc32(text.encode('utf-8', 'surrogatepass')):08x}"


def split(content: bytes) -> Parts:
    """Take a well-formed file apart."""
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    metadata = header.pop("__metadata__")
    return Parts(header, metadata, json.loads(metadata["document"]), content[8 + length :])


def raw(header: Any, data: bytes = b"") -> bytes:
    """A file with this header, given as JSON data or as bytes."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


# -- damages -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Damage:
    """One way to spoil a file, and a part of the message it must give."""

    name: str
    apply: Callable[[bytes], bytes]
    message: str


def _on_parts(change: Callable[[Parts], Any], *, seal: bool = True) -> Callable[[bytes], bytes]:
    def apply(content: bytes) -> bytes:
        parts = split(content)
        change(parts)
        return parts.join(seal=seal)

    return apply


def _set(path: str, value: Any) -> Callable[[Parts], None]:
    """Set `document.a.b.0` and so on."""

    def change(parts: Parts) -> None:
        *outer, last = path.split("|")
        target: Any = parts
        for key in outer:
            target = getattr(target, key) if isinstance(target, Parts) else target[key]
        if value is _DELETE:
            del target[last]
        else:
            target[int(last) if isinstance(target, list) else last] = value

    return change


_DELETE = object()


def _metadata(key: str, value: str) -> Callable[[bytes], bytes]:
    def change(parts: Parts) -> None:
        parts.metadata[key] = value

    return _on_parts(change)


def _document_text(edit: Callable[[str], str]) -> Callable[[bytes], bytes]:
    def apply(content: bytes) -> bytes:
        parts = split(content)
        parts.metadata["document"] = edit(parts.metadata["document"])
        reseal(parts.metadata)
        return parts.join(seal=False)

    return apply


def _swap_offsets(parts: Parts) -> None:
    parts.header["dense"]["data_offsets"] = parts.header["double"]["data_offsets"]


def _tensor_bytes(name: str, edit: Callable[[bytearray], None]) -> Callable[[bytes], bytes]:
    def change(parts: Parts) -> None:
        content = bytearray(parts.bytes_of(name))
        edit(content)
        parts.retouch(name, bytes(content))

    return _on_parts(change)


def _put(position: int, *values: int) -> Callable[[bytearray], None]:
    def edit(content: bytearray) -> None:
        content[position : position + len(values)] = bytes(values)

    return edit


def _claim(shape: list[int]) -> Callable[[Parts], None]:
    def change(parts: Parts) -> None:
        parts.document["constants"]["all_zero"]["packed"]["shape"] = shape

    return change


def _deep(depth: int) -> bytes:
    return b'{"__metadata__":' + b"[" * depth + b"]" * depth + b"}"


DAMAGES = [
    # the container
    Damage("empty", lambda content: b"", "too few"),
    Damage("nine bytes", lambda content: content[:9], "too few"),
    Damage("not ours at all", lambda content: b"\x89PNG\r\n\x1a\n" + bytes(64), "header claims"),
    Damage("header length of 2^63", lambda content: b"\xff" * 7 + b"\x7f" + content[8:], "header claims"),
    Damage("header of zeros", lambda content: raw(bytes(64), b""), "does not start with"),
    Damage("truncated header", lambda content: content[:200], "header claims"),
    Damage("truncated data", lambda content: content[:-1], "truncated"),
    Damage("one byte too long", lambda content: content + b"\0", "over-long"),
    Damage("twice the file", lambda content: content + content, "over-long"),
    Damage("header not JSON", lambda content: raw(b"{hello}" + b" " * 9), "not valid JSON"),
    Damage("header a list", lambda content: raw(b"[1, 2, 3] "), "does not start with"),
    Damage("header not UTF-8", lambda content: raw(b'{"\xff": 1}       '), "UTF-8"),
    Damage("duplicate tensor", lambda content: raw(b'{"a": 1, "a": 2}'), "appears twice"),
    Damage("NaN in the header", lambda content: raw(b'{"a": NaN}         '), "NaN is not"),
    Damage("infinite number", lambda content: raw(b'{"a": 1e999}       '), "does not fit a double"),
    Damage("huge integer", lambda content: raw(b'{"a": ' + b"9" * 5000 + b"}"), "integer with 5000 digits"),
    Damage("nesting of 100,000", lambda content: raw(_deep(100_000)), "nested deeper"),
    Damage("lone surrogate", lambda content: raw(b'{"__metadata__": {"a": "\\ud800"}}'), "not valid Unicode"),
    Damage("metadata not strings", lambda content: raw({"__metadata__": {"format": 1}}), "strings to strings"),
    Damage("metadata a list", lambda content: raw({"__metadata__": ["format"]}), "strings to strings"),
    Damage("unknown dtype", _on_parts(_set("header|dense|dtype", "F31")), "is not one of"),
    Damage("dtype a number", _on_parts(_set("header|dense|dtype", 32)), "is not one of"),
    Damage("another dtype of that size", _on_parts(_set("header|dense|dtype", "I32")), "in the document"),
    Damage("negative size", _on_parts(_set("header|dense|shape", [-3, -5])), "non-negative"),
    Damage("a size of true", _on_parts(_set("header|scalar|shape", [True])), "non-negative"),
    Damage("shape too small", _on_parts(_set("header|dense|shape", [3, 4])), "needs 48 bytes"),
    Damage("shape of 2^62 elements", _on_parts(_set("header|dense|shape", [2**31, 2**31])), "larger than any"),
    Damage(
        "overflowing product", _on_parts(_set("header|dense|shape", [2**32, 2**32, 2**32, 2**32])), "larger than any"
    ),
    Damage("empty times absurd", _on_parts(_set("header|empty|shape", [0, 2**62])), "larger than any"),
    Damage("seventeen dimensions", _on_parts(_set("header|scalar|shape", [1] * 17)), "at most 16"),
    Damage("offsets backwards", _on_parts(_set("header|dense|data_offsets", [60, 0])), "lie outside"),
    Damage("offsets beyond the end", _on_parts(_set("header|dense|data_offsets", [10**9, 10**9 + 60])), "lie outside"),
    Damage("offset a float", _on_parts(_set("header|dense|data_offsets", [0.0, 60.0])), "non-negative"),
    Damage("three offsets", _on_parts(_set("header|dense|data_offsets", [0, 60, 60])), "two non-negative"),
    Damage("two tensors in one place", _on_parts(_swap_offsets), "bytes"),
    Damage("tensor removed", _on_parts(_set("header|dense", _DELETE)), "leave a gap"),
    Damage("extra key", _on_parts(_set("header|dense|extra", 1)), "exactly dtype"),
    # the metadata
    Damage("another format", _metadata("format", "pt"), "not a .spx file"),
    Damage("no metadata", lambda content: raw(split(content).header, split(content).data), "not a .spx file"),
    Damage("version 3", _metadata("version", "3"), "format version 3 needs sparse_engine"),
    Damage("version 0", _metadata("version", "0"), "not a positive number"),
    Damage("version of words", _metadata("version", "one"), "not a positive number"),
    Damage("version in Arabic digits", _metadata("version", "١"), "not a positive number"),
    Damage("endless version", _metadata("version", "9" * 10_000), "not a positive number"),
    Damage("unknown metadata", _on_parts(_set("metadata|more", "1")), "exactly the keys"),
    Damage("checksum missing", _on_parts(_set("metadata|crc32", _DELETE), seal=False), "exactly the keys"),
    Damage("document changed", _on_parts(_set("metadata|requires", "sparse_engine >= 9"), seal=False), "checksum"),
    Damage("document a list", _document_text(lambda text: "[]"), "must be an object"),
    Damage("document with NaN", _document_text(lambda text: text.replace("2.5", "NaN")), "NaN is not"),
    Damage("document with a duplicate", _document_text(lambda text: text.replace('"note"', '"numbers"')), "twice"),
    Damage("document deep", _document_text(lambda text: text.replace("2.5", "[" * 99 + "]" * 99)), "nested deeper"),
    Damage("document cut", _document_text(lambda text: text[:-5]), "not valid JSON"),
    Damage("no graph", _on_parts(_set("document|graph", _DELETE)), "the keys"),
    Damage("graph a list", _on_parts(_set("document|graph", [])), "document.graph must be an object"),
    Damage("producer a number", _on_parts(_set("document|producer", 3)), "producer"),
    Damage("attributes null", _on_parts(_set("document|attributes", None)), "document.attributes"),
    # the tables
    Damage("tensor not in the table", _on_parts(_set("document|tensors|dense", _DELETE)), "disagree on 1 tensors"),
    Damage("table entry too short", _on_parts(_set("document|tensors|dense", ["F32", [3, 5]])), "must be"),
    Damage("wrong checksum", _on_parts(_set("document|tensors|dense|2", 1)), "damaged"),
    Damage("checksum a string", _on_parts(_set("document|tensors|dense|2", "1")), "must be"),
    Damage("another shape in the table", _on_parts(_set("document|tensors|dense|1", [5, 3])), "in the document"),
    Damage("constant removed", _on_parts(_set("document|constants|dense", _DELETE)), "belong to no constant"),
    Damage("constant of nothing", _on_parts(_set("document|constants|dense", {})), "must have the key"),
    Damage("constant null", _on_parts(_set("document|constants|dense", None)), "must have the key"),
    Damage("constant names no tensor", _on_parts(_set("document|constants|dense|tensor", "nope")), "does not have"),
    Damage("constant names a list", _on_parts(_set("document|constants|dense|tensor", [1])), "does not have"),
    # the packed weights
    Damage("packed not an object", _on_parts(_set("document|constants|block|packed", 1)), "packed must be"),
    Damage("roles not an object", _on_parts(_set("document|constants|block|tensors", [])), "tensors must be"),
    Damage("no values", _on_parts(_set("document|constants|block|tensors|values", _DELETE)), "no values"),
    Damage("unknown coding", _on_parts(_set("document|constants|block|packed|coding", "zip")), "unknown coding"),
    Damage("coding a list", _on_parts(_set("document|constants|block|packed|coding", [])), "coding"),
    Damage(
        "unknown structure", _on_parts(_set("document|constants|block|packed|structure", "hexagon")), "no structure"
    ),
    Damage("structure a number", _on_parts(_set("document|constants|block|packed|structure", 7)), "not a text"),
    Damage(
        "block of 2^40", _on_parts(_set("document|constants|block|packed|structure", f"block({2**40}, 1)")), "block"
    ),
    Damage(
        "another block", _on_parts(_set("document|constants|block|packed|structure", "block(4, 8)")), "block|bitmask"
    ),
    Damage("coding of channels", _on_parts(_set("document|constants|block|packed|coding", "channels")), "tensors"),
    Damage("full without values", _on_parts(_set("document|constants|all_zero|packed|coding", "full")), "full|unknown"),
    Damage("claims 4 GiB", _on_parts(_claim([32768, 32768])), "may unpack to"),
    Damage("claims 2^80", _on_parts(_claim([2**40, 2**40])), "may unpack to"),
    Damage("claims nothing by absurd", _on_parts(_claim([0, 2**60])), "may unpack to"),
    Damage("negative claim", _on_parts(_claim([-5, -6])), "non-negative"),
    Damage("one dimension", _on_parts(_claim([30])), "two to eight"),
    Damage(
        "column beyond the end", _tensor_bytes("index16/pattern.cols", _put(0, 0xFF, 0xFF)), "column indices|ascend"
    ),
    Damage("column negative", _tensor_bytes("index32/pattern.cols", _put(0, 0, 0, 0, 0x80)), "column indices"),
    Damage("counts too many", _tensor_bytes("index16/pattern.counts", _put(0, 200)), "counts"),
    Damage("bits beyond the end", _tensor_bytes("bitmask/pattern.bits", _put(86, 0xFF)), "bits set beyond"),
    Damage("more kept than values", _tensor_bytes("bitmask/pattern.bits", _put(0, 0xFF)), "values for a pattern"),
    Damage(
        "gaps leave the matrix", _tensor_bytes("delta8/pattern.gaps", _put(0, 254, 254, 254, 254, 254, 254)), "reaches"
    ),
    Damage(
        "gaps end in a skip",
        _tensor_bytes("delta8/pattern.gaps", lambda content: _put(len(content) - 1, 255)(content)),
        "gap",
    ),
    Damage("channels not ascending", _tensor_bytes("channel/pattern.rows", _put(0, 5, 5)), "ascend"),
    Damage("channel beyond the end", _tensor_bytes("channel/pattern.channels", _put(0, 250)), "ascend"),
    Damage("order no permutation", _tensor_bytes("transposed/order", _put(0, 0, 0, 0, 0, 0, 0, 0, 0)), "permutation"),
    Damage("order beyond the end", _tensor_bytes("transposed/order", _put(0, 255, 255, 255, 127)), "permutation"),
    Damage("a boolean of 2", _tensor_bytes("flags", _put(0, 2)), "other than 0 and 1"),
]
