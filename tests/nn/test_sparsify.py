"""`sparsify_` and `densify_`: what is converted, what is left and why, and that undoing gives back the same model."""

import copy
import json

import pytest
import torch
from torch import nn
from torch.nn.utils import prune
from torch.nn.utils.parametrizations import weight_norm

from sparse_engine.errors import SparseEngineError
from sparse_engine.nn import SparseConv2d, SparseLinear, densify_, sparsify_
from sparse_engine.prune import masks, set_masks
from sparse_engine.structure import Block


def zeroed(layer, sparsity):
    with torch.no_grad():
        layer.weight.mul_(torch.rand_like(layer.weight) >= sparsity)
    return layer


def network():
    torch.manual_seed(0)
    return nn.Sequential(
        zeroed(nn.Conv2d(3, 64, 3, padding=1), 0.9),
        nn.BatchNorm2d(64),
        nn.ReLU(),
        zeroed(nn.Conv2d(64, 64, 3, padding=1), 0.95),
        nn.AdaptiveAvgPool2d(4),
        nn.Flatten(),
        zeroed(nn.Linear(1024, 256), 0.9),
        nn.ReLU(),
        zeroed(nn.Linear(256, 128), 0.3),
        nn.Linear(128, 10),
    )


def reasons(report):
    return {layer.name: layer.reason for layer in report.layers}


def test_estimate_converts_what_pays_and_says_why():
    model = network()
    x = torch.randn(2, 3, 16, 16)
    expected = model.eval()(x)
    report = sparsify_(model)
    assert report.converted == ["3", "6"]
    assert isinstance(model[3], SparseConv2d)
    assert isinstance(model[6], SparseLinear)
    assert type(model[8]) is nn.Linear
    why = reasons(report)
    assert "times as fast" in why["3"]
    assert "1728 weights" in why["0"]
    assert "0.86 times as fast" in why["8"]
    assert why["9"] == "no exact zeros"
    torch.testing.assert_close(model(x), expected)
    assert "2 of 5 layers are sparse now" in str(report)
    assert json.loads(report.to_json())["layers"][1]["sparsity"] == pytest.approx(0.95, abs=0.01)
    line = report.layers[1]
    assert line.sparse_bytes < 0.2 * line.dense_bytes


def test_training_is_estimated_apart():
    model = nn.Sequential(zeroed(nn.Linear(256, 256), 0.5))
    assert not sparsify_(model).converted
    assert sparsify_(model.eval()).converted == ["0"]


def test_what_no_sparse_kernel_takes_stays_dense():
    model = nn.Sequential(zeroed(nn.Linear(256, 256), 0.9)).double()
    report = sparsify_(model)
    assert not report.converted
    assert "torch.float64" in reasons(report)["0"]
    depthwise = nn.Sequential(zeroed(nn.Conv2d(512, 512, 3, groups=512), 0.9))
    assert "9 inputs to each output" in reasons(sparsify_(depthwise))["0"]


def test_force_converts_what_has_zeros():
    model = network()
    report = sparsify_(model, force=True)
    assert report.converted == ["0", "3", "6", "8"]
    assert "force=True" in reasons(report)["8"]
    model = network()
    assert sparsify_(model, force=True, min_sparsity=0.0).converted == ["0", "3", "6", "8", "9"]


def test_min_sparsity():
    report = sparsify_(network(), force=True, min_sparsity=0.93)
    assert report.converted == ["3"]
    assert "min_sparsity=93.0 %" in reasons(report)["6"]


@pytest.mark.parametrize(
    "ignore, left",
    [
        (["6"], ["0", "3", "8"]),
        ([nn.Conv2d], ["6", "8"]),
        (["re:[03]", "8"], ["6"]),
        (["*"], []),
    ],
)
def test_ignore(ignore, left):
    report = sparsify_(network(), force=True, ignore=ignore)
    assert report.converted == left
    assert "ignored, as asked" in reasons(report).values()


def test_ignore_a_whole_branch():
    model = nn.Sequential()
    model.add_module("body", network())
    model.add_module("body2", zeroed(nn.Linear(10, 10), 0.5))
    assert sparsify_(model, force=True, ignore=["body"]).converted == ["body2"]


