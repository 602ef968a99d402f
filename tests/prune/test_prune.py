"""``se.prune`` as users call it: counts, masks that hold, identity of parameters, what is refused."""

from __future__ import annotations

import copy
import pickle
import warnings

import pytest
import torch
from torch import nn

import sparse_engine as se
from sparse_engine.errors import PruneError, SparseEngineError
from sparse_engine.prune import Iterative, apply_masks_, hold_masks, prunable_weights, set_masks
from sparse_engine.train.models import build


def small() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 36, 10))


@pytest.mark.parametrize(
    "options",
    [
        {"sparsity": 0.9},
        {"sparsity": 0.333, "scope": "layer"},
        {"sparsity": 0.9, "distribution": "erk"},
        {"sparsity": 0.9, "scope": "layer", "distribution": "erk_kernel", "criterion": "random"},
        {"sparsity": 0.0},
        {"sparsity": 0.95, "schedule": 4, "keep_one": True},
    ],
)
def test_the_kept_count_is_exact_and_zeros_are_exact(options):
    model = build("resnet8")
    report = se.prune(model, **options)
    assert report.kept == round((1 - options["sparsity"]) * report.total)
    parameters = dict(model.named_parameters())
    for name, mask in se.masks(model).items():
        assert torch.equal(parameters[name] != 0, mask), name
        assert mask.dtype == torch.bool
    assert report.total + report.other == sum(p.numel() for p in model.parameters())


def test_global_magnitude_keeps_the_largest():
    model = small()
    values = torch.cat([w.detach().abs().flatten() for w in prunable_weights(model).values()])
    report = se.prune(model, sparsity=0.8)
    threshold = values.sort(descending=True).values[report.kept - 1]
    for weight in prunable_weights(model).values():
        assert (weight.detach().abs()[weight != 0] >= threshold).all()


@pytest.mark.parametrize(
    "structure", [se.NM(2, 4), se.Block((4, 1)), se.Block((2, 4)), se.FanIn(5), se.Channel(), "nm(1, 4)"]
)
def test_every_structure_fits_its_own_check(structure):
    model = small()
    fixed = isinstance(structure, se.NM | se.FanIn | str)
    report = se.prune(model, sparsity=None if fixed else 0.5, structure=structure)
    parsed = se.Structure.parse(structure)
    for mask in se.masks(model).values():
        parsed.check(mask)
    assert 0 < report.sparsity < 1
    assert report.structure == str(parsed)


@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW])
def test_masks_hold_against_momentum_and_weight_decay(kind):
    model = small()
    options = {"lr": 0.1, "weight_decay": 0.1, **({"momentum": 0.9} if kind is torch.optim.SGD else {})}
    optimizer = kind(model.parameters(), **options)
    x, y = torch.randn(4, 3, 8, 8), torch.tensor([0, 1, 2, 3])

    def step() -> None:
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()

    step()  # momentum exists before the mask does
    se.prune(model, sparsity=0.9)
    with hold_masks(model, optimizer):
        for _ in range(5):
            step()
            for name, mask in se.masks(model).items():
                assert (dict(model.named_parameters())[name][~mask] == 0).all()
    step()
    weights = dict(model.named_parameters())
    assert any((weights[n][~m] != 0).any() for n, m in se.masks(model).items())  # without the hold they do come back


def test_masked_gradients_stay_out_of_the_optimiser():
    model = small()
    optimizer = torch.optim.Adam(model.parameters())
    se.prune(model, sparsity=0.9)
    hold_masks(model, optimizer, mask_gradients=True)
    nn.functional.cross_entropy(model(torch.randn(4, 3, 8, 8)), torch.tensor([0, 1, 2, 3])).backward()
    optimizer.step()
    for name, mask in se.masks(model).items():
        state = optimizer.state[dict(model.named_parameters())[name]]
        assert (state["exp_avg"][~mask] == 0).all()
        assert (state["exp_avg_sq"][~mask] == 0).all()


def test_parameters_keep_their_identity_and_state_dicts_stay_plain():
    model = small()
    before = {name: id(p) for name, p in model.named_parameters()}
    keys = list(model.state_dict())
    se.prune(model, sparsity=0.7)
    assert {name: id(p) for name, p in model.named_parameters()} == before
    assert list(model.state_dict()) == keys


def test_masks_travel_with_copies_and_squash_forgets_them():
    model = small()
    se.prune(model, sparsity=0.7)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert all(torch.equal(mask, se.masks(model)[name]) for name, mask in se.masks(other).items())
        set_masks(other, {"0.weight": torch.zeros(8, 3, 3, 3, dtype=torch.bool)})
        assert se.masks(model)["0.weight"].any()
    with torch.no_grad():
        model[0].weight.add_(1)
    apply_masks_(model)
    zeros = (model[0].weight == 0).sum()
    assert zeros > 0
    assert se.squash_(model) is model
    assert se.masks(model) == {}
    assert (model[0].weight == 0).sum() == zeros
    assert not any(k.startswith("_sparse") for m in model.modules() for k in m.__dict__)


