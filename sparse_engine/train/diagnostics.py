"""Looking at trained and pruned networks: conditioning, loss surface, density by layer, overlap of masks, gradient
flow."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sparse_engine.distill.batch import Batch
from sparse_engine.distill.objectives import Objective, as_objective
from sparse_engine.errors import SparseEngineError
from sparse_engine.prune.criteria import Substituted, Untouched
from sparse_engine.prune.masks import is_sparse_layer


def mean_jacobian_singular_value(model: nn.Module, inputs: Tensor, limit: int = 16) -> float:
    """Mean singular value of the input–output Jacobian (Mean-JSV), over samples and singular values.

    Values near 1 mean that signals and gradients keep their size through the network; EPSD (arXiv 2402.00084) uses it
    to compare masks.

    Example::

        mean_jacobian_singular_value(model, batch.inputs)

    Args:
        model: in evaluation mode here; left as found.
        inputs: [N, ...]; the first ``limit`` samples are used.
        limit: how many Jacobians (each costs as many backward passes as there are outputs).
    """
    if not len(inputs):
        raise SparseEngineError("Mean-JSV needs at least one sample")
    values = []
    with Untouched(model):
        model.eval()
        for x in inputs[:limit]:
            jacobian = torch.autograd.functional.jacobian(lambda v: model(v.unsqueeze(0)).squeeze(0), x)
            values.append(torch.linalg.svdvals(jacobian.reshape(jacobian.shape[0], -1)))
    return float(torch.cat(values).mean())


def loss_surface(
    model: nn.Module,
    batch: Batch,
    *,
    objective: Objective | None = None,
    span: float = 1.0,
    points: int = 21,
    seed: int = 0,
) -> tuple[Tensor, Tensor]:
    """The loss on a plane through the weights, along two random filter-normalised directions (arXiv 1712.09913).

    Removed weights stay removed: directions are zero where weights are exactly zero.

    Example::

        axis, losses = loss_surface(model, batch)
        plot_surface(axis, losses, "surface.png")

    Args:
        model: evaluation mode; left as found.
        batch: on which the loss is taken.
        objective: cross entropy when None.
        span: the plane reaches from −span to span, in units of the filters' norms.
        points: per side.
        seed: of the directions.

    Returns:
        (axis [points], losses [points, points]).
    """
    objective = as_objective(objective)
    generator = torch.Generator().manual_seed(seed)
    weights = {name: p.detach() for name, p in model.named_parameters() if p.dim() > 1}
    directions = []
    for _ in range(2):
        direction = {}
        for name, weight in weights.items():
            d = torch.randn(weight.shape, generator=generator).to(weight) * (weight != 0)
            rows = weight.reshape(weight.shape[0], -1)
            norm = d.reshape(rows.shape).norm(dim=1, keepdim=True).clamp(min=1e-12)
            direction[name] = (d.reshape(rows.shape) / norm * rows.norm(dim=1, keepdim=True)).reshape(weight.shape)
        directions.append(direction)
    axis = torch.linspace(-span, span, points)
    losses = torch.empty(points, points)
    with Untouched(model), torch.no_grad():
        model.eval()
        for i, a in enumerate(axis):
            for j, b in enumerate(axis):
                moved = {n: w + a * directions[0][n] + b * directions[1][n] for n, w in weights.items()}
                losses[i, j] = objective(Substituted(model, moved), batch)
    return axis, losses


def mask_overlap(first: Mapping[str, Tensor], second: Mapping[str, Tensor]) -> dict[str, float]:
    """Intersection over union of two masks by layer, and over all of them as ``"total"``.

    Example::

        mask_overlap(se.masks(a), se.masks(b))["total"]

    Raises:
        SparseEngineError: when the masks are not of the same layers.
    """
    if set(first) != set(second):
        different = sorted(set(first) ^ set(second))
        raise SparseEngineError(f"the masks cover different layers, e.g. {different[0]!r}")
    both = {name: (int((first[name] & second[name]).sum()), int((first[name] | second[name]).sum())) for name in first}
    out = {name: shared / union if union else 1.0 for name, (shared, union) in both.items()}
    union = sum(u for _, u in both.values())
    out["total"] = sum(s for s, _ in both.values()) / union if union else 1.0
    return out


def gradient_flow(
    model: nn.Module, batch: Batch, objective: Objective | Callable[..., Tensor] | None = None
) -> dict[str, float]:
    """L2 norm of the loss gradient over kept weights by layer, and over all of them as ``"total"``.

    The model is in evaluation mode here, so that the curve over training shows the weights and not the noise of
    dropout; it is left as found. Layers of :mod:`sparse_engine.nn` count under the name of their dense weight.

    Example::

        curve = [gradient_flow(model, batch)["total"] for _ in training()]
    """
    objective = as_objective(objective)
    sparse = {id(module.values): name for name, module in model.named_modules() if is_sparse_layer(module)}
    weights = {name: p for name, p in model.named_parameters() if p.dim() > 1 or id(p) in sparse}
    with Untouched(model):
        model.eval()
        leaves = {name: p.detach().clone().requires_grad_() for name, p in weights.items()}
        loss = objective(Substituted(model, leaves), batch)
        gradients = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True, materialize_grads=True)
    squares = {
        f"{sparse[id(w)]}.weight" if id(w) in sparse else name: float((g * (w != 0)).square().sum())
        for (name, w), g in zip(weights.items(), gradients, strict=True)
    }
    return {**{name: value**0.5 for name, value in squares.items()}, "total": sum(squares.values()) ** 0.5}


def plot_density(densities: Mapping[str, float], path: str | Path) -> Path:
    """Density by layer as a bar chart (PNG); a collapsed layer is marked in red."""
    plt = _pyplot()
    names = list(densities)
    figure, axis = plt.subplots(figsize=(max(4.0, 0.35 * len(names) + 2), 3.5), layout="constrained")
    values = [100 * densities[name] for name in names]
    axis.bar(range(len(names)), values, color="tab:blue")
    for position, value in enumerate(values):
        if value == 0:
            axis.text(position, 0, "0", color="tab:red", ha="center", va="bottom")
    axis.set_xticks(range(len(names)), names, rotation=90, fontsize=7)
    axis.set_ylabel("kept weights, %")
    figure.savefig(path, dpi=120)
    plt.close(figure)
    return Path(path)


def plot_surface(axis: Tensor, losses: Tensor, path: str | Path) -> Path:
    """A loss surface as filled contours (PNG)."""
    plt = _pyplot()
    figure, area = plt.subplots(figsize=(4.5, 3.6), layout="constrained")
    drawn = area.contourf(axis, axis, losses.T, levels=24)
    figure.colorbar(drawn, label="loss")
    area.set(xlabel="first direction", ylabel="second direction")
    figure.savefig(path, dpi=120)
    plt.close(figure)
    return Path(path)


def _pyplot() -> Any:
    try:
        import matplotlib
    except ImportError:
        raise SparseEngineError("plots need matplotlib, which is not installed: pip install matplotlib") from None
    matplotlib.use("Agg")
    import matplotlib.pyplot

    return matplotlib.pyplot
