"""Masks: which weights of a model are kept, stored beside the weights and held there.

A mask lives on the module that owns the weight, as an ordinary Python attribute. It therefore travels with
``copy.deepcopy`` and ``pickle`` but stays out of ``state_dict``: a pruned model's state is a plain dense state with
exact zeros, which every other tool can read.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from sparse_engine.errors import PruneError

_ATTRIBUTE = "_sparse_engine_masks"

#: Module types whose weights are pruned, and the names of those weights.
PRUNABLE: tuple[tuple[type[nn.Module], tuple[str, ...]], ...] = (
    (nn.MultiheadAttention, ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight")),
    (nn.Linear, ("weight",)),
    (nn.modules.conv._ConvNd, ("weight",)),
)

Ignore = Iterable[str | type[nn.Module] | nn.Module]


def prunable_weights(model: nn.Module, ignore: Ignore = ()) -> dict[str, nn.Parameter]:
    """The weights that pruning may touch, by qualified name, in the order of ``model.named_modules()``.

    Example::

        prunable_weights(model, ignore=["conv1", nn.Linear, "re:.*head"])   # {"layer1.0.conv1.weight": Parameter, ...}

    Weights of linear and convolution layers and the projections of ``nn.MultiheadAttention`` are prunable; biases,
    norms and embeddings are not. A weight that several modules share appears once, under its first name.

    Args:
        model: any module.
        ignore: what to leave alone: qualified names of modules (with everything below them) or of parameters, module
            types, module objects, or ``"re:PATTERN"``, a regular expression that has to match the whole module or
            parameter name.

    Returns:
        A dict from qualified parameter name to the parameter itself (not a copy).

    Raises:
        PruneError: if an entry of ``ignore`` matches nothing, which is nearly always a misspelling; if FSDP2 has
            already cut the weights into shards.
    """
    return {n: w for n, w in all_weights(model, ignore).items() if isinstance(w, nn.Parameter)}


def all_weights(model: nn.Module, ignore: Ignore = ()) -> dict[str, Tensor]:
    """As :func:`prunable_weights`, and the weights of sparse layers among them, as dense copies without gradient.

    Example::

        all_weights(sparsified)["fc1.weight"].shape        # (300, 784), zeros where nothing is kept
    """
    refuse_sharded(model, "choosing weights")
    rules = _Rules(ignore)
    found: dict[str, Tensor] = {}
    seen: set[int] = set()
    for module_name, module in model.named_modules():
        sparse = is_sparse_layer(module)
        for attribute, weight in [("weight", module.weight.detach())] if sparse else _own_weights(module):
            name = f"{module_name}.{attribute}" if module_name else attribute
            if not sparse:  # a copy's id says nothing
                if id(weight) in seen:
                    continue
                seen.add(id(weight))
            if not rules.match(model, module_name, module, name):
                found[name] = weight
    rules.check(model)
    return found


def masks(model: nn.Module) -> dict[str, Tensor]:
    """The masks of a pruned model, by qualified weight name.

    Example::

        se.prune(model, sparsity=0.9)
        se.masks(model)["layer1.0.conv1.weight"].float().mean()      # the density of that layer

    Args:
        model: any module.

    Returns:
        A dict from qualified parameter name to a bool tensor of the weight's shape, True = kept; empty for a model that
        was never pruned.
        The tensors are the stored ones: change them through :func:`set_masks` only.
    """
    out: dict[str, Tensor] = {}
    for module_name, module in model.named_modules():
        stored = {"weight": module.mask} if is_sparse_layer(module) else module.__dict__.get(_ATTRIBUTE, {})
        for attribute, mask in stored.items():
            out[f"{module_name}.{attribute}" if module_name else attribute] = mask
    return out


def is_sharded(tensor: Tensor | None) -> bool:
    """Whether a tensor is a ``DTensor``, of which each process holds a shard: what FSDP2 makes of parameters.

    Example::

        fully_shard(layer)
        is_sharded(layer.weight)        # True
    """
    loaded = sys.modules.get("torch.distributed.tensor")  # a DTensor cannot exist before this is imported
    return loaded is not None and isinstance(tensor, loaded.DTensor)


def refuse_sharded(model: nn.Module, what: str) -> None:
    """Raise PruneError where FSDP2 has cut a model's parameters; ``what`` needs whole weights.

    Example::

        refuse_sharded(model, "growing weights by gradient")
    """
    for name, parameter in model.named_parameters():
        if is_sharded(parameter):
            raise PruneError(
                f"{what} needs whole weights, but {name!r} is a shard on each process (FSDP2); do it before "
                "fully_shard: masks stay on the model and are held on the shards"
            )


def is_sparse_layer(module: nn.Module) -> bool:
    """Whether a module is one of :mod:`sparse_engine.nn`, whose pattern is its mask."""
    return hasattr(module, "set_pattern_")


@torch.no_grad()
def set_masks(model: nn.Module, new: dict[str, Tensor], *, apply: bool = True) -> None:
    """Store masks on a model and (unless ``apply=False``) set the removed weights to exactly zero.

    Example::

        set_masks(model, {"fc.weight": model.fc.weight.abs() > 0.01})

    The parameters keep their identity, so optimisers that hold them stay valid. For layers of :mod:`sparse_engine.nn`
    the pattern changes; :class:`DynamicMask` also brings the optimiser's state along.

    Args:
        model: the model whose weights are named.
        new: qualified parameter name to bool tensor of the weight's shape, True = kept. Other weights keep the masks
            they have.
        apply: write the zeros now.

    Raises:
        PruneError: for a name that the model lacks, or a mask with another shape or dtype.
    """
    resolved = []
    for name, mask in new.items():
        module_name, _, attribute = name.rpartition(".")
        try:
            module = model.get_submodule(module_name)
            parameter = getattr(module, attribute)
        except AttributeError:
            raise PruneError(
                f"the model has no parameter {name!r}; names are those of model.named_parameters()"
            ) from None
        if not isinstance(mask, Tensor) or mask.dtype != torch.bool or mask.shape != parameter.shape:
            got = f"{mask.dtype} {tuple(mask.shape)}" if isinstance(mask, Tensor) else type(mask).__name__
            raise PruneError(f"mask of {name!r} is {got}, expected torch.bool {tuple(parameter.shape)} (True = kept)")
        resolved.append((module, attribute, parameter, mask))
    for module, attribute, parameter, mask in resolved:
        if is_sparse_layer(module):
            if not torch.equal(module.mask, mask.to(module.mask.device)):
                module.set_pattern_(mask)
            continue
        store = module.__dict__.setdefault(_ATTRIBUTE, {})
        store[attribute] = mask.to(parameter.device, copy=True)
        if apply:
            _zero_(parameter.data, store[attribute])


@torch.no_grad()
def apply_masks_(model: nn.Module) -> None:
    """Set every removed weight to exactly zero again; what :func:`hold_masks` does after each optimiser step.

    Example::

        apply_masks_(model)
    """
    for _, _, parameter, mask in _stored(model):
        _zero_(parameter.data, mask)


def squash_(model: nn.Module) -> nn.Module:
    """Make the zeros permanent: apply the masks once more and forget them; the model is plain PyTorch again.

    Example::

        se.squash_(model)
        torch.save(model.state_dict(), "pruned.pt")

    Args:
        model: a pruned model; a model without masks is returned unchanged.

    Returns:
        The same model.
    """
    apply_masks_(model)
    for module in model.modules():
        module.__dict__.pop(_ATTRIBUTE, None)
    return model


class MaskHold:
    """The handle that :func:`hold_masks` returns; ``remove()`` (or leaving a ``with`` block) ends the hold."""

    def __init__(self, handles: list[Any]) -> None:
        self._handles = handles

    def remove(self) -> None:
        """Stop re-applying the masks."""
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def __enter__(self) -> MaskHold:
        return self

    def __exit__(self, *_: object) -> None:
        self.remove()


def hold_masks(model: nn.Module, optimizer: torch.optim.Optimizer, *, mask_gradients: bool = False) -> MaskHold:
    """Keep removed weights at exactly zero through training: neither momentum nor weight decay nor noise revives them.

    Example::

        hold = se.prune.hold_masks(model, optimizer)
        for x, y in loader:
            loss(model(x), y).backward()
            optimizer.step()                 # the masks are re-applied at the end of the step

    Args:
        model: the pruned model; masks are looked up at every step, so a mask that changes during training is followed.
            It may have been through FSDP2's ``fully_shard`` since it was pruned.
        optimizer: the optimiser that updates its weights.
        mask_gradients: also zero the gradients of removed weights before the step, so that they enter neither the
            optimiser's state nor an adaptive step size. Dynamic methods that read dense gradients must read them before
            the step.

    Returns:
        A handle with ``remove()``, usable as a context manager.
    """
    handles = [optimizer.register_step_post_hook(lambda *_: apply_masks_(model))]
    if mask_gradients:

        def clear(*_: object) -> None:
            for _, _, parameter, mask in _stored(model):
                if parameter.grad is not None:
                    _zero_(parameter.grad, mask)

        handles.append(optimizer.register_step_pre_hook(clear))
    return MaskHold(handles)


def _zero_(tensor: Tensor, mask: Tensor) -> None:
    """Set to zero what a mask of the whole weight removes; of a sharded tensor every process sets its own part."""
    if is_sharded(tensor):
        from torch.distributed.tensor import distribute_tensor

        # every process has the same mask: nothing is sent
        mask = distribute_tensor(mask, tensor.device_mesh, tensor.placements, src_data_rank=None).to_local()
        tensor = tensor.to_local()
    tensor.masked_fill_(~mask, 0)


def _own_weights(module: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    for kind, attributes in PRUNABLE:
        if isinstance(module, kind):
            for attribute in attributes:
                parameter = module._parameters.get(attribute)
                if parameter is not None:
                    yield attribute, parameter
            return


def _stored(model: nn.Module) -> Iterator[tuple[str, str, nn.Parameter, Tensor]]:
    for module_name, module in model.named_modules():
        store = module.__dict__.get(_ATTRIBUTE)
        if not store:
            continue
        for attribute, mask in store.items():
            parameter = getattr(module, attribute)
            if mask.device != parameter.device:  # the model was moved after pruning
                mask = store[attribute] = mask.to(parameter.device)
            yield module_name, attribute, parameter, mask


class _Rules:
    """The entries of ``ignore``, each remembering whether it matched anything."""

    def __init__(self, ignore: Ignore) -> None:
        self.entries = [ignore] if isinstance(ignore, str | type | nn.Module) else list(ignore)
        self.patterns = {}
        for entry in self.entries:
            if isinstance(entry, str) and entry.startswith("re:"):
                try:
                    self.patterns[entry] = re.compile(entry[3:])
                except re.error as error:
                    raise PruneError(f"ignore entry {entry!r} is not a regular expression: {error}") from None
            elif not isinstance(entry, str | nn.Module) and not (
                isinstance(entry, type) and issubclass(entry, nn.Module)
            ):
                raise PruneError(f"ignore entry {entry!r} is neither a name, a module type, a module nor 're:PATTERN'")

    def match(self, model: nn.Module, module_name: str, module: nn.Module, name: str) -> bool:
        return any(self._matches(entry, module_name, module, name) for entry in self.entries)

    def _matches(self, entry: Any, module_name: str, module: nn.Module, name: str) -> bool:
        if isinstance(entry, type):
            return isinstance(module, entry)
        if isinstance(entry, nn.Module):
            return any(module is inner for inner in entry.modules())
        if entry in self.patterns:
            return bool(self.patterns[entry].fullmatch(module_name) or self.patterns[entry].fullmatch(name))
        return name == entry or module_name == entry or module_name.startswith(entry + ".")

    def check(self, model: nn.Module) -> None:
        """Refuse names that match no module and no parameter (a type that does not occur is harmless)."""
        names = [name for name, _ in model.named_modules()] + [name for name, _ in model.named_parameters()]
        for entry in self.entries:
            if isinstance(entry, str):
                pattern = self.patterns.get(entry)
                known = any(pattern.fullmatch(name) for name in names) if pattern else entry in names
                if not known:
                    raise PruneError(
                        f"ignore entry {entry!r} matches no module or parameter of the model; names look like "
                        f"{', '.join(repr(name) for name in names if name)[:200]}"
                    )
