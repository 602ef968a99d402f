"""Packed weights: bit-for-bit round trips, sizes, the compressed-row view, transposition, and damaged states."""

import copy
import pickle

import numpy
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sparse_engine.errors import FileFormatError, ShapeError, StructureError
from sparse_engine.packed import PackedWeight
from sparse_engine.structure import NM, Block, Channel, FanIn, Unstructured


def random_weight(shape, density, seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(shape, generator=generator) * (torch.rand(shape, generator=generator) < density)).to(dtype)


def structured_weight(structure, shape, seed=0):
    """A random weight that fits the structure and does not divide evenly into it."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(shape, generator=generator)
    matrix = weight.reshape(shape[0], -1)
    rows, cols = matrix.shape
    if isinstance(structure, Block):
        grid = torch.rand(-(-rows // structure.shape[0]), -(-cols // structure.shape[1]), generator=generator) < 0.4
        matrix *= grid.repeat_interleave(structure.shape[0], 0).repeat_interleave(structure.shape[1], 1)[:rows, :cols]
    elif isinstance(structure, NM):
        for start in range(0, cols, structure.m):
            group = matrix[:, start : start + structure.m]
            drop = torch.rand(group.shape, generator=generator).argsort(1)[:, structure.n :]
            group.scatter_(1, drop, 0.0)
    elif isinstance(structure, FanIn):
        drop = torch.rand(matrix.shape, generator=generator).argsort(1)[:, structure.k :]
        matrix.scatter_(1, drop, 0.0)
    elif isinstance(structure, Channel):
        weight[torch.rand(shape[0], generator=generator) < 0.4] = 0
        weight[:, torch.rand(shape[1], generator=generator) < 0.4] = 0
    else:
        matrix *= torch.rand(matrix.shape, generator=generator) < 0.3
    return weight


def bits(tensor):
    return tensor.contiguous().view({2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()])


def same_bits(left, right):
    return left.dtype == right.dtype and left.shape == right.shape and torch.equal(bits(left), bits(right))


STRUCTURES = [
    Unstructured(),
    *(Block(shape) for shape in [(1, 4), (4, 1), (8, 1), (16, 1), (16, 16), (32, 32), (64, 64), (3, 5)]),
    NM(2, 4),
    NM(1, 16),
    FanIn(5),
    Channel(),
]
SHAPES = [(37, 41), (64, 96), (1, 7), (7, 1), (20, 12, 3, 3), (33, 1, 5, 5), (9, 5, 1, 1)]


def fits(structure, shape):
    return not isinstance(structure, FanIn) or numpy.prod(shape[1:]) >= structure.k


CASES = [(structure, shape) for structure in STRUCTURES for shape in SHAPES if fits(structure, shape)]


@pytest.mark.parametrize("structure, shape", CASES, ids=str)
def test_round_trip_is_bit_for_bit(structure, shape):
    weight = structured_weight(structure, shape)
    packed = PackedWeight.from_dense(weight, structure=structure)
    assert packed.structure == structure
    assert same_bits(packed.to_dense(), weight + 0.0)
    again = PackedWeight.from_state(*packed.state())
    assert same_bits(again.to_dense(), packed.to_dense())
    assert again.structure == structure


@pytest.mark.parametrize("structure, shape", CASES, ids=str)
def test_csr_view_and_transpose(structure, shape):
    weight = structured_weight(structure, shape)
    packed = PackedWeight.from_dense(weight, structure=structure)
    matrix = weight.reshape(shape[0], -1)
    for view, expected in ((packed, matrix), (packed.transpose(), matrix.T), (packed.transpose().transpose(), matrix)):
        assert view.values is packed.values
        row_ptr, cols, order = view.csr()
        assert row_ptr.dtype == torch.int64
        assert cols.dtype == torch.int32
        assert row_ptr[0] == 0
        assert row_ptr[-1] == len(cols) == packed.nnz
        values = packed.values if order is None else packed.values[order]
        rows = torch.repeat_interleave(torch.arange(len(row_ptr) - 1), row_ptr.diff())
        flat = rows * expected.shape[1] + cols
        assert (flat.diff() > 0).all()
        rebuilt = torch.zeros(expected.numel()).index_put((flat,), values).reshape(expected.shape)
        assert torch.equal(rebuilt, expected)
        assert torch.equal(view.to_dense().reshape(expected.shape), expected)
        assert same_bits(PackedWeight.from_state(*view.state()).to_dense(), view.to_dense())


@pytest.mark.parametrize("structure, shape", CASES, ids=str)
def test_block_view(structure, shape):
    packed = PackedWeight.from_dense(structured_weight(structure, shape), structure=structure)
    row_ptr, cols, order = packed.blocks()
    block_rows, block_cols = packed.block
    assert order is None
    assert len(cols) * block_rows * block_cols == packed.values.numel()
    grid_rows = torch.repeat_interleave(torch.arange(len(row_ptr) - 1), row_ptr.diff())
    padded = torch.zeros((len(row_ptr) - 1) * block_rows, (int(cols.max()) + 1 if len(cols) else 0) * block_cols)
    for cell, values in enumerate(packed.values.reshape(-1, block_rows, block_cols)):
        row, col = int(grid_rows[cell]) * block_rows, int(cols[cell]) * block_cols
        padded[row : row + block_rows, col : col + block_cols] = values
    dense = packed.to_dense().reshape(shape[0], -1)
    width = min(padded.shape[1], dense.shape[1])
    assert torch.equal(padded[: shape[0], :width], dense[:, :width])
    assert not dense[:, width:].any()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64, torch.float32])
def test_dtypes_and_special_values(dtype):
    weight = random_weight((50, 60), 0.2, dtype=dtype)
    weight[0, 0], weight[1, 1], weight[2, 2], weight[3, 3] = float("nan"), float("inf"), float("-inf"), -0.0
    packed = PackedWeight.from_dense(weight)
    assert packed.dtype == dtype
    assert not packed.mask()[3, 3]
    assert packed.mask()[0, 0]
    assert packed.mask()[1, 1]
    expected = weight.clone()
    expected[weight == 0] = 0.0
    assert same_bits(packed.to_dense(), expected)


def test_a_mask_keeps_zeros_and_drops_what_it_removes():
    weight = torch.tensor([[1.0, -0.0], [3.0, 4.0]])
    mask = torch.tensor([[True, True], [False, True]])
    packed = PackedWeight.from_dense(weight, mask)
    assert packed.nnz == 3
    assert same_bits(packed.to_dense(), torch.tensor([[1.0, -0.0], [0.0, 4.0]]))
    assert torch.equal(packed.mask(), mask)


def test_a_mask_is_never_widened_by_detection():
    mask = torch.zeros(64, 64, dtype=torch.bool)
    mask[:32] = True
    mask[3, 5] = False
    assert torch.equal(PackedWeight.from_dense(torch.randn(64, 64), mask).mask(), mask)


def test_misfits_are_refused():
    weight = random_weight((16, 16), 0.5)
    with pytest.raises(StructureError, match="blocks are partly kept"):
        PackedWeight.from_dense(weight, weight != 0, Block((4, 4)))
    with pytest.raises(StructureError, match="groups of 4"):
        PackedWeight.from_dense(weight, structure="nm(1, 4)")
    with pytest.raises(StructureError, match=r"mask of shape \(3, 16\)"):
        PackedWeight.from_dense(weight, torch.ones(3, 16, dtype=torch.bool))
    with pytest.raises(StructureError, match=r"torch\.int64"):
        PackedWeight.from_dense(torch.ones(3, 3, dtype=torch.int64))
    with pytest.raises(StructureError, match="bias"):
        PackedWeight.from_dense(weight, bias=torch.ones(3))


@pytest.mark.parametrize("shape", [(0, 5), (5, 0), (0, 0), (4, 0, 3, 3), (0, 4, 3, 3)])
@pytest.mark.parametrize("structure", [Unstructured(), Block((4, 1)), NM(2, 4), Channel(), None])
def test_empty_shapes(shape, structure):
    packed = PackedWeight.from_dense(torch.zeros(shape), structure=structure)
    assert packed.nnz == 0
    assert packed.to_dense().shape == shape
    assert packed.csr().row_ptr.tolist() == [0] * (shape[0] + 1)
    assert PackedWeight.from_state(*packed.state()).to_dense().shape == shape
    assert packed.transpose().to_dense().shape == (packed.columns, packed.rows)


@pytest.mark.parametrize("structure", [Unstructured(), Block((4, 1)), NM(2, 4), FanIn(0), Channel()], ids=str)
def test_a_layer_without_weights(structure):
    packed = PackedWeight.from_dense(torch.zeros(9, 10), structure=structure)
    assert packed.nnz == 0
    assert packed.sparsity == 1.0
    assert torch.equal(packed.to_dense(), torch.zeros(9, 10))
    assert torch.equal(PackedWeight.from_state(*packed.state()).to_dense(), torch.zeros(9, 10))


@pytest.mark.parametrize("sparsity", [0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.98, 0.99])
@pytest.mark.parametrize("shape", [(512, 512, 3, 3), (1000, 2048), (64, 64)], ids=str)
def test_bytes_shrink_with_density(sparsity, shape):
    packed = PackedWeight.from_dense(random_weight(shape, 1 - sparsity))
    assert packed.structure == Unstructured()
    assert packed.nbytes <= 1.6 * packed.density * packed.dense_nbytes + 0.02 * packed.dense_nbytes
    tensors, _ = packed.state()
    assert packed.nbytes == sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())


def test_every_coding_is_chosen_somewhere():
    seen = {PackedWeight.from_dense(random_weight((300, 400), density)).coding for density in (1.1, 0.5, 0.05, 0.002)}
    seen.add(PackedWeight.from_dense(random_weight((300, 400), 0.0005)).coding)
    wide = torch.zeros(2, 200_000)
    wide[:, ::5000] = 1
    seen.add(PackedWeight.from_dense(wide, structure=Unstructured()).coding)
    assert seen == {"full", "bitmask", "delta8", "index16", "index32"}


def test_bias_travels_with_the_weight():
    bias = torch.randn(9)
    packed = PackedWeight.from_dense(random_weight((9, 10), 0.5), bias=bias)
    assert torch.equal(PackedWeight.from_state(*packed.state()).bias, bias)
    assert torch.equal(packed.with_values(packed.values * 2).bias, bias)
    assert packed.with_bias(None).bias is None
    with pytest.raises(ShapeError, match="9 rows"):
        packed.with_bias(torch.ones(3))


def test_with_values_shares_the_pattern_and_checks_the_count():
    packed = PackedWeight.from_dense(random_weight((9, 10), 0.5))
    doubled = packed.with_values(packed.values.double() * 2)
    assert doubled.pattern is packed.pattern
    assert torch.equal(doubled.to_dense(), packed.to_dense().double() * 2)
    with pytest.raises(ShapeError, match=str(packed.nnz)):
        packed.with_values(packed.values[1:])


def test_to_dense_is_differentiable_in_the_values():
    packed = PackedWeight.from_dense(structured_weight(Block((3, 5)), (10, 11)).double(), structure=Block((3, 5)))
    values = packed.values.clone().requires_grad_()
    assert torch.autograd.gradcheck(lambda v: packed.with_values(v).to_dense(), values)


def test_gather_reads_at_the_pattern():
    for structure in (Unstructured(), Block((3, 5)), Channel()):
        packed = PackedWeight.from_dense(structured_weight(structure, (10, 11)), structure=structure)
        dense = torch.randn(10, 11)
        assert torch.equal(packed.with_values(packed.gather(dense)).to_dense(), dense * packed.mask())


def test_copies_and_pickles():
    packed = PackedWeight.from_dense(random_weight((9, 10), 0.5), bias=torch.ones(9)).transpose()
    for other in (copy.deepcopy(packed), pickle.loads(pickle.dumps(packed))):
        assert torch.equal(other.to_dense(), packed.to_dense())
        assert other.values is not packed.values


def test_packing_does_not_keep_the_dense_weight_alive():
    weight = random_weight((64, 64), 0.1)
    packed = PackedWeight.from_dense(weight)
    assert packed.values.untyped_storage().nbytes() == packed.values.numel() * 4
    weight.zero_()
    assert packed.values.any()


def damaged_states():
    base = PackedWeight.from_dense(random_weight((40, 50), 0.05, seed=5), structure="unstructured")
    bitmask = PackedWeight.from_dense(random_weight((41, 53), 0.5))
    index = PackedWeight.from_dense(random_weight((300, 400), 0.0005))
    channel = PackedWeight.from_dense(structured_weight(Channel(), (37, 41)), structure=Channel())
    transposed = base.transpose()
    assert (base.coding, bitmask.coding, index.coding) == ("delta8", "bitmask", "index16")

    def change(packed, tensors=None, **meta):
        own, own_meta = packed.state()
        own.update(tensors or {})
        return {name: tensor for name, tensor in own.items() if tensor is not None}, {**own_meta, **meta}

    def edited(tensor, position, value):
        tensor = tensor.clone()
        tensor[position] = value
        return tensor

    yield "values missing", change(base, {"values": None}), "missing"
    yield "values short", change(base, {"values": base.values[:-1]}), "values for a pattern"
    yield "values of integers", change(base, {"values": base.values.int()}), "dtype"
    yield "values two-dimensional", change(base, {"values": base.values[None]}), "one-dimensional"
    yield "unknown tensor", change(base, {"more": torch.ones(1)}), "unknown"
    yield "unknown structure", change(base, structure="cube(3)"), "no structure"
    yield "unknown coding", change(base, coding="zip"), "coding"
    for value in (["bitmask"], {"bitmask": 1}, None, 3):
        yield f"coding {value!r}", change(base, coding=value), "unknown coding"
        yield f"structure {value!r}", change(base, structure=value), "not a text"
        yield f"shape {value!r}", change(base, shape=value), "no shape"
        yield f"description {value!r}", (base.state()[0], value), "expected"
        yield f"tensors {value!r}", (value, base.state()[1]), "no mapping|unknown tensors"
        yield f"values {value!r}", change(base, {"values": value or 0}), "one-dimensional"
    yield "tensor names of two kinds", change(base, {3: torch.ones(1)}), "no mapping"
    yield "other coding", change(base, coding="bitmask"), "unknown tensors"
    yield "channel coding on unstructured", change(channel, structure="unstructured"), "does not belong"
    yield "negative shape", change(base, shape=[-40, 50]), "shape"
    yield "huge shape", change(base, shape=[2**40, 2**40]), "shape"
    yield "fractional shape", change(base, shape=[40.0, 50]), "shape"
    yield "smaller shape", change(base, shape=[2, 50]), "of 100"
    yield "gaps end in an escape", change(base, {"pattern.gaps": edited(base.pattern["gaps"], -1, 255)}), "inside a gap"
    yield "bitmask short", change(bitmask, {"pattern.bits": bitmask.pattern["bits"][:-1]}), "bytes for"
    yield "bitmask too long", change(bitmask, {"pattern.bits": edited(bitmask.pattern["bits"], -1, 255)}), "beyond"
    cols, counts = index.pattern["cols"].int(), index.pattern["counts"]
    yield "columns as int32", change(index, {"pattern.cols": cols}), "dtype"
    yield "column out of range", change(index, {"pattern.cols": edited(cols, 0, 400).to(torch.uint16)}), "reach"
    yield "counts too large", change(index, {"pattern.counts": edited(counts, 0, 255)}), "sum"
    yield "rows out of range", change(channel, {"pattern.rows": edited(channel.pattern["rows"], -1, 200)}), "ascend"
    yield "rows unordered", change(channel, {"pattern.rows": channel.pattern["rows"].flip(0)}), "ascend"
    yield "order out of range", change(transposed, {"order": edited(transposed.order, 0, 10**6)}), "permutation"
    yield "order repeats", change(transposed, {"order": transposed.order * 0}), "permutation"
    yield "mask breaks N:M", change(base, structure="nm(1, 32)"), "groups"
    yield "no meta", (base.state()[0], {}), "keys"


@pytest.mark.parametrize("state, message", [pytest.param(s, m, id=name) for name, s, m in damaged_states()])
def test_damaged_states_are_refused(state, message):
    with pytest.raises(FileFormatError, match=message):
        PackedWeight.from_state(*state)


@settings(max_examples=60, deadline=None)
@given(
    st.integers(0, 30),
    st.integers(0, 30),
    st.integers(1, 6),
    st.integers(1, 6),
    st.floats(0.0, 1.0),
    st.integers(0, 2**16),
)
def test_any_shape_block_and_density(rows, cols, block_rows, block_cols, density, seed):
    weight = random_weight((rows, cols), density, seed)
    for structure in (Unstructured(), Block((block_rows, block_cols)), Channel(), None):
        packed = PackedWeight.from_dense(weight, structure=structure)
        assert torch.equal(packed.to_dense(), weight)
        assert torch.equal(packed.transpose().to_dense(), weight.T)
        assert torch.equal(PackedWeight.from_state(*packed.state()).to_dense(), weight)


@settings(max_examples=100, deadline=None)
@given(st.data())
def test_random_damage_is_refused_or_harmless(data):
    """Whatever bytes the pattern holds, it either describes a matrix or is refused; nothing is read outside."""
    density = data.draw(st.sampled_from([0.0, 0.003, 0.05, 0.5]))
    packed = PackedWeight.from_dense(random_weight((30, 70), density, seed=1), structure="unstructured")
    tensors, meta = packed.state()
    names = [name for name in tensors if name.startswith("pattern.") and tensors[name].numel()]
    if not names:
        return
    name = data.draw(st.sampled_from(names))
    raw = bytearray(tensors[name].numpy().tobytes())
    for _ in range(data.draw(st.integers(1, 3))):
        raw[data.draw(st.integers(0, len(raw) - 1))] = data.draw(st.integers(0, 255))
    tensors[name] = torch.frombuffer(raw, dtype=tensors[name].dtype)
    try:
        again = PackedWeight.from_state(tensors, meta)
    except FileFormatError:
        return
    assert again.to_dense().shape == (30, 70)
