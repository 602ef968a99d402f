"""How a budget of kept weights is shared between layers."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping

from sparse_engine.errors import PruneError

NAMES = ("uniform", "erk", "erk_kernel")


def layer_counts(
    shapes: Mapping[str, tuple[int, ...]], density: float, distribution: str | Mapping[str, float] = "uniform"
) -> dict[str, int]:
    """The number of weights that each layer keeps, adding up to exactly ``round(density × all weights)``.

    Example::

        layer_counts({"fc1": (300, 784), "fc2": (10, 300)}, 0.1, "erk")

    Args:
        shapes: weight shapes by name.
        density: fraction of all weights to keep, 0 to 1.
        distribution: ``"uniform"`` (every layer the same density), ``"erk"`` (density ∝ (in + out) / (in · out)),
            ``"erk_kernel"`` (density ∝ (in + out + kernel sides) / (in · out · kernel sides); the form used with RigL),
            or a map from name (or ``"re:PATTERN"``) to a *sparsity* of that layer; layers that the map leaves out share
            the rest of the budget uniformly.

    Returns:
        Kept weights by name.

    Raises:
        PruneError: for an unknown distribution, a map that names no layer, or a map that cannot meet the total.

    Source: Erdős–Rényi allocation of SET (arXiv 1707.04780) and its kernel form of RigL (arXiv 1911.11134).
    """
    if not shapes:
        return {}
    sizes = {name: math.prod(shape) for name, shape in shapes.items()}
    total = round(density * sum(sizes.values()))
    if isinstance(distribution, str):
        if distribution not in NAMES:
            raise PruneError(f"distribution {distribution!r} is not one of {', '.join(NAMES)} or a map of sparsities")
        raw = {name: _raw_density(shape, distribution) for name, shape in shapes.items()}
        return _apportion(sizes, raw, total)
    return _custom(sizes, total, distribution)


def _raw_density(shape: tuple[int, ...], distribution: str) -> float:
    if distribution == "uniform":
        return 1.0
    outputs, inputs, *kernel = shape if len(shape) > 1 else (1, *shape)
    if distribution == "erk":
        return (inputs + outputs) / (inputs * outputs)
    return (inputs + outputs + sum(kernel)) / (inputs * outputs * math.prod(kernel))


def _apportion(sizes: Mapping[str, int], raw: Mapping[str, float], total: int) -> dict[str, int]:
    """Scale the raw densities to the total, saturating layers at full density, then round by largest remainder."""
    full: set[str] = set()
    while True:
        rest = [name for name in sizes if name not in full]
        budget = total - sum(sizes[name] for name in full)
        weight = sum(raw[name] * sizes[name] for name in rest)
        scale = budget / weight if weight else 0.0
        over = [name for name in rest if scale * raw[name] > 1]
        if not over:
            break
        full.update(over)
    ideal = {name: float(sizes[name]) if name in full else scale * raw[name] * sizes[name] for name in sizes}
    counts = {name: min(sizes[name], math.floor(value + 1e-9)) for name, value in ideal.items()}
    order = sorted(sizes, key=lambda name: (counts[name] - ideal[name], list(sizes).index(name)))
    missing = total - sum(counts.values())
    while missing > 0:
        for name in order:
            if missing and counts[name] < sizes[name]:
                counts[name] += 1
                missing -= 1
    return counts


def _custom(sizes: Mapping[str, int], total: int, given: Mapping[str, float]) -> dict[str, int]:
    counts: dict[str, int] = {}
    for key, sparsity in given.items():
        if not 0 <= sparsity <= 1:
            raise PruneError(f"distribution gives {key!r} the sparsity {sparsity}; it must lie in 0..1")
        pattern = re.compile(key[3:]) if key.startswith("re:") else None
        hits = [
            name
            for name in sizes
            if (pattern.fullmatch(name) if pattern else name in (key, key + ".weight") or name.startswith(key + "."))
        ]
        if not hits:
            raise PruneError(f"distribution names {key!r}, which is none of the prunable weights {', '.join(sizes)}")
        for name in hits:
            counts[name] = round((1 - sparsity) * sizes[name])
    rest = {name: size for name, size in sizes.items() if name not in counts}
    budget = total - sum(counts.values())
    if not rest:
        return {name: counts[name] for name in sizes}
    if not 0 <= budget <= sum(rest.values()):
        raise PruneError(
            f"distribution keeps {sum(counts.values())} weights in the layers it names, but the whole model "
            f"may keep {total}: "
            f"{len(rest)} other layers of {sum(rest.values())} weights would have to keep {budget}; change "
            "sparsity or the map"
        )
    counts.update(_apportion(rest, dict.fromkeys(rest, 1.0), budget))
    return {name: counts[name] for name in sizes}
