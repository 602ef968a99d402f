"""Fixtures of the op tests."""

import pytest
import torch


@pytest.fixture
def poisoned_memory():
    """`torch.empty` hands out NaN, so that an output element that a kernel leaves unwritten is seen."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(before)
