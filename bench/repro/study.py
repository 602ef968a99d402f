"""The studies: which runs each claim needs, and how their results are kept."""

from __future__ import annotations

import datetime
import json
import platform
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bench import results_io
from sparse_engine.errors import SparseEngineError
from sparse_engine.train import load_data, run
from sparse_engine.train.data import ArrayData

#: Epochs, models and grids per scale; every method of a study trains for the same number of epochs in all. The
#: pipeline's paper has hidden layers of 784-784 on MNIST: ZerO is an identity there, which the claimed collapse needs.
#: At a rate of 0.1 the T² of distillation makes these networks without batch norm diverge on MNIST.
SCALES: dict[str, dict[str, Any]] = {
    "digits": {
        "epochs": 20, "hidden": [128, 128], "pipeline_hidden": [128, 128], "limit": None, "coreset_rate": 0.1,
        "sparsities": (0.9, 0.95, 0.98), "densities": (0.1, 0.03, 0.01), "stage_density": 0.02, "all_stages": False,
        "studies": ("epsd", "pipeline", "coreset"),
    },
    "mnist": {
        "epochs": 10, "hidden": [256, 256], "pipeline_hidden": [784, 784], "limit": 5000, "coreset_rate": 0.02,
        "sparsities": (0.9, 0.95, 0.98, 0.995), "densities": (0.1, 0.01, 0.003, 0.001), "stage_density": 0.01,
        "all_stages": True, "alone_density": 0.001, "studies": ("epsd", "pipeline", "coreset"),
    },
}  # fmt: skip
SCALES["fashion_mnist"] = SCALES["mnist"]
SCALES["cifar10"] = {
    "epochs": 5, "model": {"name": "vgg11_cifar", "options": {"width": 0.25}}, "limit": 4000, "amp": True,
    "densities": (0.1, 0.01, 0.003, 0.001), "stage_density": 0.01, "studies": ("pipeline",), "stages": False,
}  # fmt: skip
#: five times the optimiser steps, at the densities that the claim is about
SCALES["cifar10_10000"] = {**SCALES["cifar10"], "epochs": 10, "limit": 10000, "densities": (0.01, 0.001)}
#: the pipeline's claim is about this density and below
LOW_DENSITY = 0.01

Cell = dict[str, Any]


def results_of(scale: str, folder: Path = results_io.RESULTS) -> Path:
    """The file with the runs of a scale: one per scale, so that two scales can run side by side."""
    return folder / f"reproduction_{scale}.json"


class Store:
    """The runs of one scale, written after every run by the writer that all results share."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.rows: list[dict[str, Any]] = json.loads(path.read_text())["rows"] if path.exists() else []
        self.keys = {self.key(row["study"], row["cell"], row["seed"], row["scale"]) for row in self.rows}

    @staticmethod
    def key(study: str, cell: Cell, seed: int, scale: str) -> str:
        """What makes two runs the same."""
        return json.dumps([study, cell, seed, scale], sort_keys=True)

    def add(self, row: dict[str, Any]) -> None:
        """Append and write."""
        self.rows.append(row)
        self.keys.add(self.key(row["study"], row["cell"], row["seed"], row["scale"]))
        data = "digits" if row["scale"] == "digits" else "DIR"
        results_io.write(
            self.path.stem,
            rows=self.rows,
            claim="Runs behind docs/reproduction.md, one row each.",
            command=f"python -m bench.repro run --scale {row['scale']} --data {data}",
            seeds=sorted({entry["seed"] for entry in self.rows}),
            folder=self.path.parent,
        )


def run_cells(
    store: Store, cells: list[tuple[str, Cell, int]], scale: str, data: str, deadline: float | None = None
) -> None:
    """Run what is not in the store yet; a failing run is stored with its error instead of an accuracy."""
    settings = SCALES[scale]
    loaded = load_data(data, augment=True, limit=settings["limit"])
    missing = [cell for cell in cells if store.key(cell[0], cell[1], cell[2], scale) not in store.keys]
    print(f"{len(cells) - len(missing)} of {len(cells)} runs are there, {len(missing)} to go", flush=True)
    for number, (study, cell, seed) in enumerate(missing, 1):
        if deadline is not None and time.monotonic() > deadline:
            print("out of time; the next call continues here", flush=True)
            return
        began, busy = time.perf_counter(), time.process_time()
        row = {"study": study, "cell": cell, "seed": seed, "scale": scale}
        try:
            result = run(recipe_of(cell, scale), loaded, progress=False, seed=seed, **overrides(cell, scale, loaded))
            for key in (
                "test_accuracy",
                "validation_accuracy",
                "teacher_accuracy",
                "gate_openness",
                "training_samples",
            ):
                if key in result.summary:
                    row[key] = result.summary[key]
            row["sparsity"] = result.summary["sparsity"]
            row["kept_by_layer"] = [layer.kept for layer in result.report.layers]
        except SparseEngineError as error:
            row["error"] = str(error)
        row["seconds"] = round(time.perf_counter() - began, 2)
        row["cpu_seconds"] = round(time.process_time() - busy, 2)
        row["date"] = datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC")
        row["machine"] = f"{platform.machine()}, {torch.get_num_threads()} thread(s), torch {torch.__version__}"
        store.add(row)
        shown = row.get("test_accuracy", row.get("error", ""))
        print(f"{number}/{len(missing)} {study} {cell} seed {seed}: {shown} ({row['seconds']} s)", flush=True)


def recipe_of(cell: Cell, scale: str) -> dict[str, Any]:
    """The common ground of all runs; the cell's own settings come on top."""
    settings = SCALES[scale]
    model = settings.get("model")
    if model is None:
        hidden = settings["pipeline_hidden" if cell["kind"] == "pipeline" else "hidden"]
        model = {"name": "mlp", "options": {"hidden": hidden}}
    return {
        "name": "reproduction",
        "model": model,
        "data": {"augment": True},
        "train": {
            "epochs": settings["epochs"], "batch_size": 64, "learning_rate": 0.1, "weight_decay": 5e-4,
            "schedule": "multistep", "milestones": [0.5, 0.75], "sparse_kernels": "never",
            "amp": settings.get("amp", False), "test_every": 0,
        },
        "convert": {"enabled": False},
    }  # fmt: skip


