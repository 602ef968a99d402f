"""State dicts from PyTorch and safetensors files, with masks folded in, and back."""

from __future__ import annotations

import os
import pickle
import re
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from sparse_engine.errors import CheckpointError, FileFormatError
from sparse_engine.io.atomic import atomic_write
from sparse_engine.io.container import Container, write_container

_WRAPPERS = ("state_dict", "model_state_dict", "model", "net", "module", "ema")
_PREFIXES = ("module.", "_orig_mod.")
_PARAMETRIZATION = re.compile(r"(?P<owner>(?:.*\.)?)parametrizations\.(?P<name>[^.]+)\.(?P<rest>.+)", re.DOTALL)


def read_checkpoint(path: str | os.PathLike[str], *, resolve: bool = True) -> dict[str, torch.Tensor]:
    """Read a state dict from a safetensors file or from what `torch.save` wrote; no code from the file is run.

    Example:
        >>> state = read_checkpoint("resnet50.pt")                # doctest: +SKIP
        >>> (state["fc.weight"] == 0).float().mean()              # doctest: +SKIP
        tensor(0.9000)

    The kind of file is told from its first bytes, not from its name. Tensors are mapped from the file where its
    layout allows. A state dict inside a larger checkpoint (`state_dict`, `model`, …) is found; prefixes that wrappers
    add (`module.` by DDP, `_orig_mod.` by `torch.compile`) are removed.

    Args:
        path: the file.
        resolve: multiply masks into weights, see `resolve_masks`.

    Returns:
        Name -> tensor on the CPU.

    Raises:
        CheckpointError: the file is damaged, is no checkpoint, or could be read only by running code from it.
        OSError: the file does not exist or cannot be read.
    """
    path = Path(path)
    with open(path, "rb") as file:
        head = file.read(9)
    if path.is_file() and path.stat().st_size == 0:
        raise CheckpointError(f"{path}: the file is empty")
    try:
        loaded = Container(path).tensors() if _looks_like_safetensors(path, head) else read_torch_file(path)
    except CheckpointError:
        raise
    except FileFormatError as error:
        raise CheckpointError(str(error)) from None
    state = _strip_prefixes(_find_state_dict(loaded, path))
    return resolve_masks(state) if resolve else state


def write_checkpoint(
    path: str | os.PathLike[str], state: Mapping[str, torch.Tensor], *, metadata: Mapping[str, str] | None = None
) -> None:
    """Write a state dict atomically, as safetensors or with `torch.save`, by the ending of the file's name.

    Example:
        >>> write_checkpoint("pruned.safetensors", model.state_dict())        # doctest: +SKIP

    Args:
        path: the file, ending in `.safetensors`, `.pt` or `.pth`.
        state: name -> tensor.
        metadata: strings to keep in a safetensors file.

    Raises:
        CheckpointError: the ending is neither, a value is no tensor, or metadata is given for a PyTorch file, which has
            no place for it.
        OSError: the file cannot be written.
    """
    path = Path(path)
    strangers = [name for name, value in state.items() if not isinstance(value, torch.Tensor)]
    if strangers:
        raise CheckpointError(
            f"{len(strangers)} of {len(state)} values are no tensors (first: {strangers[0]!r}); pass model.state_dict()"
        )
    if path.suffix == ".safetensors":
        write_container(path, state, metadata)
    elif path.suffix in {".pt", ".pth"}:
        if metadata:
            raise CheckpointError(f"{path}: PyTorch files have no place for metadata; use the ending .safetensors")
        with atomic_write(path) as file:
            torch.save({name: tensor.detach() for name, tensor in state.items()}, file)
    else:
        raise CheckpointError(f"{path}: the ending must be .safetensors, .pt or .pth, not {path.suffix!r}")


