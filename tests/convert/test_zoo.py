"""Conversion of whole models: the same outputs, natively, at any batch size, and the user's model untouched."""

from __future__ import annotations

import pytest
import torch

import sparse_engine as se
from tests.convert.zoo import SMALL, ZOO, Case, build

BOUND = 1e-4


def _check(case: Case) -> None:
    model = build(case)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    x = torch.randn(2, 3, case.size, case.size)

    executable = se.convert(model, (x,), tune=False, bound=BOUND)

    assert executable.report.fallbacks == {}
    assert executable.graph.fixed_batch is None
    assert executable.report.max_error <= BOUND
    with torch.no_grad():
        for batch in (1, 3):
            x = torch.randn(batch, 3, case.size, case.size)
            assert se.convert.relative_error(executable(x), model(x)) <= BOUND
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("case", SMALL, ids=lambda case: case.name)
def test_small_models(case: Case) -> None:
    _check(case)


@pytest.mark.slow
@pytest.mark.parametrize("case", ZOO, ids=lambda case: case.name)
def test_models(case: Case) -> None:
    _check(case)


@pytest.mark.parametrize(
    "case",
    [*SMALL[3:], *(pytest.param(case, marks=pytest.mark.slow) for case in SMALL[:3])],
    ids=lambda case: case.name,
)
def test_passes_are_exact(case: Case) -> None:
    """In double precision the optimised graph differs by rounding only, dead channels included."""
    model = build(case)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, (torch.nn.Conv2d, torch.nn.Linear)):
                dead = torch.randperm(module.weight.shape[0])[: module.weight.shape[0] // 5]
                module.weight[dead] = 0
    x = torch.randn(3, 3, case.size, case.size)
    graph = se.convert.capture(model, (x,)).graph.to(torch.float64)
    optimised = se.convert.optimise(graph)
    assert len(optimised.nodes) < len(graph.nodes)
    assert optimised.bytes() < graph.bytes()
    (expected,), (found,) = graph.run([x.double()]), optimised.run([x.double()])
    assert se.convert.relative_error(found, expected) <= 1e-10