def overrides(cell: Cell, scale: str, loaded: tuple[ArrayData, ArrayData]) -> dict[str, Any]:
    """Dotted recipe keys of a cell."""
    build = {"epsd": _epsd, "pipeline": _pipeline, "coreset": _coreset}[cell["kind"]]
    settings = SCALES[scale]
    changes = build(cell, settings["epochs"])
    if cell["kind"] == "coreset":
        changes["train.learning_rate"] = settings["coreset_rate"]
    return changes


# --- a. early pruning with self-distillation --------------------------------------------------------------------------

SELF_DISTILLATION = ("cs_kd", "ps_kd", "dlb")
BASELINES = ("random", "magnitude", "snip", "grasp", "synflow", "prospr")


def epsd_cells(scale: str) -> Iterator[Cell]:
    """EPSD against its baselines: criterion × loss in the scorer × loss in training × sparsity."""

    def cell(**options: Any) -> Cell:
        return {"kind": "epsd", **options}

    for loss in ("cross_entropy", *SELF_DISTILLATION):
        yield cell(method="dense", loss=loss)
    for sparsity in SCALES[scale]["sparsities"]:
        for loss in SELF_DISTILLATION:
            yield cell(method="EPSD", loss=loss, sparsity=sparsity)
            yield cell(method="SC", loss=loss, sparsity=sparsity)
        for criterion in BASELINES:
            yield cell(method=criterion, loss="cross_entropy", sparsity=sparsity)
        yield cell(method="EPSD iterative", loss="cs_kd", sparsity=sparsity)
        yield cell(method="EPSD first-order", loss="cs_kd", sparsity=sparsity)


def _epsd(cell: Cell, epochs: int) -> dict[str, Any]:
    out: dict[str, Any] = {"loss.name": cell["loss"]}
    method = cell["method"]
    if method == "dense":
        return out
    out["prune.sparsity"] = cell["sparsity"]
    out["prune.allow_collapse"] = True
    if method.startswith("EPSD") or method == "SC":
        out["prune.criterion"] = "epsd"
        mode = "first_order" if method == "EPSD first-order" else "full"
        out["prune.options"] = {"steps": 3, "learning_rate": 0.5, "momentum": 0.9, "mode": mode}
        if method == "SC":
            out["prune.loss"] = "cross_entropy"
        if method == "EPSD iterative":
            out["prune.rounds"] = 5
    else:
        out["prune.criterion"] = method
    return out


# --- b. the end-to-end pipeline ---------------------------------------------------------------------------------------

STAGES = ("zero", "mask", "smoothing", "activations", "skips")


