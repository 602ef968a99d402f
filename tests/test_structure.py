"""Structures: parsing, checking a mask, and detection from exact zeros."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sparse_engine.errors import StructureError
from sparse_engine.structure import NM, Block, Channel, FanIn, Structure, Unstructured, detect

ALL = [Unstructured(), Block((4, 1)), Block((16, 16)), NM(2, 4), FanIn(8), Channel()]


def block_mask(rows: int, cols: int, block: tuple[int, int], density: float, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    grid = torch.rand(-(-rows // block[0]), -(-cols // block[1]), generator=generator) < density
    return grid.repeat_interleave(block[0], 0).repeat_interleave(block[1], 1)[:rows, :cols]


def random_mask(shape: tuple[int, ...], density: float, seed: int = 0) -> torch.Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed)) < density


def nm_mask(rows: int, cols: int, n: int, m: int, seed: int = 0) -> torch.Tensor:
    scores = torch.rand(rows, cols // m, m, generator=torch.Generator().manual_seed(seed))
    kept = torch.zeros_like(scores, dtype=torch.bool).scatter(-1, scores.topk(n, dim=-1).indices, True)
    return kept.reshape(rows, cols)


def fan_in_mask(rows: int, cols: int, k: int, seed: int = 0) -> torch.Tensor:
    scores = torch.rand(rows, cols, generator=torch.Generator().manual_seed(seed))
    return torch.zeros(rows, cols, dtype=torch.bool).scatter(1, scores.topk(k, dim=1).indices, True)


@pytest.mark.parametrize("structure", ALL, ids=str)
def test_text_round_trip(structure):
    assert Structure.parse(str(structure)) == structure
    assert Structure.parse(structure) is structure


@pytest.mark.parametrize(
    "text, expected",
    [("2:4", NM(2, 4)), ("16x1", Block((16, 1))), ("Block((4, 1))", Block((4, 1))), ("block4x1", Block((4, 1)))],
)
def test_other_spellings(text, expected):
    assert Structure.parse(text) == expected


@pytest.mark.parametrize("text", ["", "blocks", "block(4)", "block(0, 1)", "nm(5, 4)", "nm(2)", "fan_in", "channel(3)"])
def test_parse_refuses(text):
    with pytest.raises(StructureError, match="no structure"):
        Structure.parse(text)


@pytest.mark.parametrize(
    "make",
    [
        lambda: Block((0, 4)),
        lambda: Block((4, 1, 1)),
        lambda: Block(4),
        lambda: NM(0, 4),
        lambda: NM(5, 4),
        lambda: FanIn(-1),
    ],
)
def test_impossible_structures_are_refused(make):
    with pytest.raises(StructureError):
        make()


@pytest.mark.parametrize(
    "structure, mask, numbers",
    [
        (Block((4, 1)), random_mask((37, 41), 0.4), r"\d+ of 410 blocks"),
        (NM(2, 4), random_mask((37, 41), 0.6), r"\d+ of 407 groups of 4"),
        (FanIn(8), random_mask((37, 41), 0.4), r"\d+ of 37 rows"),
        (Channel(), random_mask((37, 41), 0.4), r"\d+ weights are removed"),
    ],
    ids=["block", "nm", "fan_in", "channel"],
)
def test_check_refuses_and_names_the_numbers(structure, mask, numbers):
    with pytest.raises(StructureError, match=numbers):
        structure.check(mask)


def test_check_names_the_first_block_that_does_not_fit():
    mask = torch.ones(8, 8, dtype=torch.bool)
    mask[5, 3] = False
    with pytest.raises(StructureError, match=r"rows 4\.\.7, columns 3\.\.3"):
        Block((4, 1)).check(mask)


@pytest.mark.parametrize(
    "structure, mask",
    [
        (Block((4, 3)), block_mask(13, 11, (4, 3), 0.5)),
        (NM(2, 4), nm_mask(8, 12, 2, 4)),
        (NM(2, 4), torch.zeros(8, 13, dtype=torch.bool)),
        (FanIn(3), fan_in_mask(5, 7, 3)),
        (FanIn(0), torch.zeros(5, 7, dtype=torch.bool)),
        (Channel(), torch.zeros(0, 7, dtype=torch.bool)),
        (Block((4, 1)), torch.zeros(7, 0, dtype=torch.bool)),
        (Unstructured(), random_mask((5, 7), 0.5)),
    ],
)
def test_check_accepts(structure, mask):
    structure.check(mask)


def test_channels_of_a_convolution_include_all_taps():
    mask = torch.ones(6, 4, 3, 3, dtype=torch.bool)
    mask[:, 2] = False
    Channel().check(mask)
    mask[:, 1, 0, 0] = False
    with pytest.raises(StructureError, match="6 weights"):
        Channel().check(mask)


@pytest.mark.parametrize("tensor", [torch.ones(3), torch.tensor(1.0)])
def test_one_dimension_is_refused(tensor):
    with pytest.raises(StructureError, match="two dimensions"):
        detect(tensor)


@pytest.mark.parametrize(
    "block", [(64, 64), (32, 32), (16, 16), (16, 1), (8, 1), (4, 1), (1, 4), (1, 16), (64, 1), (4, 4)], ids=str
)
@pytest.mark.parametrize("shape", [(260, 260), (131, 197)], ids=str)
def test_detects_blocks(block, shape):
    mask = block_mask(*shape, block, 0.2, seed=3)
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(1)) * mask
    assert detect(weight) == Block(block)


@pytest.mark.parametrize("n, m", [(2, 4), (1, 4), (4, 8), (1, 16), (2, 16)])
def test_detects_nm(n, m):
    assert detect(nm_mask(64, 128, n, m)) == NM(n, m)


def test_detects_fan_in():
    assert detect(fan_in_mask(64, 131, 13)) == FanIn(13)


def test_detects_channels():
    weight = torch.randn(32, 16, 3, 3)
    weight[4:9] = 0
    weight[:, 5] = -0.0
    assert detect(weight) == Channel()


@pytest.mark.parametrize("density", [0.02, 0.1, 0.5, 0.9, 0.99])
def test_random_zeros_are_unstructured(density):
    assert detect(random_mask((120, 130), density)) == Unstructured()


def test_nothing_removed_or_everything_removed_is_unstructured():
    assert detect(torch.ones(8, 8)) == Unstructured()
    assert detect(torch.zeros(8, 8)) == Unstructured()
    assert detect(torch.zeros(0, 8)) == Unstructured()


def test_minus_zero_is_a_zero_and_nan_is_kept():
    weight = torch.full((64, 64), -0.0)
    weight[0:16] = float("nan")
    assert detect(weight) == Channel()


@given(st.integers(1, 40), st.integers(1, 40), st.floats(0.0, 1.0), st.integers(0, 2**16))
def test_what_is_detected_covers_every_kept_weight(rows, cols, density, seed):
    from sparse_engine.packed import PackedWeight

    mask = random_mask((rows, cols), density, seed)
    packed = PackedWeight.from_dense(mask.float())
    assert (packed.mask() | ~mask).all()
