"""Each command does what it says, in tables and in JSON."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import numpy
import pytest
import torch

import sparse_engine as se
from sparse_engine.io import Container, is_spx, read_checkpoint

COMMANDS = ("doctor", "inspect", "prune", "train", "convert", "run", "bench", "report")


def test_the_list_of_commands(cli):
    lines = [line.strip("│ ").split(" ")[0] for line in cli("--help").output.splitlines()]
    assert [line for line in lines if line in COMMANDS] == list(COMMANDS)
    assert cli("--version").output == f"sparse-engine {se.__version__}\n"


@pytest.mark.parametrize("name", COMMANDS)
def test_help_has_an_example_and_json(cli, name):
    output = cli(f"{name} --help").output
    assert "Example" in output
    assert f"sparse-engine {name}" in output
    assert "--json" in output
    assert "--debug" in output


# -- doctor ------------------------------------------------------------------------------------------------------------


def test_doctor_says_what_runs_where(cli):
    output = cli("doctor").output
    for part in ("processor", "instruction sets", "torch", torch.__version__, "What runs where", "executables (.spx)"):
        assert part in output


def test_doctor_in_json(cli):
    data = cli("doctor --json").data
    assert data["packages"]["torch"] == torch.__version__
    assert data["packages"]["sparse_engine"] == se.__version__
    assert data["threads"]["available"] >= 1
    assert {verdict["work"] for verdict in data["verdicts"]} >= {"executables (.spx)", "sparse layers, GPU"}
    assert all(verdict["why"] for verdict in data["verdicts"])


def test_doctor_names_a_setting_that_prevents_everything(cli, monkeypatch):
    module = sys.modules["sparse_engine.report.environment"]
    monkeypatch.setattr(module, "native_core", lambda: {"loaded": False, "reason": "ISA 'foo' is unknown"})
    data = cli("doctor --json").data
    (verdict,) = [verdict for verdict in data["verdicts"] if verdict["work"] == "executables (.spx)"]
    assert verdict["works"] is False
    assert "ISA 'foo' is unknown" in verdict["why"]


# -- inspect -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("source", ["@pruned.pt", "--model @net.py:build --checkpoint @pruned.pt"])
def test_inspect_counts_zeros(cli, folder, source):
    data = cli(f"inspect {source} --json").data
    state = read_checkpoint(folder / "pruned.pt")
    weights = {name: tensor for name, tensor in state.items() if tensor.dim() > 1}
    assert [layer["name"] for layer in data["layers"]] == list(weights)
    for layer in data["layers"]:
        assert layer["zeros"] == int((weights[layer["name"]] == 0).sum())
        assert layer["shape"] == list(weights[layer["name"]].shape)
    assert data["zeros"] == sum(layer["zeros"] for layer in data["layers"])
    assert data["packed_bytes"] < data["dense_bytes"]


def test_inspect_an_executable(cli):
    output = cli("inspect @model.spx").output
    assert "unstructured" in output
    assert "weights are zero" in output


def test_inspect_says_when_nothing_is_pruned(cli):
    output = cli("inspect @dense.pt").output
    assert "Nothing is pruned" in output
    assert "sparse-engine prune" in output


# -- prune, convert, run -----------------------------------------------------------------------------------------------


def test_from_dense_weights_to_the_same_outputs(cli, folder, tmp_path):
    made = cli("prune --model @net.py:build --checkpoint @dense.pt --sparsity 0.8 -o pruned.safetensors --json").data
    assert made["report"]["sparsity"] == pytest.approx(0.8, abs=0.01)
    state = read_checkpoint(tmp_path / "pruned.safetensors")
    line = "convert --model @net.py:build --checkpoint pruned.safetensors --input-shape 1,3,12,12 --no-tune"
    converted = cli(f"{line} -o m.spx --json").data
    assert converted["report"]["max_error"] <= 1e-4
    assert converted["file_bytes"] == (tmp_path / "m.spx").stat().st_size
    model = se.cli._models.build_model(f"{folder}/net.py:build", None, tmp_path / "pruned.safetensors")
    assert torch.equal(model[0].weight, state["0.weight"])
    x = torch.randn(5, 3, 12, 12)
    numpy.save(tmp_path / "x.npy", x.numpy())
    cli("run m.spx --input x.npy --output y.npy")
    expected = model(x).detach().numpy()
    numpy.testing.assert_allclose(numpy.load(tmp_path / "y.npy"), expected, atol=1e-4 * abs(expected).max())


def test_convert_prints_the_table_and_names_the_file(cli, tmp_path):
    output = cli("convert --model @net.py:build --checkpoint @pruned.pt --input-shape 1x3x12x12 --no-tune").output
    assert "Wrote pruned.spx" in output
    assert "unstructured" in output
    assert is_spx(tmp_path / "pruned.spx")


def test_convert_with_arguments_for_the_model(cli):
    line = "convert --model @net.py:build --arg width=16 --arg classes=7 --allow-dense --input-shape 1,3,9,9"
    cli(f"{line} --no-tune -o a.spx")
    data = cli("run a.spx --random --batch 3 --json").data
    assert data["outputs"][0]["shape"] == [3, 7]
    assert len(data["outputs"][0]["top"]) == 3


@pytest.mark.parametrize("ending", [".npy", ".npz", ".pt", ".safetensors"])
def test_run_reads_each_kind_of_file(cli, folder, tmp_path, ending):
    pair = torch.load(folder / "pair.pt")
    path = tmp_path / f"x{ending}"
    if ending == ".npy":
        numpy.save(path, pair["x"].numpy())
    elif ending == ".npz":
        numpy.savez(path, anything=pair["x"].numpy())
    elif ending == ".pt":
        torch.save(pair["x"], path)
    else:
        se.io.write_container(path, {"x": pair["x"]})
    cli(f"run @model.spx --input {path} --output y.safetensors")
    found = Container(tmp_path / "y.safetensors").tensor("output")
    assert torch.allclose(found, pair["y"], atol=1e-4)


def test_run_converts_doubles_and_says_so(cli, folder, tmp_path):
    pair = torch.load(folder / "pair.pt")
    numpy.save(tmp_path / "x.npy", pair["x"].double().numpy())
    result = cli("run @model.spx --input x.npy --output y.npz")
    assert "converted from torch.float64 to torch.float32" in result.stderr
    assert numpy.load(tmp_path / "y.npz")["output"] == pytest.approx(pair["y"].numpy(), abs=1e-4)


def test_random_inputs_follow_the_seed(cli):
    first, again, other = (cli(f"run @model.spx --random --seed {seed} --json").data for seed in (1, 1, 2))
    assert first["outputs"] == again["outputs"]
    assert first["outputs"] != other["outputs"]


def test_a_module_on_the_path(cli, folder, tmp_path, monkeypatch):
    (tmp_path / "my_nets.py").write_text((folder / "net.py").read_text())
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if entry not in ("", str(tmp_path))])
    cli("convert --model my_nets:build --checkpoint @pruned.pt --input-shape 1,3,12,12 --no-tune -o a.spx")
    assert is_spx(tmp_path / "a.spx")


# -- bench, report, train ----------------------------------------------------------------------------------------------


def test_bench_measures_each_batch_size(cli):
    data = cli("bench @model.spx --batch 1 --batch 3 --seconds 0.02 --json").data
    assert [result["batch"] for result in data["results"]] == [1, 3]
    for result in data["results"]:
        assert result["executable"]["runs"] == result["dense"]["runs"] >= 5
        assert 0 < result["executable"]["p10"] <= result["executable"]["p50"] <= result["executable"]["p99"]
        assert result["speedup"] == pytest.approx(result["dense"]["p50"] / result["executable"]["p50"])
    assert torch.__version__ in data["machine"]


def test_bench_against_the_model_itself(cli):
    output = cli("bench @model.spx --model @net.py:build --checkpoint @pruned.pt --seconds 0.02").output
    assert "dense (PyTorch model)" in output


def test_bench_converts_a_model(cli):
    line = "bench --model @net.py:build --checkpoint @pruned.pt --input-shape 1,3,12,12 --seconds 0.02 --json"
    assert cli(line).data["results"][0]["batch"] == 1


def test_bench_writes_a_trace(cli, folder, tmp_path):
    if not se.load(folder / "model.spx").native:
        assert "nothing to profile" in cli("bench @model.spx --seconds 0.02 --trace trace.json", code=1).stderr
        return
    cli("bench @model.spx --seconds 0.02 --trace trace.json")
    events = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    spans = [event for event in events if event["ph"] == "X"]
    assert spans
    assert all(event["dur"] >= 0 and event["ts"] >= 0 and event["name"] for event in spans)
    lanes = {event["tid"] for event in events if event["name"] == "thread_name"}
    assert lanes == {event["tid"] for event in spans}


def test_report_of_an_executable(cli, tmp_path):
    data = cli("report @model.spx -o page.html --seconds 0.02 --batch 1 --batch 2 --json").data
    page = (tmp_path / "page.html").read_text()
    assert [result["batch"] for result in data["benchmarks"]] == [1, 2]
    assert "<svg" in page
    assert "Sparsity by layer" in page
    assert "Latency" in page


@pytest.mark.parametrize("source", ["@pruned.pt", "@model.spx --no-measure"])
def test_report_without_measuring(cli, tmp_path, source):
    cli(f"report {source} -o page.html")
    page = (tmp_path / "page.html").read_text()
    assert "Sparsity by layer" in page
    assert "Latency" not in page


def test_report_of_a_training_run(cli, folder, tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    (run / "summary.json").write_text(json.dumps({"recipe": "epsd", "data": "digits", "test_accuracy": 0.9731}))
    rows = [{"phase": "train", "loss": 1 / epoch, "train_accuracy": 0.5, "test_accuracy": 0.4} for epoch in (1, 2, 3)]
    (run / "log.json").write_text(json.dumps(rows))
    (run / "model.spx").write_bytes((folder / "model.spx").read_bytes())
    cli("report run --no-measure -o page.html")
    page = (tmp_path / "page.html").read_text()
    assert "97.31" in page
    assert "Training" in page
    assert "Loss surface" not in page
    (run / "diagnostics.json").write_text(json.dumps({"mean_jsv": {"before": 0.0271, "after": 0.5}}))
    cli("report run --no-measure -o page.html")
    assert "0.0271" in (tmp_path / "page.html").read_text()


def test_train_hands_everything_on(cli, monkeypatch, tmp_path):
    seen = {}

    def run(recipe, data, **options):
        seen.update(recipe=recipe, data=data, **options)
        return SimpleNamespace(summary={"test_accuracy": 0.5}, __str__=lambda self: "done")

    monkeypatch.setattr(se.train, "run", run)
    told = []
    monkeypatch.setattr(se.train, "keep_freed_memory", lambda keep=True: told.append(keep))
    data = cli("train epsd --data digits --set train.epochs=3 --set prune.sparsity=0.95 --resume --json").data
    assert data["summary"] == {"test_accuracy": 0.5}
    assert seen["recipe"], seen["data"] == ("epsd", "digits")
    assert seen["train.epochs"] == 3
    assert seen["prune.sparsity"] == 0.95
    assert seen["resume"] is True
    assert str(seen["out"]) == os.path.join("runs", "epsd")
    assert told == [True, False]


def test_train_lists_its_recipes(cli):
    assert "epsd" in cli("train --list").output


# -- as a process of its own -------------------------------------------------------------------------------------------


def test_as_a_process():
    command = [sys.executable, "-m", "sparse_engine.cli", "inspect", "none.pt", "--json"]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 1
    assert result.stderr.strip() == "error: none.pt: there is no such file or folder"
    assert json.loads(result.stdout)["error"]["type"] == "FileNotFoundError"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interruption_leaves_nothing(tmp_path, number):
    (tmp_path / "slow.py").write_text(
        "import time\nfrom torch import nn\n"
        "def build():\n    print('building', flush=True)\n    time.sleep(60)\n    return nn.Linear(2, 2)\n"
    )
    line = ["convert", "--model", "slow.py:build", "--input-shape", "1,2", "-o", "out.spx"]
    process = subprocess.Popen(
        [sys.executable, "-m", "sparse_engine.cli", *line],
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        # Where the tests run in the background of a shell, interrupts are ignored, and children inherit that.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    assert process.stdout.readline() == "building\n"
    time.sleep(0.1)
    process.send_signal(number)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130, errors
    assert "Interrupted" in errors
    assert "Traceback" not in errors
    assert sorted(path.name for path in tmp_path.iterdir() if path.name != "__pycache__") == ["slow.py"]
