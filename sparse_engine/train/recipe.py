"""Recipes: what a training run does, as data. YAML in, checked dataclasses out, one clear error for anything else."""

from __future__ import annotations

import dataclasses
import difflib
import functools
import re
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any

from sparse_engine.errors import RecipeError, SparseEngineError
from sparse_engine.prune.criteria import CRITERIA
from sparse_engine.structure import Block, Channel, Structure, Unstructured


@dataclass
class ModelPart:
    """The network: a name of :mod:`sparse_engine.train.models` and options for its constructor."""

    name: str = "mlp"
    options: dict[str, Any] = field(default_factory=dict)
    init: str = "default"  # or "zero": the ZerO initialisation
    checkpoint: str | None = None  # safetensors file to start from


@dataclass
class DataPart:
    """How the data are used: augmentation, how many samples, and the share held out for validation."""

    augment: bool | str = False
    limit: int | None = None
    validation: float = 0.0
    label_noise: float = 0.0  # share of training labels replaced by random ones


@dataclass
class TrainPart:
    """The training proper: epochs, batches, optimiser and learning rate."""

    epochs: int = 10
    batch_size: int = 64
    optimizer: str = "sgd"  # sgd, adam, adamw
    learning_rate: float = 0.1
    momentum: float = 0.9
    weight_decay: float = 5e-4
    nesterov: bool = False
    schedule: str = "multistep"  # constant, multistep, cosine
    milestones: list[float] = field(default_factory=lambda: [0.5, 0.75])
    gamma: float = 0.1
    warmup_epochs: float = 0.0
    clip_gradients: float | None = None
    amp: bool = False
    sparse_kernels: str = "auto"  # auto, always, never
    test_every: int = 1  # epochs between looks at the test set; 0: only when the run is over


@dataclass
class LossPart:
    """The loss: cross_entropy, cs_kd, ps_kd, dlb or kd (a frozen teacher)."""

    name: str = "cross_entropy"
    weight: float = 1.0  # λ of CS-KD, α of DLB
    alpha: float | None = None  # α_T of PS-KD (0.8), share of the teacher in kd (None: by the fraction kept)
    temperature: float | None = None  # None: the paper's
    label_smoothing: float = 0.0  # of the hard part of cross_entropy, cs_kd and kd
    final_label_smoothing: float | None = None


@dataclass
class TeacherPart:
    """A teacher trained on the full data before anything else; the same network when no model is named."""

    epochs: int = 0
    model: ModelPart | None = None
    checkpoint: str | None = None


@dataclass
class CoresetPart:
    """Which part of the data is trained on: random, forgetting, el2n, grand, margin, herding, k_centre or infobatch."""

    score: str = "random"
    fraction: float = 1.0
    keep: str = "hard"  # hard, easy, random
    balance: bool = True
    epochs: int = 5  # of the scoring runs
    runs: int = 1
    updates: str = "epochs"  # or "iterations": as many optimiser steps as on the full data


@dataclass
class PretrainPart:
    """Training before pruning, with learned gates or without."""

    epochs: int = 0
    gates: str = "none"  # none, bernoulli, continuous, str, hard_concrete
    initial: float = 0.9  # probability (or openness) of every gate at the start
    variance_penalty: float = 1e-4  # λ1, of Σ p (1 − p)
    size_penalty: float = 1e-4  # λ2, of Σ p
    penalty_warmup: float = 0.0  # share of the epochs during which the penalties grow from 0
    gate_learning_rate: float = 0.05  # of the gates' own Adam optimiser
    loss: str | None = None  # that of the recipe when None


@dataclass
class PrunePart:
    """What is removed before the training proper."""

    criterion: str = "magnitude"
    sparsity: float | None = 0.9
    structure: str = "unstructured"
    scope: str = "global"
    distribution: str | dict[str, float] | None = None
    ignore: list[str] = field(default_factory=list)
    rounds: int | None = None
    keep_one: bool = False
    allow_collapse: bool = False
    options: dict[str, Any] = field(default_factory=dict)  # of the criterion, e.g. steps, mode
    loss: str | None = None  # that of the recipe when None; "cross_entropy" makes EPSD its baseline SC


@dataclass
class DynamicPart:
    """Masks that change during training: none, rigl, set, granet, gradual or iterative."""

    name: str = "none"
    every: int = 100  # optimiser steps between changes
    fraction: float = 0.3  # of the kept weights, replaced at the first change
    stop: float = 0.75  # share of training after which the masks rest
    initial_sparsity: float = 0.0  # granet and gradual start there
    begin: float = 0.0  # share of training at which granet and gradual start
    rounds: int = 5  # iterative


