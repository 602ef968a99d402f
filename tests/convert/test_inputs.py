"""What users hand in: masks made permanent on a copy, checkpoints loaded into it, the user's model untouched."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune

import sparse_engine as se
from sparse_engine.convert.inputs import prepare, prepare_examples
from sparse_engine.errors import CheckpointError, ConvertError, ShapeError

X = torch.randn(4, 8)


def network() -> nn.Sequential:
    return nn.Sequential(nn.Linear(8, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(0.5), nn.Linear(16, 4))


def state(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def unchanged(model: nn.Module, before: dict[str, Tensor]) -> bool:
    after = model.state_dict()
    return list(after) == list(before) and all(torch.equal(after[name], before[name]) for name in before)


def outputs(model: nn.Module) -> Tensor:
    """What a model returns in eval mode, leaving its mode as it was."""
    twin = copy.deepcopy(model) if not any(hasattr(m, "weight_orig") for m in model.modules()) else model
    modes = [(module, module.training) for module in twin.modules()]
    twin.eval()
    with torch.no_grad():
        result = twin(X)
    for module, mode in modes:
        module.training = mode
    return result


def check(model: nn.Module, sparsity: float, **arguments: Any) -> se.Executable:
    """Convert, compare with the model itself, and see that the model is as it was."""
    model.train()
    expected, before = outputs(model), state(model)
    executable = se.convert(model, (X,), tune=False, **arguments)
    assert unchanged(model, before)
    assert all(module.training for module in model.modules())
    assert se.convert.relative_error(executable(X), expected) <= 1e-5
    assert executable.report.sparsity == pytest.approx(sparsity, abs=0.02)
    return executable


def test_exact_zeros() -> None:
    model = network()
    with torch.no_grad():
        model[0].weight *= torch.rand(16, 8) > 0.75
        model[4].weight *= torch.rand(4, 16) > 0.75
    model[0].weight.data[0, 0] = -0.0
    zeros = sum(int((model[index].weight == 0).sum()) for index in (0, 4))
    check(model, zeros / (16 * 8 + 4 * 16))


def test_torch_prune() -> None:
    model = network()
    prune.l1_unstructured(model[0], "weight", amount=0.75)
    prune.random_structured(model[4], "weight", amount=2, dim=0)
    prune.l1_unstructured(model[4], "bias", amount=2)
    check(model, (0.75 * 128 + 32) / 192)
    assert hasattr(model[0], "weight_orig")
    assert len(model[0]._forward_pre_hooks) == 1


def test_torch_ao_pruning() -> None:
    pruning = pytest.importorskip("torch.ao.pruning")
    model = network()
    sparsifier = pruning.WeightNormSparsifier(sparsity_level=0.75, sparse_block_shape=(1, 1), zeros_per_block=1)
    sparsifier.prepare(model, [{"tensor_fqn": "0.weight"}, {"tensor_fqn": "4.weight"}])
    sparsifier.step()
    check(model, 0.75)
    assert nn.utils.parametrize.is_parametrized(model[0])


def test_other_parametrisations() -> None:
    model = network()
    parametrizations.weight_norm(model[0])
    parametrizations.spectral_norm(model[4])
    check(model, 0.0)


def test_masks_of_this_library() -> None:
    model = network()
    se.prune(model, sparsity=0.75)
    with torch.no_grad():
        model[0].weight.add_(0)
    check(model, 0.75)


def test_a_mask_whose_weights_have_moved_on_is_applied() -> None:
    model = network()
    se.prune(model, sparsity=0.75)
    with torch.no_grad():
        model[0].weight.add_(1.0)  # as an optimiser without the hold would
    plain = prepare(model)
    mask = se.masks(model)["0.weight"]
    assert torch.equal(plain[0].weight != 0, mask)
    assert bool((model[0].weight != 0).all())


def test_sparse_modules() -> None:
    model = network()
    with torch.no_grad():
        model[0].weight *= torch.rand(16, 8) > 0.75
        model[4].weight *= torch.rand(4, 16) > 0.75
    zeros = sum(int((model[index].weight == 0).sum()) for index in (0, 4))
    se.sparsify_(model, force=True)
    assert type(model[0]) is not nn.Linear
    check(model, zeros / 192)
    assert type(model[0]) is not nn.Linear


@pytest.mark.parametrize("ending", [".pt", ".safetensors"])
def test_checkpoint_files(tmp_path: Path, ending: str) -> None:
    from sparse_engine.io import write_checkpoint

    trained = network().eval()
    with torch.no_grad():
        trained[0].weight *= torch.rand(16, 8) > 0.75
    write_checkpoint(tmp_path / f"weights{ending}", trained.state_dict())
    model = network()
    before = state(model)
    executable = se.convert(model, X, weights=tmp_path / f"weights{ending}", tune=False)
    assert unchanged(model, before)
    assert se.convert.relative_error(executable(X), trained(X)) <= 1e-5


def test_masked_state_dicts() -> None:
    pruned = network().eval()
    prune.l1_unstructured(pruned[0], "weight", amount=0.75)
    executable = se.convert(network(), X, weights=pruned.state_dict(), tune=False)
    assert se.convert.relative_error(executable(X), pruned(X)) <= 1e-5


def test_a_checkpoint_of_another_model_is_refused() -> None:
    with pytest.raises(CheckpointError, match=r"0\.weight"):
        se.convert(network(), X, weights={"0.weight": torch.zeros(3, 3)})


def test_shared_weights_stay_shared() -> None:
    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(8, 8).double(), nn.Linear(8, 8).double()
            self.b.weight = self.a.weight

        def forward(self, x: Tensor) -> Tensor:
            return self.b(self.a(x))

    plain = prepare(Shared())
    assert plain.a.weight is plain.b.weight
    assert plain.a.weight.dtype == torch.float32


def test_nothing_is_copied_that_does_not_change() -> None:
    model = network()
    plain = prepare(model)
    assert plain is not model
    assert all(a is b for a, b in zip(plain.parameters(), model.parameters(), strict=True))
    assert plain[1].running_mean is not model[1].running_mean  # a forward may write buffers
    assert model.training
    assert not plain.training


def test_wrappers_are_taken_off() -> None:
    model = network().eval()
    compiled = torch.compile(model)
    assert type(prepare(compiled)) is nn.Sequential
    assert type(prepare(nn.DataParallel(model))) is nn.Sequential


def test_examples() -> None:
    (x,) = prepare_examples(numpy.zeros((2, 3)))
    assert x.dtype == torch.float32
    assert [item.dtype for item in prepare_examples((X.double(), torch.arange(3)))] == [torch.float32, torch.int64]
    for wrong, message in (
        ("x", "tuple of tensors"),
        ((), "tuple of tensors"),
        ((X, 3), "example input 1 is int"),
        ((X[:0],), "is empty"),
    ):
        with pytest.raises(ShapeError, match=message):
            prepare_examples(wrong)


def test_what_is_no_model_is_refused() -> None:
    with pytest.raises(ConvertError, match=r"takes a torch\.nn\.Module, not function"):
        se.convert(lambda x: x, X)  # type: ignore[arg-type]
