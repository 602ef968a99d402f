"""`.spx` files: what goes in comes out, small, mapped; whatever is wrong is found before it is used."""

from __future__ import annotations

import re
import subprocess
import sys
import tracemalloc

import pytest
import safetensors.torch
import torch

from sparse_engine.errors import FileFormatError
from sparse_engine.io import is_spx, read_spx, write_spx
from sparse_engine.packed import PackedWeight
from tests.io import spx_cases


@pytest.fixture
def sample(tmp_path):
    return spx_cases.write_sample(tmp_path / "sample.spx")


def test_everything_comes_back_bit_for_bit(sample):
    contents = read_spx(sample)
    expected = spx_cases.constants()
    assert contents.graph == spx_cases.GRAPH
    assert contents.attributes == {"note": "sample", "numbers": [1, 2.5, None]}
    assert list(contents.constants) == list(expected)
    for name, constant in expected.items():
        found = contents.constants[name]
        if isinstance(constant, PackedWeight):
            assert isinstance(found, PackedWeight)
            assert (found.structure, found.coding) == (constant.structure, constant.coding)
            found, constant = found.to_dense(), constant.to_dense()
        assert found.dtype == constant.dtype
        assert found.shape == constant.shape
        assert torch.equal(found, constant), name


def test_the_sample_has_every_coding():
    codings = {constant.coding for constant in spx_cases.constants().values() if isinstance(constant, PackedWeight)}
    assert codings >= {"bitmask", "delta8", "index16", "channels", "full"} - {"full"}


@pytest.mark.parametrize("density", [0.5, 0.2, 0.1, 0.05, 0.01])
def test_sparse_files_shrink(tmp_path, density):
    torch.manual_seed(0)
    weight = torch.randn(256, 128, 3, 3) * (torch.rand(256, 128, 3, 3) < density)
    sizes = write_spx(tmp_path / "a.spx", {}, {"w": weight})
    assert sizes.dense_bytes == 4 * weight.numel()
    assert sizes.file_bytes == (tmp_path / "a.spx").stat().st_size
    assert sizes.file_bytes <= (1.6 * density + 0.02) * sizes.dense_bytes
    assert torch.equal(read_spx(tmp_path / "a.spx").dense()["w"], weight)


def test_dense_weights_and_odd_types_stay_as_they_are(tmp_path):
    constants = {
        "dense": torch.ones(8, 8),
        "vector": torch.zeros(100),
        "integers": torch.zeros(10, 10, dtype=torch.int32),
        "strided": torch.arange(1.0, 13.0).reshape(3, 4).t(),
    }
    write_spx(tmp_path / "a.spx", {}, constants)
    found = read_spx(tmp_path / "a.spx").constants
    for name, constant in constants.items():
        assert isinstance(found[name], torch.Tensor)
        assert torch.equal(found[name], constant)


def test_negative_zero_is_a_zero_and_special_values_survive(tmp_path):
    weight = torch.full((16, 16), -0.0)
    weight[0, :4] = torch.tensor([float("nan"), float("inf"), float("-inf"), 1e-45])
    write_spx(tmp_path / "a.spx", {}, {"w": weight})
    packed = read_spx(tmp_path / "a.spx").constants["w"]
    assert isinstance(packed, PackedWeight)
    assert packed.nnz == 4
    assert torch.equal(packed.values.view(torch.int32), weight[0, :4].view(torch.int32))


def test_a_shared_tensor_is_stored_once(tmp_path):
    weight = torch.randn(64, 64)
    once = write_spx(tmp_path / "a.spx", {}, {"a": weight}).constant_bytes
    assert write_spx(tmp_path / "b.spx", {}, {"a": weight, "b": weight}).constant_bytes == once
    found = read_spx(tmp_path / "b.spx").constants
    assert torch.equal(found["a"], found["b"])


def test_names_that_look_like_parts_of_packed_weights(tmp_path):
    weight = torch.zeros(8, 64)
    weight[0, 0] = 1.0
    constants = {"w": weight, "w/values": torch.ones(3), "w/pattern.gaps": torch.ones(2)}
    write_spx(tmp_path / "a.spx", {}, constants)
    found = read_spx(tmp_path / "a.spx").dense()
    assert all(torch.equal(found[name], constant) for name, constant in constants.items())


def test_weights_that_are_next_to_empty_can_be_read_back(tmp_path):
    constants = {f"w{index}": torch.zeros(1024, 1024 * 8) for index in range(3)}
    sizes = write_spx(tmp_path / "a.spx", {}, constants)
    assert sizes.file_bytes < sizes.dense_bytes
    assert all(
        not tensor.any() and tensor.shape == (1024, 8192) for tensor in read_spx(tmp_path / "a.spx").dense().values()
    )


