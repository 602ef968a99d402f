"""Real checkpoints and real images: pruned models of others as they are, and CIFAR networks pruned and fine-tuned here.

    SPARSE_ENGINE_DATA=DATA python -m bench.real prune --network resnet20      fine-tunes at 80, 90 and 95 % (resumes)
    SPARSE_ENGINE_DATA=DATA python -m bench.real lenet                         trains the lottery ticket under its mask
    SPARSE_ENGINE_DATA=DATA python -m bench.real accuracy                      converts; every test image through both
    SPARSE_ENGINE_DATA=DATA python -m bench.real speed [--engines-python P]    latency and sizes

DATA holds CIFAR-10, MNIST (any layout that `load_data` knows) and `checkpoints/`. What is trained goes to
build/bench/real/, the figures to bench/results/real_*.json.
"""

from __future__ import annotations

import argparse
import math
import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn

import sparse_engine as se
from bench import results_io
from bench.engines import contenders, disturbed, make_environment, take_turns
from bench.rows import merged
from sparse_engine.io import load_state, read_checkpoint, write_checkpoint
from sparse_engine.train.data import ArrayData, load_data
from sparse_engine.train.models import build

WORK = results_io.RESULTS.parent.parent / "build" / "bench" / "real"
SPARSITIES = (0.8, 0.9, 0.95)
IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
HALF = ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))