def test_densify_gives_back_the_same_weights():
    model = network()
    before = copy.deepcopy(model)
    biases = [layer.bias for layer in model if hasattr(layer, "bias")]
    sparsify_(model, force=True)
    assert densify_(model) is model
    assert repr(model) == repr(before)
    for name, tensor in before.state_dict().items():
        assert torch.equal(model.state_dict()[name], tensor)
    assert all(a is b for a, b in zip(biases, [layer.bias for layer in model if hasattr(layer, "bias")], strict=True))


def test_densify_of_a_single_layer():
    dense = zeroed(nn.Linear(10, 10), 0.5)
    again = densify_(SparseLinear.from_dense(dense))
    assert torch.equal(again.weight, dense.weight)


@pytest.mark.parametrize("training", [False, True])
def test_timing_on_example_inputs(training):
    model = network().train(training)
    state = {name: tensor.clone() for name, tensor in model.state_dict().items() if "running" in name}
    x = torch.randn(2, 3, 8, 8)
    random_state = torch.get_rng_state()
    report = sparsify_(model, example_inputs=x)
    assert torch.equal(torch.get_rng_state(), random_state)
    for name, tensor in state.items():
        assert torch.equal(model.state_dict()[name], tensor), f"{name} was changed by the timing"
    for layer in report.layers[:4]:
        assert layer.dense_ms > 0
        assert layer.sparse_ms > 0
        assert layer.sparse == (layer.sparse_ms < layer.dense_ms)
        assert "measured" in layer.reason
    assert report.layers[4].dense_ms is None
    assert " ms" in str(report)


def test_layers_that_the_inputs_do_not_reach():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.used = zeroed(nn.Linear(64, 64), 0.9)
            self.unused = zeroed(nn.Linear(64, 64), 0.9)

        def forward(self, x):
            return self.used(x)

    report = sparsify_(Model(), example_inputs=(torch.randn(3, 64),))
    assert reasons(report)["unused"] == "not reached by the example inputs"
    assert not report.layers[1].sparse


def test_pruned_modules_are_converted():
    model = nn.Sequential(nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 128))
    for layer in (model[0], model[2]):
        prune.l1_unstructured(layer, "weight", amount=0.95)
    x = torch.randn(3, 128)
    expected = model(x).detach()
    masks = [layer.weight_mask.bool() for layer in (model[0], model[2])]
    report = sparsify_(model)
    assert report.converted == ["0", "2"]
    torch.testing.assert_close(model(x), expected)
    assert torch.equal(model[0].mask, masks[0])
    densify_(model)
    torch.testing.assert_close(model(x), expected)
    assert not model[0]._forward_pre_hooks
    assert set(dict(model.named_parameters())) == {"0.weight", "0.bias", "2.weight", "2.bias"}


@pytest.mark.parametrize("kind", ["se.prune", "torch.nn.utils.prune"])
def test_a_kept_weight_that_is_zero_stays_trainable(kind):
    """The pattern is the mask's, not that of the zeros that happen to be in the weight."""
    model = nn.Sequential(nn.Linear(64, 64), nn.Conv2d(8, 8, 3))
    kept = [torch.rand(layer.weight.shape) < 0.2 for layer in model]
    with torch.no_grad():
        for layer, mask in zip(model, kept, strict=True):
            layer.weight[torch.rand(layer.weight.shape) < 0.5] = 0.0
            assert bool((mask & (layer.weight == 0)).any())
    if kind == "se.prune":
        set_masks(model, {f"{i}.weight": mask for i, mask in enumerate(kept)})
    else:
        for layer, mask in zip(model, kept, strict=True):
            prune.custom_from_mask(layer, "weight", mask)
    report = sparsify_(model, force=True)
    for layer, mask, line in zip(model, kept, report.layers, strict=True):
        assert torch.equal(layer.mask, mask)
        assert line.sparsity == pytest.approx(1 - float(mask.float().mean()))
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    (model[0](torch.rand(3, 64)).sum() + model[1](torch.rand(2, 8, 5, 5)).sum()).backward()
    optimizer.step()
    assert all(bool((layer.weight[mask] != 0).all()) for layer, mask in zip(model, kept, strict=True))
    assert all(not layer.weight[~mask].any() for layer, mask in zip(model, kept, strict=True))
    assert {name: mask.tolist() for name, mask in masks(model).items()} == {
        f"{i}.weight": mask.tolist() for i, mask in enumerate(kept)
    }