def test_tensors_are_mapped_and_the_file_cannot_change_through_them(sample):
    before = sample.read_bytes()
    contents = read_spx(sample)
    contents.constants["dense"].fill_(7.0)
    contents.constants["bitmask"].values.zero_()
    assert sample.read_bytes() == before
    assert not torch.equal(read_spx(sample).constants["dense"], contents.constants["dense"])


def test_the_official_reader_reads_the_tensors(sample):
    tensors = safetensors.torch.load_file(sample)
    assert torch.equal(tensors["dense"], spx_cases.constants()["dense"])


def test_reading_needs_no_model_code_and_no_pickle(sample):
    script = (
        "import sys; from sparse_engine.io import read_spx; import pickle\n"
        "def refuse(*args, **kwargs): raise SystemExit('unpickled')\n"
        "pickle.load = pickle.loads = pickle.Unpickler = refuse\n"
        "contents = read_spx(sys.argv[1]); print(len(contents.dense()))\n"
        "code = ('sparse_engine.train', 'sparse_engine.convert', 'torchvision')\n"
        "assert not any(name.startswith(code) for name in sys.modules)"
    )
    result = subprocess.run([sys.executable, "-c", script, sample], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert int(result.stdout) == len(spx_cases.constants())


@pytest.mark.parametrize("damage", spx_cases.DAMAGES, ids=lambda damage: damage.name)
def test_damage_gives_one_clear_error(sample, damage):
    sample.write_bytes(damage.apply(sample.read_bytes()))
    tracemalloc.start()
    try:
        with pytest.raises(FileFormatError) as caught:
            read_spx(sample)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    message = str(caught.value)
    assert re.search(damage.message, message), message
    assert "sample.spx" in message
    assert len(message) < 600
    assert peak < 40 * 2**20


def test_a_newer_file_says_what_it_needs(sample):
    parts = spx_cases.split(sample.read_bytes())
    parts.metadata.update(version="7", requires="sparse_engine >= 3.2.0")
    # A future version may change everything else, so nothing else may be looked at first.
    parts.metadata["something_new"] = "x"
    sample.write_bytes(parts.join())
    with pytest.raises(FileFormatError, match=r"version 7 needs sparse_engine >= 3\.2\.0; this is sparse_engine \d"):
        read_spx(sample)
    assert is_spx(sample)


def test_every_flipped_bit_is_found(tmp_path):
    path = spx_cases.write_tiny(tmp_path / "tiny.spx")
    content = path.read_bytes()
    read_spx(path)
    for position in range(8 * len(content)):
        flipped = bytearray(content)
        flipped[position // 8] ^= 1 << position % 8
        path.write_bytes(flipped)
        with pytest.raises(FileFormatError):
            read_spx(path)


def test_every_truncation_is_found(tmp_path):
    path = spx_cases.write_tiny(tmp_path / "tiny.spx")
    content = path.read_bytes()
    for length in range(len(content)):
        path.write_bytes(content[:length])
        with pytest.raises(FileFormatError):
            read_spx(path)


def test_without_verification_only_values_go_unchecked(sample):
    parts = spx_cases.split(sample.read_bytes())
    start, _ = parts.header["dense"]["data_offsets"]
    content = bytearray(sample.read_bytes())
    content[len(content) - len(parts.data) + start] ^= 1
    sample.write_bytes(content)
    with pytest.raises(FileFormatError, match="values of tensor 'dense' are damaged"):
        read_spx(sample)
    assert not torch.equal(read_spx(sample, verify=False).constants["dense"], spx_cases.constants()["dense"])


def test_what_is_not_json_is_refused_when_writing(tmp_path):
    for graph in ({"a": float("nan")}, {"a": {1, 2}}, {"a": torch.ones(1)}, {"a": 2**70}):
        with pytest.raises(FileFormatError):
            write_spx(tmp_path / "a.spx", graph, {})
    assert not list(tmp_path.iterdir())


def test_a_type_that_cannot_be_stored_is_refused(tmp_path):
    with pytest.raises(FileFormatError, match="constant 'c'"):
        write_spx(tmp_path / "a.spx", {}, {"c": torch.ones(2, dtype=torch.complex64)})
    assert not list(tmp_path.iterdir())


def test_a_missing_file_is_a_missing_file(tmp_path):
    with pytest.raises(FileNotFoundError):
        read_spx(tmp_path / "none.spx")
    assert not is_spx(tmp_path / "none.spx")
