"""`LowPrecisionLinear`: a linear layer for inference whose weight is stored in bfloat16 or int8."""

from collections.abc import Sequence
from typing import Any, Self

import torch
from torch import float32, nn

from sparse_engine.nn.convert import _ignored, _move_hooks, _replace, _shared_parameters
from sparse_engine.nn.layers import SparseLinear, pruned_weight
from sparse_engine.ops import native
from sparse_engine.ops.low_precision import _FEW_ROWS, LowPrecisionWeight, layer_of, low_precision_linear

__all__ = ["LowPrecisionLinear", "lower_precision_"]


class LowPrecisionLinear(nn.Module):
    """`nn.Linear` with a weight in bfloat16 or int8, dense or sparse, for inference at small batches.

    Example:
        >>> layer = LowPrecisionLinear.from_layer(nn.Linear(256, 128), "int8")
        >>> layer(torch.randn(1, 256)).shape
        torch.Size([1, 128])

    The weight cannot be trained; its tensors are buffers, so they are saved, loaded and moved with the module.

    Attributes:
        in_features, out_features: K and M.
        precision: "bf16" or "int8".
        bias: nn.Parameter (M,) or None.
    """

    bias: nn.Parameter | None

    def __init__(self, weight: LowPrecisionWeight, bias: nn.Parameter | None = None) -> None:
        """Make a layer of a rounded weight.

        Args:
            weight: (M, K).
            bias: (M,) or None.
        """
        super().__init__()
        self.out_features, self.in_features = weight.shape
        self.precision = weight.precision
        for name in ("values", "scales", "row_ptr", "cols"):
            self.register_buffer(name, getattr(weight, name))
        self.register_parameter("bias", bias)
        self._native: Any = None

    @classmethod
    def from_layer(
        cls,
        layer: nn.Linear | SparseLinear,
        precision: str = "int8",
        mask: torch.Tensor | None = None,
        *,
        sparse: bool | None = None,
    ) -> Self:
        """Round the weight of a linear layer.

        Args:
            layer: dense or sparse; its bias Parameter is shared.
            precision: "bf16" or "int8".
            mask: bool (M, K), True = kept; by default what the layer keeps, or everything but exact zeros.
            sparse: whether to keep a pattern; by default where that reads less.

        Raises:
            SparseEngineError: for an unknown precision, or a weight with NaN or infinity in int8.
        """
        if isinstance(layer, SparseLinear):
            packed = layer.packed()
            weight = LowPrecisionWeight.from_dense(packed.with_bias(None), precision, mask, sparse=sparse)
        else:
            dense, found = pruned_weight(layer)
            weight = LowPrecisionWeight.from_dense(dense, precision, found if mask is None else mask, sparse=sparse)
        return cls(weight, layer.bias)

    @property
    def low_precision_weight(self) -> LowPrecisionWeight:
        """The rounded weight; it shares this layer's memory."""
        shape = (self.out_features, self.in_features)
        return LowPrecisionWeight(self.precision, shape, self.values, self.scales, self.row_ptr, self.cols)

    @property
    def weight(self) -> torch.Tensor:
        """The rounded weight as a dense float32 tensor, made anew on each access."""
        return self.low_precision_weight.to_dense()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map (..., in_features) to (..., out_features), in x's dtype: float32 or bfloat16."""
        bias = self.bias
        if (
            not torch.compiler.is_compiling()
            and native.is_plain_input(x)
            and x.is_contiguous()
            and x.shape[-1:] == (self.in_features,)
            and 0 < x.numel() <= _FEW_ROWS * self.in_features
            and (bias is None or (bias.dtype is float32 and bias.is_cpu and bias.is_contiguous()))
            and not (torch.is_grad_enabled() and (x.requires_grad or (bias is not None and bias.requires_grad)))
        ):
            layer = self._native or self._build()
            if layer is not None:
                y = torch.empty((*x.shape[:-1], self.out_features), dtype=float32)
                rows, pointer = x.numel() // self.in_features, 0 if bias is None else bias.data_ptr()
                layer.forward(x.data_ptr(), self.in_features, rows, y.data_ptr(), self.out_features, pointer)
                return y
        return low_precision_linear(x, self.low_precision_weight, bias)

    def _build(self) -> Any:
        if self.values.device.type == "cpu":
            self._native = layer_of(self.low_precision_weight)
        return self._native

    def _apply(self, fn: Any, recurse: bool = True) -> Self:
        # `.half()` and the like are for the bias: the scales belong to the stored integers.
        scales = self.scales
        super()._apply(fn, recurse)
        if scales is not None:
            self.scales = scales.to(self.values.device)
        if self.precision == "bf16" and self.values.dtype != torch.bfloat16:
            self.values = self.values.to(torch.bfloat16)
        self._native = None
        return self

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *rest: Any) -> None:
        for name in ("values", "row_ptr", "cols"):  # another checkpoint may keep another number of weights
            own, new = getattr(self, name), state_dict.get(prefix + name)
            if own is not None and new is not None and own.dtype == new.dtype and own.shape != new.shape:
                setattr(self, name, torch.empty_like(new, device=own.device))
        super()._load_from_state_dict(state_dict, prefix, *rest)
        self._native = None

    def __getstate__(self) -> dict[str, Any]:
        # The C++ object cannot be copied; it is built anew when next needed.
        return {**self.__dict__, "_native": None}

    def extra_repr(self) -> str:
        """Describe the layer as `nn.Linear` does, with its precision and sparsity."""
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, "
            f"precision={self.precision}, sparsity={self.low_precision_weight.sparsity:.4f}"
        )


def lower_precision_(
    model: nn.Module, precision: str = "int8", *, ignore: Sequence[str | type[nn.Module]] = ()
) -> list[str]:
    """Replace every `nn.Linear` and `SparseLinear` in a model by a `LowPrecisionLinear`, in place, for inference.

    Example:
        >>> model = nn.Sequential(nn.Linear(256, 128), nn.ReLU(), nn.Linear(128, 10))
        >>> lower_precision_(model, "int8", ignore=["2"])
        ['0']

    Args:
        model: in evaluation mode; a model that is itself such a layer is not replaced.
        precision: "bf16" or "int8".
        ignore: names (with wildcards, or "re:" and a regular expression) and module types that stay.

    Returns:
        The names of the replaced layers. Layers whose weight another module shares stay as they are.

    Raises:
        SparseEngineError: as `LowPrecisionLinear.from_layer`; the model is then unchanged.
    """
    shared = _shared_parameters(model)
    places: dict[nn.Module, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        if name and type(module) in (nn.Linear, SparseLinear) and not _ignored(module, name, ignore):
            weight = module.values if isinstance(module, SparseLinear) else pruned_weight(module)[0]
            if id(weight) not in shared:
                places.setdefault(module, []).append(name)
    made = {module: LowPrecisionLinear.from_layer(module, precision).train(module.training) for module in places}
    for module, layer in made.items():
        _move_hooks(module, layer)
        for name in places[module]:
            _replace(model, name, layer)
    return sorted(name for names in places.values() for name in names)
