"""`masked_linear`: y = x (W ∘ mask)ᵀ + b for a dense weight whose mask may be another one at every step.

For training that moves its mask about: the weight and its gradient stay dense tensors, and on a GPU tiles of the mask
that are all zero are skipped, which is found out on the GPU at every call.

    masked_linear              y[n, m]  = sum over k of x[n, k] · W[m, k] · mask[m, k]   + bias[m]
    masked_linear_input_grad   dx[n, k] = sum over m of dy[n, m] · W[m, k] · mask[m, k]
    masked_linear_weight_grad  dW[m, k] = mask[m, k] · sum over n of dy[n, m] · x[n, k]

Numbers of the weight under the mask have no influence at all, NaN and infinities included.
"""

import math
from typing import Any

import torch

from sparse_engine import kernels
from sparse_engine.errors import ShapeError
from sparse_engine.ops import registry
from sparse_engine.ops.sparse_linear import bias_gradient

__all__ = ["explain_masked_linear", "masked_linear"]

_library = torch.library.Library("sparse_engine", "FRAGMENT")


def masked_linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    mask: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    impl: str = "auto",
) -> torch.Tensor:
    """Apply a linear layer through a mask.

    Example:
        >>> mask = torch.tensor([[True, False]])
        >>> masked_linear(torch.tensor([[1.0, 10.0]]), torch.tensor([[2.0, 3.0]]), mask)
        tensor([[2.]])

    Args:
        x: (..., K). weight: (M, K). mask: bool (M, K), True = kept. bias: (M,) or None.
        impl: "auto", or a backend's name ("triton", "torch").

    Returns:
        (..., M). Differentiable in x, weight and bias; the weight's gradient is zero where the mask is. Under autocast
        the product runs in the autocast dtype.

    Raises:
        ShapeError: when sizes do not fit together.
        BackendError: when the backend asked for cannot run the call; it lists every backend and its reasons.
    """
    _check(x, weight, mask, bias)
    if torch.is_autocast_enabled(x.device.type):
        dtype = torch.get_autocast_dtype(x.device.type)
        x, weight, bias = x.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)
    return torch.ops.sparse_engine.masked_linear(x, weight, mask, bias, impl)


def explain_masked_linear(
    x: torch.Tensor, weight: torch.Tensor, mask: torch.Tensor, bias: torch.Tensor | None = None
) -> registry.Explanation:
    """Say which backend `masked_linear` takes for these inputs and why not the others."""
    _check(x, weight, mask, bias)
    return registry.explain("masked_linear", x, weight, mask, bias)


def _check(x: torch.Tensor, weight: torch.Tensor, mask: torch.Tensor, bias: torch.Tensor | None) -> None:
    if weight.dim() != 2 or mask.shape != weight.shape or mask.dtype != torch.bool:
        raise ShapeError(
            f"masked_linear: weight {tuple(weight.shape)} with a mask {mask.dtype} {tuple(mask.shape)}; "
            "a matrix and a bool mask of its shape expected"
        )
    if x.dim() < 1 or x.shape[-1] != weight.shape[1]:
        raise ShapeError(f"masked_linear: input of shape {tuple(x.shape)} for a weight of {tuple(weight.shape)}")
    if bias is not None and tuple(bias.shape) != (weight.shape[0],):
        raise ShapeError(f"masked_linear: bias of shape {tuple(bias.shape)} for {weight.shape[0]} outputs")


# -- op: schema, choice of the backend, shapes, gradients --------------------------------------------------------------

_library.define("masked_linear(Tensor x, Tensor weight, Tensor mask, Tensor? bias, str impl) -> Tensor")
_library.define("masked_linear_input_grad(Tensor grad, Tensor weight, Tensor mask, str impl) -> Tensor")
_library.define("masked_linear_weight_grad(Tensor grad, Tensor x, Tensor mask, str impl) -> Tensor")


def _dispatch(op: str, *inputs: Any) -> torch.Tensor:
    *operands, impl = inputs
    return registry.choose(op, impl, *operands).run(*operands)


for _op in ("masked_linear", "masked_linear_input_grad", "masked_linear_weight_grad"):
    _library.impl(_op, lambda *inputs, _op=_op: _dispatch(_op, *inputs), "CompositeExplicitAutograd")


@torch.library.register_fake("sparse_engine::masked_linear", lib=_library)
def _fake(x, weight, mask, bias, impl):
    return x.new_empty((*x.shape[:-1], weight.shape[0]))


@torch.library.register_fake("sparse_engine::masked_linear_input_grad", lib=_library)
def _fake_input_grad(grad, weight, mask, impl):
    return grad.new_empty((*grad.shape[:-1], weight.shape[1]))


@torch.library.register_fake("sparse_engine::masked_linear_weight_grad", lib=_library)
def _fake_weight_grad(grad, x, mask, impl):
    return grad.new_empty(mask.shape)


def _setup_forward(ctx, inputs, output):
    x, weight, mask, _, ctx.impl = inputs
    wants_x, wants_weight = ctx.needs_input_grad[:2]
    ctx.save_for_backward(x if wants_weight else None, weight if wants_x else None, mask)


