"""Whatever is wrong with a command line: one message, with the way out, and an exit status that is not 0."""

from __future__ import annotations

import os
import re

import pytest
import torch

# command line, exit status, what the message must say
CASES = [
    ("inspect none.pt", 1, r"none\.pt: there is no such file"),
    ("inspect", 2, "give either a file, or --model"),
    ("inspect .", 1, "is a folder, a file is needed"),
    ("inspect @net.py", 1, r"net\.py: neither a safetensors file nor a readable PyTorch checkpoint"),
    ("inspect @pruned.pt --checkpoint x.pt", 2, "belong to --model"),
    ("convert", 2, "--model is missing"),
    ("convert --checkpoint @pruned.pt", 2, "a checkpoint holds weights, not the network"),
    ("convert --model resnet51", 1, "did you mean 'resnet5"),
    ("convert --model nowhere.at_all:build", 2, "no Python module 'nowhere'"),
    ("convert --model none.py:build", 1, "there is no such file"),
    ("convert --model @net.py:bild", 2, r"has no 'bild'; it has .*build"),
    ("convert --model @net.py:number --input-shape 1,2", 2, "gave a int, not a torch.nn.Module"),
    ("convert --model @net.py:needs", 2, "missing a required argument: 'something'"),
    ("convert --model @net.py:build --arg depth=3", 2, "unexpected keyword argument 'depth'"),
    ("convert --model @net.py:build --arg 3", 2, "write KEY=VALUE"),
    ("convert --model @net.py:build --checkpoint @pruned.pt", 2, "input shape of .* is not known"),
    ("convert --model @net.py:build --checkpoint @dense.pt --input-shape 1,3,8,8", 2, "the model is dense: 0 of its"),
    ("convert --model mlp", 2, "Give its pruned weights with --checkpoint"),
    (
        "convert --model @net.py:build --checkpoint @pruned.pt --input-shape 1,4,8,8",
        2,
        "fails on inputs of shape 1×4×8×8",
    ),
    ("convert --model @net.py:build --checkpoint @pruned.pt --input-shape 1,3,z", 2, "write sizes with commas"),
    ("convert --model @net.py:build --checkpoint @pruned.pt --input-shape 1,0,8,8", 2, "a size of 0"),
    ("convert --model @net.py:build --checkpoint none.pt", 1, r"none\.pt: there is no such file"),
    ("convert --model @net.py:build --checkpoint @model.spx", 1, "is already an executable"),
    ("convert --model @net.py:build --arg width=9 --checkpoint @pruned.pt", 1, "the checkpoint does not fit the model"),
    ("convert --model @net.py:Branching --allow-dense --input-shape 1,3", 1, r"cannot capture.*net\.py:\d+ in forward"),
    (
        "convert --model @net.py:build --checkpoint @pruned.pt --input-shape 1,3,8,8 -o no/a.spx",
        1,
        "no: there is no such",
    ),
    ("convert --model @net.py:build --checkpoint @pruned.pt --input-shape 1,3,8,8 --threads 0", 2, "threads"),
    (
        "convert --model @net.py:build --checkpoint @pruned.pt --input-shape 1,3,8,8 --bound -1 --no-tune",
        1,
        "bound must be",
    ),
    ("convert --bogus", 2, "No such option"),
    ("bogus", 2, "No such command"),
    ("run", 2, "Missing argument"),
    ("run @model.spx", 2, "give inputs with --input FILE"),
    ("run none.spx --random", 1, "there is no such file"),
    ("run @pruned.pt --random", 1, "header"),
    ("run @model.spx --input none.npy", 1, "there is no such file"),
    ("run @model.spx --input @pruned.pt", 2, "the files hold .*; the executable takes"),
    ("run @model.spx --input @net.py", 2, r"inputs are \.npy"),
    ("run @model.spx --input object.pt", 1, "would run code"),
    ("run @model.spx --input wrong.pt", 1, r"\(2, 3, 12\)|shape"),
    ("run @model.spx --input integers.pt", 1, "int64"),
    ("run @model.spx --random --output y.txt", 2, "the ending must be one of"),
    ("bench", 2, "give an executable"),
    ("bench @model.spx --batch 0", 2, "batch"),
    ("bench @model.spx --trace no/t.json", 1, "no: there is no such"),
    ("report none.spx", 1, "there is no such file"),
    ("report @model.spx -o page.pdf", 2, "must end in .html"),
    ("report .", 1, "not the folder of a training run"),
    ("prune --model mlp", 1, "sparsity"),
    ("prune --model mlp --sparsity 1.5", 2, "sparsity"),
    ("prune --model mlp --sparsity 0.5 --criterion snip", 2, "--data digits"),
    ("prune --model mlp --sparsity 0.5 --criterion beauty", 1, "is not one of magnitude"),
    ("prune --model mlp --sparsity 0.5 --structure hexagon", 1, "is no structure"),
    ("prune --model mlp --sparsity 0.5 -o a.txt", 2, "the ending must be"),
    ("train", 2, "name a recipe"),
    ("train epsd", 2, "name the data"),
    ("train none --data digits", 1, "'none'"),
    ("train epsd --data none", 1, "'none' does not exist"),
    ("train epsd --data digits --set epochs", 1, "key=value"),
    ("train epsd --data digits --set typo.epochs=3", 1, "typo"),
]


@pytest.fixture(autouse=True)
def inputs(tmp_path):
    torch.save(torch.nn.ReLU(), tmp_path / "object.pt")
    torch.save(torch.ones(2, 3, 12), tmp_path / "wrong.pt")
    torch.save(torch.ones(2, 3, 12, 12, dtype=torch.int64), tmp_path / "integers.pt")


@pytest.mark.parametrize(("line", "code", "message"), CASES, ids=lambda value: value if isinstance(value, str) else "")
def test_one_message_and_a_status(cli, tmp_path, line, code, message):
    before = sorted(os.listdir(tmp_path))
    result = cli(line, code=code)
    assert re.search(message, " ".join(result.stderr.replace("│", " ").split())), result.stderr
    assert result.stdout == ""
    assert [name for name in sorted(os.listdir(tmp_path)) if name not in ("__pycache__", "runs")] == before


def test_errors_in_json(cli):
    data = cli("inspect none.pt --json", code=1).data
    assert data == {"error": {"type": "FileNotFoundError", "message": "none.pt: there is no such file or folder"}}


def test_debug_shows_where_it_comes_from(cli):
    errors = cli("inspect none.pt --debug", code=1).stderr
    assert "Traceback" in errors
    assert "error: none.pt: there is no such file or folder" in errors


def test_a_full_disk(cli, tmp_path, monkeypatch):
    def full(descriptor):
        raise OSError(28, "No space left on device", "out.spx")

    monkeypatch.setattr(os, "fsync", full)
    before = sorted(os.listdir(tmp_path))
    line = "convert --model @net.py:build --checkpoint @pruned.pt --input-shape 1,3,8,8 --no-tune -o out.spx"
    assert "out.spx: No space left on device" in cli(line, code=1).stderr
    assert sorted(os.listdir(tmp_path)) == before


def test_an_unexpected_error_says_so(cli, monkeypatch):
    from sparse_engine.cli import doctor

    def broken():
        raise KeyError("surprise")

    monkeypatch.setattr(doctor, "environment", broken)
    message = cli("doctor", code=1).stderr
    assert "KeyError: 'surprise'" in message
    assert "--debug" in message
