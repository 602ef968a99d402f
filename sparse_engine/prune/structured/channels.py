"""Pruning whole channels, heads and groups to a target."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from sparse_engine.errors import PruneError

from ..masks import prunable_weights, set_masks
from .analysis import Analysis, analyse
from .capture import ExampleInputs, capture
from .compaction import adaptable, compact
from .criteria import channel_scores
from .targets import Cost, Latency, cost_named, nothing_removed, preferred_multiple
from .units import Group, find_groups, removal, zero_units_


@dataclass
class ChannelReport:
    """What `prune_channels` did.

    Args:
        kept: group name -> (units kept, units before).
        cost_before, cost_after: in `unit`.
        notes: groups that the model's own code cannot shrink, and why.
        multiple: of which every group keeps a multiple of units.
        measured: milliseconds of the whole compacted network, where the cost times such.
    """

    unit: str
    cost_before: float
    cost_after: float
    kept: dict[str, tuple[int, int]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    multiple: int = 1
    measured: float | None = None

    def __str__(self) -> str:
        share = self.cost_after / max(self.cost_before, 1e-30)
        lines = [f"{self.unit}: {self.cost_before:,.6g} -> {self.cost_after:,.6g} ({share:.1%})"]
        lines += [f"  {name}: {kept} of {total}" for name, (kept, total) in self.kept.items()]
        return "\n".join(lines)


def prune_channels(
    model: nn.Module,
    example_inputs: ExampleInputs,
    *,
    target: float,
    cost: str | Cost = "flops",
    criterion: str = "l1",
    scope: str = "global",
    reduction: str = "mean",
    normaliser: str = "mean",
    ignore: Sequence[str] = (),
    minimum: int = 1,
    multiple: int | Latency = 1,
    data: Any = None,
    loss: Callable[[Tensor, Tensor], Tensor] | None = None,
    seed: int = 0,
) -> ChannelReport:
    """Zero the least important channels, heads and groups until the network that is left costs no more than asked.

    Example::

        report = prune_channels(model, x, target=0.5, cost="flops", criterion="l1")
        clock = Latency(measure=executable_time, whole=executable_time)               # sparse_engine.train.stp
        prune_channels(model, x, target=4.0, cost=clock, criterion="taylor", data=loader)         # at most 4 ms
        small = se.compact(model, x)

    The zeros are exact and are stored as masks too (`se.masks`), so training under them works before compaction.

    Args:
        model: changed in place: weights, biases, norm scales and shifts of what goes become zero.
        example_inputs: a tensor, a tuple of positional arguments, or a dict of keyword arguments.
        target: what may be left: a fraction of the dense cost for ``"parameters"`` and ``"flops"``, milliseconds for
            a latency.
        cost: ``"parameters"``, ``"flops"``, ``"latency"`` or a `Cost`.
        criterion, reduction, normaliser, data, loss, seed: see `channel_scores`.
        scope: ``"global"``: all groups share one order; ``"local"``: every group loses the same fraction.
        ignore: names of tensors or modules whose channels stay.
        minimum: units that every group keeps.
        multiple: groups keep a multiple of this many units (where they have as many), for kernels that like round
            sizes. A `Latency` instead of a number finds out by measurement: `preferred_multiple`.

    Returns:
        What every group keeps and what the network costs now.

    Raises:
        PruneError: the target cannot be met (the message says how far down one can go), or an option is not known.
    """
    if scope not in ("global", "local"):
        raise PruneError(f"scope is {scope!r}; it has to be 'global' or 'local'")
    if minimum < 1 or (isinstance(multiple, int) and multiple < 1):
        raise PruneError(f"minimum is {minimum} and multiple is {multiple}; both have to be 1 or more")
    was_training = {module: module.training for module in model.modules()}
    model.eval()
    try:
        analysis = analyse(capture(model, example_inputs))
        groups, _, notes = adaptable(analysis, model, find_groups(analysis, ignore), example_inputs)
    finally:
        for module, training in was_training.items():
            module.training = training
    if not groups:
        raise PruneError(
            f"{type(model).__name__} has no group of channels that could be removed; see `ignore`, "
            "and Analysis.kept_whole for operators without a rule"
        )
    if isinstance(multiple, Latency):
        multiple = preferred_multiple(analysis, multiple)
    measure = cost_named(cost)
    scores = channel_scores(
        model, groups, criterion, reduction=reduction, normaliser=normaliser, data=data, loss=loss, seed=seed
    )
    before = measure(analysis, nothing_removed(analysis))
    limit = target if measure.unit == "ms" else _checked_fraction(target, measure.unit) * before
    order = _order(scores, scope)
    measured = None
    if isinstance(measure, Latency) and measure.whole is not None:
        before = measure.whole(model, example_inputs)

    def choose() -> list[NDArray[np.bool_]]:
        return select_units(analysis, groups, order, measure, limit, minimum=minimum, multiple=multiple)

    if isinstance(measure, Latency) and measure.whole is not None:
        gone, measured = _until_whole(model, example_inputs, analysis, groups, measure, limit, choose)
    else:
        gone = choose()
    removed = removal(analysis, groups, gone)
    masks = zero_units_(model, groups, gone)
    weights = prunable_weights(model)
    set_masks(model, {name: mask for name, mask in masks.items() if name in weights})
    kept = {group.name: (int((~vector).sum()), len(group)) for group, vector in zip(groups, gone, strict=True)}
    after = measure(analysis, removed) if measured is None else measured
    return ChannelReport(measure.unit, before, after, kept, notes, multiple, measured)


_TRIES = 6  # networks that are built and timed for a target in milliseconds


def _until_whole(
    model: nn.Module,
    example_inputs: ExampleInputs,
    analysis: Analysis,
    groups: Sequence[Group],
    clock: Latency,
    limit: float,
    choose: Callable[[], list[NDArray[np.bool_]]],
) -> tuple[list[NDArray[np.bool_]], float]:
    """Choose, build, time the whole network, correct the sum of the layers by what it took, and choose again.

    Raises:
        PruneError: no network within the limit was met.
    """
    best: tuple[list[NDArray[np.bool_]], float] | None = None
    times = []
    for _ in range(_TRIES):
        gone = choose()
        small = copy.deepcopy(model).eval()
        zero_units_(small, groups, gone)
        small = compact(small, example_inputs, verify=False)
        took = clock.whole(small, example_inputs)  # type: ignore[misc]
        times.append(took)
        if took <= limit and (best is None or took > best[1]):
            best = gone, took
        if best is not None and best[1] >= 0.95 * limit:
            break
        # a little more than was missing, so that the next network is within the limit
        clock.scale *= took / clock(analysis, removal(analysis, groups, gone)) * (1.02 if took > limit else 1.0)
    if best is None:
        raise PruneError(
            f"none of {len(times)} networks met {limit:,.6g} ms; they took "
            f"{', '.join(f'{value:,.4g}' for value in times)} ms. Raise the target"
        )
    return best


def select_units(
    analysis: Analysis,
    groups: Sequence[Group],
    order: Sequence[tuple[int, int]],
    cost: Cost,
    limit: float,
    *,
    minimum: int = 1,
    multiple: int = 1,
) -> list[NDArray[np.bool_]]:
    """The shortest prefix of `order` whose removal brings the cost to the limit.

    Args:
        analysis, groups: of the model.
        order: (group, unit) pairs, what goes first first.
        cost: of what is left.
        limit: in the cost's unit.
        minimum, multiple: see `prune_channels`.

    Raises:
        PruneError: the limit is out of reach.
    """

    def chosen(count: int) -> list[NDArray[np.bool_]]:
        gone = [np.zeros(len(group), dtype=bool) for group in groups]
        removals: list[list[int]] = [[] for _ in groups]
        for group, unit in order[:count]:
            removals[group].append(unit)
        for group, units in enumerate(removals):
            size = len(groups[group])
            keep = max(size - len(units), min(minimum, size))
            if multiple > 1 and size >= multiple:
                keep = min(size, -(-keep // multiple) * multiple)
            gone[group][units[: size - keep]] = True
        return gone

    def price(count: int) -> float:
        return cost(analysis, removal(analysis, groups, chosen(count)))

    if price(0) <= limit:
        return chosen(0)
    lowest = price(len(order))
    if lowest > limit:
        raise PruneError(
            f"the target of {limit:,.6g} {cost.unit} is out of reach: with {minimum} unit(s) left in "
            f"every group {lowest:,.6g} {cost.unit} remain; "
            "raise the target, lower minimum=, or ignore fewer layers"
        )
    low, high = 0, len(order)  # price(low) > limit >= price(high)
    while high - low > 1:
        middle = (low + high) // 2
        if price(middle) <= limit:
            high = middle
        else:
            low = middle
    return chosen(high)


def _order(scores: Sequence[Tensor], scope: str) -> list[tuple[int, int]]:
    """(group, unit) pairs from the least to the most important; ties by position."""
    entries = []
    for group, values in enumerate(scores):
        ranked = torch.argsort(values, stable=True).tolist()
        if scope == "local":
            entries += [((rank + 1) / len(ranked), group, unit) for rank, unit in enumerate(ranked)]
        else:
            entries += [(float(values[unit]), group, unit) for unit in ranked]
    return [(group, unit) for _, group, unit in sorted(entries)]


def _checked_fraction(target: float, unit: str) -> float:
    if not 0 < target <= 1:
        raise PruneError(
            f"target is {target!r}; for {unit} it is the fraction of the dense network that may be "
            "left, above 0 and at most 1"
        )
    return target