@dataclass
class PostPart:
    """Help for very sparse networks, annealed away during training and then removed."""

    soft_activations: bool = False
    skip_connections: bool = False
    until: float = 0.75  # share of training at which the network is the plain one


@dataclass
class StpPart:
    """Stimulative-training-guided pruning (arXiv 2403.06417): a search, while training, for the subnet that is kept."""

    target: float = 0.5  # fraction of the full cost that may be left; milliseconds for cost latency
    cost: str = "flops"  # flops, parameters, latency
    weight: float = 1.0  # λ, of the subnet's loss
    temperature: float = 1.0
    divergence: str = "kl"  # or "normalised": logits brought to mean 0 and deviation 1 on both sides first
    warmup: float = 0.1  # share of training with random subnets, before the order of the units is fixed
    search: float = 0.6  # share of training at which the widths have reached the target, by force if need be
    settle: float = 0.75  # share of training at which the pool is down to `members`
    pool: int = 12  # depth tuples at most: the deepest, the rest drawn at random
    members: int = 1  # of the pool that stay to the end; the one that agrees best is the result
    rounds: int = 2  # samples of every (group, depth) before a cut
    step: float | None = None  # share of the full cost that one cut saves; None: what the number of steps allows
    floor: float = 0.1  # share of its units that every group keeps (at least one)
    guidance: bool = True  # False: random cuts instead of those with the least divergence per cost saved
    width: bool = True  # False: search the depth alone
    depth: bool = True  # False: search the widths alone
    expansion: bool = True  # False: no larger subnets beside the current one
    calibration: int = 50  # batches for the statistics of batch norm at the end


@dataclass
class ConvertPart:
    """The executable at the end."""

    enabled: bool = True
    tune: bool = True
    batch_size: int = 64
    tolerance: float = 1e-3  # share of test predictions that may differ from the trained model's


@dataclass
class DiagnosticsPart:
    """What ``sparse-engine report`` shows of a run beside its curves; computed only when the run has a folder."""

    enabled: bool = True
    samples: int = 128  # training samples on which gradients and the loss surface are taken, a batch at most
    points: int = 11  # of the loss surface, per side


@dataclass
class Recipe:
    """A whole run. Every part has defaults; :func:`load_recipe` reads one from YAML.

    Example::

        recipe = load_recipe("epsd", {"prune.sparsity": 0.95, "train.epochs": 5})
    """

    name: str = "recipe"
    description: str = ""
    seed: int = 0
    model: ModelPart = field(default_factory=ModelPart)
    data: DataPart = field(default_factory=DataPart)
    train: TrainPart = field(default_factory=TrainPart)
    loss: LossPart = field(default_factory=LossPart)
    teacher: TeacherPart | None = None
    coreset: CoresetPart | None = None
    pretrain: PretrainPart | None = None
    prune: PrunePart | None = None
    dynamic: DynamicPart = field(default_factory=DynamicPart)
    post: PostPart = field(default_factory=PostPart)
    stp: StpPart | None = None
    convert: ConvertPart = field(default_factory=ConvertPart)
    diagnostics: DiagnosticsPart = field(default_factory=DiagnosticsPart)

    def to_dict(self) -> dict[str, Any]:
        """Plain data, as it would be written in YAML."""
        return dataclasses.asdict(self)


_CHOICES: dict[str, tuple[str, ...]] = {
    "model.init": ("default", "zero"),
    "train.optimizer": ("sgd", "adam", "adamw"),
    "train.schedule": ("constant", "multistep", "cosine"),
    "train.sparse_kernels": ("auto", "always", "never"),
    "loss.name": ("cross_entropy", "cs_kd", "ps_kd", "dlb", "kd"),
    "pretrain.gates": ("none", "bernoulli", "continuous", "str", "hard_concrete"),
    "pretrain.loss": ("cross_entropy", "cs_kd", "ps_kd", "dlb", "kd"),
    "prune.criterion": tuple(CRITERIA),
    "prune.scope": ("global", "layer"),
    "prune.loss": ("cross_entropy", "cs_kd", "ps_kd", "dlb", "kd"),
    "coreset.score": ("random", "forgetting", "el2n", "grand", "margin", "herding", "k_centre", "infobatch"),
    "coreset.keep": ("hard", "easy", "random"),
    "coreset.updates": ("epochs", "iterations"),
    "stp.cost": ("flops", "parameters", "latency"),
    "stp.divergence": ("kl", "normalised"),
    "dynamic.name": ("none", "rigl", "set", "granet", "gradual", "iterative"),
}

