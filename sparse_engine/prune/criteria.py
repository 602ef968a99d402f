"""Criteria: how much a model would miss each weight. Every criterion is a small object with one method, ``scores``."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from sparse_engine.distill.batch import Batch, as_batches
from sparse_engine.distill.objectives import CrossEntropy, Objective
from sparse_engine.errors import PruneError

Weights = Mapping[str, nn.Parameter]


@dataclass(frozen=True)
class Evidence:
    """What a criterion may look at besides the weights.

    Args:
        data: batches (see :func:`sparse_engine.distill.batch.as_batches`), or None.
        objective: the loss with its state; cross entropy when None was given.
        masks: what is kept so far, by weight name; missing names are dense.
        seed: for everything random.
    """

    data: Any = None
    objective: Objective = field(default_factory=CrossEntropy)
    masks: Mapping[str, Tensor] = field(default_factory=dict)
    seed: int = 0

    def batches(self, need: int | None, criterion: str) -> list[Batch]:
        """The first ``need`` batches (all when None), cycling when the data has fewer."""
        if self.data is None:
            raise PruneError(f"criterion {criterion!r} needs data: pass data=loader, or data=(inputs, targets)")
        out: list[Batch] = []
        for batch in as_batches(self.data):
            out.append(batch)
            if need is not None and len(out) == need:
                return out
        if not out:
            raise PruneError(f"criterion {criterion!r} got data without a single batch")
        return out if need is None else [out[i % len(out)] for i in range(need)]


class Criterion:
    """Base of all criteria: subclass it, give it a ``name`` and ``scores``.

    Example::

        class Smallest(Criterion):
            name = "smallest"

            def scores(self, model, weights, evidence):
                return {name: -weight.detach().abs() for name, weight in weights.items()}
    """

    name: ClassVar[str]
    #: rounds of re-scoring when the caller does not say; SynFlow is only defined with many
    default_rounds: ClassVar[int] = 1

    def scores(self, model: nn.Module, weights: Weights, evidence: Evidence) -> dict[str, Tensor]:
        """A float tensor of each weight's shape; larger = keep. The model must be left as it was found."""
        raise NotImplementedError


@dataclass(frozen=True)
class Magnitude(Criterion):
    """``|w|``."""

    name: ClassVar[str] = "magnitude"

    def scores(self, model: nn.Module, weights: Weights, evidence: Evidence) -> dict[str, Tensor]:
        return {name: weight.detach().abs() for name, weight in weights.items()}


@dataclass(frozen=True)
class Random(Criterion):
    """Uniform random scores, the same for the same seed on every device and machine."""

    name: ClassVar[str] = "random"

    def scores(self, model: nn.Module, weights: Weights, evidence: Evidence) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(evidence.seed)
        return {
            name: torch.rand(weight.shape, generator=generator).to(weight.device) for name, weight in weights.items()
        }


@dataclass(frozen=True)
class Snip(Criterion):
    """``|w ⊙ ∂L/∂w|``, the loss's sensitivity to each weight's mask at the current weights (SNIP, arXiv 1810.02340).

    Args:
        batches: how many batches the gradient is averaged over.
        normalise: divide by the sum over all weights; the order is the same, the numbers become shares.
    """

    name: ClassVar[str] = "snip"
    batches: int = 1
    normalise: bool = False

    def scores(self, model: nn.Module, weights: Weights, evidence: Evidence) -> dict[str, Tensor]:
        gradients = mask_gradients(model, weights, evidence, evidence.batches(self.batches, self.name))
        out = {name: gradient.abs() for name, gradient in gradients.items()}
        return normalised(out) if self.normalise else out


