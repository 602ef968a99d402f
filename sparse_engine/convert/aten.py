"""How each aten call becomes native ops.

A handler gets the builder and the call and returns the stand-in(s) of the result. It raises NotNative, with the reason,
where the call's arguments are outside of what the native ops do; the call then becomes a fallback node.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from sparse_engine.convert.capture import Builder, Call, NotNative, Ref
from sparse_engine.convert.graph import DTYPES, FLOATING, Dim, Size, is_int, size_to_json
from sparse_engine.convert.schema import broadcast

Handler = Callable[[Builder, Call], Any]
HANDLERS: dict[str, Handler] = {}

IGNORED = frozenset(
    {
        torch.ops.aten._assert_async.msg,
        torch.ops.aten._assert_scalar.default,
        torch.ops.aten.sym_constrain_range_for_size.default,
        torch.ops.aten.sym_constrain_range.default,
        torch.ops.aten._assert_tensor_metadata.default,
        operator.ge,
        operator.le,
        operator.eq,
    }
)


def handles(*names: str) -> Callable[[Handler], Handler]:
    """Register a handler for aten overloads."""

    def register(handler: Handler) -> Handler:
        for name in names:
            HANDLERS[f"aten.{name}"] = handler
        return handler

    return register


# ---- linear operators


@handles("conv2d.default", "conv2d.padding", "conv1d.default", "conv1d.padding", "convolution.default")
def _convolution(builder: Builder, call: Call) -> Ref:
    x, weight, bias = _floating(call["input"]), _constant(call["weight"], "weight"), call["bias"]
    if bias is not None:
        _constant(bias, "bias")
    if call.arguments.get("transposed"):
        raise NotNative("transposed convolutions have no native op")
    spatial = weight.dim() - 2
    if spatial not in (1, 2):
        raise NotNative(f"a convolution over {spatial} dimensions has no native op")
    stride, dilation = _pair(call["stride"], spatial), _pair(call["dilation"], spatial)
    if isinstance(call["padding"], str):
        before, after = [0] * spatial, [0] * spatial
        if call["padding"] == "same":
            for axis in range(spatial):
                total = dilation[axis] * (weight.shape[2 + axis] - 1)
                before[axis], after[axis] = total // 2, total - total // 2
    else:
        before = after = _pair(call["padding"], spatial)
    batched = x.rank == spatial + 2
    if not batched:
        x = builder.reshape(x, (1, *x.shape))
    if spatial == 1:  # one row of pixels
        x = builder.reshape(x, (x.shape[0], x.shape[1], 1, x.shape[2]))
        weight, stride, dilation = weight.unsqueeze(2), [1, *stride], [1, *dilation]
        before, after = [0, *before], [0, *after]
    result = builder.emit(
        "conv2d",
        [x],
        {"weight": weight, "bias": bias},
        stride=stride,
        padding=[*before, *after],
        dilation=dilation,
        groups=call["groups"],
        activation=None,
    )
    return builder.reshape(result, call.shape)


@handles("linear.default")
def _linear(builder: Builder, call: Call) -> Ref:
    if isinstance(call["weight"], Ref) or isinstance(call["bias"], Ref):
        raise NotNative("its weight is computed from the input")
    return _emit_linear(builder, call["input"], call["weight"], call["bias"])


@handles("addmm.default")
def _addmm(builder: Builder, call: Call) -> Ref:
    if call["beta"] != 1 or call["alpha"] != 1:
        raise NotNative("beta or alpha is not 1")
    bias, weight = _constant(call["self"], "bias"), _constant(call["mat2"], "weight")
    return _emit_linear(builder, call["mat1"], weight.t(), bias)


@handles("matmul.default", "mm.default", "bmm.default")
def _matmul(builder: Builder, call: Call) -> Ref:
    a, b = call["self"], call.arguments.get("other", call.arguments.get("mat2"))
    if isinstance(b, Tensor) and b.dim() == 2 and isinstance(a, Ref) and a.rank >= 2:
        return _emit_linear(builder, a, b.t(), None)
    a, b = _floating(builder.ref(a)), _floating(builder.ref(b))
    if a.rank < 2 or b.rank < 2:
        raise NotNative("a product with a vector has no native op")
    return builder.emit("matmul", [a, b])


@handles("scaled_dot_product_attention.default")
def _attention(builder: Builder, call: Call) -> Ref:
    query, key, value = (_floating(builder.ref(call[name])) for name in ("query", "key", "value"))
    if call["dropout_p"] or call["enable_gqa"]:
        raise NotNative("dropout and grouped queries have no native op")
    inputs = [query, key, value]
    mask = call["attn_mask"]
    if isinstance(mask, Tensor) and mask.dtype == torch.bool:
        mask = torch.zeros(mask.shape, dtype=DTYPES[query.dtype]).masked_fill(~mask, -math.inf)
    if mask is not None:
        inputs.append(_floating(builder.ref(mask)))
    if not is_int(query.shape[-1]):
        raise NotNative("the head size depends on the batch size")
    scale = call["scale"] if call["scale"] is not None else 1 / math.sqrt(query.shape[-1])
    return builder.emit("attention", inputs, scale=float(scale), causal=bool(call["is_causal"]))


# ---- normalisation


@handles("batch_norm.default", "_native_batch_norm_legit_no_training.default")
def _batch_norm(builder: Builder, call: Call) -> Any:
    x = _floating(call["input"])
    if call.arguments.get("training"):
        raise NotNative("batch norm with the statistics of the input (training mode or track_running_stats=False)")
    mean, variance = _constant(call["running_mean"], "mean"), _constant(call["running_var"], "variance")
    # In double precision: these two vectors stand for four.
    scale = (variance.double() + call["eps"]).rsqrt()
    if call["weight"] is not None:
        scale = scale * _constant(call["weight"], "weight").double()
    shift = -mean.double() * scale
    if call["bias"] is not None:
        shift = shift + _constant(call["bias"], "bias").double()
    dtype = DTYPES[x.dtype]
    result = builder.emit("affine", [x], {"scale": scale.to(dtype), "shift": shift.to(dtype)}, axis=1, activation=None)
    return result if call.target == "aten.batch_norm.default" else (result, None, None)


@handles("layer_norm.default", "native_layer_norm.default")
def _layer_norm(builder: Builder, call: Call) -> Any:
    params = {role: _maybe_constant(call[role], role) for role in ("weight", "bias")}
    result = builder.emit(
        "layer_norm", [_floating(call["input"])], params, dims=len(call["normalized_shape"]), eps=float(call["eps"])
    )
    return result if call.target == "aten.layer_norm.default" else (result, None, None)


@handles("group_norm.default")
def _group_norm(builder: Builder, call: Call) -> Ref:
    params = {role: _maybe_constant(call[role], role) for role in ("weight", "bias")}
    return builder.emit(
        "group_norm", [_floating(call["input"])], params, groups=call["num_groups"], eps=float(call["eps"])
    )


@handles("instance_norm.default")
def _instance_norm(builder: Builder, call: Call) -> Ref:
    x = _floating(call["input"])
    if not call["use_input_stats"]:
        raise NotNative("instance norm with running statistics")
    params = {role: _maybe_constant(call[role], role) for role in ("weight", "bias")}
    return builder.emit("group_norm", [x], params, groups=x.shape[1], eps=float(call["eps"]))


@handles("rms_norm.default")
def _rms_norm(builder: Builder, call: Call) -> Ref:
    x = _floating(call["input"])
    eps = call["eps"] if call["eps"] is not None else torch.finfo(DTYPES[x.dtype]).eps
    dims = list(range(x.rank - len(call["normalized_shape"]), x.rank))
    square = builder.emit("unary", [x], activation={"kind": "square"})
    mean = builder.emit("reduce", [square], kind="mean", dims=dims, keepdim=True)
    factor = builder.emit("unary", [_scalar(builder, mean, "add", eps)], activation={"kind": "rsqrt"})
    result = _binary(builder, "mul", x, factor)
    return result if call["weight"] is None else _binary(builder, "mul", result, _constant(call["weight"], "weight"))


# ---- elementwise


def _unary_handler(kind: str) -> Handler:
    def handler(builder: Builder, call: Call) -> Ref:
        return builder.emit(
            "unary", [_floating(call.arguments.get("self", call.arguments.get("input")))], activation={"kind": kind}
        )

    return handler


# fmt: off
_PLAIN = (
    "relu", "silu", "hardswish", "hardsigmoid", "sigmoid", "tanh", "exp", "sqrt", "rsqrt", "neg", "abs",
    "reciprocal", "square", "log", "erf",
)
# fmt: on
for _kind in _PLAIN:
    handles(f"{_kind}.default")(_unary_handler(_kind))
handles("special_erf.default")(_unary_handler("erf"))


@handles("relu6.default")
def _relu6(builder: Builder, call: Call) -> Ref:
    return _clamp_between(builder, call["self"], 0.0, 6.0)


@handles("hardtanh.default")
def _hardtanh(builder: Builder, call: Call) -> Ref:
    return _clamp_between(builder, call["self"], call["min_val"], call["max_val"])


@handles("clamp.default", "clip.default")
def _clamp(builder: Builder, call: Call) -> Ref:
    return _clamp_between(builder, call["self"], call["min"], call["max"])


@handles("clamp_min.default")
def _clamp_min(builder: Builder, call: Call) -> Ref:
    return _clamp_between(builder, call["self"], call["min"], None)


@handles("clamp_max.default")
def _clamp_max(builder: Builder, call: Call) -> Ref:
    return _clamp_between(builder, call["self"], None, call["max"])


@handles("leaky_relu.default")
def _leaky_relu(builder: Builder, call: Call) -> Ref:
    activation = {"kind": "leaky_relu", "slope": float(call["negative_slope"])}
    return builder.emit("unary", [_floating(call["self"])], activation=activation)


@handles("gelu.default")
def _gelu(builder: Builder, call: Call) -> Ref:
    kind = "gelu_tanh" if call["approximate"] == "tanh" else "gelu"
    return builder.emit("unary", [_floating(call["self"])], activation={"kind": kind})


@handles("elu.default")
def _elu(builder: Builder, call: Call) -> Ref:
    if (call["alpha"], call["scale"], call["input_scale"]) != (1, 1, 1):
        raise NotNative("elu with another alpha or scale than 1")
    return builder.emit("unary", [_floating(call["self"])], activation={"kind": "elu"})


@handles("softplus.default")
def _softplus(builder: Builder, call: Call) -> Ref:
    if (call["beta"], call["threshold"]) != (1, 20):
        raise NotNative("softplus with another beta than 1 or another threshold than 20")
    return builder.emit("unary", [_floating(call["self"])], activation={"kind": "softplus"})


@handles("mish.default")
def _mish(builder: Builder, call: Call) -> Ref:
    x = _floating(call["self"])
    inner = builder.emit("unary", [x], activation={"kind": "softplus"})
    return _binary(builder, "mul", x, builder.emit("unary", [inner], activation={"kind": "tanh"}))


@handles("add.Tensor", "add.Scalar", "sub.Tensor", "sub.Scalar", "rsub.Tensor", "rsub.Scalar")
def _add(builder: Builder, call: Call) -> Ref:
    name = call.target.split(".")[1]
    left, right = call["self"], call["other"]
    if name == "rsub":
        left, right = right, left
    alpha = call["alpha"]
    if alpha != 1:
        if name == "rsub":
            left, right = left, _times(builder, right, alpha)
        else:
            right = _times(builder, right, alpha)
    return _binary(builder, "add" if name == "add" else "sub", left, right)


@handles("mul.Tensor", "mul.Scalar")
def _mul(builder: Builder, call: Call) -> Ref:
    return _binary(builder, "mul", call["self"], call["other"])


@handles("div.Tensor", "div.Scalar", "true_divide.Tensor")
def _div(builder: Builder, call: Call) -> Ref:
    return _binary(builder, "div", call["self"], call["other"])


@handles("maximum.default", "minimum.default", "max.other", "min.other")
def _extreme(builder: Builder, call: Call) -> Ref:
    return _binary(builder, "maximum" if "max" in call.target else "minimum", call["self"], call["other"])


@handles("pow.Tensor_Scalar", "pow.Tensor_Tensor", "pow.Scalar")
def _pow(builder: Builder, call: Call) -> Ref:
    x, exponent = call["self"], call["exponent"]
    special = {2: "square", 0.5: "sqrt", -0.5: "rsqrt", -1: "reciprocal"}
    if isinstance(x, Ref) and isinstance(exponent, (int, float)) and exponent in special:
        return builder.emit("unary", [_floating(x)], activation={"kind": special[exponent]})
    return _binary(builder, "pow", x, exponent)


# ---- pooling and reductions


@handles("max_pool2d.default", "max_pool2d_with_indices.default", "max_pool1d.default")
def _max_pool(builder: Builder, call: Call) -> Any:
    spatial = 1 if "1d" in call.target else 2
    kernel = _pair(call["kernel_size"], spatial)
    stride = _pair(call["stride"], spatial) if call["stride"] else kernel
    padding, dilation = _pair(call["padding"], spatial), _pair(call["dilation"], spatial)
    shape = call.shape if isinstance(call.declared, type(call["self"].value)) else call.declared[0].shape
    result = _pool(
        builder, "max_pool2d", call["self"], kernel, stride, padding, dilation, call["ceil_mode"], True, None, shape
    )
    return (result, None) if "indices" in call.target else result


@handles("avg_pool2d.default", "avg_pool1d.default")
def _avg_pool(builder: Builder, call: Call) -> Ref:
    spatial = 1 if "1d" in call.target else 2
    kernel = _pair(call["kernel_size"], spatial)
    stride = _pair(call["stride"], spatial) if call["stride"] else kernel
    padding = _pair(call["padding"], spatial)
    divisor = call.arguments.get("divisor_override")
    return _pool(
        builder,
        "avg_pool2d",
        call["self"],
        kernel,
        stride,
        padding,
        [1] * spatial,
        call["ceil_mode"],
        call["count_include_pad"],
        divisor,
        call.shape,
    )


@handles("adaptive_avg_pool2d.default", "_adaptive_avg_pool2d.default", "adaptive_avg_pool1d.default")
def _adaptive_avg_pool(builder: Builder, call: Call) -> Ref:
    x, size = _floating(call["self"]), list(call["output_size"])
    if "1d" in call.target:
        x, size = builder.reshape(x, (*x.shape[:-1], 1, x.shape[-1])), [1, *size]
    x = _four_dimensional(builder, x)
    return builder.reshape(builder.emit("adaptive_avg_pool2d", [x], output_size=size), call.shape)


@handles("adaptive_max_pool2d.default")
def _adaptive_max_pool(builder: Builder, call: Call) -> Any:
    x = _floating(call["self"])
    height, width = x.shape[-2:]
    rows, columns = call["output_size"]
    if not (is_int(height) and is_int(width)) or height % rows or width % columns:
        raise NotNative("adaptive max pooling whose windows differ in size")
    kernel = [height // rows, width // columns]
    shape = call.declared[0].shape
    return (_pool(builder, "max_pool2d", x, kernel, kernel, [0, 0], [1, 1], False, True, None, shape), None)


@handles(
    "mean.dim",
    "sum.dim_IntList",
    "amax.default",
    "amin.default",
    "mean.default",
    "sum.default",
    "max.default",
    "min.default",
)
def _reduce(builder: Builder, call: Call) -> Ref:
    x = _floating(call["self"])
    name = call.target.split(".")[1]
    dims = call.arguments.get("dim")
    if dims is None or dims == []:
        dims = list(range(x.rank))
    dims = sorted({_wrap(dim, x.rank) for dim in ([dims] if is_int(dims) else dims)})
    if not dims:
        raise NotNative("a reduction of a scalar")
    kind = {"max": "amax", "min": "amin"}.get(name, name)
    return builder.emit("reduce", [x], kind=kind, dims=dims, keepdim=bool(call.arguments.get("keepdim", False)))


@handles("linalg_vector_norm.default")
def _vector_norm(builder: Builder, call: Call) -> Ref:
    x = _floating(call["self"])
    dims = call["dim"] if call["dim"] is not None else list(range(x.rank))
    dims = sorted({_wrap(dim, x.rank) for dim in ([dims] if is_int(dims) else dims)})
    inner, kind = {1: ("abs", "sum"), 2: ("square", "sum"), math.inf: ("abs", "amax")}.get(call["ord"], ("", ""))
    if not inner or not dims:
        raise NotNative(f"a norm of order {call['ord']}")
    powers = builder.emit("unary", [x], activation={"kind": inner})
    total = builder.emit("reduce", [powers], kind=kind, dims=dims, keepdim=bool(call["keepdim"]))
    return builder.emit("unary", [total], activation={"kind": "sqrt"}) if call["ord"] == 2 else total


@handles("softmax.int", "_softmax.default")
def _softmax(builder: Builder, call: Call) -> Ref:
    x = _floating(call["self"])
    return builder.emit("softmax", [x], dim=_wrap(call["dim"], x.rank))


@handles("log_softmax.int", "_log_softmax.default")
def _log_softmax(builder: Builder, call: Call) -> Ref:
    x = _floating(call["self"])
    dims = [_wrap(call["dim"], x.rank)]
    highest = builder.emit("reduce", [x], kind="amax", dims=dims, keepdim=True)
    centred = _binary(builder, "sub", x, highest)
    total = builder.emit(
        "reduce", [builder.emit("unary", [centred], activation={"kind": "exp"})], kind="sum", dims=dims, keepdim=True
    )
    return _binary(builder, "sub", centred, builder.emit("unary", [total], activation={"kind": "log"}))


# ---- movement


@handles(
    "dropout.default",
    "feature_dropout.default",
    "alpha_dropout.default",
    "clone.default",
    "contiguous.default",
    "detach.default",
    "alias.default",
    "lift_fresh_copy.default",
    "lift_fresh.default",
    "positive.default",
    "_to_copy.default",
    "to.dtype",
    "to.dtype_layout",
    "to.device",
    "to.other",
    "type_as.default",
    "resolve_conj.default",
    "resolve_neg.default",
    "native_dropout.default",
)
def _identity(builder: Builder, call: Call) -> Any:
    x = call.arguments.get("self", call.arguments.get("input"))
    if call.arguments.get("train"):
        raise NotNative("dropout in training mode")
    if call.target == "aten.native_dropout.default":
        return (x, None)
    if not isinstance(x, Ref) or x.value != call.declared:
        raise NotNative("a conversion between dtypes")
    return x


@handles(
    "view.default",
    "reshape.default",
    "_unsafe_view.default",
    "flatten.using_ints",
    "unflatten.int",
    "squeeze.default",
    "squeeze.dim",
    "squeeze.dims",
    "unsqueeze.default",
    "view_as.default",
    "reshape_as.default",
)
def _reshape(builder: Builder, call: Call) -> Ref:
    return builder.reshape(_floating(call["self"]), call.shape)


@handles("permute.default", "movedim.int", "moveaxis.int")
def _permute(builder: Builder, call: Call) -> Ref:
    x = _floating(call["self"])
    if "dims" in call.arguments:
        return builder.permute(x, [_wrap(dim, x.rank) for dim in call["dims"]])
    order = list(range(x.rank))
    order.insert(_wrap(call["destination"], x.rank), order.pop(_wrap(call["source"], x.rank)))
    return builder.permute(x, order)


@handles("transpose.int", "swapaxes.default", "swapdims.default", "t.default", "numpy_T.default", "mT.default")
def _transpose(builder: Builder, call: Call) -> Ref:
    x = _floating(call["self"])
    order = list(range(x.rank))
    if call.target == "aten.numpy_T.default":
        order.reverse()
    elif x.rank >= 2:
        first = _wrap(call.arguments.get("dim0", call.arguments.get("axis0", -2)), x.rank)
        second = _wrap(call.arguments.get("dim1", call.arguments.get("axis1", -1)), x.rank)
        order[first], order[second] = order[second], order[first]
    return builder.permute(x, order)


@handles("expand.default", "expand_as.default", "broadcast_to.default")
def _expand(builder: Builder, call: Call) -> Ref:
    return builder.expand(_floating(builder.ref(call["self"])), call.shape)


@handles("cat.default", "concat.default", "concatenate.default")
def _concat(builder: Builder, call: Call) -> Ref:
    items = [_floating(builder.ref(item)) for item in call["tensors"]]
    # PyTorch lets empty one-dimensional tensors take part in any concatenation.
    items = [item for item in items if item.shape != (0,) or len(call.shape) == 1]
    return builder.emit("concat", items, dim=_wrap(call["dim"], len(call.shape)))


@handles("stack.default")
def _stack(builder: Builder, call: Call) -> Ref:
    items = [_floating(builder.ref(item)) for item in call["tensors"]]
    dim = _wrap(call["dim"], len(call.shape))
    items = [builder.reshape(item, (*item.shape[:dim], 1, *item.shape[dim:])) for item in items]
    return builder.emit("concat", items, dim=dim)


@handles("slice.Tensor", "narrow.default")
def _slice(builder: Builder, call: Call) -> Ref:
    x = _floating(call["self"])
    dim = _wrap(call["dim"], x.rank)
    if x.shape == call.shape and call.arguments.get("step", 1) == 1:
        return x
    size = x.shape[dim]
    if isinstance(size, Dim):
        raise NotNative("slices along the batch dimension have no native op")
    start, step = call["start"] or 0, call.arguments.get("step", 1)
    if "length" in call.arguments:
        start = start + size if start < 0 else start
        return builder.slice(x, dim, start, start + call["length"])
    stop = size if call["end"] is None else call["end"]
    if not is_int(start) or not is_int(stop):
        raise NotNative("a slice whose ends depend on the batch size")
    start, stop, step = slice(start, stop, step).indices(size)
    return builder.slice(x, dim, start, max(start, stop), step)


@handles("select.int")
def _select(builder: Builder, call: Call) -> Ref:
    x = _floating(call["self"])
    dim = _wrap(call["dim"], x.rank)
    return _pick(builder, x, dim, call["index"])


@handles("unbind.int")
def _unbind(builder: Builder, call: Call) -> list[Ref]:
    x = _floating(call["self"])
    dim = _wrap(call["dim"], x.rank)
    return [_pick(builder, x, dim, index) for index in range(len(call.declared))]


@handles(
    "split.Tensor",
    "split.int",
    "split_with_sizes.default",
    "chunk.default",
    "split.sizes",
    "tensor_split.sections",
    "tensor_split.indices",
    "unsafe_split.Tensor",
    "unsafe_chunk.default",
)
def _split(builder: Builder, call: Call) -> list[Ref]:
    x = _floating(call["self"])
    dim = _wrap(call["dim"], x.rank)
    if isinstance(x.shape[dim], Dim):
        raise NotNative("splits along the batch dimension have no native op")
    pieces, start = [], 0
    for piece in call.declared:
        pieces.append(builder.slice(x, dim, start, start + piece.shape[dim]))
        start += piece.shape[dim]
    return pieces


@handles("pad.default", "constant_pad_nd.default")
def _pad(builder: Builder, call: Call) -> Ref:
    x, pad = _floating(call["self"]), list(call["pad"])
    if call.arguments.get("mode", "constant") != "constant":
        raise NotNative(f"padding with mode '{call['mode']}' has no native op")
    if not all(is_int(amount) for amount in pad):
        raise NotNative("a padding that depends on the batch size")
    for index, amount in enumerate(pad):
        if amount < 0:  # a negative padding crops
            dim = x.rank - 1 - index // 2
            size = x.shape[dim]
            if isinstance(size, Dim):
                raise NotNative("slices along the batch dimension have no native op")
            x = builder.slice(x, dim, 0 if index % 2 else -amount, size + amount if index % 2 else size)
            pad[index] = 0
    if not any(pad):
        return x
    return builder.emit("pad", [x], pad=pad, value=float(call["value"] or 0.0))


@handles("roll.default")
def _roll(builder: Builder, call: Call) -> Ref:
    x = _floating(call["self"])
    shifts, dims = _pair(call["shifts"], None), _pair(call["dims"], None)
    if not dims:
        raise NotNative("a roll of the flattened tensor")
    for shift, dim in zip(shifts, dims, strict=True):
        dim = _wrap(dim, x.rank)
        size = x.shape[dim]
        if isinstance(size, Dim) or not is_int(shift):
            raise NotNative("rolls along the batch dimension have no native op")
        shift = shift % size if size else 0
        if shift:
            tail, head = builder.slice(x, dim, size - shift, size), builder.slice(x, dim, 0, size - shift)
            x = builder.emit("concat", [tail, head], dim=dim)
    return x


@handles("channel_shuffle.default", "native_channel_shuffle.default")
def _channel_shuffle(builder: Builder, call: Call) -> Ref:
    x, groups = _floating(call["self"]), call["groups"]
    batch, channels, *rest = x.shape
    split = builder.reshape(x, (batch, groups, channels // groups, *rest))
    order = [0, 2, 1, *range(3, split.rank)]
    return builder.reshape(builder.permute(split, order), x.shape)


@handles("pixel_shuffle.default")
def _pixel_shuffle(builder: Builder, call: Call) -> Ref:
    x, factor = _floating(call["self"]), call["upscale_factor"]
    if x.rank != 4:
        raise NotNative("pixel shuffle of a tensor without batch dimension")
    batch, channels, height, width = x.shape
    split = builder.reshape(x, (batch, channels // factor**2, factor, factor, height, width))
    return builder.reshape(builder.permute(split, [0, 1, 4, 2, 5, 3]), call.shape)


@handles("pixel_unshuffle.default")
def _pixel_unshuffle(builder: Builder, call: Call) -> Ref:
    x, factor = _floating(call["self"]), call["downscale_factor"]
    if x.rank != 4:
        raise NotNative("pixel unshuffle of a tensor without batch dimension")
    batch, channels, height, width = x.shape
    split = builder.reshape(x, (batch, channels, height // factor, factor, width // factor, factor))
    return builder.reshape(builder.permute(split, [0, 1, 3, 5, 2, 4]), call.shape)


@handles("upsample_nearest2d.vec", "upsample_nearest2d.default")
def _upsample_nearest(builder: Builder, call: Call) -> Ref:
    x = _floating(call.arguments.get("input", call.arguments.get("self")))
    batch, channels, height, width = x.shape
    out_height, out_width = call.shape[2:]
    if (
        not all(is_int(size) for size in (height, width, out_height, out_width))
        or out_height % height
        or out_width % width
    ):
        raise NotNative("nearest upsampling by a factor that is not whole")
    rows, columns = out_height // height, out_width // width
    split = builder.reshape(x, (batch, channels, height, 1, width, 1))
    return builder.reshape(builder.expand(split, (batch, channels, height, rows, width, columns)), call.shape)


@handles("repeat.default", "tile.default")
def _repeat(builder: Builder, call: Call) -> Ref:
    x = _floating(call["self"])
    repeats = call.arguments.get("repeats", call.arguments.get("dims"))
    if not all(is_int(count) for count in repeats):
        raise NotNative("a number of repeats that depends on the batch size")
    rank = max(x.rank, len(repeats))
    repeats = [1] * (rank - len(repeats)) + list(repeats)
    shape = (1,) * (rank - x.rank) + x.shape
    split: list[Size] = []
    wide: list[Size] = []
    for size, count in zip(shape, repeats, strict=True):
        split += [1, size]
        wide += [count, size]
    if all(count == 1 for count in repeats):
        return builder.reshape(x, call.shape)
    return builder.reshape(builder.expand(builder.reshape(x, split), wide), call.shape)


@handles(
    "new_zeros.default",
    "new_ones.default",
    "new_full.default",
    "zeros_like.default",
    "ones_like.default",
    "full_like.default",
)
@handles("zeros.default", "ones.default", "full.default")
def _filled(builder: Builder, call: Call) -> Any:
    """A tensor that holds one number: its contents do not depend on the input, only (perhaps) its size does."""
    name = call.target.split(".")[1]
    number = 0 if "zeros" in name else 1 if "ones" in name else call["fill_value"]
    if not isinstance(number, (bool, int, float)):
        raise NotNative("a fill value that is computed from the input")
    shape, dtype = call.shape, DTYPES[call.declared.dtype]
    if all(is_int(size) for size in shape):
        return torch.full(shape, number, dtype=dtype)
    small = torch.full([1] * len(shape), number, dtype=dtype)
    return builder.expand(_floating(builder.ref(small)), shape)


# ---- helpers


def _emit_linear(builder: Builder, x: Any, weight: Tensor, bias: Tensor | None) -> Ref:
    x = _floating(builder.ref(x))
    if bias is not None and tuple(bias.shape) != (weight.shape[0],):
        bias = bias.expand(weight.shape[0]) if bias.numel() == 1 else bias
    return builder.emit("linear", [x], {"weight": weight, "bias": bias}, activation=None)


def _binary(builder: Builder, kind: str, left: Any, right: Any) -> Ref:
    """An elementwise op on any mix of tensors, 0-d constants and numbers."""
    left, right = _number_or_tensor(left), _number_or_tensor(right)
    if isinstance(right, float):
        return _scalar(builder, left, kind, right)
    if isinstance(left, float):
        return _scalar(builder, right, kind, left, reverse=True)
    left, right = builder.ref(left), builder.ref(right)
    _floating(left), _floating(right)
    broadcast(left.shape, right.shape)
    return builder.emit("binary", [left, right], kind=kind, activation=None)


def _scalar(builder: Builder, x: Any, kind: str, value: float, reverse: bool = False) -> Ref:
    return builder.emit("scalar", [_floating(x)], kind=kind, value=float(value), reverse=reverse)


def _number_or_tensor(item: Any) -> Any:
    if isinstance(item, (Ref, Dim)):
        if isinstance(item, Dim):
            raise NotNative("arithmetic with the batch size")
        return item
    if isinstance(item, Tensor):
        return float(item) if item.dim() == 0 else item
    if isinstance(item, (bool, int, float)):
        return float(item)
    raise NotNative(f"arithmetic with {type(item).__name__}")


def _times(builder: Builder, item: Any, alpha: float) -> Any:
    return item * alpha if isinstance(item, (int, float, Tensor)) else _scalar(builder, item, "mul", alpha)


def _clamp_between(builder: Builder, x: Any, low: Any, high: Any) -> Ref:
    bounds = [None if bound is None or math.isinf(bound) else float(bound) for bound in (low, high)]
    if bounds == [0.0, None]:
        return builder.emit("unary", [_floating(x)], activation={"kind": "relu"})
    return builder.emit("unary", [_floating(x)], activation={"kind": "clamp", "min": bounds[0], "max": bounds[1]})


def _pool(
    builder: Builder,
    op: str,
    x: Any,
    kernel: list[int],
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    ceil_mode: bool,
    count_include_pad: bool,
    divisor: int | None,
    shape: Sequence[Size],
) -> Ref:
    x = _floating(x)
    if len(kernel) == 1:  # one row of pixels
        x = builder.reshape(x, (*x.shape[:-1], 1, x.shape[-1]))
        kernel, stride, padding, dilation = [1, *kernel], [1, *stride], [0, *padding], [1, *dilation]
    result = builder.emit(
        op,
        [_four_dimensional(builder, x)],
        kernel=kernel,
        stride=stride,
        padding=[*padding, *padding],
        dilation=dilation,
        ceil_mode=bool(ceil_mode),
        count_include_pad=bool(count_include_pad),
        divisor=divisor,
    )
    return builder.reshape(result, shape)


def _four_dimensional(builder: Builder, x: Ref) -> Ref:
    return builder.reshape(x, (1, *x.shape)) if x.rank == 3 else x


def _pick(builder: Builder, x: Ref, dim: int, index: Any) -> Ref:
    size = x.shape[dim]
    if isinstance(size, Dim):
        raise NotNative("an index along the batch dimension has no native op")
    if not is_int(index):
        raise NotNative("an index that depends on the batch size")
    index = index + size if index < 0 else index
    piece = builder.slice(x, dim, index, index + 1)
    return builder.reshape(piece, (*x.shape[:dim], *x.shape[dim + 1 :]))


def _floating(item: Any) -> Ref:
    if not isinstance(item, Ref):
        raise NotNative("its input is a constant")
    if item.dtype not in FLOATING:
        raise NotNative(f"its input has dtype {item.dtype}; native ops compute in float32")
    return item


def _constant(item: Any, role: str) -> Tensor:
    if not isinstance(item, Tensor):
        raise NotNative(f"its {role} is computed from the input")
    return item


def _maybe_constant(item: Any, role: str) -> Tensor | None:
    return None if item is None else _constant(item, role)


def _wrap(dim: int, rank: int) -> int:
    return dim + rank if dim < 0 else dim


def _pair(data: Any, count: int | None) -> list[int]:
    items = [data] if is_int(data) else list(data)
    if count is not None and len(items) == 1:
        items = items * count
    if not all(is_int(item) for item in items):
        raise NotNative("an attribute that depends on the batch size")
    return items


__all__ = ["HANDLERS", "IGNORED", "handles", "size_to_json"]
