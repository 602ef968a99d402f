"""How much a network would miss each removal unit."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from sparse_engine.distill.batch import as_batches
from sparse_engine.errors import PruneError

from .spec import tensor_owners
from .units import Group, Member

CRITERIA = ("l1", "l2", "bn_scale", "geometric_median", "taylor", "fisher", "hessian", "random")
REDUCTIONS = ("mean", "sum", "max", "product", "first")
NORMALISERS = ("none", "mean", "max", "sum", "standard")


def channel_scores(
    model: nn.Module,
    groups: Sequence[Group],
    criterion: str = "l1",
    *,
    reduction: str = "mean",
    normaliser: str = "mean",
    data: Any = None,
    loss: Callable[[Tensor, Tensor], Tensor] | None = None,
    seed: int = 0,
) -> list[Tensor]:
    """A score for every unit of every group; larger = keep.

    Example::

        scores = channel_scores(model, groups, "taylor", data=loader)

    Args:
        model: the model the groups were found in; left as it was.
        groups: from `find_groups`.
        criterion:
            ``l1``, ``l2``: mean absolute value, root mean square, of each filter (arXiv 1608.08710);
            ``bn_scale``: absolute batch norm scale (network slimming, arXiv 1708.06519);
            ``geometric_median``: mean distance from the other filters of the layer (FPGM, arXiv 1811.00250);
            ``taylor``: (sum of weight × gradient)² of the mean loss (arXiv 1906.10771);
            ``fisher``: the same per batch, averaged over batches: the diagonal of the empirical Fisher matrix along
                the removal (arXiv 1801.05787);
            ``hessian``: |½ h − g|, the change of the mean loss to second order when a factor on the unit goes from 1 to
                0; g and h are its first two derivatives in that factor (after Optimal Brain Damage, LeCun et al. 1990);
            ``random``: uniform.
        reduction: how the layers that a group runs through become one number: ``mean``, ``sum``, ``max``, ``product``
            (geometric mean), ``first``.
        normaliser: what each group's scores are divided by before groups are compared: ``none``, ``mean``, ``max``,
            ``sum``, or ``standard`` (subtract the mean, divide by the deviation).
        data: batches for ``taylor``, ``fisher`` and ``hessian``: a loader, a list, or one (inputs, targets) pair.
        loss: ``loss(outputs, targets)``; cross entropy by default.
        seed: for ``random``, and for the probes of ``hessian`` in networks of more than 32 units, where h is estimated
            (Hutchinson) from 32 products with the Hessian instead of one per unit.

    Returns:
        One float64 tensor [units] per group, on the CPU.

    Raises:
        PruneError: an unknown name, a criterion without its data, or a group without what the criterion looks at.
    """
    for name, value, known in (
        ("criterion", criterion, CRITERIA),
        ("reduction", reduction, REDUCTIONS),
        ("normaliser", normaliser, NORMALISERS),
    ):
        if value not in known:
            raise PruneError(f"{name} is {value!r}; it has to be one of {', '.join(known)}")
    tensors = {name: getattr(*sites[0]).detach() for name, sites in tensor_owners(model).items()}
    if criterion == "random":
        generator = torch.Generator().manual_seed(seed)
        return [torch.rand(len(group), generator=generator, dtype=torch.float64) for group in groups]
    if criterion == "hessian":
        return [_normalise(scores, normaliser) for scores in _second_order(model, groups, data, loss, seed)]
    sensitivity = _sensitivity(model, data, loss, criterion) if criterion in ("taylor", "fisher") else None
    out = []
    for group in groups:
        if sensitivity is not None:
            scores = _squared_sums(group, sensitivity)
        else:
            rows = [
                score
                for member in group.members
                if (score := _member_score(member, tensors, criterion, model)) is not None
            ]
            if not rows:
                raise PruneError(
                    f"group {group.name!r} has nothing that criterion {criterion!r} looks at; ignore "
                    "its layers or choose another criterion"
                )
            scores = _reduce(torch.stack(rows), reduction)
        out.append(_normalise(scores, normaliser))
    return out


def _member_score(member: Member, tensors: dict[str, Tensor], criterion: str, model: nn.Module) -> Tensor | None:
    """One layer's opinion on each unit, or None where the criterion has none."""
    tensor = tensors[member.name]
    if criterion == "bn_scale":
        path, _, attribute = member.name.rpartition(".")
        if attribute != "weight" or not isinstance(model.get_submodule(path), nn.modules.batchnorm._NormBase):
            return None
        return _rows(member, tensor).abs().mean(1)
    if not member.produces:
        return None
    rows = _rows(member, tensor)
    if criterion == "l1":
        return rows.abs().mean(1)
    if criterion == "l2":
        return rows.square().mean(1).sqrt()
    return torch.cdist(rows, rows).mean(1)


def _rows(member: Member, tensor: Tensor) -> Tensor:
    """float64 [units, everything of this tensor that belongs to the unit]."""
    index = torch.from_numpy(member.index).to(tensor.device)
    moved = tensor.movedim(member.dim, 0).double()
    return moved[index].reshape(len(member.index), -1).cpu()


def _reduce(rows: Tensor, reduction: str) -> Tensor:
    if reduction == "mean":
        return rows.mean(0)
    if reduction == "sum":
        return rows.sum(0)
    if reduction == "max":
        return rows.amax(0)
    if reduction == "product":
        return rows.clamp_min(torch.finfo(rows.dtype).tiny).log().mean(0).exp()
    return rows[0]


