"""A whole run: from a recipe and data to a trained sparse model, its executable and the files that describe both.

A run is a list of *stages* (teacher, score, pretrain, prune, train). After every epoch and every stage one checkpoint
is written; a resumed run continues from it bit for bit.
"""

from __future__ import annotations

import copy
import functools
import json
import math
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sparse_engine import coreset
from sparse_engine.distill import (
    Batch,
    ClassWiseSelfDistillation,
    CrossEntropy,
    LastBatchSelfDistillation,
    Objective,
    ProgressiveSelfDistillation,
    TeacherDistillation,
)
from sparse_engine.errors import PruneError, RecipeError, SparseEngineError
from sparse_engine.io.atomic import atomic_write, atomic_write_text
from sparse_engine.nn import SparseConv2d, SparseLinear, densify_, sparsify_
from sparse_engine.prune import (
    CRITERIA,
    Cubic,
    DynamicMask,
    GivenScores,
    GradualPruning,
    GraNet,
    LearnedMasks,
    Periodic,
    PruneReport,
    layer_counts,
    masks,
    prunable_weights,
    prune,
    set_masks,
    sparsity_report,
    squash_,
    zero_init_,
)
from sparse_engine.prune.criteria import Untouched
from sparse_engine.prune.structured import CompactionSpec, compaction_spec, save_compact
from sparse_engine.structure import Structure, Unstructured

from . import models
from .checkpoint import load_checkpoint, save_checkpoint
from .data import ArrayData, as_array_data, load_data
from .diagnostics import gradient_flow, loss_surface, mask_overlap, mean_jacobian_singular_value
from .distributed import Processes, agree, join, leave
from .evaluate import accuracy, outputs
from .log import Progress, RunLog, plot_run
from .loop import EpochResult, Mechanism, NotFiniteError, Phase, autocast, fit
from .mechanisms import Forgetting, GateTraining, Helpers, InfoBatch, Rewiring
from .post import PostPruning
from .recipe import ModelPart, PrunePart, Recipe, TrainPart, load_recipe, recipe_names
from .source import BatchSource
from .stp import StimulativeTraining
from .supernet import Supernet

ModelFactory = Callable[[], nn.Module]


@dataclass
class RunResult:
    """What a run returns.

    Attributes:
        model: the trained model, plain PyTorch with exact zeros.
        summary: accuracy, sparsity, speed and size as plain data; also in ``summary.json``.
        history: one row per epoch; also in ``log.csv`` and ``log.json``.
        folder: where the files are, None if none were written.
        report: kept weights by layer.
        executable: the converted model, None if ``convert.enabled`` is false.
    """

    model: nn.Module
    summary: dict[str, Any]
    history: list[dict[str, Any]]
    folder: Path | None
    report: PruneReport
    executable: Any = None

    def __str__(self) -> str:
        return _summary_text(self.summary)


def run(
    recipe: str | Path | dict[str, Any] | Recipe,
    data: Any,
    *,
    model: nn.Module | ModelFactory | None = None,
    out: str | Path | None = None,
    resume: bool = False,
    progress: bool | None = None,
    device: str = "cpu",
    **overrides: Any,
) -> RunResult:
    """Train by a recipe and convert the result.

    Example::

        result = sparse_engine.train.run("epsd", "digits", out="runs/epsd", **{"prune.sparsity": 0.95})
        print(result)                      # accuracy, sparsity, speed, size
        result.executable(x)

    Args:
        recipe: a name (``epsd``, ``end_to_end``, ``data_pruning_kd``, ``rigl``, ``magnitude``, ``stp``), a YAML file, a
            mapping or a Recipe.
        data: what :func:`load_data` takes, or (train, test) of datasets or of (inputs, labels) tensors.
        model: a module, or a function that makes one, instead of the recipe's.
        out: folder for checkpoint, log, plots, weights and executable; nothing is written when None.
        resume: continue from the checkpoint in ``out``; starts anew if there is none yet.
        progress: a bar on a terminal and lines elsewhere when None; False for silence.
        device: where to train.
        overrides: dotted keys of the recipe, e.g. ``**{"train.epochs": 3}``, or whole parts.

    Returns:
        Model, summary, history, report and executable.

    Raises:
        SparseEngineError: for anything wrong with the recipe, the data or the combination, before any long work.
    """
    checked = load_recipe(recipe, overrides)
    processes = join(device)
    try:
        return _Run(checked, data, model, out, resume, progress, device, processes).execute()
    finally:
        leave(processes)


@dataclass
class _Stage:
    name: str
    make: Callable[[], Phase | None]
    finish: Callable[[Phase | None], None]


