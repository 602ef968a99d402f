"""What a user hands to ``convert``, made plain: all masks permanent, eval mode, one dtype, on the CPU; on a copy.

The copy shares the tensors it does not change, so it costs memory only for what differs, and the user's model stays as
it is.
"""

from __future__ import annotations

import copy
import os
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from sparse_engine.errors import ConvertError, MaskError, ShapeError

Weights = str | os.PathLike[str] | Mapping[str, Tensor]


def prepare(model: nn.Module, weights: Weights | None = None, dtype: torch.dtype = torch.float32) -> nn.Module:
    """A copy of a model that is ready to be captured.

    Example::

        plain = prepare(model)                                   # masks multiplied in, eval mode
        plain = prepare(resnet50(), "pruned.safetensors")        # with a checkpoint's weights

    Understood are ``torch.nn.utils.prune`` (``weight_orig`` and ``weight_mask``), ``torch.ao.pruning`` and every other
    parametrisation, the masks of ``sparse_engine.prune``, and ``sparse_engine.nn``'s sparse modules.

    Args:
        model: any module; it is not changed.
        weights: a checkpoint (file name, or a state dict) to load into the copy first.
        dtype: floating parameters and buffers are converted to it.

    Returns:
        A module of the same classes, or of their dense twins.

    Raises:
        ConvertError: the model cannot be copied.
        CheckpointError: the weights do not fit the model.
    """
    if not isinstance(model, nn.Module):
        raise ConvertError(f"convert takes a torch.nn.Module, not {type(model).__name__}")
    plain = _densify(share_copy(_unwrap(model)))
    _remove_prune_hooks(plain)
    _remove_parametrizations(plain)
    _apply_masks(plain)
    if weights is not None:
        _load(plain, weights)
    plain.eval()
    _replace_tensors(plain, lambda tensor: _plain_tensor(tensor, dtype))
    return plain


def prepare_examples(example_inputs: Any, dtype: torch.dtype = torch.float32) -> tuple[Tensor, ...]:
    """Example inputs as a tuple of CPU tensors; floating ones in `dtype`.

    Args:
        example_inputs: a tensor, a numpy array, or a sequence of these: the model's positional arguments.

    Raises:
        ShapeError: something else than tensors or arrays, or an empty batch.
    """
    items: Sequence[Any] = [example_inputs] if isinstance(example_inputs, (Tensor, numpy.ndarray)) else example_inputs
    if not isinstance(items, (list, tuple)) or not items:
        raise ShapeError(
            f"example_inputs must be a tuple of tensors, one per argument of the model, not "
            f"{type(example_inputs).__name__}"
        )
    result = []
    for index, item in enumerate(items):
        if not isinstance(item, (Tensor, numpy.ndarray)):
            raise ShapeError(
                f"example input {index} is {type(item).__name__}; only tensors and numpy arrays are understood"
            )
        tensor = torch.as_tensor(item).detach().cpu()
        if tensor.numel() == 0:
            raise ShapeError(f"example input {index} is empty (shape {tuple(tensor.shape)}); give at least one example")
        result.append(tensor.to(dtype) if tensor.is_floating_point() else tensor)
    return tuple(result)


def share_copy(model: nn.Module) -> nn.Module:
    """A copy of the module tree with the same parameter objects; buffers are copied, since a forward may write them."""
    memo: dict[int, Any] = {id(parameter): parameter for parameter in model.parameters()}
    for module in model.modules():
        # torch.nn.utils.prune leaves computed weights behind, which deepcopy refuses.
        memo.update(
            {
                id(item): item.detach()
                for item in vars(module).values()
                if isinstance(item, Tensor) and item.grad_fn is not None
            }
        )
    try:
        return copy.deepcopy(model, memo=memo)
    except Exception as error:
        raise ConvertError(
            f"the model cannot be copied ({type(error).__name__}: {error}); convert needs a model that "
            f"copy.deepcopy takes"
        ) from error


# ---- helpers


def _unwrap(model: nn.Module) -> nn.Module:
    while True:
        if isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
            model = model.module
        elif isinstance(getattr(model, "_orig_mod", None), nn.Module):  # torch.compile
            model = model._orig_mod
        else:
            return model


