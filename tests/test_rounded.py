"""`RoundedWeight`: packed weights in bfloat16 and int8, in memory and in files."""

import json

import pytest
import torch

from sparse_engine.errors import FileFormatError, SparseEngineError
from sparse_engine.io.spx import read_spx, write_spx
from sparse_engine.rounded import RoundedWeight, round_weight
from tests.io import spx_cases


def sparse(rows, columns, density):
    return torch.randn(rows, columns) * (torch.rand(rows, columns) < density)


SHAPES = [(sparse, 20, 300, 0.1), (sparse, 7, 5, 0.5), (sparse, 6, 9, 0.0), (sparse, 8, 40, 1.0), (sparse, 3, 0, 1.0)]


@pytest.mark.parametrize("precision", ["bf16", "int8"])
@pytest.mark.parametrize("make, rows, columns, density", SHAPES)
def test_it_stands_for_the_rounded_weight(make, rows, columns, density, precision):
    weight = make(rows, columns, density)
    rounded = RoundedWeight.from_dense(weight, precision)
    values, scales = round_weight(weight, precision)
    expected = values.float() if scales is None else values.float() * scales[:, None]
    assert torch.equal(rounded.to_dense(), expected)
    assert rounded.to_dense().dtype == rounded.dtype == torch.float32
    row_ptr, cols, raw = rounded.csr()
    dense = torch.zeros(rows, columns)
    of_row = torch.repeat_interleave(torch.arange(rows), torch.from_numpy(row_ptr).diff())
    dense[of_row, torch.from_numpy(cols).long()] = torch.from_numpy(rounded.float_values(row_ptr, raw))
    assert torch.equal(dense, expected)
    again = RoundedWeight.from_state(*rounded.state(), precision)
    assert torch.equal(again.to_dense(), expected)


def test_it_is_smaller_than_single_precision():
    weight = sparse(256, 1024, 0.1)
    full, half, whole = (
        4 * weight.numel(),
        RoundedWeight.from_dense(weight, "bf16"),
        RoundedWeight.from_dense(weight, "int8"),
    )
    assert half.nbytes < 0.08 * full
    assert whole.nbytes < 0.06 * full
    assert RoundedWeight.from_dense(torch.randn(64, 64), "int8").nbytes == 64 * 64 + 4 * 64


@pytest.mark.parametrize("precision", ["bf16", "int8"])
def test_files_keep_it(precision, tmp_path):
    weight = RoundedWeight.from_dense(sparse(40, 200, 0.1), precision)
    write_spx(tmp_path / "a.spx", {"n": 1}, {"w": weight, "b": torch.ones(3)})
    contents = read_spx(tmp_path / "a.spx")
    assert contents.version == 2
    found = contents.constants["w"]
    assert isinstance(found, RoundedWeight)
    assert found.precision == precision
    assert torch.equal(found.to_dense(), weight.to_dense())
    assert contents.outline()["w"].dtype == torch.float32
    write_spx(tmp_path / "b.spx", {"n": 1}, {"b": torch.ones(3)})
    assert read_spx(tmp_path / "b.spx").version == 1, "older readers read files without rounded weights"


def test_a_flipped_bit_is_found(tmp_path):
    path = tmp_path / "a.spx"
    write_spx(path, {"n": 1}, {"w": RoundedWeight.from_dense(sparse(4, 24, 0.3), "int8")})
    content = path.read_bytes()
    for position in range(0, len(content), 3):
        damaged = bytearray(content)
        damaged[position] ^= 1 << position % 8
        path.write_bytes(damaged)
        with pytest.raises(FileFormatError):
            read_spx(path)


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda entry: entry.update(rounded="int4"), "int4"),
        (lambda entry: entry.update(rounded=["int8"]), "expected"),
        (lambda entry: entry.update(rounded="bf16"), "int8; bfloat16 expected"),
        (lambda entry: entry.pop("rounded"), "unknown tensors"),
        (lambda entry: entry["packed"].update(shape=[2, 2, 24]), "no matrix"),
    ],
)
def test_what_does_not_fit_is_refused(change, message, tmp_path):
    path = tmp_path / "a.spx"
    write_spx(path, {"n": 1}, {"w": RoundedWeight.from_dense(sparse(4, 24, 0.3), "int8")})
    parts = spx_cases.split(path.read_bytes())
    change(parts.document["constants"]["w"])
    path.write_bytes(parts.join())
    with pytest.raises(FileFormatError, match=message):
        read_spx(path)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 0.0, -1.0])
def test_scales_are_checked(value):
    rounded = RoundedWeight.from_dense(sparse(4, 24, 0.3), "int8")
    tensors, meta = rounded.state()
    scales = tensors["scales"].clone()
    scales[2] = value
    with pytest.raises(FileFormatError, match="4 positive"):
        RoundedWeight.from_state({**tensors, "scales": scales}, meta, "int8")
    with pytest.raises(FileFormatError, match="scales belong to int8"):
        RoundedWeight.from_state({name: t for name, t in tensors.items() if name != "scales"}, meta, "int8")


def test_a_newer_file_says_what_it_needs(tmp_path):
    path = tmp_path / "a.spx"
    write_spx(path, {"n": 1}, {"w": RoundedWeight.from_dense(sparse(4, 24, 0.3), "int8")})
    parts = spx_cases.split(path.read_bytes())
    assert json.loads(parts.metadata["document"])["constants"]["w"]["rounded"] == "int8"
    parts.metadata["version"] = "3"
    path.write_bytes(parts.join())
    with pytest.raises(FileFormatError, match="version 3"):
        read_spx(path)


def test_int8_holds_finite_numbers_only():
    with pytest.raises(SparseEngineError, match="2 infinities"):
        RoundedWeight.from_dense(torch.tensor([[float("inf"), 1.0, float("nan")]]), "int8")
