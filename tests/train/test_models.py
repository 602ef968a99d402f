"""Built-in models: torchvision's keys, the CIFAR checkpoints, clear refusals."""

from __future__ import annotations

import pytest
import torch

from sparse_engine.errors import CheckpointError, RecipeError
from sparse_engine.train.models import MODELS, accepts, build, load_state
from tests.convert.zoo import torchvision_models


@pytest.mark.parametrize(
    "name, theirs",
    [
        ("resnet18", "resnet18"),
        ("resnet50", "resnet50"),
        ("vgg16_bn", "vgg16_bn"),
        ("mobilenet_v2", "mobilenet_v2"),
        ("vit_b_16", "vit_b_16"),
    ],
)
def test_keys_and_shapes_are_torchvisions(name, theirs):
    models = torchvision_models()
    with torch.device("meta"):
        ours, other = build(name), getattr(models, theirs)()
    want = {key: value.shape for key, value in other.state_dict().items()}
    assert {key: value.shape for key, value in ours.state_dict().items()} == want


def test_outputs_are_torchvisions():
    models = torchvision_models()
    theirs = models.mobilenet_v2().eval()
    ours = load_state(build("mobilenet_v2"), theirs.state_dict()).eval()
    x = torch.randn(1, 3, 64, 64)
    assert torch.equal(ours(x), theirs(x))


@pytest.mark.parametrize(
    "name, options, shape",
    [
        ("mlp", {"in_features": 12, "hidden": (5,), "num_classes": 3}, (3, 2, 2)),
        ("resnet8", {"num_classes": 7}, (3, 32, 32)),
        ("resnet20", {"option": "B", "head": "fc"}, (3, 32, 32)),
        ("resnet18_cifar", {"width": 8}, (3, 32, 32)),
        ("vgg11_cifar", {"width": 0.125}, (3, 32, 32)),
        ("mobilenet_v2", {"width": 0.25, "small_input": True, "num_classes": 10}, (3, 32, 32)),
        ("vit_small", {"layers": 1, "width": 24, "mlp": 32}, (3, 32, 32)),
    ],
)
def test_forward_and_backward(name, options, shape):
    model = build(name, **options)
    out = model(torch.randn(2, *shape))
    assert out.shape == (2, options.get("num_classes", 10))
    out.sum().backward()
    assert all(p.grad is not None for p in model.parameters())


def test_option_a_shortcut_subsamples_and_pads_on_both_sides():
    shortcut = build("resnet8").layer2[0].downsample
    x = torch.randn(1, 16, 4, 4)
    y = shortcut(x)
    assert y.shape == (1, 32, 2, 2)
    assert torch.equal(y[:, 8:24], x[:, :, ::2, ::2])
    assert (y[:, :8] == 0).all()
    assert (y[:, 24:] == 0).all()


def test_published_cifar_checkpoints_load(real_data):
    from safetensors.torch import load_file

    folder = next(p for p in (real_data / "checkpoints", real_data) if (p / "resnet20_cifar10.safetensors").exists())
    for name in ("resnet20", "resnet56"):
        load_state(build(name), load_file(folder / f"{name}_cifar10.safetensors"))


def test_state_that_does_not_fit_is_explained():
    model = build("resnet8")
    state = dict(model.state_dict())
    load_state(model, {f"module.{k}": v for k, v in state.items() if "num_batches" not in k})
    del state["linear.weight"]
    state["head.weight"] = torch.zeros(1)
    state["conv1.weight"] = torch.zeros(1, 3, 3, 3)
    with pytest.raises(CheckpointError, match=r"1 missing keys \(linear.weight\).*1 unexpected keys.*conv1.weight"):
        load_state(model, state)


@pytest.mark.parametrize(
    "name, options, message",
    [
        ("resnet21", {}, "did you mean"),
        ("mlp", {"widht": 3}, "widht"),
        ("resnet20", {"depth": 21}, "6n"),
        ("resnet20", {"option": "C"}, "'C'"),
        ("vit_small", {"image_size": 30}, "multiple of patch_size"),
        ("timm:nothing_here", {}, "timm"),
        ("keras:resnet", {}, "keras"),
    ],
)
def test_bad_names_and_options(name, options, message):
    with pytest.raises(RecipeError, match=message):
        build(name, **options)


def test_accepts_knows_every_model():
    for name in MODELS:
        assert accepts(name, "num_classes"), name
    assert accepts("mlp", "in_features")
    assert not accepts("resnet20", "in_features")