def _remove_prune_hooks(model: nn.Module) -> None:
    """torch.nn.utils.prune keeps ``name_orig`` and ``name_mask`` and multiplies them in a hook before every forward."""
    from torch.nn.utils.prune import BasePruningMethod

    for path, module in model.named_modules():
        for name in [key.removesuffix("_orig") for key in module._parameters if key.endswith("_orig")]:
            mask = module._buffers.get(f"{name}_mask")
            if mask is None:
                continue
            original = module._parameters.pop(f"{name}_orig")
            del module._buffers[f"{name}_mask"]
            if mask.shape != original.shape:
                raise MaskError(f"{path}.{name}_mask has shape {tuple(mask.shape)}, the weight {tuple(original.shape)}")
            module.__dict__.pop(name, None)
            module.register_parameter(name, _masked(original, mask))
            for key, hook in list(module._forward_pre_hooks.items()):
                if isinstance(hook, BasePruningMethod) and hook._tensor_name == name:
                    del module._forward_pre_hooks[key]


def _remove_parametrizations(model: nn.Module) -> None:
    for module in list(model.modules()):
        if not parametrize.is_parametrized(module):
            continue
        for name, parametrizations in list(module.parametrizations.items()):  # type: ignore[union-attr, operator]
            # Removing writes the result into the original tensors, which the user's model still holds.
            for parameter in ("original", *(f"original{index}" for index in range(8))):
                if parameter in parametrizations._parameters:
                    parametrizations._parameters[parameter] = nn.Parameter(
                        parametrizations._parameters[parameter].detach().clone(), requires_grad=False
                    )
            was_training = module.training
            module.eval()
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                parametrize.remove_parametrizations(module, name, leave_parametrized=True)
            module.train(was_training)


def _apply_masks(model: nn.Module) -> None:
    from sparse_engine.prune.masks import masks

    for path, mask in masks(model).items():
        owner, _, name = path.rpartition(".")
        module = model.get_submodule(owner)
        parameter = module._parameters[name]
        if parameter is not None and bool((parameter.detach()[~mask.to(parameter.device)] != 0).any()):
            module._parameters[name] = _masked(parameter, mask)


def _densify(model: nn.Module) -> nn.Module:
    if not any(type(module).__module__.startswith("sparse_engine.nn") for module in model.modules()):
        return model
    from sparse_engine.nn import densify_

    return densify_(model)


def _load(model: nn.Module, weights: Weights) -> None:
    from sparse_engine.io import load_state, read_checkpoint, resolve_masks

    state = read_checkpoint(Path(weights)) if isinstance(weights, (str, os.PathLike)) else resolve_masks(weights)
    # Loading copies into the parameters, which the user's model still holds.
    _replace_tensors(model, lambda tensor: tensor.detach().to("cpu", copy=True))
    load_state(model, state)


def _masked(weight: Tensor, mask: Tensor) -> nn.Parameter:
    # torch.where and not a product: a removed weight that is inf or nan is removed too.
    kept = torch.where(
        mask.to(weight.device).bool(), weight.detach(), torch.zeros((), dtype=weight.dtype, device=weight.device)
    )
    return nn.Parameter(kept, requires_grad=False)


def _plain_tensor(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    target = dtype if tensor.is_floating_point() else tensor.dtype
    return tensor if tensor.device.type == "cpu" and tensor.dtype == target else tensor.detach().to("cpu", target)


def _replace_tensors(model: nn.Module, change: Callable[[Tensor], Tensor]) -> None:
    """Replace parameters and buffers one by one; tensors that several modules share stay shared."""
    done: dict[int, tuple[Tensor, Tensor]] = {}
    for module in model.modules():
        for store in (module._parameters, module._buffers):
            for name, tensor in store.items():
                if tensor is None:
                    continue
                if id(tensor) not in done:
                    changed = change(tensor)
                    if changed is not tensor and isinstance(tensor, nn.Parameter):
                        changed = nn.Parameter(changed, requires_grad=False)
                    done[id(tensor)] = (tensor, changed)
                store[name] = done[id(tensor)][1]
