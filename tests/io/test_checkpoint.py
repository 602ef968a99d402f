"""Checkpoints: every kind of file that holds a state dict, masks folded in, and clear refusals."""

from __future__ import annotations

import copy
import os
import pickle
import random

import pytest
import torch
from torch import nn
from torch.ao.pruning import WeightNormSparsifier
from torch.nn.utils import prune

from sparse_engine.errors import CheckpointError
from sparse_engine.io import load_state, read_checkpoint, resolve_masks, write_checkpoint


def _model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(4, 2))


def _same(a, b) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("ending", [".pt", ".pth", ".safetensors"])
def test_round_trip(tmp_path, ending):
    state = _model().state_dict()
    write_checkpoint(tmp_path / f"a{ending}", state)
    assert _same(read_checkpoint(tmp_path / f"a{ending}"), state)


@pytest.mark.parametrize("wrapper", ["state_dict", "model", "model_state_dict"])
@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod.", "module._orig_mod."])
@pytest.mark.parametrize("zipped", [True, False])
def test_training_checkpoints(tmp_path, wrapper, prefix, zipped):
    state = _model().state_dict()
    saved = {wrapper: {prefix + name: tensor for name, tensor in state.items()}, "epoch": 3, "lr": [0.1]}
    torch.save(saved, tmp_path / "a.pt", _use_new_zipfile_serialization=zipped)
    assert _same(read_checkpoint(tmp_path / "a.pt"), state)


def test_the_content_decides_not_the_name(tmp_path):
    state = _model().state_dict()
    write_checkpoint(tmp_path / "a.safetensors", state)
    os.rename(tmp_path / "a.safetensors", tmp_path / "a.pt")
    assert _same(read_checkpoint(tmp_path / "a.pt"), state)


def test_torch_prune_masks(tmp_path):
    model = _model()
    prune.l1_unstructured(model[0], "weight", amount=0.5)
    prune.random_structured(model[3], "weight", amount=0.5, dim=1)
    torch.save(model.state_dict(), tmp_path / "a.pt")
    state = read_checkpoint(tmp_path / "a.pt")
    prune.remove(model[0], "weight")
    prune.remove(model[3], "weight")
    assert _same(state, model.state_dict())
    assert int((state["0.weight"] == 0).sum()) == 54


def test_torch_ao_parametrizations(tmp_path):
    model = nn.Sequential(nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 4))
    sparsifier = WeightNormSparsifier(sparsity_level=0.5, sparse_block_shape=(1, 4))
    sparsifier.prepare(model, [{"tensor_fqn": "0.weight"}])
    sparsifier.step()
    torch.save(model.state_dict(), tmp_path / "a.pt")
    with pytest.raises(CheckpointError, match="squash_mask"):
        read_checkpoint(tmp_path / "a.pt")
    mask = model[0].parametrizations.weight[0].mask
    torch.save({**model.state_dict(), "0.parametrizations.weight.0.mask": mask}, tmp_path / "b.pt")
    state = read_checkpoint(tmp_path / "b.pt")
    assert state.keys() == {"0.weight", "0.bias", "2.weight", "2.bias"}
    assert torch.equal(state["0.weight"], model[0].weight)
    assert float((state["0.weight"] == 0).float().mean()) >= 0.5


def test_a_removed_weight_is_zero_even_where_it_was_not_finite():
    weight = torch.tensor([1.0, float("nan"), float("inf"), -2.0])
    found = resolve_masks({"a.weight_orig": weight, "a.weight_mask": torch.tensor([1.0, 0.0, 0.0, 1.0]), "b": weight})
    assert found["a.weight"].tolist() == [1.0, 0.0, 0.0, -2.0]
    assert found["b"] is weight
    assert list(found) == ["a.weight", "b"]


def test_names_that_only_look_like_masks_stay():
    state = {"attention_mask": torch.ones(2), "x_orig": torch.ones(2)}
    assert resolve_masks(state).keys() == state.keys()


@pytest.mark.parametrize(
    ("state", "message"),
    [
        ({"w_orig": torch.ones(2, 3), "w_mask": torch.ones(3, 2)}, r"mask of shape \(3, 2\)"),
        ({"a.parametrizations.weight.0.mask": torch.ones(2)}, "own values are missing"),
        (
            {"parametrizations.weight.original0": torch.ones(2), "parametrizations.weight.original1": torch.ones(2)},
            "no mask",
        ),
    ],
    ids=["shape", "orphan", "weight norm"],
)
def test_masks_that_make_no_sense(state, message):
    with pytest.raises(CheckpointError, match=message):
        resolve_masks(state)


class _Attack:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (str(self.path), "w"))


