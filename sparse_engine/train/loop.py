"""The training loop: one phase of a run, epoch by epoch.

A phase is a model, an objective, batches, an optimiser and any number of *mechanisms*: objects that take part at fixed
points (rewiring masks, gates, annealed helpers, trackers). Read :func:`fit` first; everything else serves it.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from sparse_engine.distill.batch import Batch
from sparse_engine.distill.objectives import Objective
from sparse_engine.errors import SparseEngineError
from sparse_engine.prune.masks import hold_masks, masks, set_masks

from .distributed import Processes, average_buffers, total, wrapped
from .recipe import TrainPart
from .source import BatchSource


class NotFiniteError(SparseEngineError):
    """The loss became infinite or NaN; the message says where and what to try."""


class Mechanism:
    """Base: override what is needed. Everything random has to come from torch's global generator or from a seed."""

    def parameters(self) -> list[nn.Parameter]:
        """Parameters of the model that it trains itself; the phase's optimiser leaves them alone."""
        return []

    def attach(self, phase: Phase) -> None:
        """Told when model and optimiser exist."""

    def start_epoch(self, epoch: int, epochs: int) -> None:
        """Before an epoch."""

    def end_epoch(self) -> None:
        """After an epoch; the place to bring several processes together."""

    def progress(self, share: float) -> None:
        """Before each step: the share of the phase's steps done."""

    def penalty(self) -> Tensor | None:
        """Added to the loss."""
        return None

    def observe(self, batch: Batch, outputs: Tensor) -> None:
        """After the forward pass: the outputs (detached) for ``batch.inputs``."""

    def before_step(self, step: int) -> bool:
        """After the backward pass; True leaves this optimiser step out."""
        return False

    def after_step(self, step: int) -> None:
        """After the optimiser step."""

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint needs."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore it."""


