"""Whole runs: every recipe ends in an executable, a killed run resumes bit for bit, mistakes cost seconds."""

from __future__ import annotations

import json
import re
import sys

import pytest
import torch
from torch import nn

import sparse_engine as se
from sparse_engine.distill import CrossEntropy
from sparse_engine.errors import CheckpointError, PruneError, RecipeError, SparseEngineError
from sparse_engine.train import Phase, accuracy, load_data, run
from sparse_engine.train.loop import Mechanism, learning_rate
from sparse_engine.train.recipe import TrainPart

SMALL = {
    "model.options": {"hidden": [24, 24]},
    "data.limit": 200,
    "train.epochs": 2,
    "train.learning_rate": 0.05,
    "convert.enabled": False,
}
FAST = {
    "epsd": {"prune.options": {"steps": 1, "mode": "first_order"}},
    "magnitude": {"pretrain.epochs": 1, "prune.keep_one": True},
    "rigl": {"dynamic.every": 2},
    "end_to_end": {"pretrain.epochs": 1, "prune.sparsity": 0.9},
    "data_pruning_kd": {"teacher.epochs": 1, "coreset.score": "el2n", "coreset.epochs": 1, "coreset.updates": "epochs"},
}


def settings(recipe: str, **more) -> dict:
    return {**SMALL, **FAST[recipe], **more}


@pytest.mark.parametrize("recipe", list(FAST))
def test_every_recipe_runs_to_the_requested_sparsity(recipe):
    result = run(recipe, "digits", progress=False, **settings(recipe))
    wanted = {"epsd": 0.9, "magnitude": 0.9, "rigl": 0.9, "end_to_end": 0.9, "data_pruning_kd": 0.8}[recipe]
    assert result.report.kept == round((1 - wanted) * result.report.total)
    parameters = dict(result.model.named_parameters())
    assert sum(int((parameters[layer.name] != 0).sum()) for layer in result.report.layers) <= result.report.kept
    assert se.masks(result.model) == {}
    assert not any(type(m).__name__ in ("SoftReLU", "SparseLinear") for m in result.model.modules())
    assert [row["phase"] for row in result.history].count("train") == 2
    assert result.summary["test_accuracy"] == accuracy(result.model, load_data("digits", limit=200)[1])
    assert "test accuracy" in str(result)


def test_a_run_ends_with_files_and_an_executable(tmp_path):
    result = run("epsd", "digits", out=tmp_path / "r", progress=False, **settings("epsd", **{"convert.enabled": True}))
    names = {p.name for p in (tmp_path / "r").iterdir()}
    assert {"checkpoint.pt", "log.csv", "log.json", "model.safetensors", "model.spx", "summary.json"} <= names
    summary = json.loads((tmp_path / "r" / "summary.json").read_text())
    assert summary["executable_accuracy"] == pytest.approx(summary["test_accuracy"], abs=0.01)
    assert summary["executable_bytes"] < summary["dense_bytes"]
    assert summary["executable_ms"] > 0
    _, test = load_data("digits", limit=200)
    x = test.batch(torch.arange(5)).inputs
    torch.testing.assert_close(se.load(tmp_path / "r" / "model.spx")(x), result.model(x).detach(), rtol=1e-4, atol=1e-4)
    rows = (tmp_path / "r" / "log.csv").read_text().splitlines()
    assert rows[0].startswith("phase,epoch,loss")
    assert len(rows) == 3


