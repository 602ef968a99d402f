"""Subnets of a shared network: what they compute, what they cost, and that they leave the network as it was."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from sparse_engine.errors import PruneError
from sparse_engine.prune.structured import Flops, Parameters, compaction_spec
from sparse_engine.train import models
from sparse_engine.train.stp import verify_extraction
from sparse_engine.train.supernet import Subnet, Supernet, magnitudes, recalibrate_

KINDS = {
    "resnet14": {"option": "B", "width": 4},
    "resnet18": {"small_input": True, "width": 4},
    "resnet50": {"small_input": True, "width": 2},
    "mobilenet_v2": {"small_input": True, "width": 0.1},
    "vit_small": {"layers": 2, "width": 24, "mlp": 16, "heads": 3, "image_size": 8},
}
STAGES = {
    "resnet14": [["layer1.1"], ["layer2.1"], ["layer3.1"]],
    "resnet18": [["layer1.1"], ["layer2.1"], ["layer3.1"], ["layer4.1"]],
    "vit_small": [["encoder.layers.encoder_layer_1"]],
}


def supernet(name: str) -> Supernet:
    return Supernet(models.build(name, num_classes=5, **KINDS[name]), torch.randn(2, 3, 8, 8))


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] * (name == "resnet50")) for name in KINDS]
)
def test_a_sliced_subnet_is_the_extracted_network(name: str):
    family = supernet(name)
    family.set_order("l1")
    if name in STAGES:
        assert family.stages == STAGES[name]
    generator = torch.Generator().manual_seed(0)
    for _ in range(2):
        subnet = family.sample(generator)
        network = family.extract(subnet)
        assert verify_extraction(family, subnet, network, torch.randn(3, 3, 8, 8)) <= 1e-5
        assert family.cost(subnet, Parameters()) == sum(p.numel() for p in network.parameters())
        assert compaction_spec(network).identities == family.skipped(subnet)
        if name != "vit_small":  # whose fused attention the independent counter does not see on the CPU
            with FlopCounterMode(display=False) as counter:
                network(torch.randn(2, 3, 8, 8))
            assert family.cost(subnet, Flops()) == counter.get_total_flops()


def test_active_leaves_no_trace_and_gradients_reach_the_kept_weights():
    family = supernet("resnet14")
    model, x = family.model.train(), torch.randn(4, 3, 8, 8)
    before = copy.deepcopy(model.state_dict())
    attributes = {
        name: (m.in_channels, m.out_channels) for name, m in model.named_modules() if isinstance(m, nn.Conv2d)
    }
    subnet = Subnet((0, 1, 0), tuple(max(1, len(group) // 2) for group in family.groups))
    with family.active(subnet):
        assert isinstance(model.layer1[1], nn.Identity)
        model(x).square().sum().backward()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())  # statistics too
    assert attributes == {
        n: (m.in_channels, m.out_channels) for n, m in model.named_modules() if isinstance(m, nn.Conv2d)
    }
    assert all(isinstance(parameter, nn.Parameter) for parameter in model.parameters())
    gone = family.gone(subnet)[0]
    gradient = model.conv1.weight.grad
    assert not gradient[torch.from_numpy(gone)].any()
    assert gradient[torch.from_numpy(~gone)].abs().sum() > 0
    assert model.layer1[1].conv1.weight.grad is None


def test_an_error_inside_restores_everything():
    family = supernet("resnet14")
    names = [name for name, _ in family.model.named_parameters()]
    with pytest.raises(RuntimeError), family.active(Subnet((0, 0, 0), tuple(1 for _ in family.groups))):
        raise RuntimeError
    assert [name for name, _ in family.model.named_parameters()] == names
    assert family.model(torch.randn(1, 3, 8, 8)).shape == (1, 5)


def test_the_full_subnet_is_the_model():
    family = supernet("resnet14")
    x = torch.randn(2, 3, 8, 8)
    expected = family.model.eval()(x)
    with family.active(family.full):
        assert torch.equal(family.model(x), expected)


def test_order_keeps_the_largest_filters():
    family = supernet("resnet14")
    weight = family.model.layer1[0].conv1.weight
    weight.data[2] *= 100
    family.set_order("l1")
    position = [group.name for group in family.groups].index("layer1.0.conv1.weight")
    assert family.order[position][0] == 2
    widths = list(family.full.widths)
    widths[position] = 1
    subnet = Subnet(family.full.depths, tuple(widths))
    kept, dropped = magnitudes(family, subnet)
    assert kept > dropped > 0
    assert torch.equal(family.extract(subnet).layer1[0].conv1.weight, weight[2:3])


def test_subnets_that_do_not_fit():
    family = supernet("resnet14")
    with pytest.raises(PruneError, match="depths"):
        family.removed(Subnet((2, 0, 0), family.full.widths))
    with pytest.raises(PruneError, match="widths"):
        family.removed(Subnet((0, 0, 0), (0, *family.full.widths[1:])))


def test_recalibration_averages_over_the_batches():
    model = nn.Sequential(nn.BatchNorm1d(3), nn.Dropout(0.5))
    batches = [torch.randn(6, 3) * 3 + 1 for _ in range(4)]
    recalibrate_(model, iter(batches))
    torch.testing.assert_close(model[0].running_mean, torch.stack([b.mean(0) for b in batches]).mean(0))
    torch.testing.assert_close(model[0].running_var, torch.stack([b.var(0) for b in batches]).mean(0))
    assert model[0].momentum == 0.1
    assert not model[0].training
    with pytest.raises(PruneError, match="no batch"):
        recalibrate_(model, [])
    assert model[0].running_mean.abs().sum() > 0