@dataclass(frozen=True)
class Movement(Criterion):
    """``−Σ w ⊙ ∂L/∂w``: weights that descent moves away from zero are kept (movement pruning, arXiv 2005.07683).

    The sum runs over the given batches at the current weights; during training
    :class:`sparse_engine.prune.MovementTracker` accumulates the same quantity along the way.
    """

    name: ClassVar[str] = "movement"
    batches: int = 1

    def scores(self, model: nn.Module, weights: Weights, evidence: Evidence) -> dict[str, Tensor]:
        gradients = mask_gradients(model, weights, evidence, evidence.batches(self.batches, self.name))
        return {name: -gradient for name, gradient in gradients.items()}


@dataclass(frozen=True)
class Grasp(Criterion):
    """Gradient-flow preservation: the score of removal is ``−w ⊙ Hg`` and the largest are removed (GraSP, arXiv
    2002.07376).

    So the returned score, larger = keep, is ``w ⊙ Hg``. Logits are divided by ``temperature`` before the loss.
    """

    name: ClassVar[str] = "grasp"
    batches: int = 1
    temperature: float = 200.0

    def scores(self, model: nn.Module, weights: Weights, evidence: Evidence) -> dict[str, Tensor]:
        batches = evidence.batches(self.batches, self.name)
        names, parameters = list(weights), list(weights.values())
        with Untouched(model) as model:

            def gradients(batch: Batch, create_graph: bool) -> tuple[Tensor, ...]:
                leaves = {
                    name: parameter.detach().requires_grad_() for name, parameter in zip(names, parameters, strict=True)
                }
                leaves_out.append(leaves)
                forward = Substituted(model, leaves)
                loss = evidence.objective(lambda inputs: forward(inputs) / self.temperature, batch)
                return torch.autograd.grad(
                    loss, list(leaves.values()), create_graph=create_graph, allow_unused=True, materialize_grads=True
                )

            leaves_out: list[dict[str, Tensor]] = []
            total = [torch.zeros_like(parameter) for parameter in parameters]
            for batch in batches:
                for sum_, gradient in zip(total, gradients(batch, False), strict=True):
                    sum_ += gradient.detach() / len(batches)
            curvature = [torch.zeros_like(parameter) for parameter in parameters]
            for batch in batches:
                second = gradients(batch, True)
                dot = sum((g * t).sum() for g, t in zip(second, total, strict=True))
                products = torch.autograd.grad(
                    dot, list(leaves_out[-1].values()), allow_unused=True, materialize_grads=True
                )
                for sum_, product in zip(curvature, products, strict=True):
                    sum_ += product.detach() / len(batches)
        return {name: weight.detach() * hg for (name, weight), hg in zip(weights.items(), curvature, strict=True)}


@dataclass(frozen=True)
class SynFlow(Criterion):
    """``|w ⊙ ∂R/∂w|`` with R the summed output of the network of absolute weights on an all-ones input; no data (arXiv
    2006.05467).

    Batch norm runs in evaluation mode. Biases and running means count as zero: a path that starts at a bias is no path
    from the input, and with such paths the scores of the layers no longer add up to the same sum. The scores are
    computed in float64 because R is a product over the depth. The shape of the input is taken from ``input_shape`` or
    from the first batch of ``data`` (whose values are not used).
    """

    name: ClassVar[str] = "synflow"
    default_rounds: ClassVar[int] = 100
    input_shape: tuple[int, ...] | None = None

    def scores(self, model: nn.Module, weights: Weights, evidence: Evidence) -> dict[str, Tensor]:
        shape = self.input_shape
        if shape is None:
            if evidence.data is None:
                raise PruneError(
                    "criterion 'synflow' needs the shape of an input: pass data= (its values are not used) or "
                    "SynFlow(input_shape=(3, 32, 32))"
                )
            shape = tuple(evidence.batches(1, self.name)[0].inputs.shape[1:])
        device = next(iter(weights.values())).device
        with Untouched(model) as model:
            model.eval()
            tensors = {
                name: tensor.detach().double().abs()
                for name, tensor in model.state_dict().items()
                if tensor.is_floating_point()
            }
            for name, tensor in tensors.items():
                if name.rpartition(".")[2] in ("bias", "running_mean", "in_proj_bias"):
                    tensor.zero_()
            for name, weight in weights.items():
                value = weight.detach().double().abs()
                mask = evidence.masks.get(name)
                tensors[name] = (value if mask is None else value * mask.to(value.device)).requires_grad_()
            ones = torch.ones((1, *shape), dtype=torch.float64, device=device)
            total = torch.func.functional_call(model, tensors, (ones,)).sum()
            leaves = [tensors[name] for name in weights]
            gradients = torch.autograd.grad(total, leaves, allow_unused=True, materialize_grads=True)
        return {
            name: (leaf * gradient).detach().abs()
            for name, leaf, gradient in zip(weights, leaves, gradients, strict=True)
        }


