"""Which graphs may be computed a few samples at a time; and that those which may not are not."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import sparse_engine as se
from sparse_engine.convert.capture import capture
from sparse_engine.convert.independence import samples_are_independent
from tests.convert.test_capture import wrap
from tests.convert.zoo import SMALL, Case, build

MIXING: dict[str, Callable[[Tensor], Tensor]] = {
    "centred": lambda x: x - x.mean(0),
    "centred, dimension kept": lambda x: x - x.mean(0, keepdim=True),
    "softmax": lambda x: x.softmax(0),
    "gram": lambda x: (x @ x.mT) @ x,
    "transposed": lambda x: (x.t() @ x) + x.sum() * 0,
    "rolled": lambda x: x.roll(1, 0),
    "flipped": lambda x: x.flip(0),
    "layer norm over all": lambda x: x * nn.functional.layer_norm(x.t().reshape(-1), (x.numel(),)).sum(),
    "transposed and flattened": lambda x: x.t().reshape(x.shape[0], -1),
    "scan": lambda x: x.cumsum(0),
    "whole": lambda x: x / x.amax(),
}

APART: dict[str, Callable[[Tensor], Tensor]] = {
    "elementwise": lambda x: x.relu() * 2 + x,
    "softmax": lambda x: x.softmax(1),
    "product": lambda x: x @ torch.ones(6, 3),
    "per sample": lambda x: (x[:, :, None] @ x[:, None, :]).flatten(1),
    "windows": lambda x: (x.reshape(x.shape[0] * 2, 3) + torch.arange(3.0)).reshape(x.shape[0], 6),
    "token": lambda x: torch.cat([torch.ones(1, 2).expand(x.shape[0], -1), x], 1),
}


@pytest.mark.parametrize("name", MIXING)
def test_models_that_mix_samples(name: str) -> None:
    module = wrap(MIXING[name])
    captured = capture(module, (torch.randn(3, 6),))
    assert not (captured.graph.dynamic and samples_are_independent(captured.graph))


@pytest.mark.parametrize("name", APART)
def test_models_that_keep_them_apart(name: str) -> None:
    assert samples_are_independent(capture(wrap(APART[name]), (torch.randn(3, 6),)).graph)


@pytest.mark.parametrize("case", [case for case in SMALL if "tiny" in case.name], ids=lambda case: case.name)
def test_usual_networks_keep_them_apart(case: Case) -> None:
    captured = capture(build(case), (torch.randn(2, 3, case.size, case.size),))
    assert samples_are_independent(se.convert.optimise(captured.graph))


@pytest.mark.parametrize("name", ["centred", "gram", "softmax"])
def test_large_batches_of_mixed_samples_are_right(name: str) -> None:
    module = wrap(MIXING[name])
    executable = se.convert(module, torch.randn(3, 6), tune=False)
    for batch in (64, 257):
        x = torch.randn(batch, 6)
        assert se.convert.relative_error(executable(x), module(x)) <= 1e-5
