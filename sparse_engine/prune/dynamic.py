"""Dynamic sparse training: masks that move while the network trains, with the optimiser's state kept in step."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from sparse_engine.errors import PruneError
from sparse_engine.structure import Block, Channel, Structure, Unstructured

from .api import chosen_masks, prune
from .criteria import Criterion, Evidence, Magnitude, Random, Weights, criterion_named
from .masks import Ignore, all_weights, is_sparse_layer, masks, refuse_sharded, set_masks
from .schedule import Cubic, Schedule
from .select import group_scores, top_k_mask, ungroup

METHODS = ("rigl", "set")


def drop_fraction(step: int, end: int, alpha: float = 0.3) -> float:
    """The share of kept weights replaced at ``step``: ``α/2 · (1 + cos(π t / T_end))``, 0 from T_end on.

    Example::

        drop_fraction(0, 1000)        # 0.3
        drop_fraction(500, 1000)      # 0.15
    """
    return alpha / 2 * (1 + math.cos(math.pi * step / end)) if 0 <= step < end else 0.0


def drop_and_grow(
    weight: Tensor, mask: Tensor, growth: Tensor, count: int, structure: Structure | None = None
) -> Tensor:
    """The next mask: drop the ``count`` kept weights of smallest magnitude, grow as many where ``growth`` is largest.

    Example::

        drop_and_grow(weight, mask, weight.grad.abs(), 10)

    Growth chooses among everything that is not kept after the drop, so a weight that was just dropped may return. Ties
    are broken by position.

    Args:
        weight: any shape.
        mask: bool, same shape, True = kept.
        growth: same shape, larger = more worth growing.
        count: weights (for blocks: blocks; for channels: rows) to replace.
        structure: what is dropped and grown together; the mean over the group counts.

    Returns:
        A bool tensor with exactly as many groups kept as in ``mask``.
    """
    structure = structure or Unstructured()
    if not isinstance(structure, Unstructured | Block | Channel):
        raise PruneError(f"masks of structure {structure} cannot move yet; use Unstructured, Block or Channel")
    kept = group_scores(mask.float(), structure)[0] > 0
    magnitude = group_scores(weight.detach().abs().float(), structure)[0]
    wish = group_scores(growth.detach().float(), structure)[0]
    alive = int(kept.sum())
    count = min(count, alive, kept.numel() - alive + count)
    survivors = top_k_mask(magnitude.masked_fill(~kept, -torch.inf), alive - count)
    grown = top_k_mask(wish.masked_fill(survivors, -torch.inf), count)
    return ungroup(survivors | grown, mask.shape, structure)


def reset_state(optimizer: torch.optim.Optimizer, parameter: nn.Parameter, where: Tensor) -> None:
    """Zero an optimiser's per-weight state (momentum, second moments) at the places ``where`` is True."""
    for value in optimizer.state.get(parameter, {}).values():
        if isinstance(value, Tensor) and value.shape == parameter.shape:
            value.masked_fill_(where, 0)