@dataclass(frozen=True)
class ProsPr(Criterion):
    """Meta-gradient of the loss *after* ``steps`` SGD steps with respect to the mask (ProsPr, arXiv 2202.08132).

    ``w₀ = θ₀ ⊙ m`` with the mask applied once; ``steps`` inner SGD steps with momentum, each on its own batch; the
    score is ``|∂L(w_K)/∂m|`` on one more batch. ``steps=0`` is SNIP exactly. The objective may be any self-distillation
    loss, which makes this the scorer of EPSD (:class:`Epsd`).

    ``mode="full"`` differentiates through every inner step, momentum included (the published reference cuts the first
    momentum buffer out of the graph; that term is kept here). ``"first_order"`` treats the inner gradients as
    constants, so that ``∂w_K/∂w_0`` is the identity: one gradient graph at a time in memory.

    Args:
        steps: inner steps K.
        learning_rate: of the inner steps.
        momentum: of the inner steps.
        mode: ``"full"`` or ``"first_order"``.
    """

    name: ClassVar[str] = "prospr"
    steps: int = 3
    learning_rate: float = 0.5
    momentum: float = 0.9
    mode: str = "full"

    def __post_init__(self) -> None:
        if self.mode not in ("full", "first_order"):
            raise PruneError(f"mode is {self.mode!r}; it has to be 'full' or 'first_order'")
        if self.steps < 0:
            raise PruneError(f"steps is {self.steps}; it has to be 0 or more")

    def scores(self, model: nn.Module, weights: Weights, evidence: Evidence) -> dict[str, Tensor]:
        batches = evidence.batches(self.steps + 1, self.name)
        return normalised({name: g.abs() for name, g in self.meta_gradients(model, weights, evidence, batches).items()})

    def meta_gradients(
        self, model: nn.Module, weights: Weights, evidence: Evidence, batches: list[Batch]
    ) -> dict[str, Tensor]:
        """``∂L(w_K)/∂m``, signed and not normalised, by weight name."""
        full = self.mode == "full"
        with Untouched(model) as model:
            originals = {name: parameter.detach() for name, parameter in model.named_parameters()}
            masks = {
                name: (
                    evidence.masks[name].to(weight) if name in evidence.masks else torch.ones_like(weight)
                ).requires_grad_()
                for name, weight in weights.items()
            }
            starts = {name: originals[name] * masks[name] for name in weights}
            others = {name: value.clone().requires_grad_() for name, value in originals.items() if name not in weights}
            current = {**starts, **others}
            if not full:
                current = {name: value.detach().requires_grad_() for name, value in current.items()}
            velocity: dict[str, Tensor] = {}
            for batch in batches[:-1]:
                loss = evidence.objective(Substituted(model, current), batch)
                names = list(current)
                gradients = torch.autograd.grad(
                    loss, [current[n] for n in names], create_graph=full, allow_unused=True, materialize_grads=True
                )
                for name, gradient in zip(names, gradients, strict=True):
                    velocity[name] = velocity[name] * self.momentum + gradient if name in velocity else gradient
                    step = current[name] - self.learning_rate * velocity[name]
                    # a removed weight takes no part in training: its mask is zero for good, whatever its gradient
                    if name in evidence.masks and name in weights:
                        step = step * evidence.masks[name].to(step)
                    current[name] = step if full else step.detach().requires_grad_()
            loss = evidence.objective(Substituted(model, current), batches[-1])
            if full:
                gradients = torch.autograd.grad(
                    loss, [masks[n] for n in weights], allow_unused=True, materialize_grads=True
                )
                return {name: gradient.detach() for name, gradient in zip(weights, gradients, strict=True)}
            gradients = torch.autograd.grad(
                loss, [current[n] for n in weights], allow_unused=True, materialize_grads=True
            )
            return {
                name: gradient.detach() * originals[name] for name, gradient in zip(weights, gradients, strict=True)
            }