def _backward_forward(ctx, grad):
    x, weight, mask = ctx.saved_tensors
    wants_x, wants_weight, _, wants_bias = ctx.needs_input_grad[:4]
    op = torch.ops.sparse_engine
    dx = op.masked_linear_input_grad(grad, weight, mask, ctx.impl) if wants_x else None
    dweight = op.masked_linear_weight_grad(grad, x, mask, ctx.impl) if wants_weight else None
    dbias = bias_gradient(grad) if wants_bias else None
    return dx, dweight, None, dbias, None


def _setup_gradient(ctx, inputs, output):
    first, second, mask, ctx.impl = inputs
    ctx.save_for_backward(first, second, mask)


def _backward_input_grad(ctx, grad):
    # dx = dy (W ∘ mask): linear in both.
    dy, weight, mask = ctx.saved_tensors
    op = torch.ops.sparse_engine
    ddy = op.masked_linear(grad, weight, mask, None, ctx.impl) if ctx.needs_input_grad[0] else None
    dweight = op.masked_linear_weight_grad(dy, grad, mask, ctx.impl) if ctx.needs_input_grad[1] else None
    return ddy, dweight, None, None


def _backward_weight_grad(ctx, grad):
    # dW = (dyᵀ x) ∘ mask: its gradients are products with the incoming gradient as the weight.
    dy, x, mask = ctx.saved_tensors
    op = torch.ops.sparse_engine
    ddy = op.masked_linear(x, grad, mask, None, ctx.impl) if ctx.needs_input_grad[0] else None
    dx = op.masked_linear_input_grad(dy, grad, mask, ctx.impl) if ctx.needs_input_grad[1] else None
    return ddy, dx, None, None


torch.library.register_autograd(
    "sparse_engine::masked_linear", _backward_forward, setup_context=_setup_forward, lib=_library
)
torch.library.register_autograd(
    "sparse_engine::masked_linear_input_grad", _backward_input_grad, setup_context=_setup_gradient, lib=_library
)
torch.library.register_autograd(
    "sparse_engine::masked_linear_weight_grad", _backward_weight_grad, setup_context=_setup_gradient, lib=_library
)

# -- torch: the reference ----------------------------------------------------------------------------------------------


def _why_not_torch(*inputs: torch.Tensor | None) -> list[str]:
    places = sorted({str(tensor.device) for tensor in inputs if tensor is not None})
    kinds = sorted({str(t.dtype) for t in inputs if t is not None and t.is_floating_point()})
    reasons = [f"operands are on different devices: {', '.join(places)}"] if len(places) > 1 else []
    return reasons + ([f"operands have different dtypes: {', '.join(kinds)}"] if len(kinds) > 1 else [])


@registry.register("masked_linear", "torch", why_not=_why_not_torch)
def _torch_forward(x, weight, mask, bias):
    return torch.nn.functional.linear(x, weight.where(mask, 0), bias)


@registry.register("masked_linear_input_grad", "torch", why_not=_why_not_torch)
def _torch_input_grad(grad, weight, mask):
    return grad @ weight.where(mask, 0)


@registry.register("masked_linear_weight_grad", "torch", why_not=_why_not_torch)
def _torch_weight_grad(grad, x, mask):
    count = math.prod(grad.shape[:-1])  # −1 would not do where there are no outputs
    return (grad.reshape(count, grad.shape[-1]).T @ x.reshape(count, x.shape[-1])).where(mask, 0)


# -- triton: tiles that are all zero are skipped -----------------------------------------------------------------------


def _why_not_triton(*inputs: torch.Tensor | None) -> list[str]:
    interpreted = registry.forced("masked_linear") == "triton" and not torch.cuda.is_available()
    wanted = "cpu" if interpreted else "cuda"
    present = [tensor for tensor in inputs if tensor is not None]
    places = sorted({str(tensor.device) for tensor in present if tensor.device.type != wanted})
    if places:
        return [f"operands are on {', '.join(places)}, not on an NVIDIA GPU"]
    floats = {tensor.dtype for tensor in present if tensor.is_floating_point()}
    reasons = kernels.why_not()
    if len(floats) > 1 or not floats <= {torch.float32, torch.float16, torch.bfloat16}:
        reasons.append(
            f"operands are {', '.join(sorted(map(str, floats)))}; one of float32, float16, bfloat16 expected"
        )
    return reasons


@registry.register("masked_linear", "triton", why_not=_why_not_triton)
def _triton_forward(x, weight, mask, bias):
    return kernels.masked_linear(x.detach(), weight.detach(), mask, kernels.tile_lists(mask), bias)


@registry.register("masked_linear_input_grad", "triton", why_not=_why_not_triton)
def _triton_input_grad(grad, weight, mask):
    return kernels.masked_input_gradient(grad.detach(), weight.detach(), mask, kernels.tile_lists(mask))


@registry.register("masked_linear_weight_grad", "triton", why_not=_why_not_triton)
def _triton_weight_grad(grad, x, mask):
    return kernels.masked_weight_gradient(grad.detach(), x.detach(), mask, kernels.tile_lists(mask))
