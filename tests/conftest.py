"""Settings and fixtures for every test."""

from __future__ import annotations

import ctypes
import os
import random
from pathlib import Path

import hypothesis
import numpy as np
import pytest
import torch

# Read when Triton is first imported, which any module of tests may do.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

# The same examples on every run; `HYPOTHESIS_PROFILE=search` looks for new ones.
hypothesis.settings.register_profile("repeatable", deadline=None, derandomize=True, max_examples=25)
hypothesis.settings.register_profile("search", deadline=None, max_examples=1000)
hypothesis.settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "repeatable"))


def pytest_configure(config: pytest.Config) -> None:
    torch.set_num_threads(int(os.environ.get("SPARSE_ENGINE_TEST_THREADS", min(2, os.cpu_count() or 1))))
    _poison_new_memory()


def _poison_new_memory() -> None:
    """Makes malloc fill what it hands out with 0x7f bytes (3.4e38 as a float), so that a kernel which leaves an output
    unwritten is seen.
    """
    try:
        ctypes.CDLL(None).mallopt(-6, 0x80)  # M_PERTURB; new memory gets the complement of the byte
    except (OSError, AttributeError):
        pass  # a C library without it: tests that check for unwritten outputs fill them themselves


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leaves out what needs real data where there is none, and skips what needs a GPU where there is none."""
    if not os.environ.get("SPARSE_ENGINE_DATA"):
        wanting = [item for item in items if "real_data" in getattr(item, "fixturenames", ())]
        if wanting:
            config.hook.pytest_deselected(items=wanting)
            items[:] = [item for item in items if item not in wanting]
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="needs an NVIDIA GPU"))


@pytest.fixture(autouse=True)
def _seeded() -> None:
    random.seed(0)
    np.random.seed(0)  # noqa: NPY002  (code under test may use the global generator)
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def real_data() -> Path:
    """The folder of real data sets and checkpoints that $SPARSE_ENGINE_DATA names; tests that ask for it run only
    where it is set.
    """
    folder = Path(os.environ["SPARSE_ENGINE_DATA"])
    assert folder.is_dir(), f"SPARSE_ENGINE_DATA is {folder}, which is not a folder"
    return folder


@pytest.fixture(scope="session")
def digits() -> tuple[torch.Tensor, torch.Tensor]:
    """scikit-learn's handwritten digits: images (1797, 1, 8, 8) in 0..1 and labels (1797,)."""
    from sklearn.datasets import load_digits

    data = load_digits()
    images = torch.from_numpy(data.images).float().div_(16).unsqueeze_(1)
    return images, torch.from_numpy(data.target).long()
