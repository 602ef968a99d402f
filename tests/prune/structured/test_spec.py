"""Compact networks on disk, rebuilt from the model's own code, put back into the dense model, and trained on."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

from sparse_engine.errors import CheckpointError, PruneError
from sparse_engine.prune.structured import (
    CompactionSpec,
    compact,
    compaction_spec,
    load_compact,
    prune_channels,
    remap_optimizer_,
    remap_state_dict,
    save_compact,
)

from .conftest import EveryOperator, conv_bn, randomise_, zero_rows_


def example() -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(2, 3, 16, 16), torch.randint(11, (2, 6))


def assert_same(a: nn.Module, b: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
    with torch.no_grad():
        for x, y in zip(a(*inputs).values(), b(*inputs).values(), strict=True):
            torch.testing.assert_close(x, y, rtol=0, atol=1e-5 * float(x.abs().max()))


@pytest.fixture(scope="module")
def pair() -> tuple[nn.Module, nn.Module]:
    """A model with heads, channels and features pruned (biases are added, classes change), and its compact form."""
    torch.manual_seed(0)
    model = randomise_(EveryOperator())
    prune_channels(model, example(), target=0.7)
    zero_rows_(model, 0.3, 3)
    return model, compact(model, example())


def test_saved_and_rebuilt_on_the_models_own_code(pair: tuple[nn.Module, nn.Module], tmp_path):
    _, small = pair
    save_compact(small, tmp_path / "small.safetensors")
    rebuilt = load_compact(tmp_path / "small.safetensors", EveryOperator).eval()
    assert type(rebuilt) is EveryOperator
    assert {n: p.shape for n, p in rebuilt.named_parameters()} == {n: p.shape for n, p in small.named_parameters()}
    assert_same(small, rebuilt, example())
    save_compact(rebuilt, tmp_path / "again.safetensors")  # the spec travels with the model
    assert compaction_spec(rebuilt).to_json() == compaction_spec(small).to_json()


def test_loads_dense_too(pair: tuple[nn.Module, nn.Module], tmp_path):
    model, small = pair
    save_compact(small, tmp_path / "small.safetensors")
    dense = load_compact(tmp_path / "small.safetensors", EveryOperator(), dense=True).eval()
    own, original = dict(dense.named_parameters()), dict(model.named_parameters())
    assert all(own[name].shape == original[name].shape for name in original)
    assert_same(small, dense, example())
    assert_same(model, dense, example())


def test_a_skipped_block_loads_dense(tmp_path):
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.relu(x + self.body(x))

    def build() -> nn.Module:
        return nn.Sequential(conv_bn(3, 4), Block(), Block(), nn.Flatten(), nn.Linear(4 * 16, 2))

    model = randomise_(build())
    for parameter in model[1].body[1].parameters():
        parameter.data.zero_()
    x = torch.randn(2, 3, 4, 4)
    small = compact(model, x)
    assert compaction_spec(small).identities == ["1"]
    save_compact(small, tmp_path / "small.safetensors")
    for dense in (False, True):
        torch.testing.assert_close(
            load_compact(tmp_path / "small.safetensors", build(), dense=dense).eval()(x), model(x)
        )


def test_slice_and_scatter_are_inverse():
    spec = CompactionSpec(kept={"w": {0: [0, 2], 1: [1, 3, 4]}}, shapes={"w": [3, 5]})
    dense = torch.arange(15.0).view(3, 5)
    small = spec.slice("w", dense)
    assert small.tolist() == [[1, 3, 4], [11, 13, 14]]
    back = spec.scatter("w", small, fill=-1)
    assert back.tolist() == [[-1, 1, -1, 3, 4], [-1] * 5, [-1, 11, -1, 13, 14]]
    assert CompactionSpec.from_json(spec.to_json()) == spec


def test_training_goes_on_where_it_was():
    """A step of the compact model with the remapped optimiser = the kept part of the masked model's step."""
    torch.manual_seed(0)
    model = randomise_(
        nn.Sequential(conv_bn(3, 6), conv_bn(6, 5), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(5, 3))
    ).double()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    x, y = torch.randn(8, 3, 8, 8).double(), torch.randint(3, (8,))

    def step(network: nn.Module, opt: torch.optim.Optimizer) -> None:
        opt.zero_grad()
        nn.functional.cross_entropy(network(x), y).backward()
        opt.step()

    step(model, optimizer)
    prune_channels(model, x, target=0.5)
    small = compact(model, x)
    new = remap_optimizer_(torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9), model, small)
    assert not new.state
    buffers = {name: optimizer.state[p]["momentum_buffer"].clone() for name, p in model.named_parameters()}
    average = {name: torch.randn_like(p) for name, p in model.named_parameters()}
    spec = compaction_spec(small)
    kept_average = remap_state_dict(average, small)
    assert kept_average.keys() == average.keys()
    assert all(torch.equal(kept_average[name], spec.slice(name, average[name])) for name in average)
    model.eval()
    step(model, optimizer)
    expected = {name: spec.slice(name, p.detach()) for name, p in model.named_parameters()}
    restored = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    for name, parameter in model.named_parameters():
        restored.state[parameter]["momentum_buffer"] = buffers[name]
    remap_optimizer_(restored, model, small)
    small.eval()
    step(small, restored)
    for name, parameter in small.named_parameters():
        torch.testing.assert_close(parameter.detach(), expected[name], rtol=1e-9, atol=1e-12)