class DynamicMask:
    """RigL or SET on a model whose masks were set by :func:`sparse_engine.prune`.

    Example::

        se.prune(model, sparsity=0.9, criterion="random", scope="layer", distribution="erk_kernel")
        rewiring = DynamicMask(model, optimizer, total_steps=10_000, method="rigl")
        for step, (x, y) in enumerate(loader, 1):
            loss(model(x), y).backward()
            if not rewiring.update(step):
                optimizer.step()

    Every ``every`` steps until ``stop`` of training, each layer drops its kept weights of smallest magnitude and grows
    as
    many others: those of largest gradient magnitude (RigL), or at random (SET). Grown weights start at 0 with zero
    optimiser state. As in RigL the update takes the place of that step's optimiser step.

    Args:
        model: with masks.
        optimizer: of its weights.
        total_steps: optimiser steps of the whole training.
        method: ``"rigl"`` or ``"set"``.
        every: steps between updates, 100 in the paper.
        fraction: α, the share replaced at first.
        stop: share of training after which the masks rest.
        structure: what moves together.
        seed: of SET's choices.

    Source: RigL, arXiv 1911.11134; SET, arXiv 1707.04780.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        *,
        total_steps: int,
        method: str = "rigl",
        every: int = 100,
        fraction: float = 0.3,
        stop: float = 0.75,
        structure: Structure | None = None,
        seed: int = 0,
    ) -> None:
        if method not in METHODS:
            raise PruneError(f"method is {method!r}; it has to be one of {', '.join(METHODS)}")
        refuse_sharded(model, "dropping and growing weights")
        if every < 1 or not 0 <= fraction <= 1 or not 0 <= stop <= 1:
            raise PruneError(f"every={every} has to be at least 1, fraction={fraction} and stop={stop} in 0..1")
        self.model = model
        self.optimizer = optimizer
        self.method = method
        self.every = every
        self.fraction = fraction
        self.end = max(1, round(stop * total_steps))
        self.structure = structure or Unstructured()
        self.seed = seed
        self.updates = 0
        self.moved = 0
        self.dense_gradients: list[DenseGradient] = []

    def due(self, step: int) -> bool:
        """Whether ``step`` (counted from 1) is one at which the masks move."""
        return step % self.every == 0 and step < self.end

    def prepare(self, step: int) -> None:
        """Before the forward pass of ``step``: sparse layers are asked for a dense gradient, where the step is due.

        Needed only on models with layers of :mod:`sparse_engine.nn`, whose backward pass computes kept weights alone.
        """
        if self.method == "rigl" and self.due(step) and not self.dense_gradients:
            self.dense_gradients = [
                DenseGradient(name, module) for name, module in self.model.named_modules() if is_sparse_layer(module)
            ]

    @torch.no_grad()
    def update(self, step: int) -> bool:
        """Move the masks if ``step`` is due; True when it did, and the optimiser step should then be left out."""
        if not self.due(step):
            return False
        share = drop_fraction(step, self.end, self.fraction)
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + step)
        dense = {gradient.name: gradient.total() for gradient in self.dense_gradients}
        self.dense_gradients = []
        new = {}
        for name, mask in masks(self.model).items():
            module = self.model.get_submodule(name.rpartition(".")[0])
            parameter = getattr(module, name.rpartition(".")[2])
            if self.method == "set":
                growth = torch.rand(parameter.shape, generator=generator).to(parameter.device)
            else:
                gradient = dense.get(name) if is_sparse_layer(module) else parameter.grad
                if gradient is None:
                    raise PruneError(
                        f"{name!r} has no gradient; call prepare before the forward pass (sparse layers), and update "
                        "after backward() and before zero_grad()"
                    )
                growth = gradient.abs()
            alive = int((group_scores(mask.float(), self.structure)[0] > 0).sum())
            moved = drop_and_grow(parameter, mask, growth, int(share * alive), self.structure)
            if is_sparse_layer(module):
                change = module.set_pattern_(moved)
                change.remap_optimizer_(self.optimizer, module.values)
                self.moved += int(change.new.sum())
            else:
                self._fresh(parameter, mask, moved)
                new[name] = moved
        set_masks(self.model, new)
        self.updates += 1
        return True

    def _fresh(self, parameter: nn.Parameter, old: Tensor, new: Tensor) -> None:
        grown = new & ~old
        parameter.data.masked_fill_(grown, 0)
        reset_state(self.optimizer, parameter, grown)
        self.moved += int(grown.sum())

    def state_dict(self) -> dict[str, Any]:
        """Counters; the masks themselves belong to the model's checkpoint."""
        return {"updates": self.updates, "moved": self.moved}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what ``state_dict`` returned."""
        self.updates, self.moved = state["updates"], state["moved"]


class DenseGradient:
    """Collects ``∂L/∂W`` of a sparse layer, all weights of it, over the passes of one step."""

    def __init__(self, module_name: str, module: Any) -> None:
        self.name = f"{module_name}.weight" if module_name else "weight"
        self.module = module
        self.sum: Tensor | None = None
        self.handle = module.register_forward_hook(self._forward)

    def total(self) -> Tensor | None:
        """The gradient, averaged over processes as the others are; the layer is left in peace afterwards."""
        self.handle.remove()
        distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
        if self.sum is not None and distributed:
            torch.distributed.all_reduce(self.sum)
            self.sum /= torch.distributed.get_world_size()
        return self.sum

    def _forward(self, module: Any, inputs: tuple[Tensor, ...], out: Tensor) -> None:
        if not out.requires_grad:
            return
        x = inputs[0].detach()
        out.register_hook(lambda upstream: self._add(x, upstream.detach()))

    def _add(self, x: Tensor, upstream: Tensor) -> None:
        module = self.module
        if hasattr(module, "in_features"):
            gradient = upstream.flatten(0, -2).T @ x.flatten(0, -2)
        else:
            # the dense twin knows every form of padding
            weight = module.weight.detach().requires_grad_()
            with torch.enable_grad():
                y = torch.func.functional_call(module.to_dense(), {"weight": weight}, (x,))
                (gradient,) = torch.autograd.grad(y, weight, upstream)
        self.sum = gradient if self.sum is None else self.sum + gradient


class GradualPruning:
    """Remove weights step by step during training until the final sparsity, by any criterion.

    Example::

        pruning = GradualPruning(model, final=0.9, schedule=Cubic(begin=0, end=5000, every=100))
        pruning.update(step)         # after each optimiser step

    On layers of :mod:`sparse_engine.nn` the pattern shrinks in place and the optimiser's state shrinks with it.

    Args:
        model: dense or partly pruned.
        final: sparsity at the end.
        schedule: :class:`Cubic` or :class:`Periodic`.
        criterion, options: as in :func:`sparse_engine.prune`. With sparse layers the criterion may look at the weights
            alone (``magnitude``, ``random``, :class:`GivenScores`).
        optimizer: of the weights; needed with sparse layers.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        final: float,
        schedule: Schedule,
        criterion: str | Criterion = "magnitude",
        optimizer: torch.optim.Optimizer | None = None,
        **options: Any,
    ) -> None:
        if not hasattr(schedule, "due"):
            raise PruneError(f"gradual pruning needs a schedule over steps (Cubic or Periodic), not {schedule}")
        self.model = model
        self.final = final
        self.schedule = schedule
        self.criterion = criterion
        self.optimizer = optimizer
        self.options = options

    def update(self, step: int) -> bool:
        """Prune if ``step`` is due; True when it did."""
        if not self.schedule.due(step):
            return False
        sparsity = self.schedule.sparsity(step, self.final)
        if any(map(is_sparse_layer, self.model.modules())):
            self._shrink(sparsity, **self.options)
        else:
            prune(self.model, sparsity=sparsity, criterion=self.criterion, schedule=1, **self.options)
        return True

    @torch.no_grad()
    def _shrink(
        self,
        sparsity: float,
        structure: Structure | str | None = None,
        scope: str = "global",
        distribution: str | Mapping[str, float] | None = None,
        ignore: Ignore = (),
        keep_one: bool = False,
        seed: int = 0,
    ) -> None:
        """What ``prune`` does, by new patterns where layers are sparse."""
        criterion = criterion_named(self.criterion)
        if not isinstance(criterion, Magnitude | Random | GivenScores):
            raise PruneError(
                f"criterion {criterion.name!r} looks at more than the weights, which sparse layers do not offer; use "
                "magnitude, random or given scores, or undo them with se.densify_(model)"
            )
        if self.optimizer is None:
            raise PruneError("the model has sparse layers: pass optimizer=, whose state shrinks with them")
        structure = Structure.parse(structure) if structure is not None else Unstructured()
        weights = all_weights(self.model, ignore)
        current = {name: mask for name, mask in masks(self.model).items() if name in weights}
        scores = criterion.scores(self.model, weights, Evidence(masks=current, seed=seed))
        new = chosen_masks(scores, current, 1 - sparsity, scope, distribution, structure, keep_one)
        for name, mask in new.items():
            module = self.model.get_submodule(name.rpartition(".")[0])
            if is_sparse_layer(module) and not torch.equal(mask.cpu(), current[name].cpu()):
                module.set_pattern_(mask).remap_optimizer_(self.optimizer, module.values)
        set_masks(self.model, new)