@dataclass
class Phase:
    """One stage of a run.

    Args:
        name: for logs and checkpoints.
        model: trained in place.
        objective: the loss.
        source: the batches.
        part: optimiser and learning-rate settings.
        epochs: how many.
        mechanisms: what takes part.
        processes: of the run.
    """

    name: str
    model: nn.Module
    objective: Objective
    source: BatchSource
    part: TrainPart
    epochs: int
    mechanisms: list[Mechanism] = field(default_factory=list)
    processes: Processes = field(default_factory=Processes)

    def __post_init__(self) -> None:
        extra = [parameter for mechanism in self.mechanisms for parameter in mechanism.parameters()]
        own = {id(parameter) for parameter in extra}
        usual = [p for p in self.model.parameters() if p.requires_grad and id(p) not in own]
        self.optimizer = make_optimizer(self.part, usual)
        self.forward_model = wrapped(self.model, self.processes)
        self.step = 0
        self.hold = hold_masks(self.model, self.optimizer)
        for mechanism in self.mechanisms:
            mechanism.attach(self)

    @property
    def total_steps(self) -> int:
        """Optimiser steps of the whole phase (an epoch that leaves samples out has fewer)."""
        return max(1, self.epochs * len(self.source))

    def state_dict(self) -> dict[str, Any]:
        """Everything that the rest of the phase depends on."""
        return {
            "model": self.model.state_dict(),
            "masks": masks(self.model),
            "optimizer": self.optimizer.state_dict(),
            "objective": self.objective.state_dict(),
            "mechanisms": [mechanism.state_dict() for mechanism in self.mechanisms],
            "step": self.step,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore it, masks included."""
        self.model.load_state_dict(state["model"])
        set_masks(self.model, state["masks"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.objective.load_state_dict(state["objective"])
        for mechanism, part in zip(self.mechanisms, state["mechanisms"], strict=True):
            mechanism.load_state_dict(part)
        self.step = state["step"]


@dataclass(frozen=True)
class EpochResult:
    """Means over an epoch."""

    epoch: int
    loss: float
    accuracy: float
    learning_rate: float
    seconds: float
    steps: int


def fit(
    phase: Phase,
    *,
    start: int = 0,
    after_epoch: Callable[[EpochResult], None] | None = None,
    on_step: Callable[[int, int, float], None] | None = None,
) -> None:
    """Train a phase from epoch ``start`` to its end.

    Example::

        fit(phase, after_epoch=lambda result: print(result.loss))

    Args:
        phase: what to train.
        start: first epoch; after a resume the state has been loaded and everything continues bit for bit.
        after_epoch: called after each epoch (logging, saving).
        on_step: called with (step of the epoch, steps, loss) for progress bars.

    Raises:
        NotFiniteError: says at which step, in which layer, and what to try.
    """
    part = phase.part
    device = next(phase.model.parameters()).device
    for epoch in range(start, phase.epochs):
        began = time.perf_counter()
        phase.model.train()
        phase.objective.start_epoch(epoch, phase.epochs)
        for mechanism in phase.mechanisms:
            mechanism.start_epoch(epoch, phase.epochs)
        sums = torch.zeros(3, dtype=torch.float64)  # loss · samples, correct, samples
        rate = 0.0
        for position, batch in enumerate(phase.source.epoch(epoch), 1):
            share = phase.step / phase.total_steps
            rate = learning_rate(part, phase.step, len(phase.source), phase.epochs)
            for group in phase.optimizer.param_groups:
                group["lr"] = rate
            for mechanism in phase.mechanisms:
                mechanism.progress(share)
            forward = Recorder(phase.forward_model, autocast(part, device))
            loss = phase.objective(forward, batch)
            for mechanism in phase.mechanisms:
                penalty = mechanism.penalty()
                loss = loss if penalty is None else loss + penalty
            value = loss.item()
            if not math.isfinite(value):
                raise NotFiniteError(_not_finite(phase, batch, value, epoch))
            outputs = forward.outputs(len(batch))
            for mechanism in phase.mechanisms:
                mechanism.observe(batch, outputs)
            phase.optimizer.zero_grad(set_to_none=True)
            (loss * phase.source.share(batch)).backward()
            if part.clip_gradients is not None:
                nn.utils.clip_grad_norm_(phase.model.parameters(), part.clip_gradients)
            phase.step += 1
            replaced = [mechanism.before_step(phase.step) for mechanism in phase.mechanisms]
            if not any(replaced):
                phase.optimizer.step()
            for mechanism in phase.mechanisms:
                mechanism.after_step(phase.step)
            correct = (outputs.argmax(-1) == batch.targets).sum().item()
            sums += torch.tensor([value * len(batch), correct, len(batch)], dtype=torch.float64)
            if on_step is not None:
                on_step(position, len(phase.source), value)
        phase.objective.end_epoch()
        for mechanism in phase.mechanisms:
            mechanism.end_epoch()
        average_buffers(phase.model, phase.processes)
        sums = total(sums, phase.processes)
        count = max(1.0, float(sums[2]))
        if after_epoch is not None:
            seconds = time.perf_counter() - began
            after_epoch(
                EpochResult(epoch, float(sums[0]) / count, float(sums[1]) / count, rate, seconds, len(phase.source))
            )


class Recorder:
    """The forward function of a step: calls the model, under autocast if asked, and remembers the trained outputs."""

    def __init__(self, model: nn.Module, context: Callable[[], AbstractContextManager[Any]]) -> None:
        self.model = model
        self.context = context
        self.caught: Tensor | None = None

    def __call__(self, inputs: Any) -> Tensor:
        with self.context():
            out = self.model(inputs)
        if torch.is_grad_enabled():
            self.caught = out.detach()
        return out

    def outputs(self, count: int) -> Tensor:
        """Outputs for the batch's own inputs: the first ``count`` of the last pass with gradients."""
        if self.caught is None:
            raise SparseEngineError("the objective never called the forward function with gradients on")
        return self.caught[:count]


def make_optimizer(part: TrainPart, parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    """The optimiser of a recipe.

    Example::

        make_optimizer(TrainPart(optimizer="adamw", learning_rate=1e-3), list(model.parameters()))
    """
    options: dict[str, Any] = {"lr": part.learning_rate, "weight_decay": part.weight_decay}
    if part.optimizer == "sgd":
        nesterov = part.nesterov and part.momentum > 0
        return torch.optim.SGD(parameters, momentum=part.momentum, nesterov=nesterov, **options)
    kinds: dict[str, type[torch.optim.Optimizer]] = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}
    if part.optimizer not in kinds:
        raise SparseEngineError(f"optimizer is {part.optimizer!r}; it has to be sgd, adam or adamw")
    return kinds[part.optimizer](parameters, **options)


def learning_rate(part: TrainPart, step: int, steps_per_epoch: int, epochs: int) -> float:
    """The learning rate of a step, a function of its number alone.

    Example::

        learning_rate(TrainPart(schedule="cosine", learning_rate=0.1), 0, 100, 10)      # 0.1
    """
    warmup = part.warmup_epochs * steps_per_epoch
    if step < warmup:
        return part.learning_rate * (step + 1) / warmup
    epoch = step // max(1, steps_per_epoch)
    if part.schedule == "cosine":
        share = (step - warmup) / max(1.0, epochs * steps_per_epoch - warmup)
        return part.learning_rate / 2 * (1 + math.cos(math.pi * min(1.0, share)))
    if part.schedule == "multistep":
        passed = sum(epoch >= math.floor(milestone * epochs) for milestone in part.milestones) if epochs > 1 else 0
        return part.learning_rate * part.gamma**passed
    return part.learning_rate


def autocast(part: TrainPart, device: torch.device) -> Callable[[], AbstractContextManager[Any]]:
    """A fresh autocast context per forward pass (bfloat16: no loss scaling is needed), or nothing."""
    if not part.amp:
        return nullcontext
    return lambda: torch.autocast(device.type, dtype=torch.bfloat16)


def _not_finite(phase: Phase, batch: Batch, value: float, epoch: int) -> str:
    """Which step, which layer, and what to try."""
    culprit = "no layer's output; the loss itself overflows"
    for name, parameter in phase.model.named_parameters():
        if not torch.isfinite(parameter).all():
            culprit = f"the parameter {name!r}"
            break
    else:
        layer = _first_overflow(phase.model, batch.inputs)
        if layer is not None:
            culprit = f"the output of layer {layer!r}"
        elif isinstance(batch.inputs, Tensor) and not torch.isfinite(batch.inputs).all():
            culprit = "the input data"
    return (
        f"the loss is {value} at step {phase.step + 1} (epoch {epoch + 1} of phase {phase.name!r}); first not finite: "
        f"{culprit}. Lower the learning rate ({phase.part.learning_rate:g}), clip gradients (train.clip_gradients) or "
        "warm up (train.warmup_epochs)"
    )


def _first_overflow(model: nn.Module, inputs: Any) -> str | None:
    """The first module whose output is not finite."""
    found: list[str] = []

    def check(name: str) -> Callable[..., None]:
        def hook(_: nn.Module, __: Any, out: Any) -> None:
            if isinstance(out, Tensor) and not torch.isfinite(out).all():
                found.append(name)

        return hook

    handles = [m.register_forward_hook(check(n)) for n, m in model.named_modules() if not list(m.children())]
    with torch.no_grad():
        model(inputs)
    for handle in handles:
        handle.remove()
    return found[0] if found else None
