"""The safetensors container against its official reader and writer, and its own checks."""

from __future__ import annotations

import pytest
import safetensors.torch
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sparse_engine.errors import FileFormatError
from sparse_engine.io import Container, write_container
from sparse_engine.io.container import DTYPES
from tests.io.spx_cases import raw


def _of_dtype(dtype: torch.dtype, shape: tuple[int, ...]) -> torch.Tensor:
    count = torch.empty(shape).numel() * dtype.itemsize
    generator = torch.Generator().manual_seed(count)
    content = torch.randint(0, 2 if dtype == torch.bool else 256, (count,), dtype=torch.uint8, generator=generator)
    return content.view(dtype).reshape(shape)


def _same(a: torch.Tensor, b: torch.Tensor) -> bool:
    return (
        a.dtype == b.dtype
        and a.shape == b.shape
        and (a.numel() == 0 or torch.equal(a.reshape(-1).view(torch.uint8), b.reshape(-1).view(torch.uint8)))
    )


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("shape", [(), (0,), (3,), (2, 0, 4), (2, 3, 5)], ids=str)
def test_each_dtype_and_shape(tmp_path, dtype, shape):
    path = tmp_path / "a.safetensors"
    tensor = _of_dtype(dtype, shape)
    assert write_container(path, {"t": tensor, "other": torch.ones(1)}, {"key": "é"}) == path.stat().st_size
    container = Container(path)
    assert container.metadata == {"key": "é"}
    assert _same(container.tensor("t"), tensor)
    assert _same(safetensors.torch.load_file(path)["t"], tensor)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=30, deadline=None)
@given(
    st.dictionaries(
        st.text("abé./ ", min_size=1, max_size=6),
        st.tuples(st.sampled_from([torch.float32, torch.uint8, torch.float64, torch.bfloat16]), st.integers(0, 7)),
        max_size=5,
    )
)
def test_files_of_the_official_writer(tmp_path, layout):
    path = tmp_path / "a.safetensors"
    tensors = {name: _of_dtype(dtype, (length,)) for name, (dtype, length) in layout.items()}
    safetensors.torch.save_file(tensors, path, metadata={"format": "pt"})
    found = Container(path).tensors()
    assert found.keys() == tensors.keys()
    assert all(_same(found[name], tensor) for name, tensor in tensors.items())


def test_a_tensor_at_an_odd_offset(tmp_path):
    path = tmp_path / "a.safetensors"
    header = {
        "u": {"dtype": "U8", "shape": [3], "data_offsets": [0, 3]},
        "f": {"dtype": "F32", "shape": [2], "data_offsets": [3, 11]},
    }
    values = torch.tensor([1.5, -2.0])
    path.write_bytes(raw(header, b"\x01\x02\x03" + values.numpy().tobytes()))
    assert torch.equal(Container(path).tensor("f"), values)


def test_written_tensors_are_aligned(tmp_path):
    tensors = {"a": torch.ones(3, dtype=torch.uint8), "b": torch.ones(3), "c": torch.ones(1, dtype=torch.float64)}
    write_container(tmp_path / "a.safetensors", tensors)
    for entry in Container(tmp_path / "a.safetensors").entries.values():
        assert entry.start % entry.dtype.itemsize == 0


def test_strided_and_expanded_tensors(tmp_path):
    tensors = {
        "t": torch.arange(6.0).reshape(2, 3).t(),
        "e": torch.ones(1, 3).expand(4, 3),
        "g": torch.ones(2, requires_grad=True),
    }
    write_container(tmp_path / "a.safetensors", tensors)
    found = Container(tmp_path / "a.safetensors").tensors()
    assert all(torch.equal(found[name], tensor) for name, tensor in tensors.items())


@pytest.mark.parametrize("name", ["__metadata__", "line\nbreak", "x" * 601])
def test_names_that_the_format_has_no_place_for(tmp_path, name):
    with pytest.raises(FileFormatError, match="name must be"):
        write_container(tmp_path / "a.safetensors", {name: torch.ones(1)})
    assert not list(tmp_path.iterdir())


def test_a_file_without_tensors(tmp_path):
    write_container(tmp_path / "a.safetensors", {})
    assert Container(tmp_path / "a.safetensors").tensors() == {}
