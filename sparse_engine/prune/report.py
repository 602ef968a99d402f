"""What pruning did, layer by layer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import Tensor, nn


@dataclass(frozen=True)
class LayerReport:
    """One layer: how many of its weights are kept."""

    name: str
    shape: tuple[int, ...]
    kept: int
    total: int

    @property
    def sparsity(self) -> float:
        """Fraction removed."""
        return 1 - self.kept / self.total if self.total else 0.0


@dataclass(frozen=True)
class PruneReport:
    """Counts over the prunable weights; what is not prunable is reported apart.

    Example::

        report = se.prune(model, sparsity=0.9)
        print(report)                    # a table
        report.sparsity, report.collapsed
    """

    layers: tuple[LayerReport, ...]
    structure: str
    criterion: str
    other: int = 0
    notes: tuple[str, ...] = field(default=())

    @property
    def kept(self) -> int:
        """Kept prunable weights."""
        return sum(layer.kept for layer in self.layers)

    @property
    def total(self) -> int:
        """All prunable weights."""
        return sum(layer.total for layer in self.layers)

    @property
    def sparsity(self) -> float:
        """Fraction of the prunable weights that is removed."""
        return 1 - self.kept / self.total if self.total else 0.0

    @property
    def collapsed(self) -> list[str]:
        """Layers that lost every weight: nothing flows through them any more."""
        return [layer.name for layer in self.layers if layer.total and not layer.kept]

    def to_dict(self) -> dict[str, object]:
        """Plain JSON data."""
        return {
            "sparsity": self.sparsity,
            "kept": self.kept,
            "total": self.total,
            "other_parameters": self.other,
            "structure": self.structure,
            "criterion": self.criterion,
            "collapsed": self.collapsed,
            "notes": list(self.notes),
            "layers": [
                {
                    "name": layer.name,
                    "shape": list(layer.shape),
                    "kept": layer.kept,
                    "total": layer.total,
                    "sparsity": layer.sparsity,
                }
                for layer in self.layers
            ],
        }

    def __str__(self) -> str:
        width = max((len(layer.name) for layer in self.layers), default=5)
        lines = [f"{'layer':<{width}}  {'shape':<20} {'kept':>10} {'of':>10}  sparsity"]
        lines += [
            f"{layer.name:<{width}}  {'×'.join(map(str, layer.shape)):<20} {layer.kept:>10} {layer.total:>10}  "
            f"{layer.sparsity:8.4%}"
            for layer in self.layers
        ]
        lines.append(
            f"{'total':<{width}}  {self.structure:<20} {self.kept:>10} {self.total:>10}  {self.sparsity:8.4%}  "
            f"(+ {self.other} parameters never pruned)"
        )
        if self.collapsed:
            lines.append(f"collapsed layers (nothing is kept): {', '.join(self.collapsed)}")
        return "\n".join([*lines, *self.notes])


def sparsity_report(
    model: nn.Module, masks: Mapping[str, Tensor], weights: Mapping[str, nn.Parameter], structure: str, criterion: str
) -> PruneReport:
    """Count the masks of the given weights; a weight without a mask counts as kept in full."""
    layers = tuple(
        LayerReport(
            name, tuple(weight.shape), int(masks[name].sum()) if name in masks else weight.numel(), weight.numel()
        )
        for name, weight in weights.items()
    )
    everything = sum(parameter.numel() for parameter in model.parameters())
    return PruneReport(layers, structure, criterion, everything - sum(layer.total for layer in layers))