@dataclass
class _Run:
    recipe: Recipe
    source: Any
    given_model: nn.Module | ModelFactory | None
    out: str | Path | None
    resume: bool
    show: bool | None
    device: str
    processes: Processes
    carry: dict[str, Any] = field(default_factory=dict)

    # --- the whole --------------------------------------------------------------------------------------------------

    def execute(self) -> RunResult:
        """All stages, then the executable."""
        recipe = self.recipe
        self.folder = None if self.out is None else Path(self.out).expanduser()
        saved = self._saved()
        self._load_data()
        torch.manual_seed(recipe.seed)
        self.model = self._new_model(recipe.model)
        self._check_before_long_work()
        self.progress = Progress(self.show if self.processes.first else False)
        self.log = RunLog(self.folder if self.processes.first else None, saved["log"] if saved else None)
        self.teacher: nn.Module | None = None
        began = time.perf_counter()
        first = 0
        if saved:
            first = saved["stage"]
            self.carry = saved["carry"]
            self._restore()
            torch.set_rng_state(saved["rng"])
            self.progress.say(f"resuming at stage {first + 1}, epoch {saved['epoch'] + 1}")
        else:
            self._remember_model()
        stages = self._stages()
        for position in range(first, len(stages)):
            self._do(stages[position], position, saved if saved and position == first else None)
        self.progress.stop()
        return self._finish(time.perf_counter() - began)

    def _do(self, stage: _Stage, position: int, saved: dict[str, Any] | None) -> None:
        phase = stage.make()
        start = 0
        if phase is not None:
            if saved and saved["phase"] is not None:
                phase.load_state_dict(saved["phase"])
                start = saved["epoch"]
                torch.set_rng_state(saved["rng"])
            self.progress.start(stage.name, phase.epochs * len(phase.source))
            self.progress.skip(start * len(phase.source))

            def after_epoch(result: EpochResult) -> None:
                self._log_epoch(stage.name, phase, result)
                self._save(position, result.epoch + 1, phase)

            try:
                fit(phase, start=start, after_epoch=after_epoch, on_step=lambda *now: self.progress.advance(now[2]))
            except NotFiniteError as error:
                self.progress.stop()
                if self.folder is None or not (self.folder / "checkpoint.pt").exists():
                    raise
                raise NotFiniteError(
                    f"{error}. The last good state is {self.folder / 'checkpoint.pt'}; it resumes only with the same "
                    "recipe"
                ) from None
            phase.hold.remove()
        stage.finish(phase)
        self._save(position + 1, 0, None)

    def _stages(self) -> list[_Stage]:
        recipe = self.recipe
        stages = []
        if recipe.teacher is not None:
            stages.append(_Stage("teacher", self._make_teacher, self._finish_teacher))
        if recipe.coreset is not None and recipe.coreset.score not in ("random", "infobatch"):
            stages += [
                _Stage(f"score {index + 1}", functools.partial(self._make_scorer, index), self._finish_scorer)
                for index in range(recipe.coreset.runs)
            ]
        if recipe.coreset is not None and recipe.coreset.score != "infobatch":
            stages.append(_Stage("select", lambda: None, lambda _: self._select()))
        if recipe.pretrain is not None and recipe.pretrain.epochs:
            stages.append(_Stage("pretrain", self._make_pretrain, self._finish_pretrain))
        if recipe.prune is not None:
            stages.append(_Stage("prune", lambda: None, lambda _: self._prune()))
        stages.append(_Stage("train", self._make_train, self._finish_train))
        return stages

    # --- stages -----------------------------------------------------------------------------------------------------

    def _make_teacher(self) -> Phase | None:
        part = self.recipe.teacher
        assert part is not None
        self.teacher = self._new_model(part.model or replace(self.recipe.model, checkpoint=None))
        if part.checkpoint is not None:
            models.load_state(self.teacher, _read_weights(part.checkpoint))
        if not part.epochs:
            return None
        return self._phase("teacher", self.teacher, CrossEntropy(), self.train, part.epochs, salt=1)

    def _finish_teacher(self, phase: Phase | None) -> None:
        assert self.teacher is not None
        self.carry["teacher"] = {name: value.clone() for name, value in self.teacher.state_dict().items()}
        self.carry["teacher_accuracy"] = accuracy(self.teacher, self.test, device=self.device)
        self.progress.say(f"teacher: test accuracy {self.carry['teacher_accuracy']:.4f}")

    def _make_scorer(self, index: int) -> Phase:
        part = self.recipe.coreset
        assert part is not None
        state = torch.get_rng_state()
        torch.manual_seed(self.recipe.seed + 1000 + index)
        self.scorer = self._new_model(replace(self.recipe.model, checkpoint=None))
        torch.set_rng_state(state)
        self.tracker = coreset.ForgettingTracker(len(self.train))
        mechanisms = [Forgetting(self.tracker)] if part.score == "forgetting" else []
        return self._phase("score", self.scorer, CrossEntropy(), self.train, part.epochs, mechanisms, salt=100 + index)

    @torch.no_grad()
    def _finish_scorer(self, phase: Phase | None) -> None:
        part = self.recipe.coreset
        assert part is not None
        labels = self.train.labels
        box: list[Tensor] = []
        if part.score == "forgetting":
            scores = self.tracker.scores()
        elif part.score == "grand":
            with torch.enable_grad():
                scores = coreset.grand(self.scorer, _Replayed(self._batches(self.train)), len(self.train))
        else:
            features = coreset.penultimate(
                self.scorer, lambda: box.append(outputs(self.scorer, self.train, device=self.device))
            )
            compute = {
                "el2n": lambda: coreset.el2n(box[0], labels),
                "margin": lambda: coreset.margin(box[0], labels),
                "herding": lambda: coreset.herding(features, labels),
                "k_centre": lambda: coreset.k_centre(features, labels),
            }
            scores = compute[part.score]()
        self.carry["scores"] = self.carry.get("scores", 0) + scores.float() / part.runs

    def _select(self) -> None:
        part = self.recipe.coreset
        assert part is not None
        scores = self.carry.get("scores")
        keep = part.keep
        if scores is None:
            scores, keep = torch.zeros(len(self.train)), "random"
        kept = coreset.select(
            scores, part.fraction, keep=keep, labels=self.train.labels, balance=part.balance, seed=self.recipe.seed
        )
        self.carry["kept"] = agree(kept, self.processes)
        if self.folder is not None and self.processes.first and "scores" in self.carry:
            coreset.save_scores(self.folder / "scores.npz", self.carry["scores"], score=part.score)
        self.progress.say(f"kept {len(kept)} of {len(self.train)} training samples ({part.score}, {keep})")

    def _make_pretrain(self) -> Phase:
        part = self.recipe.pretrain
        assert part is not None
        mechanisms: list[Mechanism] = []
        self.gates = None
        data = self._kept_data()
        if part.gates != "none":
            x = data.batch(torch.arange(min(self.recipe.train.batch_size, len(data))), augment=False).inputs
            context = autocast(self.recipe.train, torch.device(self.device))
            self.model.train()
            (plain_ms,) = _step_ms([self.model], x.to(self.device), context)
            self.gates = LearnedMasks(
                self.model,
                part.gates,
                initial=part.initial,
                variance_penalty=part.variance_penalty,
                size_penalty=part.size_penalty,
                penalty_warmup=part.penalty_warmup,
                ignore=self._ignore(),
            )
            mechanisms.append(GateTraining(self.gates, part.gate_learning_rate))
            (gated_ms,) = _step_ms([self.model], x.to(self.device), context)
            if "gated_step_ms" not in self.carry:
                self.carry["gated_step_ms"], self.carry["plain_step_ms"] = gated_ms, plain_ms
                self.progress.say(
                    f"training {len(self.gates.gates)} layers with learned gates: forward and backward of a batch take "
                    f"{gated_ms:.2f} ms against {plain_ms:.2f} ms without them"
                )
        objective = self._objective(part.loss or self.recipe.loss.name, data)
        return self._phase("pretrain", self.model, objective, data, part.epochs, mechanisms, salt=2)

    def _finish_pretrain(self, phase: Phase | None) -> None:
        if self.gates is not None:
            self.progress.say(f"gates: mean openness {self.gates.openness():.4f}")
            self.carry["gate_openness"] = self.gates.openness()
            self.carry["gate_scores"] = self.gates.fold_()
        self._remember_model()

    def _prune(self) -> None:
        part = self.recipe.prune
        assert part is not None
        dynamic = self.recipe.dynamic
        sparsity = dynamic.initial_sparsity if dynamic.name in ("granet", "gradual", "iterative") else part.sparsity
        if dynamic.name in ("granet", "gradual", "iterative") and not sparsity:
            set_masks(self.model, {n: torch.ones_like(w, dtype=torch.bool) for n, w in self._weights().items()})
            self._remember_model()
            return
        if "gate_scores" in self.carry and part.criterion == "magnitude":
            criterion: Any = GivenScores(self.carry["gate_scores"], "magnitude")
        else:
            criterion = CRITERIA[part.criterion](**part.options)
        data = self._kept_data()
        objective = self._objective(part.loss or self.recipe.loss.name, data)
        source = self._batches(data, needs=objective.needs, salt=3)
        if part.criterion in ("epsd", "prospr", "snip", "grasp", "movement"):
            with Untouched(self.model):
                self.model.train()
                objective.warm(self.model, source.epoch(0))
            self.model.train()
        report = _prune_quietly(
            self.model,
            sparsity=sparsity,
            structure=Structure.parse(part.structure),
            criterion=criterion,
            scope=part.scope,
            distribution=part.distribution,
            ignore=self._ignore(),
            data=_Replayed(source),
            loss=objective,
            schedule=part.rounds,
            keep_one=part.keep_one,
            seed=self.recipe.seed,
        )
        if report.collapsed and not part.allow_collapse:
            raise PruneError(
                f"pruning emptied {len(report.collapsed)} of {len(report.layers)} layers "
                f"({', '.join(report.collapsed)}): "
                "nothing could be learned. Set prune.keep_one=true, prune.distribution=erk or a lower prune.sparsity; "
                "prune.allow_collapse=true trains on regardless"
                + ("; with --resume what was trained before is kept" if self.folder is not None else "")
            )
        set_masks(self.model, agree(masks(self.model), self.processes))
        self.carry.pop("gate_scores", None)
        self._remember_model()
        self.progress.say(f"pruned to {report.sparsity:.4%} ({report.kept} of {report.total} weights kept)")

    def _make_train(self) -> Phase:
        recipe = self.recipe
        data = self._kept_data()
        epochs = recipe.train.epochs
        if recipe.coreset is not None and recipe.coreset.updates == "iterations" and "kept" in self.carry:
            epochs = math.ceil(epochs * len(self.train) / max(1, len(data)))
        mechanisms: list[Mechanism] = []
        order = None
        if recipe.coreset is not None and recipe.coreset.score == "infobatch":
            order = coreset.InfoBatchOrder(len(data), epochs, ratio=1 - recipe.coreset.fraction)
            mechanisms.append(InfoBatch(order))
        if self._diagnosed and "jacobian" not in self.carry:
            self.carry["jacobian"] = [self._mean_jacobian()]
        self._use_sparse_kernels(data)
        self.post = None
        if recipe.post.soft_activations or recipe.post.skip_connections:
            self.post = PostPruning(
                self.model,
                activations=recipe.post.soft_activations,
                skips=recipe.post.skip_connections,
                until=recipe.post.until,
            )
            mechanisms.append(Helpers(self.post))
        mechanisms += self._dynamic()
        self.stp = None
        if recipe.stp is not None:
            x = data.batch(torch.arange(1), augment=False).inputs.to(self.device)
            self.stp = StimulativeTraining(Supernet(self.model, x), recipe.stp, seed=recipe.seed)
            mechanisms.append(self.stp.mechanism())
        objective = self.stp or self._objective(recipe.loss.name, data)
        return self._phase("train", self.model, objective, data, epochs, mechanisms, salt=4, order=order)

    def _finish_train(self, phase: Phase | None) -> None:
        if self.post is not None:
            self.post.set_progress(1.0)
            self.post.remove_()
        kept = masks(self.model)
        densify_(self.model)
        set_masks(self.model, kept)
        if self._diagnosed and kept and self.carry["masks"].keys() == kept.keys():
            self.carry["overlap"] = mask_overlap(self.carry["masks"], kept)
        if self.stp is not None:
            self._take_subnet()
        self._remember_model()

    def _take_subnet(self) -> None:
        """Replace the trained network by the subnet that STP chose."""
        assert self.stp is not None
        self.carry["full_test_accuracy"] = accuracy(self.model, self.test, device=self.device)
        source = self._batches(self._kept_data(), salt=5)
        self.model = self.stp.finish(batch.inputs for batch in source.epoch(0))
        self.carry["compaction"] = compaction_spec(self.model).to_json()
        self.carry["stp"] = self.stp.summary()
        self.progress.say(
            f"subnet: {self.carry['stp']['cost']:.4g} of {self.carry['stp']['full_cost']:.4g} "
            f"{self.carry['stp']['unit']}, "
            f"full network's test accuracy {self.carry['full_test_accuracy']:.4f}"
        )
        if self.folder is not None and self.processes.first:
            save_compact(self.model, self.folder / "compact.safetensors")

    def _use_sparse_kernels(self, data: ArrayData) -> None:
        """Put sparse layers where a training step on them is faster, and print the time of a step beside that of the
        dense and masked network.

        The masks that training begins with decide: what starts dense (granet, gradual and iterative without an initial
        sparsity) is dense and masked to the end, unless ``train.sparse_kernels`` is ``always``.
        """
        kept = masks(self.model)
        if not kept:
            return
        if "sparse_layers" not in self.carry:  # a resumed run has chosen and timed already
            self._choose_sparse_layers(data, kept, self._why_no_sparse_kernels())
        if self.carry["sparse_layers"]:
            # the pattern comes from the masks: a kept weight may be zero
            put_sparse_layers_(self.model, self.carry["sparse_layers"], kept)

    def _choose_sparse_layers(self, data: ArrayData, kept: dict[str, Tensor], why_not: str) -> None:
        """The layers that a step is faster with, as a whole: layers that win alone may lose together."""
        part = self.recipe.train
        x = data.batch(torch.arange(min(part.batch_size, len(data))), augment=False).inputs.to(self.device)
        self.model.train()
        context = autocast(part, x.device)
        names: list[str] = []
        if not why_not:
            report = sparsify_(copy.deepcopy(self.model), example_inputs=x, force=part.sparse_kernels == "always")
            names = agree([layer.name for layer in report.layers if layer.sparse], self.processes)
        contenders = [self.model]
        if names:
            contenders.append(copy.deepcopy(self.model))
            put_sparse_layers_(contenders[1], names, kept)
        dense_ms, *sparse_ms = agree(_step_ms(contenders, x, context), self.processes)
        self.carry["dense_step_ms"] = dense_ms
        alone = f"forward and backward of a batch take {dense_ms:.2f} ms"
        if not names:
            why = why_not or "no layer is faster on the sparse kernels at this size"
            self.progress.say(f"training dense and masked ({why}): {alone}")
        elif part.sparse_kernels == "auto" and sparse_ms[0] >= dense_ms:
            self.progress.say(
                f"training dense and masked: {alone} against {sparse_ms[0]:.2f} ms with {len(names)} of {len(kept)} "
                "layers on sparse kernels"
            )
            names = []
        else:
            self.carry["sparse_step_ms"] = sparse_ms[0]
            self.progress.say(
                f"training {len(names)} of {len(kept)} layers on sparse kernels: forward and backward of a batch "
                f"take {sparse_ms[0]:.2f} ms against {dense_ms:.2f} ms dense and masked"
            )
        self.carry["sparse_layers"] = names

    def _why_no_sparse_kernels(self) -> str:
        """Why this run trains dense and masked whatever its layers; empty where it may use sparse kernels."""
        part = self.recipe.train
        if part.sparse_kernels == "never":
            return "train.sparse_kernels is never"
        if self.recipe.prune is None:
            return "the recipe prunes nothing"
        if self.device != "cpu":
            return f"it trains on {self.device}"
        if part.amp:
            return "train.amp is on, and the sparse kernels train in float32"
        if self.recipe.dynamic.name not in ("none", "rigl", "set") and self.processes.world > 1:
            # DistributedDataParallel fixes the size of every parameter when it begins
            return f"masks of {self.recipe.dynamic.name} shrink, which several processes cannot follow on sparse layers"
        return ""

    def _dynamic(self) -> list[Mechanism]:
        part, pruning = self.recipe.dynamic, self.recipe.prune
        if part.name == "none" or pruning is None:
            return []
        structure = Structure.parse(pruning.structure)
        options: dict[str, Any] = {"ignore": self._ignore(), "keep_one": pruning.keep_one}
        final = pruning.sparsity or 0.0

        def cubic(phase: Phase) -> Cubic:
            begin = int(part.begin * phase.total_steps)
            end = max(begin + 1, int(part.stop * phase.total_steps))
            return Cubic(begin, end, part.every, part.initial_sparsity)

        if part.name in ("rigl", "set"):
            return [
                Rewiring(
                    lambda phase: DynamicMask(
                        phase.model, phase.optimizer, total_steps=phase.total_steps, method=part.name, every=part.every,
                        fraction=part.fraction, stop=part.stop, structure=structure, seed=self.recipe.seed,
                    ),
                    before=True,
                )
            ]  # fmt: skip
        if part.name == "granet":
            return [
                Rewiring(
                    lambda phase: GraNet(
                        phase.model, phase.optimizer, final=final, schedule=cubic(phase), fraction=part.fraction,
                        total_steps=phase.total_steps, structure=structure, **options,
                    ),
                    before=True,
                )
            ]  # fmt: skip
        options["structure"] = structure
        if part.name == "gradual":
            return [
                Rewiring(
                    lambda phase: GradualPruning(
                        phase.model, final=final, schedule=cubic(phase), optimizer=phase.optimizer, **options
                    ),
                    before=False,
                )
            ]
        return [
            Rewiring(
                lambda phase: GradualPruning(
                    phase.model,
                    final=final,
                    schedule=Periodic.iterative(
                        part.rounds, max(1, int(part.stop * phase.total_steps / part.rounds)), begin=1
                    ),
                    optimizer=phase.optimizer,
                    **options,
                ),
                before=False,
            )
        ]

    # --- the end ----------------------------------------------------------------------------------------------------

    def _finish(self, seconds: float) -> RunResult:
        report = sparsity_report(
            self.model, masks(self.model), self._weights(), _structure_text(self.recipe), _criterion_text(self.recipe)
        )
        squash_(self.model)
        self.model.eval().cpu()
        summary: dict[str, Any] = {
            "recipe": self.recipe.name,
            "data": self.train.name,
            "training_samples": len(self._kept_data()),
            "seed": self.recipe.seed,
            "test_accuracy": accuracy(self.model, self.test),
            "sparsity": report.sparsity,
            "kept_weights": report.kept,
            "prunable_weights": report.total,
            "training_seconds": round(seconds, 2),
        }
        if self.validation is not None:
            summary["validation_accuracy"] = accuracy(self.model, self.validation)
        for key in (
            "teacher_accuracy",
            "full_test_accuracy",
            "stp",
            "gate_openness",
            "gated_step_ms",
            "plain_step_ms",
            "dense_step_ms",
            "sparse_step_ms",
        ):
            if key in self.carry:
                summary[key] = self.carry[key]
        if self.folder is not None and self.processes.first:
            self._write_results(summary, report)  # before the conversion, whatever that finds
        executable = None
        if self.recipe.convert.enabled and self.processes.first:
            executable = self._convert(summary)
            if self.folder is not None:
                atomic_write_text(self.folder / "summary.json", json.dumps(summary, indent=1) + "\n")
        return RunResult(self.model, summary, self.log.rows, self.folder, report, executable)

    def _convert(self, summary: dict[str, Any]) -> Any:
        from sparse_engine.convert import convert

        part = self.recipe.convert
        x = self.test.batch(torch.arange(min(part.batch_size, len(self.test))), augment=False).inputs
        executable = convert(self.model, (x,), tune=part.tune)
        theirs = outputs(executable, self.test).argmax(1)
        ours = outputs(self.model, self.test).argmax(1)
        differing = int((theirs != ours).sum())
        if differing > part.tolerance * len(self.test):
            raise SparseEngineError(
                f"the executable predicts {differing} of {len(self.test)} test samples differently from the model "
                f"(allowed: {part.tolerance:g} of them); set convert.enabled=false to keep the model alone"
            )
        timing = executable.benchmark(x, model=self.model, seconds=1.0)
        summary.update(
            executable_accuracy=float((theirs == self.test.labels).float().mean()),
            predictions_differing=differing,
            batch_size=len(x),
            executable_ms=timing.executable.p50,
            dense_ms=timing.dense.p50,
            speedup=timing.speedup,
            dense_bytes=sum(p.numel() * p.element_size() for p in self.model.state_dict().values()),
        )
        if self.folder is not None:
            path = self.folder / "model.spx"
            executable.save(path)
            summary["executable_bytes"] = path.stat().st_size
        return executable

    def _write_results(self, summary: dict[str, Any], report: PruneReport) -> None:
        from safetensors.torch import save

        assert self.folder is not None
        state = {name: value.contiguous() for name, value in self.model.state_dict().items()}
        with atomic_write(self.folder / "model.safetensors") as file:
            file.write(save(state))
        atomic_write_text(self.folder / "summary.json", json.dumps(summary, indent=1) + "\n")
        atomic_write_text(self.folder / "sparsity.json", json.dumps(report.to_dict(), indent=1) + "\n")
        if self._diagnosed:
            atomic_write_text(self.folder / "diagnostics.json", json.dumps(self._diagnose(report), indent=1) + "\n")
        densities = {layer.name: 1 - layer.sparsity for layer in report.layers}
        plot_run(self.log.rows, densities, self.folder)

    # --- diagnostics ------------------------------------------------------------------------------------------------

    @property
    def _diagnosed(self) -> bool:
        return self.recipe.diagnostics.enabled and self.folder is not None

    def _probe(self) -> Batch:
        """The same training samples every time, without augmentation; no more than a training step has memory for."""
        data = self._kept_data()
        count = min(self.recipe.diagnostics.samples, self.recipe.train.batch_size, len(data))
        return data.batch(torch.arange(count), augment=False).to(self.device)

    def _mean_jacobian(self) -> float:
        # a Jacobian costs a backward pass per class
        limit = max(1, 160 // self.train.classes)
        return mean_jacobian_singular_value(self.model, self._probe().inputs, limit=min(16, limit))

    def _diagnose(self, report: PruneReport) -> dict[str, Any]:
        """What the report page shows of the trained model, as plain data."""
        self.model.to(self.device)
        probe = self._probe()
        axis, losses = loss_surface(self.model, probe, points=self.recipe.diagnostics.points)
        found = {
            "mean_jsv": {"before": self.carry["jacobian"][0], "after": self._mean_jacobian()},
            "loss_surface": {"axis": axis.tolist(), "losses": [[_plain_number(v) for v in row] for row in losses]},
            "gradient_flow": gradient_flow(self.model, probe),
            "mask_overlap": self.carry.get("overlap", {}),
            "density": {layer.name: 1 - layer.sparsity for layer in report.layers},
            "samples": len(probe),
        }
        self.model.cpu()
        return found

    # --- pieces -----------------------------------------------------------------------------------------------------

    def _load_data(self) -> None:
        part = self.recipe.data
        self.validation: ArrayData | None = None
        if isinstance(self.source, tuple) and len(self.source) == 2:
            train = as_array_data(self.source[0], name="training data")
            test = as_array_data(self.source[1], classes=train.classes, name="test data")
            if part.augment:
                train = replace(train, augment="shift" if part.augment is True else part.augment)
            if part.limit is not None:
                train, test = (p.subset(torch.arange(min(part.limit, len(p)))) for p in (train, test))
        else:
            train, test = load_data(self.source, augment=part.augment or None, limit=part.limit)
        generator = torch.Generator().manual_seed(self.recipe.seed + 77)
        if part.label_noise:
            wrong = torch.rand(len(train), generator=generator) < part.label_noise
            drawn = torch.randint(0, train.classes, (len(train),), generator=generator)
            train = train.with_labels(torch.where(wrong, drawn, train.labels))
        if part.validation:
            order = torch.randperm(len(train), generator=torch.Generator().manual_seed(1234))
            held = max(1, round(part.validation * len(train)))
            self.validation = train.subset(order[:held].sort().values).without_augmentation()
            train = train.subset(order[held:].sort().values)
        if len(train) < 2 or not len(test):
            raise SparseEngineError(f"{train.name}: {len(train)} training and {len(test)} test samples are too few")
        self.train, self.test = train, test

    def _new_model(self, part: ModelPart) -> nn.Module:
        if self.given_model is not None and part.name == self.recipe.model.name:
            made = self.given_model if isinstance(self.given_model, nn.Module) else self.given_model()
            model = copy.deepcopy(made) if isinstance(self.given_model, nn.Module) else made
        else:
            channels, height, width = self.train.shape
            known = {"in_channels": channels, "image_size": height, "in_features": channels * height * width}
            options = {"num_classes": self.train.classes}
            options.update({option: value for option, value in known.items() if models.accepts(part.name, option)})
            model = models.build(part.name, **{**options, **part.options})
        if part.init == "zero":
            zero_init_(model)
        if part.checkpoint is not None:
            models.load_state(model, _read_weights(part.checkpoint))
        return model.to(self.device)

    def _objective(self, name: str, data: ArrayData) -> Objective:
        part = self.recipe.loss
        smoothing = (part.label_smoothing, part.final_label_smoothing)
        if name == "cs_kd":
            return ClassWiseSelfDistillation(part.weight, part.temperature or 4.0, *smoothing)
        if name == "ps_kd":
            alpha = 0.8 if part.alpha is None else part.alpha
            return ProgressiveSelfDistillation(data.labels, data.classes, alpha)
        if name == "dlb":
            return LastBatchSelfDistillation(part.weight, part.temperature or 3.0)
        if name == "kd":
            if self.teacher is None:
                raise RecipeError("loss 'kd' needs a trained teacher; give the recipe a teacher: part")
            fraction = self.recipe.coreset.fraction if self.recipe.coreset is not None else 1.0
            alpha = coreset.default_alpha(fraction) if part.alpha is None else part.alpha
            return TeacherDistillation(self.teacher, alpha, part.temperature or 4.0, *smoothing)
        return CrossEntropy(*smoothing)

    def _phase(
        self,
        name: str,
        model: nn.Module,
        objective: Objective,
        data: ArrayData,
        epochs: int,
        mechanisms: list[Mechanism] | None = None,
        salt: int = 0,
        order: Any = None,
    ) -> Phase:
        source = self._batches(data, needs=objective.needs, salt=salt, order=order, shared=True)
        part: TrainPart = self.recipe.train
        return Phase(name, model, objective, source, part, epochs, mechanisms or [], self.processes)

    def _batches(
        self,
        data: ArrayData,
        needs: frozenset[str] = frozenset(),
        salt: int = 0,
        order: Any = None,
        shared: bool = False,
    ) -> BatchSource:
        """Batches; ``shared`` cuts each between the processes, otherwise every process sees all (scoring)."""
        return BatchSource(
            data,
            batch_size=self.recipe.train.batch_size,
            seed=self.recipe.seed * 7919 + salt,
            needs=needs,
            order=order,
            rank=self.processes.rank if shared else 0,
            world=self.processes.world if shared else 1,
            device=self.device,
        )

    def _kept_data(self) -> ArrayData:
        return self.train.subset(self.carry["kept"]) if "kept" in self.carry else self.train

    def _weights(self) -> dict[str, nn.Parameter]:
        return prunable_weights(self.model, self._ignore())

    def _ignore(self) -> list[str]:
        return self.recipe.prune.ignore if self.recipe.prune is not None else []

    def _remember_model(self) -> None:
        self.carry["model"] = {name: value.detach().clone() for name, value in self.model.state_dict().items()}
        self.carry["masks"] = {name: mask.clone() for name, mask in masks(self.model).items()}

    def _restore(self) -> None:
        if "compaction" in self.carry:
            CompactionSpec.from_json(self.carry["compaction"]).apply_(self.model)
        self.model.load_state_dict(self.carry["model"])
        set_masks(self.model, self.carry["masks"])
        if "teacher" in self.carry and self.recipe.teacher is not None:
            self.teacher = self._new_model(self.recipe.teacher.model or replace(self.recipe.model, checkpoint=None))
            self.teacher.load_state_dict(self.carry["teacher"])

    def _check_before_long_work(self) -> None:
        """One forward pass, the batch size, and the counts of the layers, so that mistakes cost seconds."""
        x = self.train.batch(torch.arange(min(2, len(self.train)))).inputs.to(self.device)
        with Untouched(self.model), torch.no_grad():
            self.model.eval()
            try:
                out = self.model(x)
            except RuntimeError as error:
                raise RecipeError(
                    f"the model {self.recipe.model.name!r} cannot take this data's samples "
                    f"{tuple(x.shape[1:])}: {error}"
                ) from None
        if not isinstance(out, Tensor) or out.shape != (len(x), self.train.classes):
            shape = tuple(out.shape) if isinstance(out, Tensor) else type(out).__name__
            raise RecipeError(
                f"the model returns {shape} for {len(x)} samples; {self.train.name} has {self.train.classes} classes"
            )
        if self.recipe.train.sparse_kernels == "always" and (why_not := self._why_no_sparse_kernels()):
            raise RecipeError(f"train.sparse_kernels is always, but {why_not}")
        part = self.recipe.prune
        if part is None:
            return
        weights = self._weights()
        if not weights:
            raise RecipeError("the model has no prunable weight outside prune.ignore")
        if part.sparsity is None:
            return
        total = sum(weight.numel() for weight in weights.values())
        kept = round((1 - part.sparsity) * total)
        if kept < len(weights) and not part.allow_collapse:
            raise PruneError(
                f"prune.sparsity={part.sparsity} keeps {kept} of {total} weights, fewer than the "
                f"{len(weights)} layers: "
                "at least one layer would be empty. Lower the sparsity or list layers in prune.ignore"
            )
        if (part.distribution is not None or part.scope == "layer") and not part.allow_collapse:
            shapes = {name: tuple(weight.shape) for name, weight in weights.items()}
            counts = layer_counts(shapes, 1 - part.sparsity, part.distribution or "uniform")
            empty = [name for name, count in counts.items() if not count]
            if empty:
                raise PruneError(
                    f"prune.sparsity={part.sparsity} with distribution {part.distribution or 'uniform'} leaves "
                    "nothing of "
                    f"{', '.join(empty)}; lower the sparsity, use erk, or list them in prune.ignore"
                )

    # --- files ------------------------------------------------------------------------------------------------------

    def _saved(self) -> dict[str, Any] | None:
        if self.folder is None:
            if self.resume:
                raise SparseEngineError("resume needs out=: the folder of the run to continue")
            return None
        path = self.folder / "checkpoint.pt"
        saved = None
        if path.exists():
            if not self.resume:
                raise SparseEngineError(
                    f"{self.folder} already holds a run; continue it with resume (--resume), or choose another "
                    "out folder"
                )
            saved = load_checkpoint(path)
            then = load_recipe(json.loads(saved["recipe"])).to_dict()  # what newer versions added has its default
            different = _differences(json.loads(json.dumps(then)), json.loads(json.dumps(self.recipe.to_dict())))
            ahead = self._ahead(saved)
            different = [text for text in different if not text.startswith(ahead)]
            if different:
                raise SparseEngineError(
                    f"the run in {self.folder} was made with another recipe ({'; '.join(different[:5])}); "
                    "resume it with "
                    "the same settings, or choose another out folder"
                )
        if self.processes.first:
            self.folder.mkdir(parents=True, exist_ok=True)
            atomic_write_text(self.folder / "recipe.json", json.dumps(self.recipe.to_dict(), indent=1) + "\n")
        return saved

    def _ahead(self, saved: dict[str, Any]) -> tuple[str, ...]:
        """Settings that a resumed run may change, because no stage that is done or under way has used them: what is
        said about a collapsed layer or a failed conversion can then be followed without training again."""
        keys = ["convert.", "diagnostics."]
        upcoming = [stage.name for stage in self._stages()][saved["stage"] :]
        if saved["phase"] is None and "prune" in upcoming:
            # prune.ignore has decided already which weights got gates
            keys += ["dynamic.", "post.", *(f"prune.{key}" for key in vars(PrunePart()) if key != "ignore")]
        return tuple(keys)

    def _save(self, stage: int, epoch: int, phase: Phase | None) -> None:
        if self.folder is None:
            return
        state = None if phase is None else phase.state_dict()
        if not self.processes.first:
            return
        content = {
            "recipe": json.dumps(self.recipe.to_dict()),
            "stage": stage,
            "epoch": epoch,
            "phase": state,
            "carry": self.carry,
            "rng": torch.get_rng_state(),
            "log": self.log.rows,
        }
        save_checkpoint(self.folder / "checkpoint.pt", content)

    def _log_epoch(self, stage: str, phase: Phase, result: EpochResult) -> None:
        every, done = self.recipe.train.test_every, result.epoch + 1
        due = every and (done % every == 0 or done == phase.epochs)
        tested = accuracy(phase.model, self.test, device=self.device) if due else None
        current = masks(phase.model)
        kept = sum(int(mask.sum()) for mask in current.values())
        size = sum(mask.numel() for mask in current.values())
        row = {
            "phase": stage,
            "epoch": done,
            "loss": result.loss,
            "train_accuracy": result.accuracy,
            "test_accuracy": tested,
            "learning_rate": result.learning_rate,
            "sparsity": 1 - kept / size if size else 0.0,
            "step_ms": 1e3 * result.seconds / max(1, result.steps),
        }
        if self._diagnosed:
            row["gradient_norm"] = gradient_flow(phase.model, self._probe())["total"]
            before = self.carry["masks"]
            if stage == "train" and current and before.keys() == current.keys():
                row["mask_overlap"] = mask_overlap(before, current)["total"]
        self.log.add(row)
        self.progress.say(
            f"{stage} {done}/{phase.epochs}  loss {result.loss:.4f}  train {result.accuracy:.4f}  "
            + (f"test {tested:.4f}  " if due else "")
            + f"{row['step_ms']:.1f} ms/step"
        )


def _plain_number(value: Tensor) -> float | None:
    """As JSON knows it: far from the centre a loss can overflow."""
    number = float(value)
    return number if math.isfinite(number) else None


def _prune_quietly(model: nn.Module, **options: Any) -> PruneReport:
    """``prune`` without its warning about emptied layers, which a run turns into an error or was told to allow."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        return prune(model, **options)


class _Replayed:
    """Epoch 0 of a source, from the start each time it is iterated."""

    def __init__(self, source: BatchSource) -> None:
        self.source = source

    def __iter__(self) -> Iterator[Batch]:
        return self.source.epoch(0)


def put_sparse_layers_(model: nn.Module, names: list[str], kept: dict[str, Tensor]) -> None:
    """Replace the named layers by sparse ones with the given masks as their patterns.

    Example::

        put_sparse_layers_(model, ["fc1"], se.masks(model))
    """
    for name in names:
        module = model.get_submodule(name)
        kind = SparseLinear if isinstance(module, nn.Linear) else SparseConv2d
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, kind.from_dense(module, kept[f"{name}.weight"]))


def _step_ms(
    models: list[nn.Module],
    x: Tensor,
    context: Callable[[], AbstractContextManager[Any]] = nullcontext,
    rounds: int = 9,
) -> list[float]:
    """Median milliseconds of a forward and backward pass of each model, in turns; models and random state are left as
    found."""
    times: list[list[float]] = [[] for _ in models]
    with torch.random.fork_rng(devices=[]):
        for turn in range(rounds + 1):
            for model, mine in zip(models, times, strict=True):
                parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
                with Untouched(model):
                    began = time.perf_counter()
                    with context():
                        loss = model(x).float().square().sum()
                    torch.autograd.grad(loss, parameters, allow_unused=True)
                    if x.is_cuda:
                        torch.cuda.synchronize(x.device)
                    if turn:  # the first turn allocates and plans
                        mine.append(1e3 * (time.perf_counter() - began))
    return [sorted(mine)[rounds // 2] for mine in times]


def _read_weights(path: str) -> dict[str, Tensor]:
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except FileNotFoundError:
        raise SparseEngineError(f"checkpoint {path!r} does not exist") from None
    except Exception as error:
        raise SparseEngineError(f"checkpoint {path!r} is not a safetensors file: {error}") from None


def _differences(old: Any, new: Any, prefix: str = "") -> list[str]:
    if isinstance(old, dict) and isinstance(new, dict):
        out = []
        for key in dict.fromkeys([*old, *new]):
            out += _differences(old.get(key), new.get(key), f"{prefix}{key}.")
        return out
    return [] if old == new else [f"{prefix.rstrip('.')}: {old!r} then, {new!r} now"]


def _structure_text(recipe: Recipe) -> str:
    return str(Unstructured()) if recipe.prune is None else str(Structure.parse(recipe.prune.structure))


def _criterion_text(recipe: Recipe) -> str:
    return "none" if recipe.prune is None else recipe.prune.criterion


def _summary_text(summary: dict[str, Any]) -> str:
    head = (
        f"{summary['recipe']} on {summary['data']}: test accuracy {summary['test_accuracy']:.4f} at sparsity "
        f"{summary['sparsity']:.4%} ({summary['kept_weights']} of {summary['prunable_weights']} weights)"
    )
    lines = [head]
    if "sparse_step_ms" in summary:
        lines.append(
            f"training step (forward and backward): {summary['sparse_step_ms']:.2f} ms on sparse kernels against "
            f"{summary['dense_step_ms']:.2f} ms dense and masked"
        )
    elif "dense_step_ms" in summary:
        lines.append(f"training step (forward and backward): {summary['dense_step_ms']:.2f} ms, dense and masked")
    if "gated_step_ms" in summary:
        lines.append(
            f"with learned gates it was {summary['gated_step_ms']:.2f} ms against {summary['plain_step_ms']:.2f} ms "
            "without"
        )
    if "speedup" in summary:
        lines.append(
            f"executable: accuracy {summary['executable_accuracy']:.4f} ({summary['predictions_differing']} "
            f"predictions differ), {summary['executable_ms']:.3f} ms against {summary['dense_ms']:.3f} ms dense at "
            f"batch {summary['batch_size']} ({summary['speedup']:.2f}×)"
        )
    if "executable_bytes" in summary:
        lines.append(f"size: {summary['executable_bytes']} bytes against {summary['dense_bytes']} dense")
    lines.append(f"trained in {summary['training_seconds']:.1f} s")
    return "\n".join(lines)


__all__ = ["RunResult", "recipe_names", "run"]