def resolve_masks(state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Fold pruning masks into the weights, so that removed weights are exact zeros under the plain name.

    Example:
        >>> resolve_masks({"fc.weight_orig": torch.ones(2), "fc.weight_mask": torch.tensor([1.0, 0.0])})
        {'fc.weight': tensor([1., 0.])}

    Understood are `torch.nn.utils.prune` (`weight_orig`, `weight_mask`) and parametrizations
    (`parametrizations.weight.original`, `parametrizations.weight.0.mask`). `torch.ao.pruning` uses the latter but does
    not save the mask unless asked to, which is an error here.

    Args:
        state: name -> tensor.

    Returns:
        A new dict in the same order; tensors without a mask are the same objects.

    Raises:
        CheckpointError: a mask without its weight or the reverse, a shape that does not fit, or a parametrization that
            is no mask.
    """
    resolved: dict[str, torch.Tensor] = {}
    for name, tensor in state.items():
        match = _PARAMETRIZATION.fullmatch(name)
        if match:
            plain = match["owner"] + match["name"]
            if match["rest"] == "original":
                masks = _find_parametrization_masks(state, match)
                if not masks:
                    # torch.ao.pruning leaves masks out of state dicts: the weight as it is would undo the pruning.
                    raise CheckpointError(
                        f"{name}: a parametrized weight whose mask is not in the file; call sparsifier.squash_mask() "
                        "before saving, or pass the live model"
                    )
                resolved[plain] = _masked(tensor, masks, plain)
            elif not re.fullmatch(r"\d+\.mask", match["rest"]):
                raise CheckpointError(
                    f"{name}: a parametrization that is no mask; make it permanent with "
                    "torch.nn.utils.parametrize.remove_parametrizations and save again"
                )
            elif f"{match['owner']}parametrizations.{match['name']}.original" not in state:
                raise CheckpointError(f"{name}: a mask, but {plain}'s own values are missing")
        elif name.endswith("_orig") and f"{name[:-5]}_mask" in state:
            plain = name.removesuffix("_orig")
            resolved[plain] = _masked(tensor, [state[f"{plain}_mask"]], plain)
        elif not (name.endswith("_mask") and f"{name[:-5]}_orig" in state):
            resolved[name] = tensor
    return resolved


def load_state(model: nn.Module, state: Mapping[str, torch.Tensor]) -> None:
    """Load a state dict into a model, or say everything that does not fit in one message.

    Example:
        >>> load_state(model, read_checkpoint("pruned.pt"))        # doctest: +SKIP

    Args:
        model: receives the values.
        state: name -> tensor, as from `read_checkpoint`.

    Raises:
        CheckpointError: names are missing or unexpected, or shapes differ; the model is left as it was.
    """
    own = model.state_dict()
    missing = [name for name in own if name not in state]
    # Batch-norm's counter is absent from checkpoints of other frameworks and does not enter inference.
    missing = [name for name in missing if not name.endswith("num_batches_tracked")]
    unexpected = [name for name in state if name not in own]
    misfits = [
        f"{name} {tuple(state[name].shape)} for {tuple(own[name].shape)}"
        for name in own
        if name in state and state[name].shape != own[name].shape
    ]
    problems = []
    if missing:
        problems.append(f"{len(missing)} of the model's {len(own)} tensors are missing ({_some(missing)})")
    if unexpected:
        problems.append(
            f"{len(unexpected)} of the checkpoint's {len(state)} tensors are unknown to the model ({_some(unexpected)})"
        )
    if misfits:
        problems.append(f"{len(misfits)} shapes differ ({_some(misfits)})")
    if problems:
        raise CheckpointError(
            "the checkpoint does not fit the model: "
            + "; ".join(problems)
            + ". Check the model's name and its arguments."
        )
    model.load_state_dict(dict(state), strict=False)


def read_torch_file(path: Path) -> Any:
    """What `torch.save` wrote, if it is tensors and plain containers; anything else gives one error.

    Example:
        >>> read_torch_file("inputs.pt").shape                    # doctest: +SKIP
        torch.Size([8, 3, 32, 32])

    Raises:
        CheckpointError: the file is damaged, or could be read only by running code from it.
        OSError: the file does not exist or cannot be read.
    """
    try:
        zipped = zipfile.is_zipfile(path)
        if zipped and _is_torchscript(path):
            raise CheckpointError(
                f"{path}: a TorchScript archive, which holds code; save the model's state_dict() instead"
            )
        return torch.load(path, map_location="cpu", weights_only=True, mmap=zipped or None)
    except (CheckpointError, OSError):
        raise
    except pickle.UnpicklingError as error:
        stranger = re.search(r"(?:Unsupported (?:global|class)|GLOBAL) ([\w.]+)", str(error))
        if stranger:
            raise CheckpointError(
                f"{path}: holds a Python object ({stranger[1]}), and reading it would run code from the file. "
                "Where the file comes from, save only the weights: torch.save(model.state_dict(), path)"
            ) from None
        raise CheckpointError(f"{path}: neither a safetensors file nor a readable PyTorch checkpoint") from None
    except Exception as error:
        # A damaged file can make torch.load raise nearly anything: struct.error, AssertionError, KeyError, …
        first_line = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
        raise CheckpointError(
            f"{path}: neither a safetensors file nor a readable PyTorch checkpoint ({first_line})"
        ) from None


def _looks_like_safetensors(path: Path, head: bytes) -> bool:
    if path.suffix == ".safetensors" and not head.startswith(b"PK"):
        return True
    return len(head) == 9 and head[8:9] == b"{" and int.from_bytes(head[:8], "little") < 2**32


def _is_torchscript(path: Path) -> bool:
    try:
        with zipfile.ZipFile(path) as archive:
            return any(name.endswith("/constants.pkl") for name in archive.namelist())
    except (zipfile.BadZipFile, OSError, NotImplementedError, UnicodeDecodeError):
        return False


def _find_state_dict(loaded: Any, path: Path) -> dict[str, torch.Tensor]:
    if not isinstance(loaded, Mapping):
        raise CheckpointError(f"{path}: holds a {type(loaded).__name__}, not a state dict; save model.state_dict()")
    if not any(isinstance(value, torch.Tensor) for value in loaded.values()):
        for wrapper in _WRAPPERS:
            if isinstance(loaded.get(wrapper), Mapping):
                return _find_state_dict(loaded[wrapper], path)
    tensors = {str(name): value for name, value in loaded.items() if isinstance(value, torch.Tensor)}
    if not tensors:
        raise CheckpointError(
            f"{path}: no tensors at the top level and none under {', '.join(_WRAPPERS)}; "
            f"it holds {_some([str(key) for key in loaded])}"
        )
    return tensors


def _strip_prefixes(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    changed = True
    while changed:
        changed = False
        for prefix in _PREFIXES:
            if state and all(name.startswith(prefix) for name in state):
                state = {name.removeprefix(prefix): tensor for name, tensor in state.items()}
                changed = True
    return state


def _find_parametrization_masks(state: Mapping[str, torch.Tensor], match: re.Match[str]) -> list[torch.Tensor]:
    stem = f"{match['owner']}parametrizations.{match['name']}."
    return [
        tensor
        for name, tensor in state.items()
        if name.startswith(stem) and re.fullmatch(r"\d+\.mask", name[len(stem) :])
    ]


def _masked(weight: torch.Tensor, masks: list[torch.Tensor], name: str) -> torch.Tensor:
    for mask in masks:
        if mask.dim() < weight.dim():
            # torch.ao's structured masks hold one flag per output row.
            mask = mask.reshape(mask.shape + (1,) * (weight.dim() - mask.dim()))
        try:
            mask = mask.expand(weight.shape)
        except RuntimeError:
            raise CheckpointError(
                f"{name}: a mask of shape {tuple(mask.shape)} for a weight of shape {tuple(weight.shape)}"
            ) from None
        # Not a product: a removed weight that is infinite or NaN must become zero.
        weight = torch.where(mask != 0, weight * mask.to(weight.dtype), torch.zeros((), dtype=weight.dtype))
    return weight


def _some(names: list[str], count: int = 3) -> str:
    return ", ".join(names[:count]) + (", …" if len(names) > count else "")
