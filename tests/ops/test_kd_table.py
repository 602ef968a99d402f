"""`kd_table_rows` against fp64, full and top-k tables, what is stored, PyTorch's own checks of the op, and refusals.

The Triton candidate runs over the same cases in `tests/kernels/test_ops.py`.
"""

from __future__ import annotations

import pytest
import torch

from sparse_engine.errors import BackendError, ShapeError
from sparse_engine.ops.kd_table import kd_table_rows
from tests.helpers import assert_close_to_fp64
from tests.kd_cases import TABLE_CASES, table_case


@pytest.mark.parametrize("case", TABLE_CASES, ids=str)
def test_losses_gradient_and_table(case):
    data = table_case(*case)
    rows = kd_table_rows(*data.call(), index=data.index, alpha=data.alpha, gradient=True)
    data.check(rows)


def test_float64_is_computed_in_float64():
    data = table_case(6, 11, None, 0.3)
    z, y, table, samples, scale = data.call()
    rows = kd_table_rows(z.double(), y, table.double(), samples, scale.double(), alpha=0.3, gradient=True)
    assert rows.hard.dtype == rows.gradient.dtype == torch.float64
    assert_close_to_fp64(rows.gradient, data.gradient, 1e-7)


def test_without_a_gradient():
    data = table_case(6, 11, None, 0.3)
    assert kd_table_rows(*data.call(), alpha=0.3).gradient.shape == (0, 11)


@pytest.mark.parametrize("top_k", [None, 4])
def test_pytorch_checks_the_op(top_k):
    data = table_case(5, 9, top_k, 0.4)
    z, y, table, samples, scale = data.call()
    inputs = (z, y, table, data.index, samples, scale, 0.4, -100, True, "auto")
    torch.library.opcheck(torch.ops.sparse_engine.kd_table_rows, inputs)


def test_refusals():
    z, y, table, samples, scale = table_case(5, 9, None, 0.4).call()
    with pytest.raises(ShapeError, match=r"scale has shape \(4,\), \(5,\) expected"):
        kd_table_rows(z, y, table, samples, scale[:4], alpha=0.4)
    with pytest.raises(ShapeError, match="table has shape"):
        kd_table_rows(z, y, table[:, :8], samples, scale, alpha=0.4)
    with pytest.raises(ShapeError, match=r"int32 with \(1, 2, 4, 8, 16\) columns"):
        kd_table_rows(z, y, table[:, :3], samples, scale, alpha=0.4, index=torch.zeros(len(table), 3).int())
    with pytest.raises(BackendError, match="not on an NVIDIA GPU"):
        kd_table_rows(z, y, table, samples, scale, alpha=0.4, impl="triton")
