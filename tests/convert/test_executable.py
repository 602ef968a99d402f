"""The executable: calls of every kind, batch sizes, threads, files, reports, and refusals."""

from __future__ import annotations

import gc
import json
import threading
from pathlib import Path
from typing import Any, NamedTuple

import numpy
import pytest
import torch
from torch import Tensor, nn

import sparse_engine as se
from sparse_engine.convert.executable import Executable
from sparse_engine.convert.report import Report
from sparse_engine.errors import ConvertError, FileFormatError, ShapeError, VerificationError


class Small(nn.Module):
    """A small pruned network with a convolution, a residual, pooling and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, padding=1)
        self.norm = nn.BatchNorm2d(16)
        self.conv = nn.Conv2d(16, 16, 3, padding=1)
        self.head = nn.Linear(16, 5)
        with torch.no_grad():
            self.conv.weight *= torch.rand_like(self.conv.weight) > 0.9
            self.head.weight *= torch.rand_like(self.head.weight) > 0.5

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.stem(x)).relu()
        x = (self.conv(x) + x).relu()
        return self.head(x.mean((2, 3)))


@pytest.fixture(scope="module")
def model() -> nn.Module:
    torch.manual_seed(0)
    return Small().eval()


@pytest.fixture(scope="module")
def executable(model: nn.Module) -> Executable:
    return se.convert(model, (torch.randn(2, 3, 8, 8),), tune=False)


def close(found: Any, expected: Any, bound: float = 1e-5) -> bool:
    return se.convert.relative_error(torch.as_tensor(found), expected) <= bound


# ---- calls


@pytest.mark.parametrize("batch", [0, 1, 2, 3, 7, 17])
def test_every_batch_size(model: nn.Module, executable: Executable, batch: int) -> None:
    x = torch.randn(batch, 3, 8, 8)
    found = executable(x)
    assert found.shape == (batch, 5)
    assert close(found, model(x).detach())


def test_numpy_in_numpy_out(model: nn.Module, executable: Executable) -> None:
    x = torch.randn(2, 3, 8, 8)
    found = executable(x.numpy())
    assert isinstance(found, numpy.ndarray)
    assert close(found, model(x).detach())


def test_inputs_that_are_not_contiguous_or_need_gradients(model: nn.Module, executable: Executable) -> None:
    x = torch.randn(2, 8, 8, 3).permute(0, 3, 1, 2)
    expected = model(x).detach()
    assert close(executable(x), expected)
    assert close(executable(x.contiguous(memory_format=torch.channels_last)), expected)
    assert close(executable(x.numpy()[:, :, ::-1, ::-1]), model(x.flip(2, 3)).detach())
    found = executable(x.clone().requires_grad_())
    assert not found.requires_grad
    assert close(found, expected)


def test_results_are_new_tensors(executable: Executable) -> None:
    x = torch.randn(2, 3, 8, 8)
    first = executable(x)
    kept = first.clone()
    executable(torch.randn(2, 3, 8, 8))
    assert torch.equal(first, kept)


def test_the_input_is_not_written() -> None:
    executable = se.convert(nn.Sequential(nn.ReLU(inplace=True), nn.Linear(4, 2)), torch.randn(2, 4), tune=False)
    x = torch.randn(2, 4)
    before = x.clone()
    executable(x)
    assert torch.equal(x, before)


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ((torch.zeros(2, 3, 8, 9),), r"\(2, 3, 8, 9\); the model takes \(N, 3, 8, 8\)"),
        ((torch.zeros(3, 8, 8),), r"the model takes \(N, 3, 8, 8\)"),
        ((torch.zeros(2, 3, 8, 8, dtype=torch.float64),), r"float64.*float32\(N, 3, 8, 8\).*x\.to"),
        ((numpy.zeros((2, 3, 8, 8)),), r"float64"),
        ((numpy.zeros((2, 3, 8, 8), dtype=object),), r"object"),
        (([[1.0]],), "is list"),
        ((), "takes 1 inputs"),
        ((torch.zeros(2, 3, 8, 8), torch.zeros(2)), "got 2"),
        ((torch.zeros(2, 3, 8, 8, device="meta"),), "on meta"),
        ((torch.zeros(2, 3, 8, 8).to_sparse(),), "the model takes"),
    ],
)
def test_inputs_that_do_not_fit_are_refused(executable: Executable, inputs: tuple[Any, ...], message: str) -> None:
    with pytest.raises(ShapeError, match=message):
        executable(*inputs)


def test_several_threads_call_one_executable(model: nn.Module, executable: Executable) -> None:
    inputs = [torch.randn(batch, 3, 8, 8) for batch in (1, 2, 3, 4, 1, 2, 3, 4)]
    expected = [model(x).detach() for x in inputs]
    alone = [executable(x) for x in inputs]
    fresh = Executable(executable.graph)  # plans are made while the others run
    failures: list[str] = []

    def work(index: int) -> None:
        for _ in range(10):
            found = fresh(inputs[index])
            if not close(found, expected[index]) or not torch.equal(found, alone[index]):
                failures.append(f"thread {index}")

    threads = [threading.Thread(target=work, args=(index,)) for index in range(len(inputs))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []


def test_the_number_of_threads_changes_nothing(model: nn.Module, executable: Executable) -> None:
    x = torch.randn(4, 3, 8, 8)
    one = Executable(executable.graph, threads=1)(x)
    assert torch.equal(one, Executable(executable.graph, threads=2)(x))
    assert torch.equal(one, executable(x))
    for wrong in (0, -1, 1.5, True):
        with pytest.raises(ConvertError, match="threads"):
            se.convert(model, x, threads=wrong)  # type: ignore[arg-type]


# ---- what models return


class Pair(NamedTuple):
    mean: Tensor
    total: Tensor


@pytest.mark.parametrize("kind", ["tuple", "dict", "named", "nested"])
def test_outputs_have_the_models_structure(kind: str, tmp_path: Path) -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Any:
            y = self.layer(x)
            mean, total = y.mean(1), y.sum(1)
            return {
                "tuple": (mean, total),
                "dict": {"mean": mean, "total": total},
                "named": Pair(mean, total),
                "nested": [mean, {"more": (total, None)}],
            }[kind]

    model = Model()
    executable = se.convert(model, torch.randn(2, 4), tune=False)
    x = torch.randn(5, 4)
    found, expected = executable(x), model(x)
    assert type(found) is type(expected)
    assert torch.utils._pytree.tree_structure(found) == torch.utils._pytree.tree_structure(expected)
    executable.save(tmp_path / "model.spx")
    again = se.load(tmp_path / "model.spx")(x)
    plain = tuple(found) if kind == "named" else found
    assert torch.utils._pytree.tree_structure(again) == torch.utils._pytree.tree_structure(plain)


def test_a_model_of_one_batch_size_runs_others_in_pieces() -> None:
    class Fixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(x) if x.shape[0] == 3 else self.layer(x).clone()

    model = Fixed()
    executable = se.convert(model, torch.randn(3, 4), tune=False)
    assert executable.graph.fixed_batch == 3
    assert "3 only" in executable.report.batch_sizes
    for batch in (0, 1, 3, 4, 8):
        x = torch.randn(batch, 4)
        assert close(executable(x), model(x).detach())


def test_a_model_that_mixes_samples_is_not_run_in_pieces() -> None:
    class Mixing(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return (x - x.mean(0)) * 2 if x.shape[0] == 3 else x - x.mean(0)

    with pytest.raises(VerificationError, match="mixes the samples"):
        se.convert(Mixing(), torch.randn(3, 4), tune=False)


def test_integers_pass_through() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Embedding(10, 8)
            self.head = nn.Linear(8, 3)

        def forward(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
            logits = self.head(self.table(tokens).mean(1))
            return logits, logits.argmax(1)

    model = Model()
    executable = se.convert(model, torch.randint(10, (2, 6)), tune=False)
    tokens = torch.randint(10, (5, 6))
    logits, choice = executable(tokens)
    assert close(logits, model(tokens)[0].detach())
    assert torch.equal(choice, model(tokens)[1])
    assert set(executable.report.fallbacks) == {"table", "argmax"}
    assert all("no native op" in reason for reason in executable.report.fallbacks.values())


# ---- files


def test_files_give_the_same_executable(model: nn.Module, executable: Executable, tmp_path: Path) -> None:
    sizes = executable.save(tmp_path / "model.spx")
    again = se.load(tmp_path / "model.spx")
    assert sizes.file_bytes == (tmp_path / "model.spx").stat().st_size
    x = torch.randn(3, 3, 8, 8)
    assert torch.equal(again(x), executable(x))
    assert again.report == executable.report
    assert se.load(tmp_path / "model.spx", threads=1).threads == 1


def test_a_file_with_a_broken_graph_is_refused(executable: Executable, tmp_path: Path) -> None:
    from sparse_engine.io import write_spx

    data = executable.graph.to_json()
    data["nodes"][0]["attrs"]["stride"] = [0, 0]
    write_spx(tmp_path / "model.spx", data, executable.graph.constants)
    with pytest.raises(FileFormatError, match=r"model\.spx.*stride"):
        se.load(tmp_path / "model.spx")


def test_weights_are_kept_packed(model: nn.Module, executable: Executable, tmp_path: Path) -> None:
    if not executable.native:  # the reference needs dense weights
        assert executable.packed_bytes == executable.graph.bytes()
        return
    assert executable.packed_bytes == executable.report.bytes_after
    assert executable.packed_bytes < executable.graph.bytes()
    executable.save(tmp_path / "model.spx")
    again = se.load(tmp_path / "model.spx")
    assert again.packed_bytes == executable.packed_bytes
    for name, tensor in executable.graph.constants.items():
        assert torch.equal(again.graph.constants[name], tensor)


# ---- report and verification


def test_report(executable: Executable) -> None:
    report = executable.report
    layers = {layer.name: layer for layer in report.layers}
    assert layers["conv"].sparsity == pytest.approx(0.9, abs=0.03)
    assert layers["conv"].shape == (2, 16, 8, 8)
    assert layers["conv"].flops == 2 * 2 * 16 * 8 * 8 * 16 * 9
    assert layers["stem"].structure == "dense"
    assert report.bytes_after < report.bytes_before
    assert report.max_error is not None
    assert report.native_share == (1.0 if executable.native else 0.0)
    assert Report.from_json(json.loads(json.dumps(report.to_json()))) == report
    text = str(report)
    for part in ("conv", "sparsity", "dense ms", "reason", "packed", "max error", "batch sizes: any"):
        assert part in text


def test_dense_models_are_accepted_and_told_so() -> None:
    executable = se.convert(nn.Sequential(nn.Linear(4, 4)), torch.randn(2, 4), tune=False)
    assert any("no weight is zero" in note for note in executable.report.notes)
    assert "no weight is zero" in str(executable.report)


def test_removed_channels_are_reported() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 1), nn.ReLU(), nn.Conv2d(8, 4, 1))
    with torch.no_grad():
        model[0].weight[:3] = 0
    report = se.convert(model, torch.randn(2, 3, 4, 4), tune=False).report
    assert report.removed_channels == 3
    assert "channels removed: 3" in str(report)


def test_outputs_beyond_the_bound_are_refused(model: nn.Module) -> None:
    with pytest.raises(VerificationError, match=r"differs from the model's by .* the bound is 1e-20"):
        se.convert(model, torch.randn(2, 3, 8, 8), tune=False, bound=1e-20)
    executable = se.convert(model, torch.randn(2, 3, 8, 8), tune=False, bound=1e-20, verify=False)
    assert executable.report.max_error is None


def test_a_model_that_is_not_what_was_captured_is_refused() -> None:
    class Random(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x * float(torch.rand(()))

    with pytest.raises(ConvertError):
        se.convert(Random(), torch.randn(2, 4), tune=False)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"device": "cuda"}, "CPU"),
        ({"dtype": torch.float16}, "float32"),
        ({"bound": 0}, "positive"),
        ({"bound": float("nan")}, "positive"),
    ],
)
def test_arguments_are_checked(model: nn.Module, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ConvertError, match=message):
        se.convert(model, torch.randn(2, 3, 8, 8), **arguments)


def test_relative_error() -> None:
    error = se.convert.relative_error
    one = torch.tensor([1.0, 2.0])
    assert error(one, one) == 0
    assert error(one + torch.tensor([0.0, 0.5]), one) == pytest.approx(0.25)
    assert error(torch.tensor([1.0, torch.nan]), one) == float("inf")
    assert error(torch.tensor([1.0, torch.inf]), torch.tensor([1.0, torch.inf])) == 0
    assert error(torch.tensor([1.0, torch.inf]), torch.tensor([1.0, -torch.inf])) == float("inf")
    assert error(torch.tensor([1.0, torch.nan]), torch.tensor([1.0, torch.inf])) == float("inf")
    assert error(torch.tensor([1, 2]), torch.tensor([1, 3])) == 0.5
    assert error(torch.zeros(0), torch.zeros(0)) == 0


def test_progress_is_told(model: nn.Module) -> None:
    steps: list[str] = []
    se.convert(model, torch.randn(2, 3, 8, 8), tune=False, progress=steps.append)
    assert steps[0] == "preparing the model"
    assert "verifying the outputs" in steps


def test_training_goes_on_without_the_executable() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU(), nn.Flatten(), nn.Linear(16, 4))
    executable = se.convert(model, torch.randn(2, 3, 2, 2), tune=False)
    inputs = [torch.randn(batch, 3, 2, 2) for batch in (2, 6)]
    expected = [model(x).detach() for x in inputs]
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1)
    for x, before in zip(inputs, expected, strict=True):
        assert close(executable(x), before)


# ---- benchmark


def test_benchmark_measures_both_in_turns(model: nn.Module, executable: Executable, tmp_path: Path) -> None:
    x = torch.randn(2, 3, 8, 8)
    result = executable.benchmark(x, seconds=0.01)
    assert result.batch == 2
    assert result.executable.runs == result.dense.runs >= 5
    assert 0 < result.executable.p10 <= result.executable.p50 <= result.executable.p99
    assert result.dense_name == "dense (PyTorch model)"
    data = json.loads(json.dumps(result.to_json()))
    assert data["speedup"] == pytest.approx(result.dense.p50 / result.executable.p50)
    assert "samples/s" in str(result)
    executable.save(tmp_path / "model.spx")
    assert "optimised graph" in se.load(tmp_path / "model.spx").benchmark(x, seconds=0.01).dense_name


def test_the_model_is_not_kept_alive() -> None:
    model = nn.Sequential(nn.Linear(4, 4))
    executable = se.convert(model, torch.randn(2, 4), tune=False)
    del model
    gc.collect()
    assert "optimised graph" in executable.benchmark(torch.randn(2, 4), seconds=0.01).dense_name


class Classifier(nn.Module):
    """Convolutions, then linear layers on one vector per sample."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, padding=1)
        self.first = nn.Linear(8 * 16 * 16, 32)
        self.last = nn.Linear(32, 5)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = nn.functional.max_pool2d(self.conv(x).relu(), 2)
        hidden = self.first(x.flatten(1)).relu()
        return self.last(hidden).softmax(-1), hidden