def test_pruning_again_never_revives():
    model = small()
    se.prune(model, sparsity=0.5, criterion="random", seed=1)
    first = se.masks(model)["4.weight"].clone()
    se.prune(model, sparsity=0.8, criterion="random", seed=2)
    assert not (se.masks(model)["4.weight"] & ~first).any()
    kept = sum(int(m.sum()) for m in se.masks(model).values())
    assert kept == round(0.2 * sum(m.numel() for m in se.masks(model).values()))


def test_iterative_rescores_on_the_pruned_network():
    x, y = torch.randn(16, 3, 8, 8), torch.arange(16) % 10
    torch.manual_seed(0)
    a, b = small(), None
    b = copy.deepcopy(a)
    se.prune(a, sparsity=0.95, criterion="snip", data=(x, y))
    se.prune(b, sparsity=0.95, criterion="snip", data=(x, y), schedule=Iterative(5))
    assert any(not torch.equal(m, se.masks(b)[n]) for n, m in se.masks(a).items())


def test_ignore_by_name_type_module_and_pattern():
    model = build("resnet8")
    for rule in ("conv1", "conv1.weight", "re:conv1", model.conv1):
        assert "conv1.weight" not in prunable_weights(model, [rule])
        assert "layer1.0.conv1.weight" in prunable_weights(model, [rule])
    assert list(prunable_weights(model, [nn.Conv2d])) == ["linear.weight"]
    assert not any(name.startswith("layer2") for name in prunable_weights(model, ["layer2"]))
    with pytest.raises(PruneError, match="'convl' matches no module"):
        prunable_weights(model, ["convl"])
    with pytest.raises(PruneError, match="regular expression"):
        prunable_weights(model, ["re:("])
    report = se.prune(model, sparsity=0.9, ignore=["conv1", "linear"])
    assert "conv1.weight" not in [layer.name for layer in report.layers]
    assert (model.conv1.weight != 0).all()


def test_attention_projections_are_pruned_and_shared_weights_once():
    model = build("vit_small", image_size=8, layers=1, width=12, mlp=24)
    names = list(prunable_weights(model))
    assert "encoder.layers.encoder_layer_0.self_attention.in_proj_weight" in names
    tied = nn.ModuleDict({"a": nn.Linear(4, 4), "b": nn.Linear(4, 4)})
    tied["b"].weight = tied["a"].weight
    assert list(prunable_weights(tied)) == ["a.weight"]


def test_collapse_is_reported_and_can_be_prevented():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 100))
    with torch.no_grad():
        model[1].weight.mul_(1e-3)
    other = copy.deepcopy(model)
    with pytest.warns(UserWarning, match=r"1 of 3 layers lost every weight: 1.weight"):
        report = se.prune(model, sparsity=0.5)
    assert report.collapsed == ["1.weight"]
    assert "collapsed" in str(report)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        again = se.prune(other, sparsity=0.5, keep_one=True)
    assert again.collapsed == []
    assert again.kept == report.kept


def test_report_is_a_table_and_plain_data():
    report = se.prune(small(), sparsity=0.9)
    assert "4.weight" in str(report)
    content = report.to_dict()
    assert content["kept"] == sum(layer["kept"] for layer in content["layers"])
    assert content["other_parameters"] == 8 * 3 + 10


@pytest.mark.parametrize(
    "options, message",
    [
        ({}, "sparsity is needed"),
        ({"sparsity": 90}, "not per cent"),
        ({"sparsity": -0.1}, r"0\.\.1"),
        ({"sparsity": 0.5, "scope": "world"}, "scope is 'world'"),
        ({"sparsity": 0.5, "distribution": "erq"}, "erq"),
        ({"sparsity": 0.9, "structure": se.NM(2, 4)}, "removes 0.5000"),
        ({"sparsity": 0.5, "structure": "blok"}, "blok"),
        ({"structure": se.FanIn(500)}, "has only 27"),
        ({"sparsity": 0.5, "ignore": [nn.Conv2d, nn.Linear]}, "no prunable weight"),
    ],
)
def test_bad_requests_change_nothing(options, message):
    model = small()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(SparseEngineError, match=message):
        se.prune(model, **options)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert se.masks(model) == {}


def test_a_mask_that_does_not_fit_is_refused_before_anything_changes():
    model = small()
    with pytest.raises(PruneError, match=r"\(2, 2\)"):
        set_masks(model, {"4.weight": torch.zeros(10, 288, dtype=torch.bool), "0.weight": torch.ones(2, 2) > 0})
    assert (model[4].weight != 0).any()
    with pytest.raises(PruneError, match=r"no parameter 'x.weight'"):
        set_masks(model, {"x.weight": torch.ones(2, 2) > 0})