@dataclass(frozen=True)
class Epsd(ProsPr):
    """Early pruning with self-distillation: ProsPr's scorer under a self-distillation loss (EPSD, arXiv 2402.00084).

    Pass the loss as ``loss=`` of :func:`sparse_engine.prune`, e.g.
    ``sparse_engine.distill.ClassWiseSelfDistillation()``; with plain cross entropy the result is the paper's "simple
    combination" (SC), through the same code.
    """

    name: ClassVar[str] = "epsd"


CRITERIA: dict[str, Callable[[], Criterion]] = {
    kind.name: kind for kind in (Magnitude, Random, Snip, Movement, Grasp, SynFlow, ProsPr, Epsd)
}


def criterion_named(criterion: str | Criterion) -> Criterion:
    """The criterion of a name, with default settings; an object is returned as it is.

    Raises:
        PruneError: for a name that is not in ``CRITERIA``.
    """
    if isinstance(criterion, str):
        if criterion not in CRITERIA:
            raise PruneError(f"criterion {criterion!r} is not one of {', '.join(CRITERIA)}")
        return CRITERIA[criterion]()
    if not callable(getattr(criterion, "scores", None)):
        raise PruneError(
            f"criterion is a {type(criterion).__name__}; pass a name ({', '.join(CRITERIA)}) or an object with scores()"
        )
    return criterion


def normalised(scores: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Scores divided by their sum over all layers (unchanged when that is zero or not finite)."""
    total = float(sum(float(score.double().sum()) for score in scores.values()))
    if total == 0 or total != total or total in (float("inf"), -float("inf")):
        return dict(scores)
    return {name: score / total for name, score in scores.items()}


def mask_gradients(model: nn.Module, weights: Weights, evidence: Evidence, batches: list[Batch]) -> dict[str, Tensor]:
    """``∂L/∂m = w ⊙ ∂L/∂w`` averaged over batches, at the current (masked) weights."""
    total = {name: torch.zeros_like(weight) for name, weight in weights.items()}
    with Untouched(model) as model:
        for batch in batches:
            leaves = {name: weight.detach().clone().requires_grad_() for name, weight in weights.items()}
            loss = evidence.objective(Substituted(model, leaves), batch)
            gradients = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True, materialize_grads=True)
            for name, gradient in zip(weights, gradients, strict=True):
                total[name] += weights[name].detach() * gradient / len(batches)
    return total


class Substituted:
    """A model called with some of its tensors replaced: the forward function that objectives get from the criteria."""

    def __init__(self, model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
        self.model = model
        self.tensors = dict(tensors)

    def __call__(self, inputs: Any) -> Tensor:
        return torch.func.functional_call(self.model, self.tensors, (inputs,))


class Untouched:
    """Lends a model for scoring and gives it back unchanged: buffers (batch-norm statistics move), modes and gradients
    included.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    def __enter__(self) -> nn.Module:
        self.buffers = {name: buffer.detach().clone() for name, buffer in self.model.named_buffers()}
        self.modes = [(module, module.training) for module in self.model.modules()]
        return self.model

    def __exit__(self, *_: object) -> None:
        with torch.no_grad():
            for name, buffer in self.model.named_buffers():
                buffer.copy_(self.buffers[name])
        for module, training in self.modes:
            module.training = training