def test_adam_state_and_scalar_state_survive():
    model = randomise_(nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 2)))
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    model(torch.randn(3, 4)).sum().backward()
    optimizer.step()
    model[0].weight.data[:2] = 0
    model[0].bias.data[:2] = 0
    small = compact(model, torch.randn(2, 4))
    second = optimizer.state[model[0].weight]["exp_avg_sq"][2:].clone()
    remap_optimizer_(optimizer, model, small)
    assert torch.equal(optimizer.state[small[0].weight]["exp_avg_sq"], second)
    assert float(optimizer.state[small[0].weight]["step"]) == 1
    with pytest.raises(PruneError, match="not the dense model's"):
        remap_optimizer_(optimizer, model, small)


@pytest.fixture
def process_group(tmp_path):
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/group", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def test_ddp_and_a_moving_average_go_on_with_the_compact_model(process_group):
    """Wrapped before and wrapped after: the optimiser's state and the average come along, and a step keeps in time."""
    torch.manual_seed(0)
    model = randomise_(nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 2)))
    wrapped = nn.parallel.DistributedDataParallel(model)
    average = torch.optim.swa_utils.AveragedModel(model, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.9))
    optimizer = torch.optim.AdamW(wrapped.parameters(), lr=0.01)
    for _ in range(2):
        optimizer.zero_grad()
        wrapped(torch.randn(3, 4)).square().sum().backward()
        optimizer.step()
        average.update_parameters(wrapped.module)
    for network in (model, average.module):
        network[0].weight.data[:2] = 0
        network[0].bias.data[:2] = 0
    small = compact(wrapped, torch.randn(2, 4))
    assert small[0].out_features == 4
    moments = optimizer.state[model[2].weight]["exp_avg"][:, 2:].clone()
    again = nn.parallel.DistributedDataParallel(small)
    remap_optimizer_(optimizer, wrapped, again)
    assert [p for group in optimizer.param_groups for p in group["params"]] == list(again.parameters())
    assert torch.equal(optimizer.state[small[2].weight]["exp_avg"], moments)
    smaller = torch.optim.swa_utils.AveragedModel(small)
    smaller.load_state_dict(remap_state_dict(average.state_dict(), again))
    x = torch.randn(5, 4)
    torch.testing.assert_close(smaller(x), average(x))
    assert int(smaller.n_averaged) == 2
    again(x).sum().backward()
    before = small[0].weight.detach().clone()
    optimizer.step()
    assert not torch.equal(small[0].weight, before)


def test_files_that_do_not_fit(pair: tuple[nn.Module, nn.Module], tmp_path):
    _, small = pair
    path = tmp_path / "small.safetensors"
    save_compact(small, path)
    with pytest.raises(PruneError, match="is it the same model"):
        load_compact(path, nn.Linear(2, 2))
    save_file({"weight": torch.zeros(2, 2)}, str(tmp_path / "plain.safetensors"))
    with pytest.raises(CheckpointError, match="no compaction spec"):
        load_compact(tmp_path / "plain.safetensors", nn.Linear(2, 2))
    (tmp_path / "broken.safetensors").write_bytes(b"1234")
    with pytest.raises(CheckpointError, match="not a readable"):
        load_compact(tmp_path / "broken.safetensors", nn.Linear(2, 2))
    with safe_open(str(path), framework="pt") as file:
        metadata = file.metadata()
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    content = json.loads(metadata["sparse_engine.compaction"])
    content["version"] = 99
    save_file(tensors, str(path), metadata={"sparse_engine.compaction": json.dumps(content)})
    with pytest.raises(CheckpointError, match="version 99"):
        load_compact(path, EveryOperator())
    with pytest.raises(PruneError, match="carries no compaction spec"):
        save_compact(nn.Linear(2, 2), path)