def _normalise(scores: Tensor, normaliser: str) -> Tensor:
    if normaliser == "none" or not len(scores):
        return scores
    if normaliser == "standard":
        deviation = scores.std(correction=0)
        return (scores - scores.mean()) / deviation if deviation > 0 else torch.zeros_like(scores)
    scale = {"mean": scores.mean(), "max": scores.amax(), "sum": scores.sum()}[normaliser]
    return scores / scale if scale > 0 else scores


def _sensitivity(
    model: nn.Module, data: Any, loss: Callable[[Tensor, Tensor], Tensor] | None, criterion: str
) -> list[dict[str, Tensor]]:
    """weight × gradient by parameter: one dict of the mean for taylor, one per batch for fisher."""
    if data is None:
        raise PruneError(f"criterion {criterion!r} needs data: pass data=loader, or data=(inputs, targets)")
    loss = loss if loss is not None else nn.functional.cross_entropy
    names = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    modes = {module: module.training for module in model.modules()}
    model.eval()  # running statistics must not move
    products: list[dict[str, Tensor]] = []
    try:
        for batch in as_batches(data):
            gradients = torch.autograd.grad(loss(model(batch.inputs), batch.targets), parameters, allow_unused=True)
            products.append(
                {
                    name: (p.detach() * g).double()
                    for name, p, g in zip(names, parameters, gradients, strict=True)
                    if g is not None
                }
            )
    finally:
        for module, training in modes.items():
            module.training = training
    if not products:
        raise PruneError(f"criterion {criterion!r} got data without a single batch")
    if criterion == "taylor":
        return [{name: sum(p[name] for p in products) / len(products) for name in products[0]}]  # type: ignore[misc]
    return products


_PROBES = 32  # products with the Hessian per batch


def _second_order(
    model: nn.Module, groups: Sequence[Group], data: Any, loss: Callable[[Tensor, Tensor], Tensor] | None, seed: int
) -> list[Tensor]:
    """|½ ∂²L/∂f² − ∂L/∂f| in a factor f on everything that a unit produces, by group."""
    if data is None:
        raise PruneError("criterion 'hessian' needs data: pass data=loader, or data=(inputs, targets)")
    loss = loss if loss is not None else nn.functional.cross_entropy
    parameters = {name: p.detach() for name, p in model.named_parameters()}
    device = next(iter(parameters.values())).device
    sizes = [len(group) for group in groups]
    total, generator = sum(sizes), torch.Generator().manual_seed(seed)
    modes = {module: module.training for module in model.modules()}
    model.eval()  # running statistics must not move
    change, batches = torch.zeros(total, dtype=torch.float64), 0
    try:
        for batch in as_batches(data):
            factors = torch.ones(total, dtype=torch.float64, device=device, requires_grad=True)
            scaled = _scaled(parameters, groups, factors.split(sizes))
            outputs = torch.func.functional_call(model, scaled, (batch.inputs,))
            (slope,) = torch.autograd.grad(loss(outputs, batch.targets), factors, create_graph=True)
            if total <= _PROBES:
                probes = torch.eye(total, dtype=torch.float64)
            else:
                probes = torch.randint(0, 2, (_PROBES, total), generator=generator).double() * 2 - 1
            curvature = torch.zeros_like(change)
            for probe in probes.to(device):
                (product,) = torch.autograd.grad(slope @ probe, factors, retain_graph=True)
                curvature += (product * probe).cpu() / (1 if total <= _PROBES else _PROBES)
            change += 0.5 * curvature - slope.detach().cpu()
            batches += 1
    finally:
        for module, training in modes.items():
            module.training = training
    if not batches:
        raise PruneError("criterion 'hessian' got data without a single batch")
    return list((change / batches).abs().split(sizes))


def _scaled(parameters: dict[str, Tensor], groups: Sequence[Group], factors: Sequence[Tensor]) -> dict[str, Tensor]:
    """The parameters with every filter and per-channel vector multiplied by its unit's factor."""
    scaled = dict(parameters)
    for group, factor in zip(groups, factors, strict=True):
        for member in group.members:
            tensor = scaled.get(member.name)
            if tensor is None or not (member.produces or tensor.ndim == 1):
                continue
            index = torch.from_numpy(member.index).to(tensor.device)
            every = torch.ones(tensor.shape[member.dim], dtype=factor.dtype, device=tensor.device)
            every = every.index_put((index.reshape(-1),), factor.repeat_interleave(index.shape[1]))
            shape = [1] * tensor.ndim
            shape[member.dim] = -1
            scaled[member.name] = tensor * every.view(shape).to(tensor.dtype)
    return scaled


def _squared_sums(group: Group, batches: list[dict[str, Tensor]]) -> Tensor:
    """Removing a unit scales all that it owns to zero: to first order the sum over the weights it produces with."""
    total = torch.zeros(len(group), dtype=torch.float64)
    for products in batches:
        effect = torch.zeros(len(group), dtype=torch.float64)
        for member in group.members:
            product = products.get(member.name)
            if product is not None and (member.produces or product.ndim == 1):
                effect += _rows(member, product).sum(1)
        total += effect.square()
    return total / len(batches)