def test_a_run_leaves_diagnostics_and_they_change_nothing(tmp_path):
    options = settings("rigl", **{"train.sparse_kernels": "always", "diagnostics.points": 3, "diagnostics.samples": 32})
    seen = run("rigl", "digits", out=tmp_path / "r", progress=False, **options)
    unseen = run("rigl", "digits", out=tmp_path / "u", progress=False, **{**options, "diagnostics.enabled": False})
    for a, b in zip(seen.model.parameters(), unseen.model.parameters(), strict=True):
        assert torch.equal(a, b)
    assert not (tmp_path / "u" / "diagnostics.json").exists()
    found = json.loads((tmp_path / "r" / "diagnostics.json").read_text())
    assert found["mean_jsv"]["before"] > 0
    assert found["mean_jsv"]["after"] > 0
    axis, losses = found["loss_surface"]["axis"], torch.tensor(found["loss_surface"]["losses"])
    assert len(axis) == 3
    probe = load_data("digits", limit=200)[0].batch(torch.arange(32))
    here = torch.nn.functional.cross_entropy(seen.model(probe.inputs), probe.targets)
    assert losses[1, 1].item() == pytest.approx(here.item(), rel=1e-4)
    assert found["density"] == {layer.name: 1 - layer.sparsity for layer in seen.report.layers}
    layers = {"fc1.weight", "fc2.weight", "fc3.weight"}
    assert set(found["mask_overlap"]) == layers | {"total"}
    assert 0 < found["mask_overlap"]["total"] < 1
    assert set(found["gradient_flow"]) == layers | {"total"}
    rows = [row for row in seen.history if row["phase"] == "train"]
    assert all(row["gradient_norm"] > 0 for row in rows)
    assert rows[-1]["mask_overlap"] == pytest.approx(found["mask_overlap"]["total"])


def test_the_test_set_is_looked_at_as_often_as_asked():
    def tested(every):
        options = settings("rigl", **{"train.epochs": 5, "train.test_every": every})
        result = run("rigl", "digits", progress=False, **options)
        assert result.summary["test_accuracy"] is not None
        return [row["test_accuracy"] is not None for row in result.history]

    assert tested(1) == [True] * 5
    assert tested(2) == [False, True, False, True, True]
    assert tested(0) == [False] * 5


@pytest.mark.parametrize(
    "recipe, more, words",
    [
        ("rigl", {"train.sparse_kernels": "always"}, "3 of 3 layers on sparse kernels.* ms against .* ms dense"),
        ("rigl", {"train.sparse_kernels": "never"}, r"dense and masked \(train.sparse_kernels is never\): .*[0-9] ms"),
        ("magnitude", {"dynamic.name": "gradual"}, "no layer is faster .*take [0-9.]+ ms"),
        ("epsd", {"train.amp": True}, "train.amp is on.*take [0-9.]+ ms"),
        ("end_to_end", {}, "3 layers with learned gates: .* take [0-9.]+ ms against [0-9.]+ ms without"),
    ],
)
def test_every_run_says_what_a_step_takes(recipe, more, words, capsys):
    result = run(recipe, "digits", progress=True, **settings(recipe, **more))
    assert re.search(words, capsys.readouterr().err)
    assert result.summary["dense_step_ms"] > 0
    assert re.search(r"training step \(forward and backward\): [0-9.]+ ms", str(result))


def test_layers_that_win_alone_but_lose_together_stay_dense(monkeypatch, capsys):
    module = sys.modules[run.__module__]
    monkeypatch.setattr(module, "_step_ms", lambda models, *_: [1.0, 2.0][: len(models)])
    chosen = module.sparsify_
    monkeypatch.setattr(module, "sparsify_", lambda model, **options: chosen(model, **{**options, "force": True}))
    dense = run("rigl", "digits", progress=True, **settings("rigl"))
    assert "1.00 ms against 2.00 ms with 3 of 3 layers on sparse kernels" in capsys.readouterr().err
    assert "sparse_step_ms" not in dense.summary
    monkeypatch.setattr(module, "_step_ms", lambda models, *_: [2.0, 1.0][: len(models)])
    assert run("rigl", "digits", progress=False, **settings("rigl")).summary["sparse_step_ms"] == 1.0


