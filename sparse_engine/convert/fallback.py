"""Nodes that call PyTorch for what has no native op.

A fallback node stores the name of one aten overload from a fixed list of functions without side effects or randomness,
and templates of its arguments in which tensors are indices into the node's inputs. It is plain JSON, and the list makes
running a graph from a file harmless: nothing can be named that is not on it.
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

# By overload, the functions that have it: none has side effects or randomness, none a shape that depends on data.
_OVERLOADS: dict[str, str] = {
    "default": """
        _adaptive_avg_pool2d _adaptive_avg_pool3d _log_softmax _softmax _to_copy _unsafe_view abs absolute acos acosh
        adaptive_avg_pool1d adaptive_avg_pool2d adaptive_avg_pool3d adaptive_max_pool1d adaptive_max_pool2d
        adaptive_max_pool3d addbmm addcdiv addcmul addmm addmv addr adjoint alias all amax amin aminmax angle any
        arange arccos arccosh arcsin arcsinh arctan arctan2 arctanh argmax argmin argsort asin asinh atan atan2 atanh
        atleast_1d atleast_2d atleast_3d avg_pool1d avg_pool2d avg_pool3d baddbmm bilinear bitwise_not bmm
        broadcast_tensors broadcast_to cat ceil celu channel_shuffle chunk clamp clamp_max clamp_min clip clone col2im
        column_stack concat concatenate constant_pad_nd contiguous conv1d conv2d conv3d conv_depthwise3d
        conv_transpose1d convolution cos cosh cosine_similarity cross cummax cummin cumprod cumsum deg2rad diag
        diag_embed diagflat diagonal diagonal_scatter diff digamma dist dot dstack einsum elu embedding erf erfc
        erfinv exp exp2 expand expand_as expm1 fix flip fliplr flipud floor floor_divide fmax fmin frac full full_like
        gather gcd gelu ger glu grid_sampler group_norm gru_cell hardshrink hardsigmoid hardswish hardtanh heaviside
        hstack hypot i0 im2col index_add index_reduce index_select inner instance_norm isfinite isinf isnan isneginf
        isposinf kl_div kron kthvalue layer_norm lcm leaky_relu lgamma linalg_cross linalg_matrix_norm linalg_norm
        linalg_vecdot linalg_vector_norm linear log log10 log1p log2 log_sigmoid logaddexp logaddexp2 logcumsumexp
        logical_and logical_not logical_or logical_xor logit logsumexp lstm_cell mH mT masked_scatter matmul matrix_H
        max max_pool1d max_pool2d max_pool2d_with_indices max_pool3d max_pool3d_with_indices maximum mean median
        meshgrid min minimum mish mm mode msort mv nan_to_num nanmean nanmedian nanquantile nansum narrow
        native_group_norm native_layer_norm neg negative new_full new_ones new_zeros nextafter numpy_T ones ones_like
        outer pad pairwise_distance permute pixel_shuffle pixel_unshuffle positive prelu prod quantile rad2deg ravel
        reciprocal reflection_pad1d reflection_pad2d reflection_pad3d relu relu6 repeat replication_pad1d
        replication_pad2d replication_pad3d reshape reshape_as rms_norm roll rot90 round row_stack rsqrt scalar_tensor
        scaled_dot_product_attention scatter_add select_scatter selu sgn sigmoid sign signbit silu sin sinc sinh
        slice_scatter softplus softshrink sort special_airy_ai special_entr special_erf special_erfc special_erfcx
        special_erfinv special_exp2 special_expit special_expm1 special_gammainc special_gammaincc special_gammaln
        special_i0 special_i0e special_i1 special_i1e special_log1p special_log_ndtr special_log_softmax special_logit
        special_logsumexp special_ndtr special_ndtri special_psi special_round special_sinc special_softmax
        special_xlog1py special_xlogy split split_with_sizes sqrt square squeeze stack std std_mean sum swapaxes
        swapdims t take take_along_dim tan tanh tensordot threshold tile topk trace tril triu trunc type_as unfold
        unsqueeze upsample_bicubic2d upsample_bilinear2d upsample_linear1d upsample_nearest1d upsample_nearest2d
        upsample_nearest3d upsample_trilinear3d var var_mean vdot view view_as vstack where zero zeros zeros_like
    """,
    "Tensor": """
        add bitwise_and bitwise_left_shift bitwise_or bitwise_right_shift bitwise_xor bucketize clamp clamp_max
        clamp_min clip copysign div divide eq fill fmod frexp ge greater gt index ldexp le lerp less lt masked_fill
        mul multiply narrow ne remainder rsub searchsorted slice split sub subtract true_divide xlogy
    """,
    "Scalar": """
        add bitwise_and bitwise_or bitwise_xor bucketize copysign div divide eq fill float_power floor_divide fmod ge
        greater gt le lerp less lt masked_fill mul multiply ne norm pow remainder rsub searchsorted sub subtract
        true_divide where
    """,
    "dim": "all any max mean median min nanmedian squeeze std std_mean var var_mean",
    "Scalar_Tensor": """
        bitwise_and bitwise_left_shift bitwise_or bitwise_right_shift bitwise_xor isin linspace remainder
    """,
    "int": "log_softmax moveaxis movedim select softmax transpose unbind unflatten",
    "vec": """
        upsample_bicubic2d upsample_bilinear2d upsample_linear1d upsample_nearest1d upsample_nearest2d
        upsample_nearest3d upsample_trilinear3d
    """,
    "Tensor_Scalar": "bitwise_left_shift bitwise_right_shift float_power isin linspace pow",
    "dtype": "addmm baddbmm bmm mm to view",
    "input": "conv_transpose2d conv_transpose3d gru lstm rnn_relu rnn_tanh",
    "Tensor_Tensor": "float_power isin linspace pow",
    "a": "mH mT matrix_H numpy_T",
    "correction": "std std_mean var var_mean",
    "Sequence": "atleast_1d atleast_2d atleast_3d",
    "dims": "all any squeeze",
    "other": "max min to",
    "padding": "conv1d conv2d conv3d",
    "Scalar_mode": "div divide",
    "Tensor_mode": "div divide",
    "other_scalar": "special_xlog1py special_xlogy",
    "scalar": "nanquantile quantile",
    "self_scalar": "special_xlog1py special_xlogy",
    "stable": "argsort sort",
    "ScalarOpt_dim": "norm",
    "ScalarOpt_dim_dtype": "norm",
    "ScalarOpt_dtype": "norm",
    "ScalarOther": "where",
    "ScalarSelf": "where",
    "Scalar_Other": "xlogy",
    "Scalar_Self": "xlogy",
    "Tensor_hacked_twin": "index",
    "decimals": "round",
    "device": "to",
    "dim_IntList": "sum",
    "dim_int": "prod",
    "dtype_layout": "to",
    "indexing": "meshgrid",
    "indices": "tensor_split",
    "int_Scalar": "index_fill",
    "int_Tensor": "index_fill",
    "intlist": "moveaxis",
    "ord_str": "linalg_norm",
    "prim_Device": "to",
    "prim_dtype": "to",
    "prim_other": "to",
    "reduce": "scatter",
    "sections": "tensor_split",
    "self": "where",
    "self_Tensor": "repeat_interleave",
    "self_int": "repeat_interleave",
    "sizes": "split",
    "src": "scatter",
    "start": "arange",
    "start_step": "arange",
    "sublist": "einsum",
    "tensor_indices_or_sections": "tensor_split",
    "two": "scatter_reduce",
    "using_ints": "flatten",
    "value": "scatter",
    "value_reduce": "scatter",
}


def _overloads() -> frozenset[str]:
    """The targets that this PyTorch has."""
    return frozenset(
        f"aten.{name}.{overload}"
        for overload, names in _OVERLOADS.items()
        for name in names.split()
        if hasattr(torch.ops.aten, name) and overload in getattr(torch.ops.aten, name).overloads()
    )


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
        try:
            inputs = [
                torch.empty(
                    shape_at(graph.values[name].shape, batch),
                    dtype=DTYPES[graph.values[name].dtype],
                    device="meta",
                )
                for name in node.inputs
            ]
            args, kwargs = _decode_call(attrs, inputs, batch)
            results = _flat(function(*args, **kwargs))
        except GraphError:
            raise
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