@pytest.mark.parametrize("batch", [1, 2, 5, 16])
def test_a_classifier_takes_the_batch_at_once(batch: int, monkeypatch: pytest.MonkeyPatch) -> None:
    from sparse_engine.convert import lower

    torch.manual_seed(0)
    model = Classifier().eval()
    executable = se.convert(model, (torch.randn(2, 3, 32, 32),), tune=False, threads=2)
    monkeypatch.setattr(lower, "_share", lambda *_: 1)  # as if one image filled the cache
    plan = executable.compile(batch)
    assert isinstance(plan, lower.TailedPlan) == (batch > 1)
    x = torch.randn(batch, 3, 32, 32)
    for found, expected in zip(plan.run([x]), model(x), strict=True):
        assert close(found, expected.detach())
    names = [name for name, _ in plan.profile([x])]
    assert {"conv", "last"} <= set(names)


@pytest.mark.parametrize("columns", [1, 4095, 4096, 4097, 9000])
@pytest.mark.parametrize("density", [0.0, 0.02, 0.3, 1.0])
def test_one_long_vector(columns: int, density: float) -> None:
    """Sparse rows are cut into blocks of columns; the clamp comes after the last one."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(columns, 37), nn.Hardtanh(-0.1, 0.1), nn.Linear(37, 3, bias=False))
    with torch.no_grad():
        model[0].weight.mul_(torch.rand(37, columns) < density)
    x = torch.randn(1, columns)
    executable = se.convert(model, (x,))
    with torch.no_grad():
        expected = model.double()(x.double())
    assert se.convert.relative_error(executable(x), expected.float()) <= 1e-5