@pytest.mark.parametrize("name", ["granet", "gradual", "iterative"])
def test_masks_shrink_on_sparse_kernels_as_on_dense_layers(name):
    options = settings(
        "rigl", **{"dynamic.name": name, "dynamic.initial_sparsity": 0.5, "dynamic.rounds": 2, "train.epochs": 3}
    )
    sparse = run("rigl", "digits", progress=False, **{**options, "train.sparse_kernels": "always"})
    dense = run("rigl", "digits", progress=False, **{**options, "train.sparse_kernels": "never"})
    assert "sparse_step_ms" in sparse.summary
    assert sparse.report.kept == dense.report.kept == round(0.1 * dense.report.total)
    for a, b in zip(sparse.model.parameters(), dense.model.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)


def test_a_model_survives_a_conversion_that_fails(tmp_path, monkeypatch):
    def convert(*_, **__):
        raise SparseEngineError("no")

    monkeypatch.setattr(se.convert, "convert", convert)
    options = settings("rigl", **{"convert.enabled": True})
    with pytest.raises(SparseEngineError, match="no"):
        run("rigl", "digits", out=tmp_path / "r", progress=False, **options)
    assert (tmp_path / "r" / "model.safetensors").exists()
    resumed = run("rigl", "digits", out=tmp_path / "r", resume=True, progress=False,
                  **{**options, "convert.enabled": False})  # fmt: skip
    assert resumed.summary["sparsity"] == pytest.approx(0.9, abs=1e-3)


def test_a_collapse_after_pretraining_is_repaired_without_training_again(tmp_path, monkeypatch):
    options = settings("magnitude", **{"pretrain.epochs": 2, "prune.keep_one": False, "prune.sparsity": 0.99})
    torch.manual_seed(0)

    def model():
        net = nn.Sequential(nn.Flatten(), nn.Linear(64, 16), nn.ReLU(), nn.Linear(16, 16), nn.Linear(16, 10))
        with torch.no_grad():
            net[3].weight.mul_(1e-4)
        return net

    options.pop("model.options")
    with pytest.raises(PruneError, match=r"keep_one=true.*with --resume what was trained before is kept"):
        run("magnitude", "digits", model=model, out=tmp_path / "r", progress=False, **options)
    resumed = run("magnitude", "digits", model=model, out=tmp_path / "r", resume=True, progress=False,
                  **{**options, "prune.keep_one": True})  # fmt: skip
    assert [row["phase"] for row in resumed.history] == ["pretrain"] * 2 + ["train"] * 2
    # once the masks are chosen, how they were chosen is settled
    with pytest.raises(SparseEngineError, match=r"another recipe .*prune.sparsity"):
        run("magnitude", "digits", model=model, out=tmp_path / "r", resume=True, progress=False,
            **{**options, "prune.keep_one": True, "prune.sparsity": 0.9})  # fmt: skip


class Killed(BaseException):
    """As a signal would end the process: no handler of the library sees it as an error of its own."""


KILLS = [
    ("epsd", 1, {}),
    ("epsd", 5, {"loss.name": "ps_kd"}),
    ("epsd", 5, {"loss.name": "dlb", "loss.temperature": 3.0}),
    ("rigl", 6, {}),
    ("rigl", 6, {"train.sparse_kernels": "always"}),
    ("end_to_end", 2, {}),
    ("end_to_end", 7, {}),
    ("data_pruning_kd", 3, {"coreset.score": "forgetting", "coreset.runs": 2}),
    ("data_pruning_kd", 9, {}),
    ("magnitude", 6, {"coreset.score": "infobatch", "coreset.fraction": 0.5, "train.epochs": 4}),
    ("magnitude", 6, {"dynamic.name": "granet", "dynamic.every": 2, "train.optimizer": "adam"}),
]


