"""STP against its baselines and ablations at equal epochs: accuracy of the small network, retained share, operations.

    python -m bench.repro.stp run --name digits --data digits --epochs 12
    python -m bench.repro.stp run --name cifar10 --data DIR/cifar-10-batches-py --model resnet20 --option A --width 16 \
        --checkpoint DIR/checkpoints/resnet20_cifar10.safetensors --samples 10000 --epochs 5 --amp
    python -m bench.repro.stp latency --name cifar10
    python -m bench.repro.stp curves --name digits --data digits --epochs 12

Every method trains for the same number of epochs on the same batches. With a checkpoint, methods that shrink a trained
network start from it; only the uniform width is trained from scratch. Rows that `bench/results/reproduction_stp_*.json`
holds already are not run again, so an interrupted reproduction continues. `python -m bench.repro tables` shows them.
"""

from __future__ import annotations

import argparse
import datetime
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from bench import results_io
from sparse_engine.convert import convert
from sparse_engine.convert import load as load_executable
from sparse_engine.distill import CrossEntropy, Objective
from sparse_engine.errors import PruneError
from sparse_engine.io import load_state, read_checkpoint
from sparse_engine.prune.structured import compact, load_compact, prune_channels, save_compact
from sparse_engine.train import Mechanism, Phase, accuracy, fit, load_data, models
from sparse_engine.train.recipe import StpPart, TrainPart
from sparse_engine.train.source import BatchSource
from sparse_engine.train.stp import Member, StimulativeTraining
from sparse_engine.train.supernet import Subnet, Supernet, magnitudes