def pipeline_cells(scale: str) -> Iterator[Cell]:
    """Baselines and the pipeline by density; combinations of its stages at one density; ZerO with a mask."""
    for density in SCALES[scale]["densities"]:
        for method in ("pipeline", "magnitude", "iterative", "random", "snip", "grasp", "rigl"):
            yield {"kind": "pipeline", "method": method, "density": density}
    if not SCALES[scale].get("stages", True):
        return
    density = SCALES[scale]["stage_density"]
    for stages in stage_sets(scale):
        yield {"kind": "pipeline", "method": "stages", "density": density, "stages": stages}
    if "alone_density" in SCALES[scale]:  # far below what magnitude reaches, where the stages have to show what they do
        for name in STAGES:
            cell = {"kind": "pipeline", "method": "stages", "density": SCALES[scale]["alone_density"]}
            yield {**cell, "stages": [name]}
    # the collapse: penalties in full force from the first step on, and what helps against it
    for stages in (["zero"], ["mask"], ["zero", "mask"]):
        yield {"kind": "pipeline", "method": "ablation", "density": density, "stages": stages}
    for stages in (["mask"], ["zero", "mask"]):
        yield {"kind": "pipeline", "method": "ablation", "density": density, "stages": stages, "penalty": 3e-3}
    for remedy in ("open", "warmup", "open+warmup"):
        yield {"kind": "pipeline", "method": "remedy", "density": density, "stages": ["zero", "mask"], "remedy": remedy}


def stage_sets(scale: str) -> list[list[str]]:
    """All combinations of the five stages; at the smallest scale only of the last four, and ZerO alone, with the mask,
    and with everything."""
    if SCALES[scale]["all_stages"]:
        return [[name for i, name in enumerate(STAGES) if bits >> i & 1] for bits in range(32)]
    sets = [[name for i, name in enumerate(STAGES[1:]) if bits >> i & 1] for bits in range(16)]
    return [*sets, ["zero"], ["zero", "mask"], list(STAGES)]


def _pipeline(cell: Cell, epochs: int) -> dict[str, Any]:
    method, half = cell["method"], epochs // 2
    out: dict[str, Any] = {
        "prune.sparsity": 1 - cell["density"],
        "prune.keep_one": True,
        "train.epochs": epochs - half,
        "train.learning_rate": 0.05,
        "train.schedule": "cosine",
    }
    if method in ("random", "snip", "grasp"):
        return {**out, "prune.criterion": method, "train.epochs": epochs}
    if method == "rigl":
        return {
            **out, "prune.criterion": "random", "prune.scope": "layer", "prune.distribution": "erk",
            "dynamic.name": "rigl", "dynamic.every": 20, "train.epochs": epochs,
        }  # fmt: skip
    if method == "iterative":
        return {**out, "dynamic.name": "iterative", "dynamic.rounds": 5, "dynamic.stop": 0.7, "train.epochs": epochs}
    out["pretrain.epochs"] = half
    if method == "magnitude":
        return out
    stages = cell.get("stages", ["mask", "smoothing", "activations", "skips"])
    remedy = cell.get("remedy", "")
    if "mask" in stages:
        out.update({
            "pretrain.gates": "bernoulli", "pretrain.variance_penalty": 0.0,
            "pretrain.size_penalty": cell.get("penalty", 3e-4),
            "pretrain.gate_learning_rate": 0.1, "pretrain.penalty_warmup": 0.0,
        })  # fmt: skip
        if method in ("pipeline", "stages"):
            out["pretrain.penalty_warmup"] = 0.3
        if "open" in remedy:
            out["pretrain.initial"] = 0.999
        if "warmup" in remedy:
            out["pretrain.penalty_warmup"] = 0.7
    if "zero" in stages:
        out["model.init"] = "zero"
    if "smoothing" in stages:
        out.update({"loss.label_smoothing": 0.1, "loss.final_label_smoothing": 0.0})
    out["post.soft_activations"] = "activations" in stages
    out["post.skip_connections"] = "skips" in stages
    return out


# --- c. data pruning with distillation --------------------------------------------------------------------------------

FRACTIONS = (0.1, 0.3)
SCORES = ("random", "forgetting", "el2n", "grand", "margin", "herding", "k_centre")
ALPHAS = (0.0, 0.25, 0.5, 0.75, 0.95)
TEACHERS = {"smaller": [32], "equal": None, "larger": [512, 512]}


def coreset_cells(scale: str) -> Iterator[Cell]:
    """Every score with and without a teacher by fraction; α by fraction; teacher sizes; label noise; fixed epochs."""

    def cell(**options: Any) -> Cell:
        return {"kind": "coreset", "updates": "iterations", **options}

    for fraction in FRACTIONS:
        for score in SCORES:
            yield cell(score=score, fraction=fraction, alpha=None)
            yield cell(score=score, fraction=fraction, alpha="default")
    for fraction in (0.1, 0.3, 1.0):
        for alpha in ALPHAS:
            yield cell(score="random", fraction=fraction, alpha=alpha, validation=True)
    for fraction in (0.1, 0.5):
        for size in TEACHERS:
            yield cell(score="random", fraction=fraction, alpha="default", teacher=size)
    for alpha in (None, "default"):
        yield cell(score="random", fraction=0.3, alpha=alpha, noise=0.3)
        yield {**cell(score="random", fraction=0.1, alpha=alpha), "updates": "epochs"}