class SqueezeNet(nn.Module):
    """SqueezeNet 1.0 (arXiv 1602.07360) with the layer names of its Caffe definition; pooling rounds up, as there."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleDict({"conv1": nn.Conv2d(3, 96, 7, 2)})
        channels = 96
        for fire, squeeze in zip(range(2, 10), (16, 16, 32, 32, 48, 48, 64, 64), strict=True):
            expand = 4 * squeeze
            self.layers[f"fire{fire}/conv1x1_1"] = nn.Conv2d(channels, squeeze, 1)
            self.layers[f"fire{fire}/conv1x1_2"] = nn.Conv2d(squeeze, expand, 1)
            self.layers[f"fire{fire}/conv3x3_2"] = nn.Conv2d(squeeze, expand, 3, padding=1)
            channels = 2 * expand
        self.layers["conv_final"] = nn.Conv2d(channels, 1000, 1)
        self.pool = nn.MaxPool2d(3, 2, ceil_mode=True)

    def forward(self, x: Tensor) -> Tensor:
        x = self.pool(self.layers["conv1"](x).relu())
        for fire in range(2, 10):
            squeezed = self.layers[f"fire{fire}/conv1x1_1"](x).relu()
            wide = [self.layers[f"fire{fire}/{name}"](squeezed).relu() for name in ("conv1x1_2", "conv3x3_2")]
            x = torch.cat(wide, 1)
            if fire in (4, 8):
                x = self.pool(x)
        return self.layers["conv_final"](x).relu().mean((2, 3))

    def load_caffe(self, state: Mapping[str, Tensor]) -> None:
        """Load weights named ``fire2/conv1x1_1.weight``."""
        load_state(self, {f"layers.{name}": value for name, value in state.items()})


@dataclass(frozen=True)
class Case:
    """A checkpoint, the network it belongs to, and the images it is for."""

    name: str
    file: Path
    make: Callable[[], nn.Module]
    data: str | None
    normalisation: tuple[tuple[float, ...], tuple[float, ...]] | None
    shape: tuple[int, ...]

    def model(self) -> nn.Module:
        model = self.make()
        state = read_checkpoint(self.file)
        if isinstance(model, SqueezeNet):
            model.load_caffe(state)
        else:
            load_state(model, state)
        return model.eval()


def data_folder() -> Path:
    folder = os.environ.get("SPARSE_ENGINE_DATA")
    if not folder:
        sys.exit("set SPARSE_ENGINE_DATA to the folder that holds CIFAR-10, MNIST and checkpoints/")
    return Path(folder)


def images(name: str, normalisation: tuple[tuple[float, ...], tuple[float, ...]] | None = None) -> list[ArrayData]:
    """Training and test part of "cifar10" or "mnist", in whichever layout the data folder has."""
    folder = data_folder()
    places = [folder / part for part in (("MNIST", "mnist") if name == "mnist" else ("cifar-10-batches-py", "cifar10"))]
    parts = load_data(next((place for place in places if place.is_dir()), folder))
    if normalisation is None:
        return list(parts)
    return [replace(part, mean=normalisation[0], std=normalisation[1]) for part in parts]


def cases() -> list[Case]:
    """Every case whose checkpoint is there."""
    given = data_folder() / "checkpoints"
    found = [
        Case(
            "resnet20 channels zeroed",
            given / "resnet20_cifar10_channels_zeroed.safetensors",
            lambda: build("resnet20", option="B", head="fc"),
            "cifar10",
            HALF,
            (3, 32, 32),
        ),
        Case("squeezenet 33 %", given / "squeezenet_imagenet_33pct.safetensors", SqueezeNet, None, None, (3, 227, 227)),
        Case("lenet ticket", WORK / "lenet.safetensors", lenet, "mnist", None, (1, 28, 28)),
    ]
    for network in ("resnet20", "resnet56"):
        make = lambda network=network: build(network)  # noqa: E731
        dense = given / f"{network}_cifar10.safetensors"
        found.append(Case(f"{network} dense", dense, make, "cifar10", IMAGENET, (3, 32, 32)))
        for sparsity in SPARSITIES:
            file = WORK / f"{network}_{sparsity:.0%}.safetensors".replace("%", "")
            found.append(Case(f"{network} {sparsity:.0%}", file, make, "cifar10", IMAGENET, (3, 32, 32)))
    return [case for case in found if case.file.exists()]


def lenet() -> nn.Module:
    return build("mlp", in_features=784, hidden=(300, 100))


# ---- training under a mask


def train_under_masks(
    model: nn.Module,
    masks: Mapping[str, Tensor],
    train: ArrayData,
    *,
    file: Path,
    epochs: float,
    learning_rate: float,
    weight_decay: float = 1e-4,
    batch_size: int = 128,
    seed: int = 0,
) -> None:
    """A plain loop: SGD with momentum and a cosine schedule; after each step what is masked is set to zero again.

    The state is kept beside `file` every 25 steps, so that an interrupted run goes on where it was.
    """
    parameters = dict(model.named_parameters())
    optimizer = torch.optim.SGD(model.parameters(), lr=learning_rate, momentum=0.9, weight_decay=weight_decay)
    steps = math.ceil(epochs * len(train) / batch_size)
    partial, first = file.with_suffix(".partial.pt"), 0
    if partial.exists():
        saved = torch.load(partial, weights_only=True)
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        first = saved["step"]
    model.train()
    for step in range(first, steps):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate * 0.5 * (1 + math.cos(math.pi * step / steps))
        epoch, place = divmod(step * batch_size, len(train))
        order = torch.randperm(len(train), generator=torch.Generator().manual_seed(seed * 1000 + epoch))
        generator = torch.Generator().manual_seed(seed * 1_000_003 + step)
        batch = train.batch(order[place : place + batch_size], generator=generator)
        loss = nn.functional.cross_entropy(model(batch.inputs), batch.targets)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        with torch.no_grad():
            for name, mask in masks.items():
                parameters[name].mul_(mask)
        if step % 25 == 24:
            print(f"{file.stem}: step {step + 1}/{steps}, loss {loss.item():.3f}", flush=True)
            state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": step + 1}
            torch.save(state, partial.with_suffix(".writing"))
            partial.with_suffix(".writing").rename(partial)
    model.eval()
    write_checkpoint(file, model.state_dict())
    partial.unlink(missing_ok=True)


def prune_network(network: str, sparsities: Sequence[float], epochs: float, learning_rate: float) -> None:
    """Prune the dense checkpoint by global magnitude to each sparsity, in one go, and fine-tune under the mask."""
    WORK.mkdir(parents=True, exist_ok=True)
    train, _ = images("cifar10", IMAGENET)
    train = replace(train, augment="flip_crop")
    dense = data_folder() / "checkpoints" / f"{network}_cifar10.safetensors"
    for sparsity in sparsities:
        file = WORK / f"{network}_{sparsity * 100:.0f}.safetensors"
        if not file.exists():
            model = build(network)
            load_state(model, read_checkpoint(dense))
            report = se.prune(model, sparsity=sparsity, scope="global", criterion="magnitude")
            masks = {name: mask.float() for name, mask in se.masks(model).items()}
            se.squash_(model)
            print(report, flush=True)
            train_under_masks(model, masks, train, file=file, epochs=epochs, learning_rate=learning_rate)


def train_ticket(epochs: float) -> None:
    """Train the MNIST lottery ticket under its mask, from the initial weights that it comes with."""
    WORK.mkdir(parents=True, exist_ok=True)
    model = lenet()
    load_state(model, read_checkpoint(data_folder() / "checkpoints" / "lenet300_mnist_ticket_9pct.safetensors"))
    masks = {name: (value != 0).float() for name, value in model.named_parameters() if value.dim() == 2}
    train, _ = images("mnist")
    train_under_masks(model, masks, train, file=WORK / "lenet.safetensors", epochs=epochs, learning_rate=0.1)


# ---- accuracy


def weight_sparsity(model: nn.Module) -> float:
    """Share of zeros in the weights of convolutions and linear layers."""
    weights = [module.weight for module in model.modules() if isinstance(module, nn.Conv2d | nn.Linear)]
    return 1 - sum(int(weight.count_nonzero()) for weight in weights) / sum(weight.numel() for weight in weights)


@torch.no_grad()
def compare_outputs(case: Case, tune: bool) -> dict[str, object]:
    """Every test image through the PyTorch model and through the executable."""
    model = case.model()
    generator = torch.Generator().manual_seed(0)
    begin = time.perf_counter()
    executable = se.convert(model, (torch.randn(16, *case.shape, generator=generator),), tune=tune)
    row: dict[str, object] = {
        "model": case.name,
        "weights_zero_%": 100 * weight_sparsity(model),
        "convert_s": time.perf_counter() - begin,
        "channels_removed": executable.report.removed_channels,
    }
    if case.data is None:
        x = torch.randn(64, *case.shape, generator=generator) * 50
        batches, count = [(x[i : i + 16], None) for i in range(0, 64, 16)], 64
    else:
        test = images(case.data, case.normalisation)[1]
        chunks = torch.arange(len(test)).split(500)
        batches, count = ((test.batch(chunk).inputs, test.labels[chunk]) for chunk in chunks), len(test)
    differing = right = ours_right = 0
    worst = scale = 0.0
    for x, labels in batches:
        expected, found = model(x), executable(x)
        differing += int((expected.argmax(1) != found.argmax(1)).sum())
        worst = max(worst, (expected - found).abs().max().item())
        scale = max(scale, expected.abs().max().item())
        if labels is not None:
            right += int((expected.argmax(1) == labels).sum())
            ours_right += int((found.argmax(1) == labels).sum())
    row |= {
        "images": count,
        "top1_torch_%": None if case.data is None else 100 * right / count,
        "top1_executable_%": None if case.data is None else 100 * ours_right / count,
        "predictions_that_differ": differing,
        "largest_error_of_scale": worst / scale,
    }
    return row


def run_accuracy(only: str, tune: bool) -> None:
    for case in cases():
        if only not in case.name:
            continue
        row = compare_outputs(case, tune)
        print(row, flush=True)
        results_io.write(
            "real_accuracy",
            rows=merged("real_accuracy", [row], ("model",)),
            claim="Converted checkpoints predict what the PyTorch models predict, image by image.",
            command="python -m bench.real accuracy",
            notes="CIFAR-10 and MNIST: the whole test set, batches of 500. SqueezeNet has no labels: 64 random inputs. "
            "The networks at 80, 90 and 95 % were pruned by global magnitude and fine-tuned under the mask by "
            "`python -m bench.real prune`.",
        )


# ---- speed and size


def measure_speed(
    case: Case, batch: int, engines_python: Path | None, threads: int, rounds: int
) -> dict[str, object] | None:
    """Latency per image of the executable, of PyTorch and (given an environment) of ONNX Runtime; None if disturbed."""
    WORK.mkdir(parents=True, exist_ok=True)
    model = case.model()
    x = torch.randn(batch, *case.shape, generator=torch.Generator().manual_seed(0))
    stem = WORK / f"{case.name.replace(' ', '_').replace('%', 'percent')}_b{batch}"
    torch.set_num_threads(threads)
    se.convert(model, (x,), threads=threads).save(stem.with_suffix(".spx"))
    torch.export.save(torch.export.export(model, (x,)), stem.with_suffix(".pt2"))
    wanted = {
        "ours": ("sparse_engine", stem.with_suffix(".spx"), sys.executable),
        "torch": ("torch", stem.with_suffix(".pt2"), sys.executable),
    }
    if engines_python is not None:
        torch.onnx.export(
            model,
            (x,),
            stem.with_suffix(".onnx"),
            opset_version=14,
            dynamo=False,
            input_names=["x"],
            output_names=["y"],
        )
        wanted["onnxruntime"] = ("onnxruntime", stem.with_suffix(".onnx"), engines_python)
    with contenders(wanted, batch=batch, threads=threads, shape=case.shape) as ready:
        times = take_turns(ready, rounds=rounds, seconds=0.15, calls=5)
    if reason := disturbed(times):
        print(f"not written, the machine was not quiet: {reason}", flush=True)
        return None
    per_image = {label: summary["median_ms"] / batch for label, summary in times.items()}
    rivals = {label: value for label, value in per_image.items() if label != "ours"}
    best = min(rivals, key=rivals.__getitem__)
    dense_bytes = sum(value.numel() * value.element_size() for value in model.state_dict().values())
    row: dict[str, object] = {
        "model": case.name,
        "batch": batch,
        "ms_per_image": per_image["ours"],
        "torch_ms_per_image": per_image["torch"],
    }
    if engines_python is not None:
        row["onnxruntime_ms_per_image"] = per_image.get("onnxruntime")
    row |= {
        "best_dense": best,
        "speed_up_over_it": rivals[best] / per_image["ours"],
        "dense_kib": dense_bytes / 1024,
        "file_kib": stem.with_suffix(".spx").stat().st_size / 1024,
    }
    for suffix in (".pt2", ".onnx", ".spx"):
        stem.with_suffix(suffix).unlink(missing_ok=True)
    return row


def run_speed(only: str, batches: list[int], engines_python: Path | None, threads: int, rounds: int) -> None:
    chosen = [case for case in cases() if only in case.name]
    for case, batch in ((case, batch) for case in chosen for batch in batches):
        row = measure_speed(case, batch, engines_python, threads, rounds)
        if row is None:
            continue
        print(row, flush=True)
        results_io.write(
            "real_speed",
            rows=merged("real_speed", [row], ("model", "batch")),
            claim="Real pruned checkpoints beside dense libraries on the same weights: time per image and size.",
            command="python -m bench.real speed --engines-python ENGINES/bin/python",
            notes=f"{threads} threads; engines in processes of their own, in turns; median of {rounds} rounds. Sizes: "
            "the state dict's tensors, and the .spx file with graph and report.",
        )


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.real", description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    prune = commands.add_parser("prune")
    prune.add_argument("--network", choices=("resnet20", "resnet56"), default="resnet20")
    prune.add_argument("--sparsity", type=float, nargs="+", default=SPARSITIES)
    prune.add_argument("--epochs", type=float, default=2.0)
    prune.add_argument("--learning-rate", type=float, default=0.02)
    ticket = commands.add_parser("lenet")
    ticket.add_argument("--epochs", type=float, default=4.0)
    accuracy = commands.add_parser("accuracy")
    accuracy.add_argument("--only", default="", help="cases whose name contains this")
    accuracy.add_argument("--no-tune", action="store_true")
    speed = commands.add_parser("speed")
    speed.add_argument("--only", default="", help="cases whose name contains this")
    speed.add_argument("--batch", type=int, nargs="+", default=[1, 16, 128])
    speed.add_argument("--threads", type=int, default=os.cpu_count())
    speed.add_argument("--rounds", type=int, default=5)
    speed.add_argument("--engines-python", type=Path, help="interpreter of an environment with ONNX Runtime")
    speed.add_argument("--setup", type=Path, metavar="DIR", help="make that environment in DIR")
    options = parser.parse_args()
    if options.command == "prune":
        prune_network(options.network, options.sparsity, options.epochs, options.learning_rate)
    elif options.command == "lenet":
        train_ticket(options.epochs)
    elif options.command == "accuracy":
        run_accuracy(options.only, not options.no_tune)
    else:
        python = make_environment(options.setup) if options.setup else options.engines_python
        run_speed(options.only, options.batch, python, options.threads, options.rounds)


if __name__ == "__main__":
    main()
