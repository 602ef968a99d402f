"""Exact counts, deterministic ties, structures, distributions, schedules."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sparse_engine.errors import PruneError
from sparse_engine.prune import Cubic, Iterative, OneShot, Periodic, layer_counts, select, top_k_mask
from sparse_engine.structure import NM, Block, Channel, FanIn, Unstructured


@given(st.integers(1, 200), st.data())
def test_top_k_keeps_exactly_k_and_the_first_among_equals(n, data):
    k = data.draw(st.integers(0, n))
    values = torch.tensor(data.draw(st.lists(st.sampled_from([0.0, 1.0, 2.0, -torch.inf]), min_size=n, max_size=n)))
    kept = top_k_mask(values, k)
    assert int(kept.sum()) == k
    order = sorted(range(n), key=lambda i: (-values[i].item(), i))[:k]
    assert sorted(order) == kept.nonzero().flatten().tolist()


def test_top_k_refuses_what_it_cannot_do():
    with pytest.raises(PruneError, match="cannot keep 4 of 3"):
        top_k_mask(torch.zeros(3), 4)
    with pytest.raises(PruneError, match="1 of 3 scores are NaN"):
        top_k_mask(torch.tensor([0.0, float("nan"), 1.0]), 1)


@given(st.integers(0, 3), st.floats(0, 1))
def test_global_counts_are_exact_whatever_the_ties(seed, density):
    generator = torch.Generator().manual_seed(seed)
    scores = {f"l{i}": torch.randint(3, (7, 5 + i), generator=generator).float() for i in range(3)}
    total = sum(s.numel() for s in scores.values())
    want = round(density * total)
    kept = select(scores, want)
    assert sum(int(m.sum()) for m in kept.values()) == want
    again = select(scores, want)
    assert all(torch.equal(kept[n], again[n]) for n in kept)


@given(
    st.sampled_from([Block((4, 1)), Block((1, 4)), Block((2, 3)), Channel(), Unstructured()]),
    st.tuples(st.integers(1, 13), st.integers(1, 13)),
    st.floats(0, 1),
)
def test_masks_fit_their_structure_and_never_exceed_the_count(structure, shape, density):
    score = torch.rand(shape)
    want = round(density * score.numel())
    mask = select({"w": score}, want, structure)["w"]
    structure.check(mask)
    kept = int(mask.sum())
    largest = {"block": math.prod(getattr(structure, "shape", (1,))), "channel": shape[1]}.get(structure.name, 1)
    assert kept <= want
    assert kept > want - largest or mask.all()


@given(st.tuples(st.integers(1, 9), st.integers(1, 19)))
def test_n_of_m_and_fan_in_keep_their_number_everywhere(shape):
    score = torch.rand(shape)
    mask = select({"w": score}, 0, NM(2, 4))["w"]
    NM(2, 4).check(mask)
    groups = [mask[:, i : i + 4] for i in range(0, shape[1], 4)]
    assert all((g.sum(1) == min(2, g.shape[1])).all() for g in groups)
    k = min(3, shape[1])
    FanIn(k).check(select({"w": score}, 0, FanIn(k))["w"])


def test_groups_are_ranked_by_their_mean():
    score = torch.tensor([[1.0, 1.0, 9.0], [1.0, 1.0, 0.0]])
    # blocks of 2×2: mean 1 on the left; the cut block on the right has mean 4.5
    mask = select({"w": score}, 2, Block((2, 2)))["w"]
    assert mask.tolist() == [[False, False, True], [False, False, True]]


def test_keep_one_leaves_something_of_every_layer_at_the_same_total():
    scores = {"small": torch.zeros(3, 3), "large": torch.ones(10, 10)}
    kept = select(scores, 20, keep_one=True)
    assert int(kept["small"].sum()) == 1
    assert sum(int(m.sum()) for m in kept.values()) == 20
    assert int(select(scores, 20)["small"].sum()) == 0


SHAPES = {"conv": (64, 3, 3, 3), "wide": (512, 512, 3, 3), "fc": (10, 512)}


@pytest.mark.parametrize("distribution", ["uniform", "erk", "erk_kernel"])
@given(density=st.floats(0, 1))
def test_layer_counts_add_up_exactly(distribution, density):
    counts = layer_counts(SHAPES, density, distribution)
    sizes = {name: math.prod(shape) for name, shape in SHAPES.items()}
    assert sum(counts.values()) == round(density * sum(sizes.values()))
    assert all(0 <= counts[name] <= sizes[name] for name in SHAPES)


def test_erk_densities_are_proportional_to_their_definition():
    shapes = {"a": (100, 200), "b": (300, 400, 3, 3)}
    counts = layer_counts(shapes, 0.01, "erk_kernel")
    a = counts["a"] / (100 * 200)
    b = counts["b"] / (300 * 400 * 9)
    want = ((100 + 200) / (100 * 200)) / ((300 + 400 + 6) / (300 * 400 * 9))
    assert a / b == pytest.approx(want, rel=0.02)
    plain = layer_counts(shapes, 0.01, "erk")
    ratio = (plain["a"] / 20000) / (plain["b"] / 1080000)
    assert ratio == pytest.approx(((300) / (20000)) / (700 / 120000), rel=0.02)


def test_erk_saturates_small_layers():
    counts = layer_counts(SHAPES, 0.2, "erk")
    assert counts["conv"] == 64 * 27
    assert counts["wide"] < 0.2 * 512 * 512 * 9


def test_a_map_fixes_some_layers_and_shares_the_rest():
    counts = layer_counts(SHAPES, 0.1, {"conv": 0.0, "re:fc": 0.5})
    assert counts["conv"] == 64 * 27
    assert counts["fc"] == 2560
    assert sum(counts.values()) == round(0.1 * sum(math.prod(s) for s in SHAPES.values()))
    with pytest.raises(PruneError, match="'head'"):
        layer_counts(SHAPES, 0.1, {"head": 0.5})
    with pytest.raises(PruneError, match="would have to keep -"):
        layer_counts(SHAPES, 0.01, {"wide": 0.0})
    with pytest.raises(PruneError, match="uniformly"):
        layer_counts(SHAPES, 0.1, "uniformly")


def test_schedules_end_where_they_should():
    assert OneShot().densities(0.1) == [0.1]
    assert Iterative(3).densities(0.001) == pytest.approx([0.1, 0.01, 0.001])
    ladder = Iterative(7).densities(0.05)
    assert ladder[-1] == 0.05
    assert all(a / b == pytest.approx(ladder[0] ** -1) for a, b in itertools.pairwise(ladder))
    cubic = Cubic(begin=10, end=110, every=10, initial=0.2)
    assert cubic.sparsity(0, 0.9) == 0.2
    assert cubic.sparsity(60, 0.9) == pytest.approx(0.9 + (0.2 - 0.9) * 0.5**3)
    assert cubic.sparsity(500, 0.9) == 0.9
    assert cubic.due(110)
    assert not cubic.due(111)
    assert len([s for s in range(200) if cubic.due(s)]) == 11
    periodic = Periodic.iterative(rounds=3, every=500)
    assert [s for s in range(2000) if periodic.due(s)] == [0, 500, 1000]
    assert [periodic.sparsity(s, 0.999) for s in (0, 500, 1000)] == pytest.approx([0.9, 0.99, 0.999])
    for bad in (lambda: Iterative(0), lambda: Cubic(5, 5), lambda: Periodic.iterative(0, 1)):
        with pytest.raises(PruneError):
            bad()
