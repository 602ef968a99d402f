"""What a compaction did, as data.

It is enough to build the compact network from the model's own code, or to put its weights back into the dense one.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sparse_engine.errors import CheckpointError, PruneError

from .attention import CompactMultiheadAttention

_ATTRIBUTE = "_sparse_engine_compaction"
_METADATA_KEY = "sparse_engine.compaction"
_VERSION = 1
_CLASSES = {"CompactMultiheadAttention": CompactMultiheadAttention}


@dataclass
class CompactionSpec:
    """The difference between a dense model and its compact form.

    Args:
        kept: tensor name -> dimension -> the dense indices that were kept; dimensions that are not named are whole.
        shapes: tensor name -> dense shape, for every tensor in `kept`.
        biases: modules that had no bias and now have one -> its dense length.
        attributes: module path -> attribute -> new value (``out_channels``, ``num_heads``, ...).
        classes: module path -> name of the class that took over.
        identities: paths of modules that did nothing and are now ``nn.Identity``.
        notes: what stayed although it was zero, and why.
    """

    kept: dict[str, dict[int, list[int]]] = field(default_factory=dict)
    shapes: dict[str, list[int]] = field(default_factory=dict)
    biases: dict[str, int] = field(default_factory=dict)
    attributes: dict[str, dict[str, Any]] = field(default_factory=dict)
    classes: dict[str, str] = field(default_factory=dict)
    identities: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def to_json(self) -> str:
        """The spec as JSON text."""
        return json.dumps({"version": _VERSION, **asdict(self)}, sort_keys=True)

    @classmethod
    def from_json(cls, text: str) -> CompactionSpec:
        """The spec from JSON text.

        Raises:
            CheckpointError: not such a text, or one of a newer version.
        """
        try:
            data = json.loads(text)
            version = data.pop("version")
        except (ValueError, KeyError, AttributeError) as error:
            raise CheckpointError(f"not a compaction spec: {error}") from error
        if version != _VERSION:
            raise CheckpointError(
                f"the compaction spec has version {version}; this release reads version {_VERSION}: "
                "use a newer sparse_engine"
            )
        unknown = set(data) - set(cls.__dataclass_fields__)
        if unknown:
            raise CheckpointError(f"the compaction spec has unknown entries: {', '.join(sorted(unknown))}")
        data["kept"] = {
            name: {int(dim): list(index) for dim, index in dims.items()} for name, dims in data.get("kept", {}).items()
        }
        return cls(**data)

    def slice(self, name: str, tensor: Tensor) -> Tensor:
        """The compact part of a dense tensor of `name`'s shape: a parameter, its gradient, momentum, mask, average."""
        for dim, index in self.kept.get(name, {}).items():
            tensor = tensor.index_select(dim, torch.tensor(index, device=tensor.device, dtype=torch.long))
        return tensor

    def scatter(self, name: str, tensor: Tensor, fill: float = 0.0) -> Tensor:
        """The inverse of `slice`: a dense tensor with `fill` where something was removed."""
        for dim, index in reversed(list(self.kept.get(name, {}).items())):
            shape = list(tensor.shape)
            shape[dim] = self.shapes[name][dim]
            out = tensor.new_full(shape, fill)
            tensor = out.index_copy(dim, torch.tensor(index, device=tensor.device, dtype=torch.long), tensor)
        return tensor

    def apply_(self, model: nn.Module) -> nn.Module:
        """Make a dense model compact in place: its layers shrink, its weights become the kept parts of what they were.

        Args:
            model: an instance of the model that the spec was made from, of the same configuration.

        Returns:
            The same model.

        Raises:
            PruneError: a tensor is missing or has another shape than the spec says.
        """
        for path in self.identities:
            _set_module(model, path, nn.Identity())
        modules = dict(model.named_modules())
        missing = [path for path in (*self.biases, *self.attributes, *self.classes) if path not in modules]
        if missing:
            raise PruneError(
                f"the model has no module {missing[0]!r}, which its compaction spec changes: is it the same model?"
            )
        for path, length in self.biases.items():
            _add_bias(modules[path], length)
        owners = tensor_owners(model)
        for name in self.kept:
            if name not in owners:
                raise PruneError(
                    f"the model has no tensor {name!r}, which its compaction spec shrinks: is it the "
                    "same model and configuration?"
                )
            tensor = getattr(*owners[name][0])
            if list(tensor.shape) != list(self.shapes[name]):
                raise PruneError(
                    f"{name!r} has shape {tuple(tensor.shape)}, its compaction spec expects the dense "
                    f"{tuple(self.shapes[name])}"
                )
        for name in self.kept:
            sites = owners[name]
            tensor = getattr(*sites[0])
            small = self.slice(name, tensor.detach())
            replace_tensor(sites, small)
            for module, attribute in sites:
                stored = module.__dict__.get("_sparse_engine_masks", {})
                if attribute in stored:
                    stored[attribute] = self.slice(name, stored[attribute])
        for path, attributes in self.attributes.items():
            module = model.get_submodule(path)
            for key, value in attributes.items():
                setattr(module, key, tuple(value) if isinstance(value, list) else value)
        for path, name in self.classes.items():
            model.get_submodule(path).__class__ = replaced_class(name)
        setattr(model, _ATTRIBUTE, self)
        return model