# key: (lowest, highest), both allowed
_RANGES: dict[str, tuple[float, float]] = {
    "data.validation": (0, 0.9),
    "data.label_noise": (0, 1),
    "data.limit": (1, float("inf")),
    "train.epochs": (0, float("inf")),
    "train.batch_size": (1, float("inf")),
    "train.learning_rate": (0, float("inf")),
    "train.momentum": (0, 1),
    "train.weight_decay": (0, float("inf")),
    "train.gamma": (0, 1),
    "train.test_every": (0, float("inf")),
    "loss.alpha": (0, 1),
    "loss.label_smoothing": (0, 1),
    "loss.final_label_smoothing": (0, 1),
    "teacher.epochs": (0, float("inf")),
    "coreset.fraction": (0, 1),
    "coreset.epochs": (1, float("inf")),
    "coreset.runs": (1, float("inf")),
    "pretrain.epochs": (0, float("inf")),
    "pretrain.initial": (0, 1),
    "pretrain.penalty_warmup": (0, 1),
    "prune.sparsity": (0, 1),
    "prune.rounds": (1, float("inf")),
    "dynamic.every": (1, float("inf")),
    "dynamic.fraction": (0, 1),
    "dynamic.stop": (0, 1),
    "dynamic.begin": (0, 1),
    "dynamic.initial_sparsity": (0, 1),
    "dynamic.rounds": (1, float("inf")),
    "post.until": (0, 1),
    "stp.target": (0, float("inf")),
    "stp.weight": (0, float("inf")),
    "stp.warmup": (0, 1),
    "stp.search": (0, 1),
    "stp.settle": (0, 1),
    "stp.floor": (0, 1),
    "stp.pool": (1, float("inf")),
    "stp.members": (1, float("inf")),
    "stp.rounds": (1, float("inf")),
    "stp.calibration": (1, float("inf")),
    "convert.batch_size": (1, float("inf")),
    "diagnostics.samples": (1, float("inf")),
    "diagnostics.points": (3, 101),
}


def recipe_names() -> list[str]:
    """The recipes that come with the package."""
    folder = resources.files("sparse_engine.train.recipes")
    return sorted(entry.name.removesuffix(".yaml") for entry in folder.iterdir() if entry.name.endswith(".yaml"))


def load_recipe(source: str | Path | Mapping[str, Any] | Recipe, changes: Mapping[str, Any] | None = None) -> Recipe:
    """Read a recipe and apply changes to it.

    Example::

        load_recipe("epsd", {"prune.sparsity": 0.95})
        load_recipe("my_recipe.yaml")

    Args:
        source: a name of :func:`recipe_names`, a YAML file, the parsed content of one, or a Recipe.
        changes: dotted key to value, e.g. ``{"train.epochs": 3}``; texts are read as YAML values, as ``--set`` gives
            them.

    Returns:
        The checked recipe.

    Raises:
        RecipeError: for an unknown recipe or key, a wrong type, a value outside its range, or a contradiction.
    """
    content = source.to_dict() if isinstance(source, Recipe) else _read(source)
    label = source if isinstance(source, str | Path) else "recipe"
    for key, value in (changes or {}).items():
        _set(content, key, value)
    recipe = _build(Recipe, content, str(label), "")
    _check(recipe)
    return recipe


def parse_setting(text: str) -> tuple[str, Any]:
    """``"train.epochs=3"`` as ``("train.epochs", 3)``; the value is read as YAML.

    Raises:
        RecipeError: when there is no ``=``.
    """
    key, equals, value = text.partition("=")
    if not equals or not key.strip():
        raise RecipeError(f"setting {text!r} has to look like key=value, e.g. train.epochs=3")
    return key.strip(), _yaml(value, f"value of {key.strip()}")