def test_a_mask_beats_the_weights_under_it():
    """A mask that was stored without being applied yet, and one on a model that moved to another type."""
    layer = nn.Linear(16, 16)
    model, mask = nn.Sequential(layer), torch.rand(16, 16) < 0.3
    set_masks(model, {"0.weight": mask}, apply=False)
    x = torch.randn(4, 16).double()
    expected = nn.functional.linear(x, (layer.weight * mask).double(), layer.bias.double())
    sparsify_(model.double(), force=True)
    torch.testing.assert_close(model(x), expected)
    assert torch.equal(model[0].mask, mask)


def test_what_cannot_be_converted_says_why():
    class Special(nn.Linear):
        pass

    tied = zeroed(nn.Linear(32, 32), 0.9)
    other = nn.Linear(32, 32)
    other.weight = tied.weight
    model = nn.ModuleDict(
        {
            "special": zeroed(Special(32, 32), 0.9),
            "normed": weight_norm(zeroed(nn.Linear(32, 32), 0.9)),
            "tied": tied,
            "other": other,
            "attention": nn.MultiheadAttention(32, 4),
        }
    )
    with torch.no_grad():
        model["attention"].out_proj.weight[:20] = 0
    report = sparsify_(model, force=True)
    assert report.converted == []
    why = reasons(report)
    assert "it is a Special" in why["special"]
    assert "parametrization" in why["normed"]
    assert why["tied"] == why["other"] == "its weight is shared with another module"
    assert "NonDynamicallyQuantizableLinear" in why["attention.out_proj"]


def test_a_module_used_twice_stays_one_module():
    layer = zeroed(nn.Linear(64, 64), 0.9)
    model = nn.Sequential(layer, nn.ReLU(), layer)
    report = sparsify_(model, force=True)
    assert len(report.layers) == 1
    assert model[0] is model[2]
    assert isinstance(model[0], SparseLinear)
    densify_(model)
    assert model[0] is model[2]
    assert type(model[0]) is nn.Linear


def test_hooks_move_along():
    model = network()
    calls = []
    model[6].register_forward_hook(lambda module, inputs, output: calls.append(type(module)))
    x = torch.randn(2, 3, 8, 8)
    sparsify_(model, force=True)
    model(x)
    densify_(model)
    model(x)
    assert calls == [SparseLinear, nn.Linear]


def test_structure_is_declared_for_all_layers():
    model = nn.Sequential(nn.Linear(64, 64))
    with torch.no_grad():
        model[0].weight.mul_((torch.rand(16, 64) < 0.1).repeat_interleave(4, 0))
    report = sparsify_(model, structure="block(4, 1)")
    assert report.layers[0].structure == "block(4, 1)"
    assert model[0].structure == Block((4, 1))


def test_misuse_is_refused():
    with pytest.raises(SparseEngineError, match=r"SparseLinear\.from_dense"):
        sparsify_(nn.Linear(3, 3))
    with pytest.raises(SparseEngineError, match="share between 0 and 1"):
        sparsify_(network(), min_sparsity=90)
    with pytest.raises(SparseEngineError, match="example_inputs"):
        sparsify_(network(), tune=True)
    assert str(sparsify_(nn.ReLU())) == "the model has no nn.Linear and no nn.Conv2d layers"


def test_a_sparse_model_trains():
    model = nn.Sequential(zeroed(nn.Linear(64, 256), 0.9), nn.ReLU(), nn.Linear(256, 4))
    sparsify_(model)
    optimizer = torch.optim.AdamW(model.parameters(), 0.01)
    x, labels = torch.randn(64, 64), torch.randint(0, 4, (64,))
    losses = []
    for _ in range(30):
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(x), labels)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.3 * losses[0]
    assert model[0].sparsity == pytest.approx(0.9, abs=0.01)
