"""Constraints between axes: what they take back, and that what is left is consistent."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sparse_engine.prune.structured.axes import Axes, EqualCounts, Grid, Mapping


def settled(axes: Axes, **removed: list[int]) -> dict[int, list[int]]:
    axes.resolve()
    wish = {axis: np.zeros(axes.sizes[axis], dtype=bool) for axis in axes.roots()}
    for axis, index in removed.items():
        wish[axes.find(int(axis[1:]))][index] = True
    return {axis: np.flatnonzero(vector).tolist() for axis, vector in axes.settle(wish).items()}


def test_a_mapping_removes_both_sides_or_none():
    axes = Axes()
    whole, part = axes.new(5), axes.new(2)
    axes.constraints.append(Mapping(whole, np.array([3, 4]), part, np.array([0, 1])))
    assert settled(axes, a0=[0, 3], a1=[0, 1]) == {whole: [0, 3], part: [0]}


def test_a_grid_keeps_what_is_not_a_whole_row_or_column():
    axes = Axes()
    flat, rows, columns = axes.new(6), axes.new(2), axes.new(3)
    axes.constraints.append(Grid(flat, (rows, columns), (2, 3)))
    left = settled(axes, a0=[0, 1, 2, 4], a1=[0, 1], a2=[0, 1, 2])
    assert left == {flat: [0, 1, 2, 4], rows: [0], columns: [1]}


def test_equal_counts_prefer_positions_that_leave_every_part():
    axes = Axes()
    axis = axes.new(8)
    axes.constraints.append(EqualCounts(axis, (np.arange(4), np.arange(4, 8))))
    assert settled(axes, a0=[0, 2, 3, 6]) == {axis: [2, 6]}
    assert settled(axes, a0=[0, 2, 3, 5, 6]) == {axis: [0, 2, 5, 6]}


def test_every_axis_keeps_one_index_and_frozen_ones_stay():
    axes = Axes()
    first, second = axes.new(3), axes.new(4)
    axes.freeze(second, np.array([2]))
    assert settled(axes, a0=[0, 1, 2], a1=[0, 1, 2, 3]) == {first: [1, 2], second: [0, 1, 3]}


def test_joined_axes_are_one():
    axes = Axes()
    first, second, third = axes.new(3), axes.new(3), axes.new(3)
    axes.join(second, third)
    axes.join(first, second)
    assert axes.find(third) == axes.find(first)
    assert settled(axes, a2=[1]) == {first: [1]}
    with pytest.raises(ValueError, match="sizes 3 and 4"):
        axes.join(first, axes.new(4))


@given(st.integers(1, 4), st.integers(1, 4), st.data())
def test_a_settled_grid_is_a_grid(rows: int, columns: int, data: st.DataObject):
    """Whatever is wished for: the kept indices of the flat axis are the product of the kept rows and columns."""
    axes = Axes()
    flat, a, b = axes.new(rows * columns), axes.new(rows), axes.new(columns)
    axes.constraints.append(Grid(flat, (a, b), (rows, columns)))
    axes.resolve()
    wish = {
        axis: np.array(data.draw(st.lists(st.booleans(), min_size=axes.sizes[axis], max_size=axes.sizes[axis])))
        for axis in (flat, a, b)
    }
    asked = {axis: vector.copy() for axis, vector in wish.items()}
    left = axes.settle(wish)
    kept = np.outer(~left[a], ~left[b]).reshape(-1)
    assert np.array_equal(~left[flat], kept)
    assert all(not (left[axis] & ~asked[axis]).any() for axis in left)
    assert kept.any()