def compaction_spec(model: nn.Module) -> CompactionSpec:
    """What `compact` did to this model.

    Raises:
        PruneError: the model was not made by `compact` or `load_compact`.
    """
    spec = getattr(model, _ATTRIBUTE, None)
    if not isinstance(spec, CompactionSpec):
        raise PruneError(
            f"{type(model).__name__} carries no compaction spec; only models from compact() or load_compact() do"
        )
    return spec


def save_compact(model: nn.Module, path: str | Path) -> None:
    """Write a compact model as a safetensors file whose metadata hold the spec.

    Example::

        save_compact(se.compact(model, x), "small.safetensors")
        small = load_compact("small.safetensors", resnet18())

    Raises:
        PruneError: the model carries no spec.
    """
    from safetensors.torch import save

    from sparse_engine.io.atomic import atomic_write

    spec = compaction_spec(model)
    tensors: dict[str, Tensor] = {}
    for name, sites in tensor_owners(model).items():
        module, attribute = sites[0]
        if attribute not in module._non_persistent_buffers_set:
            tensors[name] = getattr(module, attribute).detach().contiguous().clone()
    content = save(tensors, metadata={_METADATA_KEY: spec.to_json(), "format": "pt"})
    with atomic_write(path) as file:
        file.write(content)


def load_compact(path: str | Path, model: nn.Module | Callable[[], nn.Module], *, dense: bool = False) -> nn.Module:
    """A compact model from its file and the model's own code.

    Example::

        small = load_compact("small.safetensors", resnet18())
        whole = load_compact("small.safetensors", resnet18(), dense=True)     # the same function, dense, with zeros

    Args:
        path: written by `save_compact`.
        model: a dense instance, changed in place, or a function that makes one.
        dense: keep the dense shapes and fill removed parts with zeros instead of shrinking the model.

    Raises:
        CheckpointError: the file has no spec, or its tensors do not fit the model.
        PruneError: the spec does not fit the model.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(str(path), framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  (not a dict)
    except SafetensorError as error:
        raise CheckpointError(f"{path} is not a readable safetensors file: {error}") from error
    if _METADATA_KEY not in metadata:
        raise CheckpointError(
            f"{path} carries no compaction spec; load it with load_state_dict, or write it with save_compact"
        )
    spec = CompactionSpec.from_json(metadata[_METADATA_KEY])
    target = model if isinstance(model, nn.Module) else model()
    if dense:
        for place, length in spec.biases.items():
            _add_bias(target.get_submodule(place), length)
        tensors = {
            name: spec.scatter(name, tensor, 1.0 if name.endswith("running_var") else 0.0)
            for name, tensor in tensors.items()
        }
    else:
        spec.apply_(target)
    owners = tensor_owners(target)
    gone = [
        name
        for name in owners
        if name not in tensors and owners[name][0][1] not in owners[name][0][0]._non_persistent_buffers_set
    ]
    if dense:
        gone = [name for name in gone if not any(name.startswith(f"{identity}.") for identity in spec.identities)]
    extra = [name for name in tensors if name not in owners]
    if gone or extra:
        raise CheckpointError(
            f"{path} does not fit {type(target).__name__}: missing {gone[:4]}, unexpected {extra[:4]}"
        )
    with torch.no_grad():
        for name, tensor in tensors.items():
            module, attribute = owners[name][0]
            own = getattr(module, attribute)
            if own.shape != tensor.shape:
                raise CheckpointError(
                    f"{path}: {name!r} has shape {tuple(tensor.shape)}, the model expects {tuple(own.shape)}"
                )
            own.copy_(tensor)
        if dense:
            for identity in spec.identities:
                _silence(target.get_submodule(identity))
    return target


def remap_optimizer_(optimizer: torch.optim.Optimizer, dense: nn.Module, compact: nn.Module) -> torch.optim.Optimizer:
    """Move an optimiser from a dense model to its compact form, with momentum and all state of a parameter's shape.

    Example::

        small = se.compact(model, x)
        remap_optimizer_(optimizer, model, small)      # training goes on with small

    Args:
        optimizer: built over parameters of `dense`; changed in place. Learning rates, schedulers and step counts stay.
        dense: the model before, wrapped (DDP, DataParallel) or not.
        compact: what `compact` made of it. Wrap it in DDP again; DDP holds no state of its own.

    Returns:
        The same optimiser. Parameters that vanished leave it; biases that compaction added join the first group.

    Raises:
        PruneError: the optimiser holds parameters that are not the dense model's.
    """
    dense, compact = unwrapped(dense), unwrapped(compact)
    spec = compaction_spec(compact)
    names = {id(parameter): name for name, parameter in dense.named_parameters()}
    new = dict(compact.named_parameters())
    strangers = [tuple(p.shape) for group in optimizer.param_groups for p in group["params"] if id(p) not in names]
    if strangers:
        raise PruneError(
            f"the optimiser holds {len(strangers)} parameters that are not the dense model's, shapes "
            f"{strangers[:4]}: pass the model it was built over"
        )
    state: dict[nn.Parameter, Any] = {}
    for group in optimizer.param_groups:
        parameters = []
        for parameter in group["params"]:
            name = names[id(parameter)]
            if name not in new:
                continue
            parameters.append(new[name])
            if parameter in optimizer.state:
                state[new[name]] = {
                    key: spec.slice(name, value)
                    if isinstance(value, Tensor) and value.shape == parameter.shape
                    else value
                    for key, value in optimizer.state[parameter].items()
                }
        group["params"] = parameters
    added = [new[f"{path}.bias"] for path in spec.biases if f"{path}.bias" in new]
    if added and optimizer.param_groups:
        optimizer.param_groups[0]["params"].extend(added)
    optimizer.state.clear()
    optimizer.state.update(state)
    return optimizer


def remap_state_dict(state: Mapping[str, Tensor], compact: nn.Module) -> dict[str, Tensor]:
    """The compact part of a dict of dense tensors keyed like the model's state: moving averages, gradients, masks.

    Example::

        small_average = remap_state_dict(average, small)

    Tensors of vanished modules are left out. Names may begin with ``module.``, as those of DDP and of
    ``torch.optim.swa_utils.AveragedModel`` do. Constants that compaction pushed into biases are not: a dense average
    with zeros elsewhere than the model's would need its own compaction.

    Raises:
        PruneError: a tensor has another shape than the dense model's.
    """
    compact = unwrapped(compact)
    spec, own = compaction_spec(compact), tensor_owners(compact)
    out = {}
    for key, tensor in state.items():
        name = key if key in own else key.removeprefix("module.")
        if any(name.startswith(f"{path}.") for path in spec.identities):
            continue
        if name in spec.kept and list(tensor.shape) != list(spec.shapes[name]):
            raise PruneError(
                f"{name!r} has shape {tuple(tensor.shape)}, the dense model's is {tuple(spec.shapes[name])}"
            )
        out[key] = spec.slice(name, tensor)
    return out


def unwrapped(model: nn.Module) -> nn.Module:
    """The model inside DDP, DataParallel or an ``AveragedModel``."""
    wrappers = (nn.DataParallel, nn.parallel.DistributedDataParallel, torch.optim.swa_utils.AveragedModel)
    while isinstance(model, wrappers):
        model = model.module
    return model


def replaced_class(name: str) -> type[nn.Module]:
    """The class that takes over from PyTorch's, by its name in a spec.

    Raises:
        CheckpointError: no such class.
    """
    if name not in _CLASSES:
        raise CheckpointError(f"the compaction spec names the class {name!r}; known are {', '.join(_CLASSES)}")
    return _CLASSES[name]


def tensor_owners(model: nn.Module) -> dict[str, list[tuple[nn.Module, str]]]:
    """First name of every parameter and buffer -> all (module, attribute) places that hold it."""
    first: dict[int, str] = {}
    owners: dict[str, list[tuple[nn.Module, str]]] = {}
    kinds = ("_parameters", "_buffers")
    for kind in kinds:
        for path, module in model.named_modules(remove_duplicate=True):
            for attribute, tensor in getattr(module, kind).items():
                if tensor is None:
                    continue
                name = first.setdefault(id(tensor), f"{path}.{attribute}" if path else attribute)
                owners.setdefault(name, []).append((module, attribute))
    return owners


def replace_tensor(sites: list[tuple[nn.Module, str]], value: Tensor) -> None:
    """Put a new tensor in all places that held the old one; parameters stay parameters and stay shared."""
    old = getattr(*sites[0])
    new: Tensor = nn.Parameter(value, requires_grad=old.requires_grad) if isinstance(old, nn.Parameter) else value
    for module, attribute in sites:
        if attribute in module._parameters:
            module._parameters[attribute] = new  # type: ignore[assignment]
        else:
            module._buffers[attribute] = new


def _set_module(model: nn.Module, path: str, new: nn.Module) -> None:
    parent, _, name = path.rpartition(".")
    owner = model.get_submodule(parent)
    if name not in owner._modules:
        raise PruneError(f"the model has no module {path!r}, which its compaction spec removes")
    owner._modules[name] = new


def _add_bias(module: nn.Module, length: int) -> None:
    """A bias of zeros for a layer that had none."""
    weight = module.weight
    assert isinstance(weight, Tensor)
    module.bias = nn.Parameter(weight.new_zeros(length), requires_grad=weight.requires_grad)


def _silence(module: nn.Module) -> None:
    """Zero every weight of a block that the compact model skipped: a residual block then passes its input through."""
    for parameter in module.parameters():
        parameter.zero_()
