"""How a model, its weights and its inputs are named on the command line."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
import yaml
from torch import nn

from sparse_engine.cli._common import UsageError
from sparse_engine.errors import CheckpointError
from sparse_engine.io import is_spx, load_state, read_checkpoint

ModelOption = Annotated[
    str | None,
    typer.Option(
        "--model",
        help="A built-in model (resnet50, vgg16_bn, mlp, …), torchvision:NAME, timm:NAME, "
        "or your own: package.module:factory or file.py:factory.",
        show_default=False,
    ),
]
ArgOption = Annotated[
    list[str] | None,
    typer.Option(
        "--arg", metavar="KEY=VALUE", help="Argument for the model's constructor; repeatable.", show_default=False
    ),
]
CheckpointOption = Annotated[
    Path | None,
    typer.Option("--checkpoint", help="The model's weights: .pt, .pth or .safetensors.", show_default=False),
]
ShapeOption = Annotated[
    list[str] | None,
    typer.Option(
        "--input-shape",
        metavar="N,C,H,W",
        help="Shape of an example input, batch first; repeat for several inputs.",
        show_default=False,
    ),
]

_LIBRARIES = ("torchvision", "timm")


def build_model(name: str | None, arguments: Sequence[str] | None, checkpoint: Path | None) -> nn.Module:
    """Build the model that `--model`, `--arg` and `--checkpoint` name, in evaluation mode.

    Example:
        >>> build_model("resnet20", ["num_classes=10"], Path("pruned.pt"))            # doctest: +SKIP

    Args:
        name: a built-in name, `torchvision:NAME`, `timm:NAME`, `package.module:factory` or `file.py:factory`. The last
            two import and run the user's own Python code.
        arguments: `key=value`; values are read as YAML (numbers, true, [lists]).
        checkpoint: weights to load, or None to keep the initial ones.

    Returns:
        The model.

    Raises:
        UsageError: the name leads nowhere, an argument is malformed, or the factory gives no `nn.Module`.
        CheckpointError: the weights cannot be read or do not fit.
    """
    if name is None:
        raise UsageError(
            "--model is missing: a checkpoint holds weights, not the network that uses them. "
            "Name a built-in model (--model resnet50) or your own (--model package.module:factory)"
        )
    options = parse_arguments(arguments)
    # Reading comes first: a missing file should not cost the building of a large model.
    state = None if checkpoint is None else _read_weights(checkpoint)
    library, separator, factory = name.rpartition(":")
    if separator and library not in _LIBRARIES:
        model = _call(_find_factory(library, factory), name, options)
    else:
        from sparse_engine.train.models import build

        model = build(name, **options)
    if state is not None:
        load_state(model, state)
    return model.eval()


def parse_arguments(arguments: Sequence[str] | None) -> dict[str, Any]:
    """`["depth=20", "widths=[16, 32]"]` -> `{"depth": 20, "widths": [16, 32]}`."""
    options: dict[str, Any] = {}
    for argument in arguments or ():
        key, separator, text = argument.partition("=")
        if not separator or not key.isidentifier():
            raise UsageError(f"--arg {argument!r}: write KEY=VALUE, for example --arg num_classes=10")
        if key in options:
            raise UsageError(f"--arg {key} is given twice")
        try:
            options[key] = yaml.safe_load(text)
        except yaml.YAMLError:
            raise UsageError(f"--arg {argument!r}: the value is not valid YAML; quote it") from None
    return options


def parse_shapes(shapes: Sequence[str] | None) -> list[tuple[int, ...]]:
    """`["1,3,224,224"]` or `["1x3x224x224"]` -> `[(1, 3, 224, 224)]`."""
    parsed = []
    for text in shapes or ():
        parts = text.lower().replace("x", ",").split(",")
        if not all(part.strip().isdigit() for part in parts):
            raise UsageError(f"--input-shape {text!r}: write sizes with commas, batch first, for example 1,3,224,224")
        sizes = tuple(int(part) for part in parts)
        if 0 in sizes[1:]:
            raise UsageError(f"--input-shape {text!r}: a size of 0 holds nothing")
        parsed.append(sizes)
    return parsed


def example_inputs(name: str, shapes: Sequence[str] | None, model: nn.Module, seed: int = 0) -> list[torch.Tensor]:
    """Random example inputs of the given shapes, or of the shape that a well-known model takes.

    Raises:
        UsageError: no shape is given and none is known for the model.
    """
    sizes = parse_shapes(shapes) or [_known_shape(name, model)]
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator) for shape in sizes]


def _known_shape(name: str, model: nn.Module) -> tuple[int, ...]:
    library, _, own_name = name.rpartition(":")
    first = next((module for module in model.modules() if isinstance(module, nn.Conv2d | nn.Linear)), None)
    if library == "timm" and isinstance(getattr(model, "default_cfg", None), dict):
        return (1, *model.default_cfg["input_size"])
    if library in ("", "torchvision") and isinstance(first, nn.Conv2d):
        cifar = library == "" and (own_name.endswith("_cifar") or type(model).__name__ == "CifarResNet")
        side = 32 if cifar else 299 if own_name == "inception_v3" else 224
        return (1, first.in_channels, side, side)
    if own_name == "mlp" and isinstance(first, nn.Linear):
        return (1, first.in_features)
    raise UsageError(f"the input shape of {name} is not known; give it, batch first: --input-shape 1,3,224,224")


def _read_weights(checkpoint: Path) -> dict[str, torch.Tensor]:
    if is_spx(checkpoint):
        raise CheckpointError(f"{checkpoint}: is already an executable; use it with `sparse-engine run` or `bench`")
    return read_checkpoint(checkpoint)


def _find_factory(module_name: str, factory: str) -> Any:
    module = _import_file(Path(module_name)) if module_name.endswith(".py") else _import_module(module_name)
    found: Any = module
    for part in factory.split("."):
        if not hasattr(found, part):
            names = [name for name in dir(module) if not name.startswith("_") and callable(getattr(module, name))]
            raise UsageError(f"{module_name} has no {factory!r}; it has {', '.join(names[:12]) or 'nothing callable'}")
        found = getattr(found, part)
    if not callable(found) and not isinstance(found, nn.Module):
        raise UsageError(f"{module_name}:{factory} is a {type(found).__name__}; a function, class or module is needed")
    return found


def _import_module(name: str) -> Any:
    # Installed scripts do not have the current folder on the path; `python -m` and users expect it.
    if "" not in sys.path and str(Path.cwd()) not in sys.path:
        sys.path.insert(0, str(Path.cwd()))
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is not None and (name == error.name or name.startswith(f"{error.name}.")):
            raise UsageError(
                f"there is no Python module {error.name!r}; run where it can be imported, or give file.py:factory"
            ) from None
        raise UsageError(f"importing {name} failed: it needs {error.name!r}, which is not installed") from error
    except ValueError as error:
        raise UsageError(f"{name!r} is no module name: {error}") from None


def _import_file(path: Path) -> Any:
    if not path.is_file():
        raise FileNotFoundError(2, "No such file", str(path))
    name = f"_sparse_engine_user_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise UsageError(f"{path}: is no Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    sys.path.insert(0, str(path.resolve().parent))
    try:
        spec.loader.exec_module(module)
    except SyntaxError as error:
        raise UsageError(f"{path}, line {error.lineno}: {error.msg}") from error
    return module


def _call(factory: Any, name: str, options: dict[str, Any]) -> nn.Module:
    if isinstance(factory, nn.Module):
        model = factory
    else:
        try:
            inspect.signature(factory).bind(**options)
        except TypeError as error:
            raise UsageError(f"{name}: {error}; pass arguments as --arg KEY=VALUE") from None
        except ValueError:  # callables without a signature, such as builtins
            pass
        model = factory(**options)
    if not isinstance(model, nn.Module):
        raise UsageError(f"{name} gave a {type(model).__name__}, not a torch.nn.Module")
    return model