STP_VARIANTS: dict[str, dict[str, Any]] = {
    "stp": {},
    "random pool member": {},
    "random depth, random cuts": {"guidance": False},
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
MAIN = ("stp", *BASELINES, "random pool member")
METHODS = (*MAIN, *(name for name in STP_VARIANTS if name not in MAIN))
CLAIM = "Accuracy that STP and its baselines keep at a share of the FLOPs, at equal epochs."
#: fine-tuning and everything that starts from a checkpoint learn at this share of the rate from scratch
TUNING_RATE = 0.2
#: images behind an accuracy are normalised as those behind the checkpoint
IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
NETWORKS = results_io.RESULTS.parent.parent / "build" / "bench" / "stp"


def order(method: str) -> int:
    """A method's place in tables."""
    return METHODS.index(method) if method in METHODS else -1


def results_name(name: str) -> str:
    """The result file of a reproduction."""
    return f"reproduction_stp_{name}"


@dataclass(frozen=True)
class Settings:
    """What all rows of a file share."""

    data: str = "digits"
    model: str = "resnet14"
    option: str = "B"
    width: int = 8
    checkpoint: str | None = None
    epochs: int = 20
    batch_size: int = 32
    learning_rate: float = 0.05
    samples: int | None = None
    amp: bool = False
    pool: int = 4
    rounds: int = 2

    def described(self) -> dict[str, Any]:
        """The settings as they go into a row: without folders."""
        given = dict(vars(self), data=Path(self.data).name)
        return given | {"checkpoint": Path(self.checkpoint).name if self.checkpoint else None}


class ScalePenalty(Mechanism):
    """Network slimming: the L1 norm of all batch norm scales joins the loss (arXiv 1708.06519)."""

    def __init__(self, model: nn.Module, strength: float) -> None:
        self.norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
        self.strength = strength

    def penalty(self) -> Tensor:
        return self.strength * sum(norm.weight.abs().sum() for norm in self.norms)


class WeightPenalty(Mechanism):
    """The L1 norm of all filters joins the loss: the training that relative sparsity is compared with."""

    def __init__(self, model: nn.Module, strength: float = 1e-4) -> None:
        self.weights = [m.weight for m in model.modules() if isinstance(m, nn.Conv2d | nn.Linear)]
        self.strength = strength

    def penalty(self) -> Tensor:
        return self.strength * sum(weight.abs().sum() for weight in self.weights)


class RandomMember(StimulativeTraining):
    """The same pool, training and cuts, but chance decides who leaves the pool."""

    def _worst(self) -> Member:
        return self.pool[int(torch.randint(len(self.pool), (), generator=self.generator))]

    def best(self) -> Member:
        return self.pool[0]


class RandomDepth(StimulativeTraining):
    """One depth of the pool, drawn at random before the search, shrunk by random cuts: stimulative training without a
    search, all of it for one member."""

    def _open_pool(self) -> None:
        super()._open_pool()
        self.pool = [self.pool[int(torch.randint(len(self.pool), (), generator=self.generator))]]


class Bench:
    """One seed's data, model and batches."""

    def __init__(self, settings: Settings, seed: int, data: Any, known: float | None = None) -> None:
        self.settings, self.seed, self.known = settings, seed, known  # known: the checkpoint's accuracy
        self.train, self.test = data
        self.part = TrainPart(
            epochs=settings.epochs, batch_size=settings.batch_size, learning_rate=settings.learning_rate,
            weight_decay=1e-4, schedule="cosine", amp=settings.amp,
        )  # fmt: skip

    def model(self, trained: bool = True) -> nn.Module:
        """A network: the checkpoint's where there is one and it is wanted, else with random weights."""
        torch.manual_seed(self.seed)
        given = self.settings
        model = models.build(
            given.model,
            num_classes=self.train.classes,
            in_channels=self.train.shape[0],
            option=given.option,
            width=given.width,
        )
        if trained and given.checkpoint:
            load_state(model, read_checkpoint(Path(given.checkpoint)))
        return model

    def x(self) -> Tensor:
        return self.train.batch(torch.arange(1), augment=False).inputs

    def batches(self) -> BatchSource:
        return BatchSource(self.train, batch_size=self.part.batch_size, seed=self.seed * 7919)

    def fit(
        self,
        model: nn.Module,
        epochs: int,
        objective: Objective | None = None,
        mechanisms: list[Mechanism] | None = None,
        tuning: bool = False,
    ) -> None:
        rate = self.part.learning_rate * (TUNING_RATE if tuning else 1.0)
        part = replace(self.part, epochs=epochs, learning_rate=rate)
        fit(Phase("train", model, objective or CrossEntropy(), self.batches(), part, epochs, mechanisms or []))

    def flops(self, model: nn.Module) -> int:
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            model.eval()(self.x())
        return counter.get_total_flops()

    def dense(self) -> tuple[nn.Module, dict[str, Any]]:
        """The full network: the checkpoint as it is, or trained for the same epochs as everything else."""
        model = self.model()
        if not self.settings.checkpoint:
            self.fit(model, self.settings.epochs)
        net = Supernet(model.eval(), self.x())
        net.set_order("l1")
        kept, dropped = magnitudes(net, Subnet(net.full.depths, tuple(max(1, w // 2) for w in net.full.widths)))
        return model, {"kept_magnitude": kept, "dropped_magnitude": dropped}

    def stp(self, method: str, target: float) -> tuple[nn.Module, dict[str, Any]]:
        """Stimulative training and the network it ends with."""
        model, given = self.model(), self.settings
        kind = {"random pool member": RandomMember, "random depth, random cuts": RandomDepth}.get(
            method, StimulativeTraining
        )
        part = StpPart(target=target, pool=given.pool, rounds=given.rounds, **STP_VARIANTS[method])
        objective = kind(Supernet(model, self.x()), part, seed=self.seed)
        self.fit(model, given.epochs, objective, [objective.mechanism()], tuning=bool(given.checkpoint))
        full = None if given.checkpoint else accuracy(model, self.test)
        small = objective.finish(batch.inputs for batch in self.batches().epoch(0))
        kept, dropped = magnitudes(objective.supernet, objective.subnet)
        return small, {
            "full_accuracy": full, "depths": list(objective.subnet.depths), "widths": list(objective.subnet.widths),
            "kept_magnitude": kept, "dropped_magnitude": dropped,
        }  # fmt: skip

    def baseline(self, method: str, target: float) -> tuple[nn.Module, dict[str, Any]]:
        """One of `BASELINES`. From a checkpoint all epochs are for what the method adds to plain training."""
        given = self.settings
        if method == "uniform width from scratch":
            model = self.model(trained=False)
            prune_channels(model, self.x(), target=target, criterion="random", scope="local", seed=self.seed)
            small = models_fresh(compact(model.eval(), self.x()), self.seed)
            self.fit(small, given.epochs)
            return small, {}
        model = self.model()
        tuned, slimming = "no fine" not in method, method.startswith("slimming")
        if given.checkpoint:
            first = given.epochs // 2 if slimming else 0
        else:
            first = given.epochs // 2 if tuned else given.epochs
        if first:
            # a checkpoint leaves the penalty a few hundred steps instead of a whole training
            penalty = [ScalePenalty(model, 5e-3 if given.checkpoint else 1e-3)] if slimming else []
            self.fit(model, first, mechanisms=penalty, tuning=bool(given.checkpoint))
        full = accuracy(model, self.test) if first or not self.known else self.known
        prune_channels(model.eval(), self.x(), target=target, criterion="bn_scale" if slimming else "l1")
        small = compact(model.eval(), self.x())
        if tuned:
            self.fit(small, given.epochs - first, tuning=True)
        return small, {"full_accuracy": full}


def models_fresh(model: nn.Module, seed: int) -> nn.Module:
    """The same architecture with new weights."""
    torch.manual_seed(seed)
    for module in model.modules():
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()
    return model


def network_path(name: str, row: dict[str, Any]) -> Path:
    """Where the network behind a row is kept."""
    words = row["method"].replace(",", "").replace(" ", "_")
    return NETWORKS / name / f"{words}_{row['target']:g}_{row['seed']}.safetensors"


def measure(name: str, settings: Settings, methods: list[str], targets: list[float], seeds: list[int]) -> None:
    """Train what is not in the result file yet."""
    rows = stored(name)
    key = lambda row: (row["method"], row["target"], row["seed"])  # noqa: E731
    finished = {key(row) for row in rows}
    train, test = load_data(settings.data, augment=True)
    if settings.checkpoint:
        train, test = (replace(part, mean=IMAGENET[0], std=IMAGENET[1]) for part in (train, test))
    if settings.samples:
        train = train.subset(torch.arange(settings.samples))
    # everything of the first seed before the second; a trained network is the same for every seed
    jobs = [(method, target, seed) for seed in seeds for target in targets for method in methods]
    jobs = [("dense", 1.0, seed) for seed in (seeds[:1] if settings.checkpoint else seeds)] + jobs
    dense_flops = 0
    for method, target, seed in jobs:
        dense = [row["accuracy"] for row in rows if row["method"] == "dense"]
        bench = Bench(settings, seed, (train, test), dense[0] if dense and settings.checkpoint else None)
        dense_flops = dense_flops or bench.flops(bench.model())
        if (method, target, seed) in finished:
            continue
        began, busy = time.perf_counter(), time.process_time()
        try:
            if method == "dense":
                model, more = bench.dense()
            elif method in STP_VARIANTS:
                model, more = bench.stp(method, target)
            else:
                model, more = bench.baseline(method, target)
        except PruneError as error:  # depth alone does not reach every target
            print(f"{method:30s} target {target:.2f} seed {seed}: {error}", flush=True)
            continue
        row = {"method": method, "target": target, "seed": seed, "accuracy": accuracy(model, test)}
        row |= {"flops": bench.flops(model) / dense_flops, **more, **settings.described()}
        row |= {
            "seconds": round(time.perf_counter() - began, 1),
            "cpu_seconds": round(time.process_time() - busy, 1),
            "threads": torch.get_num_threads(),
            "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC"),
        }
        path = network_path(name, row)
        path.parent.mkdir(parents=True, exist_ok=True)
        if method == "dense":
            torch.save(model.state_dict(), path.with_suffix(".pt"))
        else:
            save_compact(model, path)
        rows.append(row)
        write(name, rows)
        print(
            f"{method:30s} target {target:.2f} seed {seed}: {row['accuracy']:.4f} at "
            f"{row['flops']:.3f} of the FLOPs, {row['seconds']:.0f} s",
            flush=True,
        )


TRAININGS = ("plain", "l1 penalty", "stimulative")


def curves(name: str, settings: Settings, seeds: list[int], target: float) -> None:
    """Relative sparsity: after each epoch the mean absolute weight of the larger half of every group's filters, and of
    the smaller half, in plain, L1-penalised and stimulative training from the same start."""
    rows: list[dict[str, Any]] = []
    train, test = load_data(settings.data, augment=True)
    if settings.samples:
        train = train.subset(torch.arange(settings.samples))
    for seed in seeds:
        for training in TRAININGS:
            rows += _curve(Bench(settings, seed, (train, test)), training, target)
            print(f"{training}, seed {seed}: ratio {rows[-1]['ratio']:.3f} at the end", flush=True)
    described = {**settings.described(), "target": target}
    results_io.write(
        f"relative_sparsity_{name}",
        rows=[row | described for row in rows],
        claim="Kept against dropped magnitude over training: plain, L1-penalised and stimulative.",
        seeds=seeds,
    )


def _curve(bench: Bench, training: str, target: float) -> list[dict[str, Any]]:
    """A row for the start and for each epoch of one training."""
    settings, model = bench.settings, bench.model()
    probe = Supernet(model, bench.x())
    half = Subnet(probe.full.depths, tuple(max(1, width // 2) for width in probe.full.widths))
    objective: Objective = CrossEntropy()
    mechanisms: list[Mechanism] = []
    if training == "l1 penalty":
        mechanisms = [WeightPenalty(model)]
    elif training == "stimulative":
        part = StpPart(target=target, pool=settings.pool, rounds=settings.rounds)
        objective = StimulativeTraining(Supernet(model, bench.x()), part, seed=bench.seed)
        mechanisms = [objective.mechanism()]
    rows: list[dict[str, Any]] = []

    def record(epoch: int) -> None:
        probe.set_order("l1")
        kept, dropped = magnitudes(probe, half)
        rows.append({
            "training": training, "seed": bench.seed, "epoch": epoch, "kept_magnitude": kept,
            "dropped_magnitude": dropped, "ratio": kept / max(dropped, 1e-12),
        })  # fmt: skip

    record(0)
    phase = Phase("train", model, objective, bench.batches(), bench.part, settings.epochs, mechanisms)
    fit(phase, after_epoch=lambda result: record(result.epoch + 1))
    rows[-1]["accuracy"] = accuracy(model, bench.test)
    return rows


def latency(name: str, batch: int, seconds: float, at_most: int | None) -> None:
    """Time the executables of all networks that are kept, in turns with the dense one, and store the medians.

    Executables are kept too: with `at_most` so many missing ones are converted and nothing is timed.
    """
    rows = stored(name)
    executables, owners, fresh = {}, {}, 0
    for position, row in enumerate(rows):
        path = network_path(name, row)
        network = _kept_network(row, path, first=rows[0]["seed"])
        if network is None:
            continue
        x = torch.randn(batch, _channels(row), *_image(row))
        file = path.with_suffix(f".{batch}.spx")
        if not file.exists() or file.stat().st_mtime < _source(row, path).stat().st_mtime:
            if at_most is not None and fresh == at_most:
                print("more are to be converted")
                return
            convert(network.eval(), (x,), threads=1).save(file)
            fresh += 1
        exe = load_executable(file, threads=1)
        owners[str(position)] = row
        executables[str(position)] = lambda exe=exe, x=x: exe(x)
    if at_most is not None:
        print(f"{len(executables)} executables are there")
        return
    times = results_io.interleaved(executables, seconds=seconds)
    for key, row in owners.items():
        row["latency_ms"] = times[key]["median_ms"]
        row["latency_batch"] = batch
    write(name, rows, results_io.read(results_name(name))["command"])  # the command that made the rows


def _source(row: dict[str, Any], path: Path) -> Path:
    return path.with_suffix(".pt") if row["method"] == "dense" else path


def _kept_network(row: dict[str, Any], path: Path, first: int) -> nn.Module | None:
    """The network behind a row; None where it is not kept (of the dense ones only the first seed's is timed)."""
    if not _source(row, path).exists() or (row["method"] == "dense" and row["seed"] != first):
        return None
    dense = models.build(
        row["model"], num_classes=10, in_channels=_channels(row), option=row["option"], width=row["width"]
    )
    if row["method"] != "dense":
        return load_compact(path, dense)
    dense.load_state_dict(torch.load(path.with_suffix(".pt"), weights_only=True))
    return dense


def _channels(row: dict[str, Any]) -> int:
    return 3 if row["data"].startswith("cifar") else 1


def _image(row: dict[str, Any]) -> tuple[int, int]:
    return (32, 32) if row["data"].startswith("cifar") else (8, 8)


def stored(name: str) -> list[dict[str, Any]]:
    """The rows of a result file, none where there is no file."""
    try:
        return results_io.read(results_name(name))["rows"]
    except FileNotFoundError:
        return []


def write(name: str, rows: list[dict[str, Any]], command: str | None = None) -> None:
    """Write the result file."""
    seeds = sorted({row["seed"] for row in rows})
    results_io.write(results_name(name), rows=rows, claim=CLAIM, command=command, seeds=seeds)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    run = commands.add_parser("run", help="train what is missing")
    run.add_argument("--name", required=True, help="of the result file")
    run.add_argument("--data", default="digits")
    run.add_argument("--model", default="resnet14")
    run.add_argument("--option", default="B", choices=("A", "B"), help="the shortcuts of the ResNet")
    run.add_argument("--width", type=int, default=8)
    run.add_argument("--checkpoint", help="trained weights to start from")
    run.add_argument("--epochs", type=int, default=20)
    run.add_argument("--batch-size", type=int, default=32)
    run.add_argument("--learning-rate", type=float, default=0.05)
    run.add_argument("--samples", type=int, help="train on the first so many samples; tests use all")
    run.add_argument("--amp", action="store_true", help="train in bfloat16 where PyTorch's autocast does")
    run.add_argument("--pool", type=int, default=4, help="depths in STP's pool")
    run.add_argument("--rounds", type=int, default=2, help="samples of every candidate before a cut")
    run.add_argument("--targets", type=float, nargs="+", default=[0.5, 0.3, 0.15])
    run.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    run.add_argument("--methods", nargs="+", default=list(METHODS), choices=METHODS)
    run.add_argument("--threads", type=int, default=1)
    curved = commands.add_parser("curves", help="relative sparsity over training, against plain and L1-penalised")
    curved.add_argument("--name", required=True)
    curved.add_argument("--data", default="digits")
    curved.add_argument("--epochs", type=int, default=12)
    curved.add_argument("--samples", type=int)
    curved.add_argument("--target", type=float, default=0.3)
    curved.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    timing = commands.add_parser("latency", help="time the networks that were kept, as executables")
    timing.add_argument("--name", required=True)
    timing.add_argument("--batch", type=int, default=1)
    timing.add_argument("--seconds", type=float, default=30.0)
    timing.add_argument("--convert", type=int, help="only convert at most so many networks that are not yet converted")
    args = parser.parse_args()
    if args.command == "latency":
        latency(args.name, args.batch, args.seconds, args.convert)
        return
    if args.command == "curves":
        torch.set_num_threads(1)
        settings = Settings(args.data, epochs=args.epochs, samples=args.samples, rounds=1)
        curves(args.name, settings, args.seeds, args.target)
        return
    torch.set_num_threads(args.threads)
    settings = Settings(
        args.data, args.model, args.option, args.width, args.checkpoint, args.epochs, args.batch_size,
        args.learning_rate, args.samples, args.amp, args.pool, args.rounds,
    )  # fmt: skip
    measure(args.name, settings, args.methods, args.targets, args.seeds)


if __name__ == "__main__":
    main()
