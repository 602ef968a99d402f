"""``se.prune``: one call that combines a criterion, a structure, a distribution and a schedule."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from sparse_engine.distill.objectives import Objective, as_objective
from sparse_engine.errors import PruneError
from sparse_engine.structure import NM, FanIn, Structure, Unstructured

from .criteria import Criterion, Evidence, criterion_named
from .distribution import layer_counts
from .masks import Ignore, is_sparse_layer, masks, prunable_weights, set_masks
from .report import PruneReport, sparsity_report
from .schedule import Iterative, OneShot, Schedule
from .select import select, structure_counts


def prune(
    model: nn.Module,
    *,
    sparsity: float | None = None,
    structure: Structure | str | None = None,
    criterion: str | Criterion = "magnitude",
    scope: str = "global",
    distribution: str | Mapping[str, float] | None = None,
    ignore: Ignore = (),
    data: Any = None,
    loss: Objective | Callable[[Tensor, Tensor], Tensor] | None = None,
    schedule: Schedule | int | None = None,
    keep_one: bool = False,
    seed: int = 0,
) -> PruneReport:
    """Remove weights: choose masks, store them on the model, and set what is removed to exactly zero.

    Example::

        report = se.prune(model, sparsity=0.9)                                       # global magnitude
        report = se.prune(model, sparsity=0.95, criterion="snip", data=loader, scope="layer", distribution="erk",
                          ignore=["conv1", "re:.*head"])
        print(report)

    The parameters keep their identity, so an optimiser made before stays valid; :func:`hold_masks` keeps the zeros
    through training. Calling
    it again on a pruned model prunes further: what was removed stays removed.

    Args:
        model: the model, changed in place (weights and masks only; modes, buffers and gradients stay as they were).
        sparsity: fraction of the prunable weights to remove, 0 to 1; the kept count is exactly ``round((1 − sparsity) ×
            total)`` for unstructured masks. May be omitted for ``NM`` and ``FanIn``, which fix it.
        structure: what is kept together; ``Unstructured()`` when None.
        criterion: a name (``magnitude``, ``random``, ``snip``, ``movement``, ``grasp``, ``synflow``, ``prospr``,
            ``epsd``) or an object with ``scores``.
        scope: ``"global"``: the layers share one budget; ``"layer"``: every layer gets its own.
        distribution: how the budget is shared: None = by one threshold over all scores (scope "global") or uniformly
            (scope "layer"); ``"uniform"``, ``"erk"``, ``"erk_kernel"`` or a map from name to sparsity fix the count of
            each layer in either scope.
        ignore: names, module types, modules or ``"re:PATTERN"`` to leave dense; they do not count.
        data: batches for the criteria that look at data: a loader, a list, or one (inputs, targets) pair.
        loss: ``loss(outputs, targets)``, or an objective of :mod:`sparse_engine.distill` called with (forward, batch);
            cross entropy by default.
        schedule: a number of rounds (exponential ladder with re-scoring) or a :class:`Schedule`; the criterion's
            default otherwise.
        keep_one: never take the last weight (or group) of a layer.
        seed: for criteria that draw random numbers.

    Returns:
        The counts by layer. Layers that lost everything are in ``report.collapsed`` and in a warning.

    Raises:
        PruneError: for a sparsity outside 0..1, unknown names, missing data, NaN scores or a structure that the
            sparsity contradicts.
    """
    structure = Structure.parse(structure) if structure is not None else Unstructured()
    chosen = criterion_named(criterion)
    weights = prunable_weights(model, ignore)
    if not weights:
        hint = "; it holds sparse layers: undo them first with se.densify_(model)" * any(
            map(is_sparse_layer, model.modules())
        )
        raise PruneError(f"the model has no prunable weight (of a linear or convolution layer) outside ignore={hint}")
    sparsity = _checked_sparsity(sparsity, structure, weights)
    if scope not in ("global", "layer"):
        raise PruneError(f"scope is {scope!r}; it has to be 'global' or 'layer'")
    objective = as_objective(loss)
    new: dict[str, Tensor] = {}
    before = {name: mask for name, mask in masks(model).items() if name in weights}
    originals = {name: weight.detach().clone() for name, weight in weights.items()}
    start = _density(before, weights)
    try:
        for density in _densities(schedule, chosen, 1 - sparsity, start):
            current = {**before, **new}
            evidence = Evidence(data=data, objective=objective.for_scoring(), masks=current, seed=seed)
            scores = chosen.scores(model, weights, evidence)
            new = chosen_masks(scores, current, density, scope, distribution, structure, keep_one)
            with torch.no_grad():
                for name, mask in new.items():
                    weights[name].data.masked_fill_(~mask, 0)
    except BaseException:
        with torch.no_grad():
            for name, value in originals.items():
                weights[name].data.copy_(value)
        raise
    set_masks(model, new)
    report = sparsity_report(model, masks(model), weights, str(structure), chosen.name)
    if report.collapsed:
        warnings.warn(
            f"{len(report.collapsed)} of {len(report.layers)} layers lost every weight: {', '.join(report.collapsed)}; "
            "use keep_one=True, a lower sparsity, or a distribution such as 'erk'",
            stacklevel=3,  # the package itself is called, which adds a frame
        )
    return report


def chosen_masks(
    scores: dict[str, Tensor],
    current: Mapping[str, Tensor],
    density: float,
    scope: str = "global",
    distribution: str | Mapping[str, float] | None = None,
    structure: Structure | None = None,
    keep_one: bool = False,
) -> dict[str, Tensor]:
    """One round: the masks that the scores ask for, within what is kept so far.

    Example::

        chosen_masks({"fc.weight": weight.abs()}, {}, density=0.1)

    Args:
        scores: by weight name, larger = keep; those of removed weights are overwritten.
        current: masks so far; missing names are dense.
        density: share of all weights to keep, 0 to 1.
        scope, distribution, structure, keep_one: as in :func:`prune`.

    Returns:
        Bool masks of the scores' shapes.
    """
    for name, mask in current.items():
        scores[name] = scores[name].masked_fill(~mask.to(scores[name].device), -torch.inf)
    if distribution is None and scope == "layer":
        distribution = "uniform"
    counts: int | dict[str, int]
    if distribution is not None:
        counts = layer_counts({name: tuple(score.shape) for name, score in scores.items()}, density, distribution)
    else:
        counts = round(density * sum(score.numel() for score in scores.values()))
    new = select(scores, counts, structure, keep_one=keep_one)
    # groups may hold weights that were removed before
    return {name: mask & current[name].to(mask.device) if name in current else mask for name, mask in new.items()}


def _checked_sparsity(sparsity: float | None, structure: Structure, weights: Mapping[str, nn.Parameter]) -> float:
    fixed = structure_counts({name: tuple(weight.shape) for name, weight in weights.items()}, structure)
    total = sum(weight.numel() for weight in weights.values())
    if fixed is not None:
        implied = 1 - sum(fixed.values()) / total
        if (
            isinstance(structure, NM)
            and sparsity is not None
            and abs(sparsity - (1 - structure.n / structure.m)) > 1e-6
        ):
            raise PruneError(
                f"{structure} removes {1 - structure.n / structure.m:.4f} of the weights, but "
                f"sparsity={sparsity}; drop sparsity= or choose another N:M"
            )
        if isinstance(structure, FanIn) and sparsity is not None and abs(sparsity - implied) > 1e-6:
            raise PruneError(
                f"{structure} removes {implied:.4f} of these weights, but sparsity={sparsity}; drop sparsity="
            )
        return implied
    if sparsity is None:
        raise PruneError(f"sparsity is needed for {structure}: the fraction of weights to remove, e.g. sparsity=0.9")
    if isinstance(sparsity, bool) or not isinstance(sparsity, int | float) or not 0 <= sparsity <= 1:
        hint = "; it is a fraction, not per cent" if isinstance(sparsity, int | float) and 1 < sparsity <= 100 else ""
        raise PruneError(f"sparsity is {sparsity!r}; it has to lie in 0..1{hint}")
    return float(sparsity)


def _density(current: Mapping[str, Tensor], weights: Mapping[str, nn.Parameter]) -> float:
    kept = sum(int(current[name].sum()) if name in current else weight.numel() for name, weight in weights.items())
    return kept / sum(weight.numel() for weight in weights.values())


def _densities(schedule: Schedule | int | None, criterion: Criterion, final: float, start: float) -> list[float]:
    if schedule is None:
        schedule = getattr(criterion, "default_rounds", 1)
    if isinstance(schedule, int):
        schedule = OneShot() if schedule == 1 else Iterative(schedule)
    if final == 0:
        return [0.0]
    if isinstance(schedule, Iterative) and start < 1 and final < start:  # the ladder starts where the model is
        return [*(start * (final / start) ** ((i + 1) / schedule.rounds) for i in range(schedule.rounds - 1)), final]
    return schedule.densities(final)