@pytest.mark.parametrize("recipe, at, more", KILLS, ids=[f"{r}-{a}-{len(m)}-{i}" for i, (r, a, m) in enumerate(KILLS)])
def test_a_killed_run_resumes_bit_for_bit(recipe, at, more, tmp_path, monkeypatch):
    options = settings(recipe, **{"train.sparse_kernels": "never", **more})
    whole = run(recipe, "digits", out=tmp_path / "whole", progress=False, **options)

    steps = 0
    observe = Phase.__post_init__

    class Bomb(Mechanism):
        def before_step(self, step):
            nonlocal steps
            steps += 1
            if steps == at:
                raise Killed
            return False

    def armed(self):
        self.mechanisms = [*self.mechanisms, Bomb()]
        observe(self)

    monkeypatch.setattr(Phase, "__post_init__", armed)
    with pytest.raises(Killed):
        run(recipe, "digits", out=tmp_path / "killed", progress=False, **options)
    resumed = run(recipe, "digits", out=tmp_path / "killed", resume=True, progress=False, **options)
    for (name, a), b in zip(whole.model.state_dict().items(), resumed.model.state_dict().values(), strict=True):
        assert torch.equal(a, b), name
    assert all("gradient_norm" in row for row in whole.history)
    timeless = [{k: v for k, v in row.items() if k != "step_ms"} for row in whole.history]
    assert [{k: v for k, v in row.items() if k != "step_ms"} for row in resumed.history] == timeless


def test_resuming_a_finished_run_changes_nothing(tmp_path):
    first = run("magnitude", "digits", out=tmp_path / "r", progress=False, **settings("magnitude"))
    again = run("magnitude", "digits", out=tmp_path / "r", resume=True, progress=False, **settings("magnitude"))
    assert again.summary["test_accuracy"] == first.summary["test_accuracy"]
    assert len(again.history) == len(first.history)


def test_resume_refuses_another_recipe_and_a_damaged_checkpoint(tmp_path):
    options = settings("magnitude")
    run("magnitude", "digits", out=tmp_path / "r", progress=False, **options)
    with pytest.raises(SparseEngineError, match="already holds a run"):
        run("magnitude", "digits", out=tmp_path / "r", progress=False, **options)
    changed = {**options, "train.learning_rate": 0.3}
    with pytest.raises(SparseEngineError, match=r"train.learning_rate: 0.05 then, 0.3 now"):
        run("magnitude", "digits", out=tmp_path / "r", resume=True, progress=False, **changed)
    path = tmp_path / "r" / "checkpoint.pt"
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(CheckpointError, match="cannot be read"):
        run("magnitude", "digits", out=tmp_path / "r", resume=True, progress=False, **options)
    with pytest.raises(SparseEngineError, match="resume needs out"):
        run("magnitude", "digits", resume=True, progress=False, **options)


def test_the_same_seed_is_the_same_run_and_another_is_not():
    a, b, c = (
        run("rigl", "digits", progress=False, **settings("rigl", seed=s, **{"train.sparse_kernels": "never"}))
        for s in (1, 1, 2)
    )
    weights = [r.model.fc2.weight for r in (a, b, c)]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])


def test_sparse_kernels_train_like_masked_dense_layers():
    options = settings("rigl", **{"train.epochs": 3})
    sparse = run("rigl", "digits", progress=False, **{**options, "train.sparse_kernels": "always"})
    dense = run("rigl", "digits", progress=False, **{**options, "train.sparse_kernels": "never"})
    for a, b in zip(sparse.model.parameters(), dense.model.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)
    assert sparse.summary["sparse_step_ms"] > 0


def test_a_loss_that_is_not_finite_stops_with_step_layer_and_advice(tmp_path):
    options = settings("magnitude", **{"train.learning_rate": 1e30, "train.momentum": 0.0})
    with pytest.raises(SparseEngineError, match=r"at step \d+ .*phase 'pretrain'.*'fc\d.*Lower the learning rate"):
        run("magnitude", "digits", out=tmp_path / "r", progress=False, **options)