@pytest.mark.parametrize("zipped", [True, False])
def test_code_in_a_checkpoint_does_not_run(tmp_path, zipped):
    target = tmp_path / "attacked"
    torch.save({"w": torch.ones(1), "x": _Attack(target)}, tmp_path / "a.pt", _use_new_zipfile_serialization=zipped)
    with pytest.raises(CheckpointError, match="would run code"):
        read_checkpoint(tmp_path / "a.pt")
    (tmp_path / "b.pt").write_bytes(pickle.dumps(_Attack(target)))
    with pytest.raises(CheckpointError):
        read_checkpoint(tmp_path / "b.pt")
    assert not target.exists()


def test_a_pickled_model_says_how_to_save_it(tmp_path):
    torch.save(_model(), tmp_path / "a.pt")
    with pytest.raises(CheckpointError, match=r"torch\.save\(model\.state_dict\(\), path\)"):
        read_checkpoint(tmp_path / "a.pt")


def test_torchscript_says_what_it_is(tmp_path):
    torch.jit.trace(nn.Linear(2, 2), torch.ones(1, 2)).save(tmp_path / "a.pt")
    with pytest.raises(CheckpointError, match="TorchScript"):
        read_checkpoint(tmp_path / "a.pt")


@pytest.mark.parametrize(
    "content", [b"", b"x", b"hello world" * 20, b"PK\x03\x04" + bytes(60), bytes(100), b"\x80\x02}q\x00."], ids=str
)
def test_files_that_are_no_checkpoints(tmp_path, content):
    (tmp_path / "a.pt").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"a\.pt"):
        read_checkpoint(tmp_path / "a.pt")


@pytest.mark.parametrize("ending", [".pt", ".safetensors"])
def test_truncated_files(tmp_path, ending):
    path = tmp_path / f"a{ending}"
    write_checkpoint(path, {"w": torch.randn(100)})
    content = path.read_bytes()
    for length in (5, 20, len(content) // 2, len(content) - 1):
        path.write_bytes(content[:length])
        with pytest.raises(CheckpointError):
            read_checkpoint(path)


@pytest.mark.parametrize("zipped", [True, False, None], ids=["zip", "legacy", "safetensors"])
def test_damaged_files_load_or_give_one_error(tmp_path, zipped):
    path = tmp_path / "a.pt"
    state = {"a.weight": torch.ones(4, 5), "b": torch.arange(3)}
    if zipped is None:
        write_checkpoint(tmp_path / "a.safetensors", state)
        content = (tmp_path / "a.safetensors").read_bytes()
    else:
        torch.save({"state_dict": state, "epoch": 3}, path, _use_new_zipfile_serialization=zipped)
        content = path.read_bytes()
    choose = random.Random(0)
    refused = 0
    for _ in range(250):
        damaged = bytearray(content)
        at = choose.randrange(len(damaged))
        if choose.random() < 0.5:
            damaged[at] ^= 1 << choose.randrange(8)
        else:
            damaged[at : at + choose.choice((1, 8, 60))] = choose.randbytes(choose.choice((0, 1, 60)))
        path.write_bytes(damaged)
        try:
            read_checkpoint(path)
        except CheckpointError:
            refused += 1
    assert refused > 50


@pytest.mark.parametrize("content", [[torch.ones(2)], {"epoch": 3}, torch.ones(2), 3])
def test_files_without_a_state_dict(tmp_path, content):
    torch.save(content, tmp_path / "a.pt")
    with pytest.raises(CheckpointError, match=r"state dict|no tensors"):
        read_checkpoint(tmp_path / "a.pt")


def test_missing_file(tmp_path):
    with pytest.raises(FileNotFoundError):
        read_checkpoint(tmp_path / "none.pt")


def test_writing_refuses_what_it_cannot_keep(tmp_path):
    with pytest.raises(CheckpointError, match="ending"):
        write_checkpoint(tmp_path / "a.bin", {})
    with pytest.raises(CheckpointError, match="no tensors"):
        write_checkpoint(tmp_path / "a.pt", {"epoch": 3})
    with pytest.raises(CheckpointError, match="metadata"):
        write_checkpoint(tmp_path / "a.pt", {}, metadata={"a": "b"})
    assert not list(tmp_path.iterdir())


def test_load_state_loads_or_says_all_that_does_not_fit():
    model = _model()
    state = {name: tensor + 1 for name, tensor in model.state_dict().items() if "num_batches" not in name}
    load_state(model, state)
    assert torch.equal(model[0].weight, state["0.weight"])
    before = copy.deepcopy(model.state_dict())
    del state["0.bias"]
    state["head.weight"] = torch.ones(1)
    state["3.weight"] = torch.ones(2, 5)
    with pytest.raises(CheckpointError) as caught:
        load_state(model, state)
    for part in ("1 of the model's 9 tensors are missing (0.bias)", "(head.weight)", "3.weight (2, 5) for (2, 4)"):
        assert part in str(caught.value)
    assert _same(model.state_dict(), before)