def _coreset(cell: Cell, epochs: int) -> dict[str, Any]:
    out: dict[str, Any] = {
        "coreset.score": cell["score"],
        "coreset.fraction": cell["fraction"],
        "coreset.epochs": 5,
        "coreset.updates": cell["updates"],
    }
    if cell["alpha"] is not None:
        out["loss.name"] = "kd"
        out["loss.temperature"] = 4.0
        out["teacher.epochs"] = epochs
        if cell["alpha"] != "default":
            out["loss.alpha"] = cell["alpha"]
        hidden = TEACHERS[cell.get("teacher", "equal")]
        if hidden is not None:
            # the kept name is the student's own; a teacher of another size is another model part
            out["teacher.model"] = {"name": "mlp", "options": {"hidden": hidden}}
    if cell.get("validation"):
        out["data.validation"] = 0.2
    if cell.get("noise"):
        out["data.label_noise"] = cell["noise"]
    return out


# --- theory -----------------------------------------------------------------------------------------------------------


def ridge_bias(fractions: tuple[float, ...] = (0.1, 0.3, 1.0), seeds: int = 20) -> list[dict[str, float]]:
    """Ridge regression: the student's squared bias against the share of the data its teacher saw.

    Student and teacher are ridge regressions; the student sees a tenth of the samples and is fitted to the mean of the
    labels and the teacher's predictions. The bias is taken over label noise.
    """
    n, d, strength, noise = 400, 50, 5.0, 1.0
    rows = []
    for fraction in fractions:
        squares = []
        for seed in range(seeds):
            generator = torch.Generator().manual_seed(seed)
            x = torch.randn(n, d, generator=generator, dtype=torch.float64)
            truth = torch.randn(d, generator=generator, dtype=torch.float64)
            small, seen = x[: n // 10], x[: max(n // 10, round(fraction * n))]
            estimates = []
            for _ in range(40):
                y = x @ truth + noise * torch.randn(n, generator=generator, dtype=torch.float64)
                teacher = _ridge(seen, y[: len(seen)], strength)
                mixed = 0.5 * y[: len(small)] + 0.5 * small @ teacher
                estimates.append(_ridge(small, mixed, strength))
            squares.append(float((torch.stack(estimates).mean(0) - truth).square().sum()))
        rows.append({"teacher_fraction": fraction, "squared_bias": sum(squares) / len(squares)})
    return rows


def _ridge(x: Tensor, y: Tensor, strength: float) -> Tensor:
    eye = torch.eye(x.shape[1], dtype=x.dtype)
    return torch.linalg.solve(x.T @ x + strength * eye, x.T @ y)


def rank(cell: Cell, scale: str) -> int:
    """When a cell is run: 0 the least that every claim needs, 1 what makes it broader, 2 combinations of the pipeline's
    stages, 3 what only fills tables."""
    if cell["kind"] == "epsd":
        return 0 if cell["method"] in ("EPSD", "SC", "prospr", "dense") else 1
    if cell["kind"] == "pipeline":
        method, density = cell["method"], cell["density"]
        if method == "stages":
            return 0 if len(cell["stages"]) < 2 else 2
        if method in ("ablation", "remedy"):
            return 0
        if density not in low_densities(scale):
            return 3
        if "model" in SCALES[scale]:  # a large network is compared at one density first, with the nearest rivals
            return 0 if density == LOW_DENSITY and method in ("pipeline", "magnitude", "iterative", "rigl") else 1
        return 0 if method not in ("random", "grasp") or density == LOW_DENSITY else 1
    fraction, score = cell["fraction"], cell["score"]
    if cell.get("noise"):
        return 0
    if cell["updates"] != "iterations" or fraction == 0.5:
        return 3
    if cell.get("validation"):
        return 1
    if fraction == FRACTIONS[0]:
        return 0 if score in ("random", "forgetting", "el2n") else 1
    return 0 if score == "random" else 3


def low_densities(scale: str) -> list[float]:
    """The densities that the pipeline's claim is about: 1 % and below."""
    return [density for density in SCALES[scale]["densities"] if density <= LOW_DENSITY]


STUDIES: dict[str, Callable[[str], Iterator[Cell]]] = {
    "epsd": epsd_cells,
    "pipeline": pipeline_cells,
    "coreset": coreset_cells,
}

__all__ = ["STUDIES", "Store", "rank", "results_of", "ridge_bias", "run_cells"]
