"""From a trained network to a faster one, twice: a small one for which accuracy can be checked, and ResNet-50.

    make demo                                  # both parts, a few minutes on two cores
    python examples/demo.py --only digits      # train, prune, fine-tune, convert, save, reload: one minute
    python examples/demo.py --only resnet50    # full size, 90 % sparse: convert and time

Nothing is downloaded: the digits come with scikit-learn, ResNet-50 gets random weights (speed does not depend on them).
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from statistics import median

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor, nn

import sparse_engine as se
from sparse_engine.train.models import build

console = Console()


# ---------------------------------------------------------------------------------------------------------- digits


class SmallCNN(nn.Module):
    """Three convolutions and a linear layer for 16×16 images: 94 thousand weights."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(
            *self.block(1, 32),
            nn.MaxPool2d(2),
            *self.block(32, 64),
            nn.MaxPool2d(2),
            *self.block(64, 128),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
        )
        self.head = nn.Linear(128, 10)

    @staticmethod
    def block(inputs: int, outputs: int) -> list[nn.Module]:
        return [nn.Conv2d(inputs, outputs, 3, padding=1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU()]

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.features(x))


def digits() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Training images (1347, 1, 16, 16) and labels, test images (450, 1, 16, 16) and labels."""
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    data = load_digits()
    images = nn.functional.interpolate(torch.tensor(data.images, dtype=torch.float32)[:, None] / 16, scale_factor=2)
    parts = train_test_split(images, torch.tensor(data.target), test_size=450, random_state=0, stratify=data.target)
    return parts[0], parts[2], parts[1], parts[3]


def train(model: nn.Module, images: Tensor, labels: Tensor, epochs: int, rate: float, what: str) -> None:
    """A plain training loop. Removed weights stay exactly zero because the optimiser's steps re-apply the masks."""
    optimizer = torch.optim.AdamW(model.parameters(), rate, weight_decay=0.01)
    batches = -(-len(images) // 64)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=epochs * batches)
    model.train()
    with se.prune.hold_masks(model, optimizer):
        for _ in track(range(epochs), description=f"{what:<24}", console=console, transient=True):
            for batch in torch.randperm(len(images)).split(64):
                optimizer.zero_grad()
                nn.functional.cross_entropy(model(images[batch]), labels[batch]).backward()
                optimizer.step()
                schedule.step()
    model.eval()


@torch.no_grad()
def predictions(run: Callable[[Tensor], Tensor], images: Tensor) -> Tensor:
    return torch.cat([run(batch).argmax(1) for batch in images.split(128)])


def demo_digits(epochs: int = 8) -> None:
    console.rule("[bold]A small CNN on handwritten digits: train, prune 90 %, fine-tune, convert")
    train_images, train_labels, test_images, test_labels = digits()
    model = SmallCNN()
    train(model, train_images, train_labels, epochs, 3e-3, "training dense")
    dense = predictions(model, test_images)

    report = se.prune(model, sparsity=0.9, distribution="erk")
    pruned = predictions(model, test_images)
    train(model, train_images, train_labels, epochs // 2, 2e-3, "fine-tuning under masks")
    se.squash_(model)
    masked = predictions(model, test_images)

    executable = se.convert(model, test_images[:16])
    converted = predictions(executable, test_images)

    table = Table("model", "test accuracy", "sparsity", title="450 test images")

    def accuracy(found: Tensor) -> str:
        return f"{(found == test_labels).float().mean():.1%}"

    table.add_row("dense", accuracy(dense), "0 %")
    table.add_row("pruned, before fine-tuning", accuracy(pruned), f"{report.sparsity:.1%}")
    table.add_row("pruned and fine-tuned, PyTorch", accuracy(masked), f"{report.sparsity:.1%}")
    table.add_row("the same as an executable", accuracy(converted), f"{executable.report.sparsity:.1%}")
    console.print(table)
    console.print(f"Predictions that differ between PyTorch and the executable: {int((masked != converted).sum())}")

    with tempfile.TemporaryDirectory() as folder:
        saved = Path(folder) / "digits.spx"
        executable.save(saved)
        torch.save(model.state_dict(), Path(folder) / "digits.pt")
        # A new process that knows nothing of SmallCNN.
        script = (
            "import sys, torch, sparse_engine as se\n"
            "torch.manual_seed(1); x = torch.randn(3, 1, 16, 16)\n"
            "print(se.load(sys.argv[1])(x).sum().item())"
        )
        result = subprocess.run([sys.executable, "-c", script, saved], capture_output=True, text=True, check=True)
        torch.manual_seed(1)
        here = executable(torch.randn(3, 1, 16, 16)).sum().item()
        console.print(
            f"Saved: {size(saved.stat().st_size)} ({size((Path(folder) / 'digits.pt').stat().st_size)} as a PyTorch "
            f"file); reloaded in a new process: sum of the outputs {float(result.stdout):.6f} there, {here:.6f} here"
        )
    compare(model, executable, {batch: test_images[:batch] for batch in (1, 16, 128)})


# ---------------------------------------------------------------------------------------------------------- ResNet-50


def demo_resnet50() -> None:
    console.rule("[bold]ResNet-50 at 90 % sparsity (random weights), 224×224")
    with console.status("building and pruning"):
        model = build("resnet50")
        # Batch-norm statistics that are not the initial ones, so that folding them has something to do.
        model.train()
        with torch.no_grad():
            for _ in range(2):
                model(torch.randn(4, 3, 128, 128))
        model.eval()
        se.prune(model, sparsity=0.9, distribution="erk")
        se.squash_(model)
    x = torch.randn(1, 3, 224, 224)
    begin = time.perf_counter()
    with console.status("") as status:
        executable = se.convert(model, x, progress=lambda step: status.update(f"converting: {step}"))
    report = executable.report
    console.print(
        f"Converted in {time.perf_counter() - begin:.0f} s: {report.native_share:.0%} of the work runs natively, "
        f"{size(report.bytes_before)} of weights became {size(report.bytes_after)}, largest difference from PyTorch "
        f"{report.max_error:.1e} of the output's scale"
    )
    slowest = sorted((layer for layer in report.layers if layer.ms), key=lambda layer: -layer.ms)[:6]
    table = Table("layer", "sparsity", "kernel", "ms", "dense ms", title="The six slowest layers")
    for layer in slowest:
        table.add_row(
            layer.name,
            "" if layer.sparsity is None else f"{layer.sparsity:.0%}",
            layer.kernel,
            f"{layer.ms:.2f}",
            "" if layer.dense_ms is None else f"{layer.dense_ms:.2f}",
        )
    console.print(table)
    compare(model, executable, {1: x, 16: torch.randn(16, 3, 224, 224)})


# ---------------------------------------------------------------------------------------------------------- timing


@torch.no_grad()
def compare(model: nn.Module, executable: Callable[[Tensor], Tensor], inputs: Mapping[int, Tensor]) -> None:
    """Times dense PyTorch, in both memory formats, and the executable in turns."""
    channels_last = build_channels_last(model)
    table = Table("batch", "PyTorch, ms", "channels last, ms", "executable, ms", "faster", title="Median times")
    for batch, x in inputs.items():
        x_last = x.to(memory_format=torch.channels_last)
        contenders = (lambda x=x: model(x), lambda x=x_last: channels_last(x), lambda x=x: executable(x))
        times: list[list[float]] = [[], [], []]
        for contender in contenders:
            contender(), contender()
        end = time.perf_counter() + 6
        while time.perf_counter() < end or len(times[0]) < 5:
            for record, contender in zip(times, contenders, strict=True):
                begin = time.perf_counter()
                contender()
                record.append((time.perf_counter() - begin) * 1e3)
        plain, last, sparse = map(median, times)
        table.add_row(
            str(batch), f"{plain:.3g}", f"{last:.3g}", f"{sparse:.3g}", f"[bold]{min(plain, last) / sparse:.1f}×"
        )
    console.print(table)


def build_channels_last(model: nn.Module) -> nn.Module:
    from copy import deepcopy

    return deepcopy(model).to(memory_format=torch.channels_last)


def size(count: float) -> str:
    return f"{count / 1e6:.1f} MB" if count >= 1e6 else f"{count / 1e3:.0f} kB"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", choices=("digits", "resnet50"), help="run one part")
    options = parser.parse_args()
    torch.manual_seed(0)
    console.print(f"sparse_engine {se.__version__}, PyTorch {torch.__version__}, {torch.get_num_threads()} threads")
    if options.only != "resnet50":
        demo_digits()
    if options.only != "digits":
        demo_resnet50()


if __name__ == "__main__":
    main()
