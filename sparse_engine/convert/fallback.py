"""Nodes that call PyTorch for what has no native op.

A fallback node stores the name of one aten overload from a fixed list of functions without side effects or randomness, and templates of its arguments in which
tensors are indices into the node's inputs. It is plain JSON, and the list makes running a graph from a file harmless: nothing can be named that is not on it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from sparse_engine.convert.graph import (
    DTYPE_NAMES,
    DTYPES,
    Dim,
    Graph,
    GraphError,
    Node,
    Size,
    format_shape,
    is_int,
    shape_at,
    size_at,
    size_from_json,
    size_to_json,
)

_OVERLOADS: dict[str, str] = {
    "default": """
        abs acos acosh adaptive_avg_pool1d adaptive_avg_pool3d adaptive_max_pool2d addmm alias amax amin aminmax angle argmax argmin argsort asin asinh atan
        atan2 atanh avg_pool1d avg_pool2d avg_pool3d baddbmm bilinear bitwise_not bmm celu channel_shuffle clamp clamp_max clamp_min clone constant_pad_nd
        contiguous conv1d conv2d conv3d conv_transpose1d convolution cos cosh cosine_similarity cross cummax cumprod cumsum deg2rad diagonal diff digamma
        einsum elu embedding erf erfc erfinv exp exp2 expand expm1 fill flip floor fmax fmin frac gather gelu glu group_norm hardshrink hardsigmoid
        hardswish hardtanh hypot instance_norm isfinite isinf isnan layer_norm leaky_relu lerp lgamma linalg_cross linalg_vector_norm linear log log10 log1p
        log2 log_sigmoid logaddexp logaddexp2 logical_and logical_not logical_or logical_xor logsumexp masked_select matmul max max_pool1d
        max_pool2d max_pool3d maximum mean median min minimum mish mm movedim mv nan_to_num neg numpy_T pad permute pixel_shuffle pixel_unshuffle
        positive prelu prod rad2deg reciprocal reflection_pad1d reflection_pad2d reflection_pad3d relu relu6 repeat replication_pad1d replication_pad2d
        replication_pad3d reshape rms_norm roll round rot90 rsqrt scaled_dot_product_attention select selu sigmoid sign silu sin sinc sinh
        slice softplus softshrink split_with_sizes sqrt square squeeze stack std sum t take_along_dim tan tanh tanhshrink threshold topk trace tril triu
        trunc unfold unsqueeze upsample_bicubic2d upsample_bilinear2d upsample_linear1d upsample_nearest1d upsample_nearest2d upsample_nearest3d
        upsample_trilinear3d var view view_as_real where xlogy zeros_like ones_like cat ceil dot outer adaptive_max_pool1d grid_sampler im2col
        col2im log_softmax softmax linalg_norm index_select masked_scatter native_group_norm native_layer_norm _adaptive_avg_pool2d
        _adaptive_avg_pool3d _log_softmax _softmax _to_copy _unsafe_view max_pool2d_with_indices max_pool3d_with_indices norm
        bucketize kron tile repeat_interleave sort arange full zeros ones new_zeros new_ones new_full scalar_tensor slice_scatter select_scatter
        scatter_add index_add prod
    """,
    "Tensor": """
        add bitwise_and bitwise_or bitwise_xor bucketize clamp clamp_max clamp_min div eq floor_divide fmod ge gt index le lt mul ne pow remainder rsub sub
        split expand_as lerp fill isin
    """,
    "Scalar": "add bitwise_and bitwise_or div eq fmod ge gt le lt lerp leaky_relu masked_fill mul ne pow remainder rsub sub where floor_divide",
    "Tensor_mode": "div",
    "Scalar_mode": "div",
    "Tensor_Tensor": "pow isin",
    "Tensor_Scalar": "pow isin",
    "Scalar_Tensor": "pow",
    "int": "select softmax log_softmax transpose split movedim unbind unflatten size repeat_interleave",
    "self_int": "repeat_interleave",
    "dim": "argsort cummax cummin max mean median min squeeze std_mean all any norm logcumsumexp sort",
    "dims": "squeeze any all",
    "dim_IntList": "sum",
    "dim_int": "prod",
    "dim_DimnameList": "",
    "ScalarOpt_dim": "norm",
    "self": "where",
    "start": "arange",
    "start_step": "arange",
    "src": "scatter",
    "value": "scatter",
    "indexing": "meshgrid",
    "correction": "std var std_mean var_mean",
    "input": "conv_transpose2d conv_transpose3d",
    "padding": "conv1d conv2d conv3d",
    "vec": "upsample_bicubic2d upsample_bilinear2d upsample_linear1d upsample_nearest1d upsample_nearest2d upsample_nearest3d upsample_trilinear3d",
    "decimals": "round",
    "dtype": "to",
    "dtype_layout": "to",
    "ScalarSelf": "where",
    "ScalarOther": "where",
    "self_Tensor": "repeat_interleave",
    "stable": "sort argsort",
    "values_stable": "",
    "using_ints": "flatten",
}


def _overloads() -> frozenset[str]:
    found: set[str] = set()
    for overload, names in _OVERLOADS.items():
        for name in names.split():
            packet = getattr(torch.ops.aten, name, None)
            if packet is not None and overload in packet.overloads():
                found.add(f"aten.{name}.{overload}")
    # Scalar-filling of one tensor and masked_fill exist under names that the loop's table does not reach.
    for target in ("aten.masked_fill.Tensor", "aten.all.default", "aten.any.default"):
        _, name, overload = target.split(".")
        if overload in getattr(torch.ops.aten, name).overloads():
            found.add(target)
    return frozenset(found)


TARGETS = _overloads()
_MAX_LIST = 4096


def target_function(target: str) -> Any:
    """The aten overload of an allowed target name; raises GraphError for any other name."""
    if target not in TARGETS:
        raise GraphError(f"the fallback target '{target:.80}' is not one of the {len(TARGETS)} allowed functions")
    _, name, overload = target.split(".")
    return getattr(getattr(torch.ops.aten, name), overload)


def encode(argument: Any, inputs: list[str], name_of: Any) -> Any:
    """An argument of an aten call as a JSON template.

    Args:
        argument: a number, string, None, dtype, dimension, tensor stand-in, or a list of these.
        inputs: names of the tensors so far; new ones are appended.
        name_of: a function from a tensor stand-in to its value name, or None for everything else.

    Raises:
        GraphError: the argument has no JSON form.
    """
    name = name_of(argument)
    if name is not None:
        inputs.append(name)
        return {"tensor": len(inputs) - 1}
    if argument is None or isinstance(argument, (bool, str)) or is_int(argument):
        return argument
    if isinstance(argument, float):
        return argument if math.isfinite(argument) else {"float": str(argument)}
    if isinstance(argument, Dim):
        return {"size": size_to_json(argument)}
    if isinstance(argument, torch.dtype) and argument in DTYPE_NAMES:
        return {"dtype": DTYPE_NAMES[argument]}
    if isinstance(argument, (list, tuple)):
        return [encode(item, inputs, name_of) for item in argument]
    raise GraphError(f"the argument {argument!r:.80} cannot be stored")


def check_fallback(graph: Graph, node: Node) -> None:
    """Refuse a fallback node whose target, templates or declared outputs are not sound."""
    attrs = node.attrs
    if attrs.keys() != {"target", "args", "kwargs"}:
        raise GraphError(f"fallback has the attributes target, args and kwargs, not {sorted(attrs)!r:.80}")
    if (
        not isinstance(attrs["target"], str)
        or not isinstance(attrs["args"], list)
        or not isinstance(attrs["kwargs"], dict)
    ):
        raise GraphError("fallback: target must be a string, args a list, kwargs an object")
    function = target_function(attrs["target"])
    if node.params:
        raise GraphError("fallback has no parameters")
    if not node.outputs:
        raise GraphError("fallback has at least one output")
    # One dry run on tensors without data finds shapes that contradict the declared ones before any memory is taken.
    for batch in (graph.fixed_batch,) if graph.fixed_batch else (2, 3):
        inputs = [
            torch.empty(
                shape_at(graph.values[name].shape, batch), dtype=DTYPES[graph.values[name].dtype], device="meta"
            )
            for name in node.inputs
        ]
        args, kwargs = _decode_call(attrs, inputs, batch)
        try:
            results = _flat(function(*args, **kwargs))
        except NotImplementedError:
            return
        except Exception as error:
            raise GraphError(f"{attrs['target']} does not accept its arguments: {_first_line(error)}") from None
        _check_results(graph, node, results, batch)


def run_fallback(graph: Graph, node: Node, inputs: Sequence[Tensor], batch: int) -> list[Tensor]:
    """Call the node's aten function; raises GraphError with the node's name where PyTorch refuses."""
    function = target_function(node.attrs["target"])
    args, kwargs = _decode_call(node.attrs, inputs, batch)
    try:
        results = _flat(function(*args, **kwargs))
    except Exception as error:
        raise GraphError(f"node '{node.name}': {node.attrs['target']} failed: {_first_line(error)}") from error
    _check_results(graph, node, results, batch)
    return results


def _decode_call(attrs: dict[str, Any], inputs: Sequence[Tensor], batch: int) -> tuple[list[Any], dict[str, Any]]:
    args = [_decode(item, inputs, batch, 0) for item in attrs["args"]]
    return args, {key: _decode(item, inputs, batch, 0) for key, item in attrs["kwargs"].items()}


def _decode(data: Any, inputs: Sequence[Tensor], batch: int, depth: int) -> Any:
    if data is None or isinstance(data, (bool, int, float)):
        return data
    if isinstance(data, str) and len(data) <= 200:
        return data
    if isinstance(data, list) and len(data) <= _MAX_LIST and depth < 4:
        return [_decode(item, inputs, batch, depth + 1) for item in data]
    if isinstance(data, dict) and len(data) == 1:
        ((kind, item),) = data.items()
        if kind == "tensor" and is_int(item) and 0 <= item < len(inputs):
            return inputs[item]
        if kind == "float" and item in ("inf", "-inf", "nan"):
            return float(item)
        if kind == "dtype" and isinstance(item, str) and item in DTYPES:
            return DTYPES[item]
        if kind == "size":
            size: Size = size_from_json(item, "fallback")
            return size_at(size, batch)
    raise GraphError(f"fallback: {data!r:.80} is not an argument template for {len(inputs)} inputs")


def _flat(results: Any) -> list[Tensor]:
    return [results] if isinstance(results, Tensor) else list(results)


def _check_results(graph: Graph, node: Node, results: list[Any], batch: int) -> None:
    if len(results) != len(node.outputs):
        raise GraphError(f"{node.attrs['target']} returns {len(results)} tensors, not {len(node.outputs)}")
    for name, result in zip(node.outputs, results, strict=True):
        declared = graph.values[name]
        shape = shape_at(declared.shape, batch)
        if (
            not isinstance(result, Tensor)
            or tuple(result.shape) != shape
            or DTYPE_NAMES.get(result.dtype) != declared.dtype
        ):
            got = f"{result.dtype}{format_shape(result.shape)}" if isinstance(result, Tensor) else type(result).__name__
            raise GraphError(
                f"{node.attrs['target']} returns {got}, but '{name}' is declared as {declared} (N = {batch})"
            )


def _first_line(error: BaseException) -> str:
    return (str(error) or type(error).__name__).strip().splitlines()[0][:300]