class GraNet:
    """Gradual pruning with regeneration: at each due step prune along the cubic schedule, then replace weights as RigL
    does.

    Example::

        granet = GraNet(model, optimizer, final=0.9, schedule=Cubic(0, 7500, 100, initial=0.5), total_steps=10_000)
        granet.update(step)          # after backward(), before zero_grad()

    Args:
        model: dense or with masks at the schedule's initial sparsity.
        optimizer: of its weights.
        final: sparsity at the end.
        schedule: the cubic path.
        total_steps, fraction, structure: as in :class:`DynamicMask`.
        options: of :func:`sparse_engine.prune`.

    Source: arXiv 2106.10404.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        *,
        final: float,
        schedule: Cubic,
        total_steps: int,
        fraction: float = 0.3,
        structure: Structure | None = None,
        **options: Any,
    ) -> None:
        self.pruning = GradualPruning(
            model, final=final, schedule=schedule, optimizer=optimizer, structure=structure or Unstructured(), **options
        )
        stop = min(1.0, schedule.end / max(1, total_steps))
        self.rewiring = DynamicMask(
            model, optimizer, total_steps=total_steps, every=schedule.every, fraction=fraction, stop=stop,
            structure=structure,
        )  # fmt: skip

    def prepare(self, step: int) -> None:
        """As in :class:`DynamicMask`."""
        self.rewiring.prepare(step)

    def update(self, step: int) -> bool:
        """Prune and rewire if due; True when the optimiser step should be left out."""
        self.pruning.update(step)
        return self.rewiring.update(step)

    def state_dict(self) -> dict[str, Any]:
        """Counters."""
        return self.rewiring.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what ``state_dict`` returned."""
        self.rewiring.load_state_dict(state)


