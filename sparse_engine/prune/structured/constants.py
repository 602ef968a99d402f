"""What a network computes no matter what its input is.

Exact zeros in weights make parts of later tensors constant: a convolution row of zeros yields its bias everywhere,
batch norm with scale 0 its shift. `propagate` follows such knowledge element by element through a captured program:
every tensor is unknown, known, or known in part, and each operator says what it knows of its result. Padding,
reshapes, concatenations and broadcasts need no special thought, because knowledge about elements moves exactly as the
elements do. Values are float64, so pushing a constant into a bias costs no accuracy.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx

from .capture import REDUCTIONS, VIEWS, Program, arguments, operator_name, shape_of

CONVOLUTIONS = frozenset(
    ["conv1d", "conv2d", "conv3d", "conv_transpose1d", "conv_transpose2d", "conv_transpose3d", "convolution"]
)

# results are the argument's elements, moved, repeated or dropped: what holds for values holds for knowledge about them
_MOVES = (VIEWS - {"_to_copy", "as_strided", "getitem", "to", "unfold"}) | {
    "clone",
    "roll",
    "flip",
    "repeat",
    "repeat_interleave",
    "pixel_shuffle",
    "pixel_unshuffle",
    "channel_shuffle",
    "cat",
    "stack",
    "concat",
    "concatenate",
    "tril",
    "triu",
    "index",
    "index_select",
    "upsample_nearest1d",
    "upsample_nearest2d",
    "upsample_nearest3d",
    "constant_pad_nd",
    "pad",
    "broadcast_tensors",
    "meshgrid",
    "hstack",
    "vstack",
}
# of the pointwise kind, but without the tag
_POINTWISE = frozenset(
    [
        "dropout",
        "alpha_dropout",
        "feature_dropout",
        "to",
        "_to_copy",
        "type_as",
        "relu6",
        "hardtanh",
        "hardswish",
        "hardsigmoid",
        "float",
        "double",
        "prelu",
    ]
)
_IDENTITIES = frozenset(
    [
        "dropout",
        "alpha_dropout",
        "feature_dropout",
        "to",
        "_to_copy",
        "type_as",
        "contiguous",
        "clone",
        "detach",
        "alias",
        "lift_fresh_copy",
        "float",
        "double",
    ]
)


@dataclass
class Partial:
    """A tensor of which some elements are known.

    Args:
        value: float64 (or the integer or bool tensor itself); meaningless where unknown.
        known: bool tensor of the same shape; None when every element is known.
    """

    value: Tensor
    known: Tensor | None = None

    def mask(self) -> Tensor:
        """Which elements are known."""
        return torch.ones((), dtype=torch.bool).expand(self.value.shape) if self.known is None else self.known


Knowledge = Partial | None | tuple[Any, ...]


def propagate(program: Program, tensors: dict[str, Tensor]) -> dict[fx.Node, Knowledge]:
    """What is known of every tensor of `program` when its parameters and buffers have the values `tensors`.

    Returns:
        node -> `Partial`, a tuple of such for operators with several results, or None for what depends on the input.
    """
    facts: dict[fx.Node, Knowledge] = dict.fromkeys(program.inputs)
    for node, name in program.state.items():
        facts[node] = Partial(tensors[name].detach().cpu())
    with torch.no_grad():
        for node in program.nodes:
            facts[node] = _simplify(_known(node, facts))
    return facts


def constant_indices(fact: Knowledge, dim: int, size: int) -> tuple[np.ndarray, np.ndarray]:
    """For each index of dimension `dim`: is the whole slice known and one single value, and which value.

    Returns:
        (bool vector, float64 vector) of length `size`; the value is 0 where the first is False.
    """
    if not isinstance(fact, Partial):
        return np.zeros(size, dtype=bool), np.zeros(size)
    value = as_double(fact.value).movedim(dim, 0).reshape(size, -1)
    if value.shape[1] == 0:
        return np.zeros(size, dtype=bool), np.zeros(size)
    uniform = value.amin(1) == value.amax(1)
    if fact.known is not None:
        uniform &= fact.known.movedim(dim, 0).reshape(size, -1).all(1)
    constant = value[:, 0] * 1.0
    uniform &= torch.isfinite(constant)
    return uniform.cpu().numpy(), torch.where(uniform, constant, torch.zeros_like(constant)).cpu().numpy()


def as_double(tensor: Tensor) -> Tensor:
    """Floating tensors in float64; integers and bools as they are."""
    return tensor.double() if tensor.is_floating_point() else tensor


def _simplify(fact: Knowledge) -> Knowledge:
    if isinstance(fact, tuple):
        return tuple(_simplify(item) for item in fact)
    if isinstance(fact, Partial) and fact.known is not None:
        if not bool(fact.known.any()):
            return None
        if bool(fact.known.all()):
            return Partial(fact.value)
    return fact


def _known(node: fx.Node, facts: dict[fx.Node, Knowledge]) -> Knowledge:
    if node.op == "get_attr":
        return None
    name = operator_name(node)
    if name == "getitem":
        source = facts[node.args[0]]  # type: ignore[index]
        return source[node.args[1]] if isinstance(source, tuple) else None  # type: ignore[index]
    operands = [facts[argument] for argument in node.all_input_nodes]
    if all(fact is None for fact in operands) and operands:
        return None
    if not isinstance(node.target, torch._ops.OpOverload):
        return None
    random = torch.Tag.nondeterministic_seeded in node.target.tags
    if random and name not in _IDENTITIES and name not in _RULES:
        return None
    if name in _IDENTITIES and not arguments(node).get("train", False):
        return _identity(node, facts)
    if all(isinstance(fact, Partial) and fact.known is None for fact in operands):
        return _evaluate(node, facts)
    rule = _RULES.get(name)
    if rule is not None:
        return rule(node, facts)
    if name in _MOVES:
        return _move(node, facts)
    if torch.Tag.pointwise in node.target.tags or name in _POINTWISE:
        return _pointwise(node, facts)
    if name in REDUCTIONS:
        return _through_unknown_mask(node, facts)
    return None


def _fact(facts: dict[fx.Node, Knowledge], argument: Any) -> Partial | None:
    fact = facts.get(argument) if isinstance(argument, fx.Node) else None
    return fact if isinstance(fact, Partial) else None


def _known_tensor(facts: dict[fx.Node, Knowledge], argument: Any) -> Tensor | None:
    fact = _fact(facts, argument)
    return fact.value if fact is not None and fact.known is None else None


def _call(node: fx.Node, convert: Callable[[fx.Node], Any], **override: Any) -> Any:
    args = fx.map_arg(node.args, convert)
    kwargs = dict(fx.map_arg(node.kwargs, convert))
    schema = getattr(node.target, "_schema", None)
    positions = {argument.name: i for i, argument in enumerate(schema.arguments)} if schema is not None else {}
    args = list(args)
    for key, value in override.items():
        if key in positions and positions[key] < len(args):
            args[positions[key]] = value
        elif key in positions:
            kwargs[key] = value
    # knowledge is not laid out in memory as the tensors were, so what was a view may need a copy here
    target = torch.ops.aten.reshape.default if operator_name(node) in ("view", "_unsafe_view") else node.target
    return target(*args, **kwargs)  # type: ignore[operator]


def _evaluate(node: fx.Node, facts: dict[fx.Node, Knowledge]) -> Knowledge:
    def value(argument: fx.Node) -> Any:
        return as_double(facts[argument].value)  # type: ignore[union-attr]

    try:
        result = _call(node, value)
    except (RuntimeError, TypeError, NotImplementedError, IndexError):
        return None  # an operator without a float64 form: nothing is claimed
    if isinstance(result, Tensor):
        return Partial(result.cpu())
    if isinstance(result, tuple | list):
        return tuple(Partial(item.cpu()) if isinstance(item, Tensor) else None for item in result)
    return None


def _identity(node: fx.Node, facts: dict[fx.Node, Knowledge]) -> Knowledge:
    return facts[node.args[0]]  # type: ignore[index]


def _values(facts: dict[fx.Node, Knowledge]) -> Callable[[fx.Node], Any]:
    """Known values, with zeros where nothing is known."""

    def convert(argument: fx.Node) -> Any:
        fact = facts[argument]
        if isinstance(fact, Partial):
            value = as_double(fact.value)
            return value if fact.known is None else value.masked_fill(~fact.known, 0)
        return torch.zeros((), dtype=torch.float64).expand(shape_of(argument) or ())

    return convert


def _unknowns(facts: dict[fx.Node, Knowledge]) -> Callable[[fx.Node], Tensor]:
    """1.0 where nothing is known, else 0.0."""

    def convert(argument: fx.Node) -> Tensor:
        fact = facts[argument]
        if isinstance(fact, Partial):
            return (~fact.mask()).float()
        return torch.ones(()).expand(shape_of(argument) or ())

    return convert


def _pack(value: Any, unknown: Any) -> Knowledge:
    if isinstance(value, Tensor):
        return Partial(value, unknown == 0)
    return tuple(_pack(v, u) for v, u in zip(value, unknown, strict=True))


def _move(node: fx.Node, facts: dict[fx.Node, Knowledge]) -> Knowledge:
    override = {"value": 0} if operator_name(node) in ("pad", "constant_pad_nd") else {}
    if operator_name(node) in ("index", "index_select"):
        return _index(node, facts)
    return _pack(_call(node, _values(facts)), _call(node, _unknowns(facts), **override))


def _index(node: fx.Node, facts: dict[fx.Node, Knowledge]) -> Knowledge:
    source, *_ = node.all_input_nodes
    if any(_known_tensor(facts, argument) is None for argument in node.all_input_nodes if argument is not source):
        return None
    values, unknowns = _values(facts), _unknowns(facts)

    def pick(convert: Callable[[fx.Node], Any]) -> Callable[[fx.Node], Any]:
        return lambda argument: convert(argument) if argument is source else facts[argument].value  # type: ignore[union-attr]

    return _pack(_call(node, pick(values)), _call(node, pick(unknowns)))


def _through_unknown_mask(node: fx.Node, facts: dict[fx.Node, Knowledge]) -> Knowledge:
    """For reductions: a result is known where everything it was made of is."""
    unknown = _unknowns(facts)(node.all_input_nodes[0])
    given = arguments(node)
    dims = given.get("dim")
    dims = [dims] if isinstance(dims, int) else list(dims) if dims is not None else list(range(unknown.ndim))
    keepdim = bool(given.get("keepdim", False))
    value = _call(node, _values(facts))
    if not isinstance(value, Tensor):
        return None
    reduced = unknown.amax(dims, keepdim=keepdim) if dims else unknown
    return Partial(value, reduced == 0) if value.shape == reduced.shape else None


def _pointwise(node: fx.Node, facts: dict[fx.Node, Knowledge]) -> Knowledge:
    try:
        value = _call(node, _values(facts))
    except (RuntimeError, TypeError, NotImplementedError):
        return None
    if not isinstance(value, Tensor):
        return None
    known = torch.ones((), dtype=torch.bool)
    unknowns = _unknowns(facts)
    for argument in node.all_input_nodes:
        mask = unknowns(argument) == 0
        if operator_name(node) == "prelu" and argument is not node.all_input_nodes[0]:
            mask = mask.all()
        known = known & mask
    known = known.expand(value.shape)
    if operator_name(node) in ("mul", "multiply"):
        for argument in node.all_input_nodes:  # zero times anything is zero
            fact = _fact(facts, argument)
            if fact is not None:
                known = known | ((fact.value == 0) & fact.mask()).expand(value.shape)
    return Partial(value, known)


def _batch_norm(node: fx.Node, facts: dict[fx.Node, Knowledge]) -> Knowledge:
    given = arguments(node)
    source = given["input"]
    shape = shape_of(source)
    if given.get("training", False) or shape is None:
        return None
    view = [1, -1] + [1] * (len(shape) - 2)

    def parameter(key: str, default: float) -> Tensor:
        tensor = _known_tensor(facts, given.get(key))
        return torch.full((shape[1],), default, dtype=torch.float64) if tensor is None else as_double(tensor)

    mean, var = parameter("running_mean", 0.0), parameter("running_var", 1.0)
    weight, bias = parameter("weight", 1.0), parameter("bias", 0.0)
    scale = weight / torch.sqrt(var + given["eps"])
    shift = bias - mean * scale
    scale, bias_view = scale.view(view), bias.view(view)
    value = torch.where(scale == 0, bias_view, _values(facts)(source) * scale + shift.view(view))
    known = ((_unknowns(facts)(source) == 0) | (scale == 0)).expand(value.shape)
    result = Partial(value, known)
    return (result, None, None) if isinstance(node.meta.get("val"), tuple | list) else result


def _layer_norm(node: fx.Node, facts: dict[fx.Node, Knowledge]) -> Knowledge:
    """Statistics mix the elements, so only a scale of zero leaves something known: the shift."""
    given = arguments(node)
    shape = shape_of(given["input"])
    weight = _known_tensor(facts, given.get("weight"))
    if shape is None or weight is None or not bool((weight == 0).any()):
        return None
    bias = _known_tensor(facts, given.get("bias"))
    if "normalized_shape" not in given:  # group norm: one scale per channel
        view = [1, -1] + [1] * (len(shape) - 2)
        weight = weight.view(view)
        bias = bias.view(view) if bias is not None else None
    value = torch.zeros(shape, dtype=torch.float64) if bias is None else as_double(bias).expand(shape)
    result = Partial(value, (weight == 0).expand(shape))
    return (result, None, None) if isinstance(node.meta.get("val"), tuple | list) else result


def _linear(node: fx.Node, facts: dict[fx.Node, Knowledge]) -> Knowledge:
    given = arguments(node)
    weight = _known_tensor(facts, given["weight"])
    shape = shape_of(node)
    if weight is None or shape is None or weight.ndim != 2:
        return None
    bias_argument = given.get("bias")
    bias = _known_tensor(facts, bias_argument)
    if bias is None and bias_argument is not None:
        return None
    source = _fact(facts, given["input"])
    usable = _wholly_known(source, -1, weight.shape[1])
    rows = ~(weight[:, ~usable] != 0).any(1)
    if not bool(rows.any()):
        return None
    value = torch.zeros(shape, dtype=torch.float64)
    if source is not None and bool(usable.any()) and bool((weight[rows][:, usable] != 0).any()):
        value[..., rows] = as_double(source.value)[..., usable] @ as_double(weight[rows][:, usable]).T
    if bias is not None:
        value[..., rows] += as_double(bias[rows])
    return Partial(value, rows.expand(shape))


def _convolution(node: fx.Node, facts: dict[fx.Node, Knowledge]) -> Knowledge:
    given = arguments(node)
    weight = _known_tensor(facts, given["weight"])
    source_node, shape = given["input"], shape_of(node)
    source_shape = shape_of(source_node)
    if weight is None or shape is None or source_shape is None or len(source_shape) != weight.ndim:
        return None
    bias_argument = given.get("bias")
    bias = _known_tensor(facts, bias_argument)
    if bias is None and bias_argument is not None:
        return None
    source = _fact(facts, source_node)
    groups = given["groups"]
    usable = _wholly_known(source, 1, source_shape[1])
    touched = connections(weight, groups, "transpose" in operator_name(node) or bool(given.get("transposed", False)))
    by_group = usable.view(groups, -1).repeat_interleave(touched.shape[0] // groups, 0)
    rows = ~(touched & ~by_group).any(1)
    if not bool(rows.any()):
        return None
    value = torch.zeros(shape, dtype=torch.float64)
    view = [1, -1] + [1] * (len(shape) - 2)
    if bool((touched & by_group)[rows].any()) and source is not None:
        known_source = torch.where(usable.view(view), as_double(source.value), torch.zeros((), dtype=torch.float64))
        computed = _call(
            node,
            lambda argument: (
                known_source
                if argument is source_node
                else as_double(weight)
                if argument is given["weight"]
                else as_double(bias)
            ),  # type: ignore[arg-type]
        )
        value = torch.where(rows.view(view), computed, value)
    elif bias is not None:
        value = value + torch.where(rows, as_double(bias), torch.zeros((), dtype=torch.float64)).view(view)
    return Partial(value, rows.view(view).expand(shape))


def connections(weight: Tensor, groups: int, transposed: bool) -> Tensor:
    """Which (output, input within its group) pairs of a convolution weight any tap connects: bool [M, K/groups]."""
    taps = (weight != 0).flatten(2).any(2) if weight.ndim > 2 else weight != 0
    if not transposed:
        return taps
    # a transposed convolution stores (K, M/groups); group i's inputs are rows i*K/groups ...
    inputs, outputs = taps.shape[0] // groups, taps.shape[1]
    return taps.view(groups, inputs, outputs).permute(0, 2, 1).reshape(groups * outputs, inputs)


def _wholly_known(source: Partial | None, dim: int, size: int) -> Tensor:
    if source is None:
        return torch.zeros(size, dtype=torch.bool)
    return source.mask().movedim(dim, 0).reshape(size, -1).all(1)


def _product(node: fx.Node, facts: dict[fx.Node, Knowledge]) -> Knowledge:
    """matmul, mm, bmm: an element is known where every term is known or has a factor known to be zero."""
    first, second = node.args[0], node.args[1]
    values, unknowns = _values(facts), _unknowns(facts)
    a, b = values(first), values(second)  # type: ignore[arg-type]
    unknown_a, unknown_b = unknowns(first), unknowns(second)  # type: ignore[arg-type]
    if a.ndim < 2 or b.ndim < 2:
        return None
    present_a, present_b = ((a != 0) | (unknown_a > 0)).float(), ((b != 0) | (unknown_b > 0)).float()
    unknown = unknown_a @ present_b + present_a @ unknown_b
    return Partial(a @ b, unknown == 0)


def _addmm(node: fx.Node, facts: dict[fx.Node, Knowledge]) -> Knowledge:
    given = arguments(node)
    if given.get("beta", 1) != 1 or given.get("alpha", 1) != 1:
        return None
    values, unknowns = _values(facts), _unknowns(facts)
    a, b, c = values(given["mat1"]), values(given["mat2"]), values(given["self"])
    unknown_a, unknown_b, unknown_c = unknowns(given["mat1"]), unknowns(given["mat2"]), unknowns(given["self"])
    present_a, present_b = ((a != 0) | (unknown_a > 0)).float(), ((b != 0) | (unknown_b > 0)).float()
    return Partial(c + a @ b, (unknown_c + unknown_a @ present_b + present_a @ unknown_b) == 0)


def _attention(node: fx.Node, facts: dict[fx.Node, Knowledge]) -> Knowledge:
    """Attention weights sum to one, so a feature of V that is the same for every key comes out unchanged."""
    value_node = arguments(node)["value"]
    fact, shape = _fact(facts, value_node), shape_of(node)
    if fact is None or shape is None or arguments(node).get("dropout_p", 0.0) != 0.0:
        return None
    value = as_double(fact.value)
    uniform = fact.mask().all(-2, keepdim=True) & (value.amax(-2, keepdim=True) == value.amin(-2, keepdim=True))
    first = value[..., :1, :]
    try:
        return Partial(first.expand(shape), uniform.expand(shape))
    except RuntimeError:  # grouped-query attention: fewer value heads than query heads
        repeat = shape[-3] // first.shape[-3]
        return Partial(
            first.repeat_interleave(repeat, -3).expand(shape), uniform.repeat_interleave(repeat, -3).expand(shape)
        )


def _pool(node: fx.Node, facts: dict[fx.Node, Knowledge]) -> Knowledge:
    """Pooling by channel: what is wholly known is evaluated, everything else is left."""
    source_node = node.args[0]
    source = _fact(facts, source_node)
    shape = shape_of(node)
    if source is None or shape is None or len(shape) < 3:
        return None
    channel_dim = len(shape) - (3 if "2d" in operator_name(node) else 2 if "1d" in operator_name(node) else 4)
    if channel_dim < 0:
        return None
    usable = _wholly_known(source, channel_dim, shape[channel_dim])
    view = [1] * len(shape)
    view[channel_dim] = -1
    known_source = torch.where(usable.view(view), as_double(source.value), torch.zeros((), dtype=torch.float64))
    result = _call(node, lambda argument: known_source)
    return Partial(result, usable.view(view).expand(shape)) if isinstance(result, Tensor) else None


_RULES: dict[str, Callable[[fx.Node, dict[fx.Node, Knowledge]], Knowledge]] = {
    "linear": _linear,
    "batch_norm": _batch_norm,
    "_native_batch_norm_legit_no_training": _batch_norm,
    "layer_norm": _layer_norm,
    "native_layer_norm": _layer_norm,
    "group_norm": _layer_norm,
    "matmul": _product,
    "mm": _product,
    "bmm": _product,
    "addmm": _addmm,
    "scaled_dot_product_attention": _attention,
    **dict.fromkeys(CONVOLUTIONS, _convolution),
    **dict.fromkeys(
        (
            f"{kind}{n}d"
            for kind in (
                "max_pool",
                "avg_pool",
                "adaptive_avg_pool",
                "adaptive_max_pool",
                "lp_pool",
                "upsample_bilinear",
                "upsample_bicubic",
            )
            for n in (1, 2, 3)
        ),
        _pool,
    ),
    "upsample_linear1d": _pool,
    "upsample_bilinear2d": _pool,
    "upsample_trilinear3d": _pool,
}
