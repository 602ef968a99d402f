"""STP against its baselines and ablations at equal epochs: accuracy of the small network, retained share, operations.

    python bench/repro/stp.py --data digits --targets 0.5 0.3 0.15 --seeds 0 1 2 --out stp.jsonl
    python bench/repro/stp.py --report stp.jsonl

Every method trains for the same number of epochs on the same batches. Rows already in the output file are not run
again, so an interrupted reproduction continues. `--report` prints mean ± standard deviation over seeds as a table.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from sparse_engine.distill import CrossEntropy, Objective
from sparse_engine.prune.structured import compact, prune_channels
from sparse_engine.train import Mechanism, Phase, accuracy, fit, load_data, models
from sparse_engine.train.recipe import StpPart, TrainPart
from sparse_engine.train.source import BatchSource
from sparse_engine.train.stp import StimulativeTraining
from sparse_engine.train.supernet import Subnet, Supernet, magnitudes

STP_VARIANTS: dict[str, dict[str, Any]] = {
    "stp": {},
    "stp, normalised logits": {"divergence": "normalised"},
    "stp, random cuts": {"guidance": False},
    "stp, width only": {"depth": False},
    "stp, depth only": {"width": False},
    "stp, no expansion": {"expansion": False},
}
BASELINES = (
    "uniform width from scratch",
    "l1 filters + fine-tuning",
    "slimming + fine-tuning",
    "l1 filters, no fine-tuning",
)


class ScalePenalty(Mechanism):
    """Network slimming: the L1 norm of all batch norm scales joins the loss (arXiv 1708.06519)."""

    def __init__(self, model: nn.Module, strength: float = 1e-3) -> None:
        self.norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
        self.strength = strength

    def penalty(self) -> Tensor:
        return self.strength * sum(norm.weight.abs().sum() for norm in self.norms)


class Bench:
    """One seed's data, model and batches."""

    def __init__(self, args: argparse.Namespace, seed: int) -> None:
        self.args, self.seed = args, seed
        self.train, self.test = load_data(args.data, limit=args.limit)
        self.part = TrainPart(
            epochs=args.epochs,
            batch_size=args.batch_size,
            learning_rate=args.learning_rate,
            weight_decay=1e-4,
            schedule="cosine",
        )

    def model(self) -> nn.Module:
        torch.manual_seed(self.seed)
        channels = self.train.shape[0]
        return models.build(
            self.args.model, num_classes=self.train.classes, in_channels=channels, option="B", width=self.args.width
        )

    def x(self) -> Tensor:
        return self.train.batch(torch.arange(1), augment=False).inputs

    def fit(
        self,
        model: nn.Module,
        epochs: int,
        objective: Objective | None = None,
        mechanisms: list[Mechanism] | None = None,
        rate: float = 1.0,
    ) -> None:
        source = BatchSource(self.train, batch_size=self.part.batch_size, seed=self.seed * 7919)
        part = replace(self.part, epochs=epochs, learning_rate=self.part.learning_rate * rate)
        fit(Phase("train", model, objective or CrossEntropy(), source, part, epochs, mechanisms or []))

    def flops(self, model: nn.Module) -> int:
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            model.eval()(self.x())
        return counter.get_total_flops()

    def row(
        self, method: str, target: float, model: nn.Module, full: float, dense_flops: int, seconds: float, **extra: Any
    ) -> dict[str, Any]:
        return {
            "method": method,
            "target": target,
            "seed": self.seed,
            "accuracy": accuracy(model, self.test),
            "full_accuracy": full,
            "flops": self.flops(model) / dense_flops,
            "seconds": round(seconds, 1),
            **extra,
        }

    def dense(self) -> dict[str, Any]:
        model, began = self.model(), time.perf_counter()
        self.fit(model, self.args.epochs)
        found = accuracy(model, self.test)
        net = Supernet(model.eval(), self.x())
        net.set_order("l1")
        kept, dropped = magnitudes(net, Subnet(net.full.depths, tuple(max(1, w // 2) for w in net.full.widths)))
        return self.row(
            "dense",
            1.0,
            model,
            found,
            self.flops(model),
            time.perf_counter() - began,
            kept_magnitude=kept,
            dropped_magnitude=dropped,
        )

    def stp(self, method: str, target: float) -> dict[str, Any]:
        model, began = self.model(), time.perf_counter()
        objective = StimulativeTraining(
            Supernet(model, self.x()), StpPart(target=target, pool=4, **STP_VARIANTS[method]), seed=self.seed
        )
        dense_flops = self.flops(model)
        self.fit(model, self.args.epochs, objective, [objective.mechanism()])
        full = accuracy(model, self.test)
        source = BatchSource(self.train, batch_size=self.part.batch_size, seed=self.seed)
        small = objective.finish(batch.inputs for batch in source.epoch(0))
        kept, dropped = magnitudes(objective.supernet, objective.subnet)
        return self.row(
            method, target, small, full, dense_flops, time.perf_counter() - began, depths=list(objective.subnet.depths),
            widths=list(objective.subnet.widths), kept_magnitude=kept, dropped_magnitude=dropped,
        )  # fmt: skip

    def baseline(self, method: str, target: float) -> dict[str, Any]:
        model, began = self.model(), time.perf_counter()
        dense_flops, epochs = self.flops(model), self.args.epochs
        if method == "uniform width from scratch":
            prune_channels(model, self.x(), target=target, criterion="random", scope="local", seed=self.seed)
            small = models_fresh(compact(model.eval(), self.x()), self.seed)
            self.fit(small, epochs)
            return self.row(method, target, small, float("nan"), dense_flops, time.perf_counter() - began)
        tuned = "no fine" not in method
        slimming = method.startswith("slimming")
        first = epochs // 2 if tuned else epochs
        self.fit(model, first, mechanisms=[ScalePenalty(model)] if slimming else None)
        full = accuracy(model, self.test)
        prune_channels(model.eval(), self.x(), target=target, criterion="bn_scale" if slimming else "l1")
        small = compact(model.eval(), self.x())
        if tuned:
            self.fit(small, epochs - first, rate=0.2)
        return self.row(method, target, small, full, dense_flops, time.perf_counter() - began)


def models_fresh(model: nn.Module, seed: int) -> nn.Module:
    """The same architecture with new weights."""
    torch.manual_seed(seed)
    for module in model.modules():
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()
    return model


def measure(args: argparse.Namespace) -> None:
    path = Path(args.out)
    done = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    key = lambda row: (row["method"], row["target"], row["seed"])  # noqa: E731
    finished = {key(row) for row in done}
    jobs = [("dense", 1.0, seed) for seed in args.seeds]
    jobs += [(method, target, seed) for seed in args.seeds for target in args.targets for method in args.methods]
    for method, target, seed in jobs:
        if (method, target, seed) in finished:
            continue
        bench = Bench(args, seed)
        row = (
            bench.dense()
            if method == "dense"
            else bench.stp(method, target)
            if method in STP_VARIANTS
            else bench.baseline(method, target)
        )
        row |= {
            "data": args.data,
            "model": args.model,
            "width": args.width,
            "epochs": args.epochs,
            "machine": platform.machine(),
            "torch": torch.__version__,
        }
        with path.open("a") as file:
            file.write(json.dumps(row) + "\n")
        print(
            f"{method:30s} target {target:.2f} seed {seed}: {row['accuracy']:.4f} at "
            f"{row['flops']:.3f} of the FLOPs, {row['seconds']:.0f} s",
            flush=True,
        )


def report(path: str) -> None:
    rows = [json.loads(line) for line in Path(path).read_text().splitlines()]

    def spread(values: list[float]) -> str:
        scaled = [100 * value for value in values]
        return f"{statistics.mean(scaled):.2f} ± {statistics.stdev(scaled) if len(scaled) > 1 else 0.0:.2f}"

    dense = {row["seed"]: row["accuracy"] for row in rows if row["method"] == "dense"}
    print("| method | FLOPs left | seeds | accuracy, % | of dense, % |\n| --- | --- | --- | --- | --- |")
    for method, target in dict.fromkeys(
        (row["method"], row["target"]) for row in sorted(rows, key=lambda r: -r["target"])
    ):
        mine = [row for row in rows if (row["method"], row["target"]) == (method, target)]
        retained = [row["accuracy"] / dense[row["seed"]] for row in mine if row["seed"] in dense]
        print(
            f"| {method} | {statistics.mean(r['flops'] for r in mine):.3f} | {len(mine)} | "
            f"{spread([r['accuracy'] for r in mine])} | {spread(retained)} |"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="digits")
    parser.add_argument("--model", default="resnet14")
    parser.add_argument("--width", type=int, default=8)
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--learning-rate", type=float, default=0.05)
    parser.add_argument("--limit", type=int)
    parser.add_argument("--targets", type=float, nargs="+", default=[0.5, 0.3, 0.15])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument(
        "--methods", nargs="+", default=[*STP_VARIANTS, *BASELINES], choices=[*STP_VARIANTS, *BASELINES]
    )
    parser.add_argument("--out", default="stp.jsonl")
    parser.add_argument("--report", metavar="FILE", help="print the table of a finished file instead of running")
    args = parser.parse_args()
    if args.report:
        report(args.report)
    else:
        measure(args)


if __name__ == "__main__":
    main()