class MovementTracker:
    """Accumulates ``−Σ_t w ⊙ ∂L/∂w`` over training steps: movement pruning's score along the path (arXiv 2005.07683).

    Example::

        tracker = MovementTracker(model)
        loss.backward(); tracker.observe(); optimizer.step()
        se.prune(model, sparsity=0.9, criterion=tracker.criterion())
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.total: dict[str, Tensor] = {}

    @torch.no_grad()
    def observe(self) -> None:
        """Add the current weights times gradients."""
        for name, parameter in self.model.named_parameters():
            if parameter.grad is not None:
                step = -(parameter * parameter.grad)
                self.total[name] = self.total[name].add_(step) if name in self.total else step

    def criterion(self) -> GivenScores:
        """The sums so far as a criterion."""
        return GivenScores(self.total, "movement")

    def state_dict(self) -> dict[str, Tensor]:
        """The sums."""
        return {name: value.clone() for name, value in self.total.items()}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Restore what ``state_dict`` returned."""
        self.total = dict(state)


class GivenScores(Criterion):
    """Scores that were computed elsewhere, by weight name."""

    def __init__(self, scores: Mapping[str, Tensor], name: str = "given") -> None:
        self.given = scores
        self.name = name  # type: ignore[misc]

    def scores(self, model: nn.Module, weights: Weights, evidence: Evidence) -> dict[str, Tensor]:
        missing = [name for name in weights if name not in self.given]
        if missing:
            raise PruneError(f"no scores were given for {len(missing)} weights, e.g. {missing[0]!r}; ignore= them")
        return {name: self.given[name].detach().float().to(weight.device) for name, weight in weights.items()}