def _read(source: str | Path | Mapping[str, Any]) -> dict[str, Any]:
    if isinstance(source, Mapping):
        return _plain(source)
    names = recipe_names()
    if str(source) in names:
        text = resources.files("sparse_engine.train.recipes").joinpath(f"{source}.yaml").read_text(encoding="utf-8")
    else:
        path = Path(source).expanduser()
        if not path.is_file():
            near = difflib.get_close_matches(str(source), names, 1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise RecipeError(f"recipe {str(source)!r} is neither a file nor one of {', '.join(names)}{hint}")
        text = path.read_text(encoding="utf-8")
    content = _yaml(text, str(source))
    if not isinstance(content, dict):
        raise RecipeError(f"recipe {source} has to be a mapping of keys; it is a {type(content).__name__}")
    return content


def _yaml(text: str, what: str) -> Any:
    import yaml

    try:
        return yaml.load(text, _loader())
    except yaml.YAMLError as error:
        raise RecipeError(f"{what} is not valid YAML: {' '.join(str(error).split())}") from None


@functools.cache
def _loader() -> type:
    """A safe loader with the numbers of YAML 1.2: to YAML 1.1, 5e-4 is a text and the structure 2:4 is 124 seconds."""
    import yaml

    class Loader(yaml.SafeLoader):
        pass

    numbers = {f"tag:yaml.org,2002:{kind}" for kind in ("int", "float")}
    Loader.yaml_implicit_resolvers = {
        first: [entry for entry in entries if entry[0] not in numbers]
        for first, entries in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }
    digits = list("-+.0123456789")
    whole = re.compile(r"[-+]?(0|[1-9][0-9]*)\Z")
    real = re.compile(r"[-+]?(([0-9]+\.?[0-9]*|\.[0-9]+)([eE][-+]?[0-9]+)?|\.(inf|Inf|INF))\Z|\.(nan|NaN|NAN)\Z")
    Loader.add_implicit_resolver("tag:yaml.org,2002:int", whole, digits)
    Loader.add_implicit_resolver("tag:yaml.org,2002:float", real, digits)
    return Loader


def _plain(value: Any) -> Any:
    return {str(k): _plain(v) for k, v in value.items()} if isinstance(value, Mapping) else value


def _set(content: dict[str, Any], key: str, value: Any) -> None:
    *parents, last = key.split(".")
    place = content
    for parent in parents:
        if place.get(parent) is None:
            place[parent] = {}
        place = place[parent]
        if not isinstance(place, dict):
            raise RecipeError(f"setting {key!r}: {parent!r} is not a group of keys")
    place[last] = _yaml(value, f"value of {key}") if isinstance(value, str) else value


def _build(kind: type, content: Any, label: str, prefix: str) -> Any:
    if not isinstance(content, Mapping):
        where = prefix.rstrip(".") or "the recipe"
        raise RecipeError(f"{label}: {where} has to be a group of keys; got {content!r}")
    hints = typing.get_type_hints(kind)
    values = {}
    for key, value in content.items():
        if key not in hints:
            near = difflib.get_close_matches(str(key), hints, 1)
            hint = f"; did you mean {prefix}{near[0]}?" if near else ""
            raise RecipeError(f"{label}: unknown key {prefix}{key}{hint} (known: {', '.join(hints)})")
        values[key] = _convert(hints[key], value, label, prefix + str(key))
    return kind(**values)


def _convert(hint: Any, value: Any, label: str, key: str) -> Any:
    options = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    if value is None and type(None) in options:
        return None
    for option in options:
        if dataclasses.is_dataclass(option):
            return _build(option, value, label, key + ".")
        origin = typing.get_origin(option) or option
        if origin is float and isinstance(value, int | float) and not isinstance(value, bool):
            return float(value)
        if origin is float and isinstance(value, str):
            try:
                return float(value)
            except ValueError:
                continue
        if origin is int and isinstance(value, float) and value.is_integer():
            return int(value)
        if origin is bool and isinstance(value, bool):
            return value
        if origin in (int, str) and isinstance(value, origin) and not isinstance(value, bool):
            return value
        if origin is list and isinstance(value, list):
            (inner,) = typing.get_args(option)
            return [_convert(inner, entry, label, f"{key}[{i}]") for i, entry in enumerate(value)]
        if origin is dict and isinstance(value, Mapping):
            return dict(value)
    names = " or ".join(
        getattr(typing.get_origin(o) or o, "__name__", str(o)).replace("NoneType", "null") for o in options
    )
    raise RecipeError(f"{label}: {key} is {value!r}; expected {names}")


def _check(recipe: Recipe) -> None:
    flat = _flat(recipe.to_dict())
    for key, choices in _CHOICES.items():
        value = flat.get(key)
        if value is not None and value not in choices:
            raise RecipeError(f"{recipe.name}: {key} is {value!r}; it has to be one of {', '.join(choices)}")
    for key, (low, high) in _RANGES.items():
        value = flat.get(key)
        if value is not None and not low <= value <= high:
            span = f"at least {low:g}" if high == float("inf") else f"in {low:g}..{high:g}"
            hint = "; it is a fraction, not per cent" if key == "prune.sparsity" and value > 1 else ""
            raise RecipeError(f"{recipe.name}: {key} is {value:g}; it has to be {span}{hint}")
    if recipe.prune is not None:
        try:
            Structure.parse(recipe.prune.structure)
        except SparseEngineError as error:
            raise RecipeError(f"{recipe.name}: prune.structure: {error}") from None
        try:
            CRITERIA[recipe.prune.criterion](**recipe.prune.options)
        except (TypeError, SparseEngineError) as error:
            text = str(error).rpartition("__init__() ")[2]
            raise RecipeError(f"{recipe.name}: prune.options of criterion {recipe.prune.criterion}: {text}") from None
        _check_dynamic(recipe)
        if recipe.prune.sparsity is None and recipe.prune.structure in ("unstructured", "channel"):
            raise RecipeError(f"{recipe.name}: prune.sparsity is needed for structure {recipe.prune.structure}")
    elif recipe.dynamic.name != "none":
        raise RecipeError(
            f"{recipe.name}: dynamic.name is {recipe.dynamic.name!r}, which needs a prune: part with a sparsity"
        )
    smoothed = recipe.loss.label_smoothing or recipe.loss.final_label_smoothing
    if smoothed and recipe.loss.name not in ("cross_entropy", "cs_kd", "kd"):
        raise RecipeError(
            f"{recipe.name}: loss.label_smoothing is not known to loss {recipe.loss.name!r}; it goes with "
            "cross_entropy, cs_kd and kd"
        )
    losses = {"loss.name": recipe.loss.name}
    losses |= {"pretrain.loss": recipe.pretrain.loss} if recipe.pretrain else {}
    losses |= {"prune.loss": recipe.prune.loss} if recipe.prune else {}
    taught = [key for key, name in losses.items() if name == "kd"]
    if taught and recipe.teacher is None:
        raise RecipeError(f"{recipe.name}: {taught[0]} is 'kd', which needs a teacher: part (epochs or a checkpoint)")
    if taught and recipe.teacher is not None and not (recipe.teacher.epochs or recipe.teacher.checkpoint):
        raise RecipeError(f"{recipe.name}: teacher needs epochs > 0 or a checkpoint")
    if recipe.coreset is not None and recipe.coreset.fraction <= 0:
        raise RecipeError(f"{recipe.name}: coreset.fraction is {recipe.coreset.fraction}; it has to be above 0")
    if recipe.stp is not None:
        check_stp(recipe.stp)
        if recipe.prune is not None or recipe.loss.name != "cross_entropy" or recipe.coreset is not None:
            raise RecipeError(
                f"{recipe.name}: stp: chooses what to remove and has a loss of its own; leave out prune:, coreset: and "
                "loss.name"
            )
    if any(not 0 <= milestone <= 1 for milestone in recipe.train.milestones):
        raise RecipeError(
            f"{recipe.name}: train.milestones are shares of training, 0..1; got {recipe.train.milestones}"
        )


def _check_dynamic(recipe: Recipe) -> None:
    """What would otherwise be found at the first change of the masks, in the middle of training."""
    part, pruning = recipe.dynamic, recipe.prune
    if part.name == "none" or pruning is None:
        return
    structure = Structure.parse(pruning.structure)
    if not isinstance(structure, Unstructured | Block | Channel):
        raise RecipeError(
            f"{recipe.name}: dynamic.name is {part.name!r}, but masks of structure {structure} cannot move yet; use "
            "unstructured, block or channel"
        )
    if pruning.sparsity is None:
        raise RecipeError(f"{recipe.name}: prune.sparsity is needed for dynamic.name {part.name}")
    if part.name in ("granet", "gradual") and not part.begin < part.stop:
        raise RecipeError(
            f"{recipe.name}: dynamic.begin={part.begin:g} has to be below dynamic.stop={part.stop:g}, or the sparsity "
            "is never reached"
        )


def check_stp(part: StpPart) -> None:
    """What ranges alone cannot say about the settings of STP.

    Raises:
        RecipeError: a contradiction.
    """
    if not 0 <= part.warmup < part.search <= part.settle <= 1:
        raise RecipeError(
            f"stp.warmup={part.warmup:g}, stp.search={part.search:g} and stp.settle={part.settle:g} have to be "
            "shares of "
            "training in this order"
        )
    if not part.width and not part.depth:
        raise RecipeError("stp.width and stp.depth are both false: nothing is left to search")
    if part.target <= 0 or (part.cost != "latency" and part.target > 1):
        raise RecipeError(
            f"stp.target is {part.target:g}; for {part.cost} it is the fraction of the full network that may be left, "
            "above 0 and at most 1"
        )


def _flat(content: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    out: dict[str, Any] = {}
    for key, value in content.items():
        if isinstance(value, Mapping):
            out.update(_flat(value, f"{prefix}{key}."))
        else:
            out[prefix + key] = value
    return out
