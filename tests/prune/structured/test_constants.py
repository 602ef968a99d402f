"""What is claimed to be constant is what the network computes, for every operator and any input."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, fx, nn

from sparse_engine.prune.structured.capture import Program, capture
from sparse_engine.prune.structured.constants import Partial, propagate

from .conftest import EveryOperator, randomise_, zero_rows_


def run(program: Program, inputs: list[Tensor]) -> dict[fx.Node, object]:
    """Every intermediate value, by executing the captured operators one by one."""
    values: dict[fx.Node, object] = {node: program.tensors[name] for node, name in program.state.items()}
    values.update(zip(program.inputs, inputs, strict=True))
    with torch.no_grad():
        for node in program.nodes:
            args, kwargs = fx.map_arg((node.args, node.kwargs), lambda n: values[n])
            args = [
                a.clone() if isinstance(a, Tensor) else a for a in args
            ]  # in-place operators must not reach the model
            values[node] = node.target(*args, **kwargs)
    return values


@pytest.mark.parametrize("seed", range(2))
def test_every_claim_holds(seed: int):
    torch.manual_seed(seed)
    model = zero_rows_(randomise_(EveryOperator()), 0.5, seed).double()
    for parameter in model.parameters():  # zeros in the tokens' path too
        if parameter.ndim == 2 and seed % 2:
            parameter.data[: parameter.shape[0] // 2] = 0
    example = (torch.randn(2, 3, 16, 16).double(), torch.randint(11, (2, 6)))
    program = capture(model, example)
    facts = propagate(program, program.tensors)
    claims = 0
    for _ in range(2):
        values = run(program, [torch.randn(2, 3, 16, 16).double() * 3, torch.randint(11, (2, 6))])
        for node, fact in facts.items():
            if node in program.inputs or not isinstance(fact, Partial):
                continue
            actual, known = values[node], fact.mask()
            assert fact.value.shape == actual.shape, node
            torch.testing.assert_close(
                fact.value[known].double(), actual[known].double(), rtol=1e-9, atol=1e-12, msg=f"{node}"
            )
            claims += node not in program.state and fact.known is not None
    assert claims > 40  # partial knowledge is what is tested here


class _Padded(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(1, 2, 1), nn.Conv2d(2, 1, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x))


def test_zero_padding_makes_a_constant_vary_at_the_border():
    model = _Padded()
    model.first.weight.data.zero_()
    model.first.bias.data.copy_(torch.tensor([2.0, 0.0]))
    program = capture(model.eval(), torch.randn(1, 1, 4, 4))
    facts = propagate(program, program.tensors)
    out = facts[program.outputs[0]]
    assert isinstance(out, Partial)
    assert out.known is None
    assert float(out.value.amax()) != float(out.value.amin())


def test_random_operators_are_not_constants():
    class Noisy(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x * 0.0 + torch.rand(3)

    program = capture(Noisy().eval(), torch.randn(2, 3))
    facts = propagate(program, program.tensors)
    assert facts[program.outputs[0]] is None