def test_a_loss_that_spoils_later_names_the_last_good_state(tmp_path, monkeypatch):
    calls, usual = 0, CrossEntropy.__call__

    def spoiled(self, forward, batch):
        nonlocal calls
        calls += 1
        return usual(self, forward, batch) * (float("nan") if calls == 6 else 1.0)  # in the second epoch

    monkeypatch.setattr(CrossEntropy, "__call__", spoiled)
    options = settings("magnitude", **{"pretrain.epochs": 2, "diagnostics.enabled": False})  # training calls it alone
    with pytest.raises(SparseEngineError, match=r"at step 6 .*last good state is .*checkpoint.pt"):
        run("magnitude", "digits", out=tmp_path / "r", progress=False, **options)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"prune.sparsity": 0.9999}, "fewer than the 3 layers"),
        (
            {"prune.sparsity": 0.97, "prune.scope": "layer", "model.options": {"hidden": [2, 2]}},
            "leaves nothing of fc2",
        ),
        ({"model.name": "resnet8", "model.options": {"in_channels": 3}}, "cannot take this data's samples"),
        ({"model.options": {"num_classes": 3}}, "10 classes"),
        ({"model.checkpoint": "/nowhere.safetensors"}, "does not exist"),
        ({"prune.ignore": ["fc9"]}, "'fc9' matches no module"),
        ({"train.sparse_kernels": "always", "train.amp": True}, "always, but train.amp is on"),
    ],
)
def test_mistakes_are_found_before_any_training(changes, message, monkeypatch):
    module = sys.modules[run.__module__]
    monkeypatch.setattr(module, "fit", lambda *_, **__: pytest.fail("training began"))
    with pytest.raises((RecipeError, PruneError, SparseEngineError), match=message):
        run("magnitude", "digits", progress=False, **{**settings("magnitude"), **changes})


def test_a_layer_emptied_by_global_pruning_is_an_error_with_the_way_out():
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 16), nn.ReLU(), nn.Linear(16, 16), nn.Linear(16, 10))
    with torch.no_grad():
        model[3].weight.mul_(1e-6)
    options = {**SMALL, "pretrain": None, "prune.sparsity": 0.5}
    options.pop("model.options")
    with pytest.raises(PruneError, match="keep_one=true"):
        run("magnitude", "digits", model=model, progress=False, **options)


def test_own_models_and_data_sets():
    torch.manual_seed(0)
    x = torch.randn(80, 6)
    y = (x[:, 0] > 0).long()
    result = run(
        {"name": "mine", "train": {"epochs": 8, "learning_rate": 0.1, "batch_size": 16}, "prune": {"sparsity": 0.5},
         "convert": {"enabled": False}},
        ((x[:60], y[:60]), (x[60:], y[60:])),
        model=lambda: nn.Sequential(nn.Flatten(), nn.Linear(6, 12), nn.ReLU(), nn.Linear(12, 2)),
        progress=False,
    )  # fmt: skip
    assert result.summary["test_accuracy"] > 0.8
    assert result.summary["sparsity"] == 0.5


def test_validation_label_noise_and_amp():
    options = settings("magnitude", **{"data.validation": 0.2, "data.label_noise": 0.5, "train.amp": True})
    result = run("magnitude", "digits", progress=False, **options)
    assert 0 <= result.summary["validation_accuracy"] <= 1
    assert result.summary["training_samples"] == 160


def test_learning_rate_schedules():
    part = TrainPart(learning_rate=1.0, schedule="multistep", milestones=[0.5, 0.75], gamma=0.1)
    assert [round(learning_rate(part, e * 10, 10, 8), 4) for e in range(8)] == [1, 1, 1, 1, 0.1, 0.1, 0.01, 0.01]
    cosine = TrainPart(learning_rate=1.0, schedule="cosine", warmup_epochs=1)
    assert learning_rate(cosine, 0, 10, 5) == pytest.approx(0.1)
    assert learning_rate(cosine, 10, 10, 5) == pytest.approx(1.0)
    assert learning_rate(cosine, 50, 10, 5) == pytest.approx(0.0)
