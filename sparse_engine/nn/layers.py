"""`SparseLinear` and `SparseConv2d`: drop-in layers whose kept weights are one ordinary 1-D Parameter, `values`."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import float32, nn
from torch.nn import functional
from torch.nn.utils import parametrize

from sparse_engine.errors import FileFormatError, ShapeError, SparseEngineError, StructureError
from sparse_engine.ops import native
from sparse_engine.ops.pattern import Pattern
from sparse_engine.ops.sparse_conv2d import (
    ChannelLists,
    EagerConv2d,
    ListedConv2d,
    channel_lists,
    output_size,
    resolve_padding,
    sparse_conv2d,
)
from sparse_engine.ops.sparse_conv2d import forward_into as conv2d_into
from sparse_engine.ops.sparse_conv2d import memory_format as conv2d_memory_format
from sparse_engine.ops.sparse_conv2d import product as conv2d_product
from sparse_engine.ops.sparse_linear import EagerLinear, sparse_linear
from sparse_engine.ops.sparse_linear import forward_into as linear_into
from sparse_engine.ops.sparse_linear import product as linear_product
from sparse_engine.packed import PackedWeight
from sparse_engine.structure import Structure, Unstructured

__all__ = ["PatternChange", "SparseConv2d", "SparseLayer", "SparseLinear"]


@dataclass(frozen=True)
class PatternChange:
    """Where each value of a changed pattern comes from.

    Example:
        >>> change = layer.set_pattern_(mask)
        >>> change.remap_optimizer_(optimizer, layer.values)

    Attributes:
        source: int64 (new number of values): the old place of each value, or −1 where it is new.
        old_count: number of values before.
    """

    source: torch.Tensor
    old_count: int

    @property
    def new(self) -> torch.Tensor:
        """Bool (new number of values): True where a value was not kept before."""
        return self.source < 0

    @property
    def dropped(self) -> int:
        """How many values are no longer kept."""
        return self.old_count - int((self.source >= 0).sum())

    def remap(self, old: torch.Tensor, fill: float = 0.0) -> torch.Tensor:
        """Bring a tensor that has one entry per old value into the new order; `fill` where a value is new.

        Raises:
            ShapeError: when its length is not the old number of values.
        """
        if old.dim() != 1 or old.shape[0] != self.old_count:
            raise ShapeError(f"got a tensor of shape {tuple(old.shape)}; ({self.old_count},) expected")
        source = self.source.to(old.device)
        if self.old_count == 0:
            return old.new_full((source.numel(),), fill)
        return torch.where(
            source >= 0, old[source.clamp(min=0)], torch.as_tensor(fill, dtype=old.dtype, device=old.device)
        )

    def remap_optimizer_(self, optimizer: torch.optim.Optimizer, values: nn.Parameter) -> None:
        """Bring an optimiser's state for `values` (momentum, second moments) into the new order; new values get 0."""
        state = optimizer.state.get(values)
        if not state:
            return
        for name, old in state.items():
            if isinstance(old, torch.Tensor) and old.dim() == 1 and old.shape[0] == self.old_count and name != "step":
                state[name] = self.remap(old)


class SparseLayer(nn.Module):
    """What `SparseLinear` and `SparseConv2d` share: pattern, values, saving and loading.

    Attributes:
        values: nn.Parameter (number of values,), in the order of the packed weight.
        bias: nn.Parameter (M,) or None.
        structure: what is kept together.
        pattern: the pattern in the form that the ops take.
    """

    values: nn.Parameter
    bias: nn.Parameter | None
    _template: PackedWeight
    _native: native.NativeProduct | None
    _full: bool

    def __setattr__(self, name: str, value: Any) -> None:
        # FSDP2 puts its shards here, frees and refills the whole values' memory around each pass, and does so behind
        # the version counter by which the native products notice new values.
        if name == "values" and hasattr(value, "device_mesh"):
            raise SparseEngineError(
                f"{type(self).__name__}: FSDP2 cannot cut the values of a sparse layer into shards; use "
                "DistributedDataParallel, or densify_ the model and keep its zeros with se.prune.hold_masks"
            )
        super().__setattr__(name, value)

    def _adopt(self, packed: PackedWeight) -> None:
        """Take over another pattern (not its values)."""
        # Values on the meta device take no memory: the template only remembers the pattern in its compact form.
        self._template = packed.with_bias(None).with_values(torch.empty(packed.values.numel(), device="meta"))
        self._pattern = Pattern.from_packed(packed)
        self._native = None

    @property
    def structure(self) -> Structure:
        """What is kept together."""
        return self._template.structure

    @property
    def pattern(self) -> Pattern:
        """The pattern, on the device of the values."""
        return self._pattern

    @property
    def weight(self) -> torch.Tensor:
        """The dense weight, made anew on each access; differentiable in `values`."""
        return self._template.with_values(self.values).to_dense()

    @property
    def mask(self) -> torch.Tensor:
        """Bool tensor of the dense weight's shape, True = kept."""
        return self._template.mask().to(self.values.device)

    @property
    def sparsity(self) -> float:
        """Share of weights removed."""
        return self._template.sparsity

    def packed(self) -> PackedWeight:
        """Return the weight with its bias in packed form; it shares this layer's values."""
        bias = None if self.bias is None else self.bias.detach()
        return self._template.with_values(self.values.detach()).with_bias(bias)

    def set_pattern_(
        self,
        mask: torch.Tensor,
        structure: Structure | str | None = None,
        fill: float | torch.Tensor = 0.0,
    ) -> PatternChange:
        """Keep other weights, without a detour over the dense weight: values kept before and after stay as they are.

        Example:
            >>> layer = SparseLinear.from_dense(nn.Linear(4, 4), torch.eye(4, dtype=torch.bool))
            >>> layer.set_pattern_(torch.ones(4, 4, dtype=torch.bool)).new.sum()
            tensor(12)

        Args:
            mask: bool tensor of the dense weight's shape, True = kept.
            structure: of the new mask; the present structure when it fits, else detected.
            fill: value of the weights that were not kept before: a number, or a dense tensor of the weight's shape to
                read from.

        Returns:
            The change, with which optimiser state is remapped. The Parameter object stays; where the number of values
            stays too (as in RigL), so does its memory. Its gradient is remapped, with zeros for new values.

        Raises:
            StructureError: when the mask does not fit the weight or the structure.
        """
        if tuple(mask.shape) != self._template.shape:
            raise StructureError(f"mask of shape {tuple(mask.shape)} does not fit a weight of {self._template.shape}")
        mask = mask.detach().to("cpu", torch.bool)
        if structure is None:
            try:
                self.structure.check(mask)
                structure = self.structure
            except StructureError:
                structure = None
        # Only the pattern is wanted, so the weight that is packed takes no memory.
        packed = PackedWeight.from_dense(torch.zeros((), dtype=torch.float16).expand(mask.shape), mask, structure)
        change = PatternChange(packed.places_in(self._template), self._template.values.numel())
        values = change.remap(self.values.detach())
        new = change.new.to(values.device)
        if isinstance(fill, torch.Tensor):
            values = torch.where(new, packed.gather(fill.detach().cpu()).to(values), values)
        elif fill:
            inside = packed.gather(torch.ones(packed.shape)).to(values.device).bool()
            values = torch.where(new & inside, torch.as_tensor(fill, dtype=values.dtype, device=values.device), values)
        self._replace_values(values, change)
        self._adopt(packed.with_values(self.values.detach()))
        self._full = False
        return change

    def values_changed_(self) -> Self:
        """Tell the layer that its values were written to behind PyTorch's back.

        Only needed after writing to memory in a way that PyTorch's version counter does not see, and only if few values
        changed: edits through `layer.values.data` that touch all of them are noticed anyway.
        """
        if self._native is not None:
            self._native.forget()
        return self

    def _replace_values(self, values: torch.Tensor, change: PatternChange | None = None) -> None:
        gradient = self.values.grad
        self.values.grad = None
        with torch.no_grad():
            if values.shape == self.values.shape:
                self.values.copy_(values)
            else:
                # While a graph of an earlier step is alive (a loop still holds its loss), PyTorch's node that adds up
                # this Parameter's gradient remembers the old size. It is forgotten where the type changes.
                kept = values.to(self.values)
                self.values.data = kept.new_empty(0, dtype=torch.complex64)
                self.values.data = kept
        if gradient is not None and change is not None:
            self.values.grad = change.remap(gradient)
        elif gradient is not None and gradient.shape == self.values.shape:
            self.values.grad = gradient
        self._native = None

    # -- moving, copying, saving ---------------------------------------------------------------------------------------

    def _apply(self, fn: Any, recurse: bool = True) -> Self:
        super()._apply(fn, recurse)
        if self.values.device.type != "meta":
            self._pattern = self._pattern.to(self.values.device)
        self._native = None
        return self

    def __getstate__(self) -> dict[str, Any]:
        # The C++ object cannot be copied; it is built anew from the pattern when next needed.
        return {**self.__dict__, "_native": None}

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        tensors, meta = self._template.with_values(self.values.detach()).state()
        del tensors["values"]
        destination[prefix + "values"] = self.values if keep_vars else self.values.detach()
        if self.bias is not None:
            destination[prefix + "bias"] = self.bias if keep_vars else self.bias.detach()
        for name, tensor in tensors.items():
            destination[prefix + name] = tensor
        # JSON as bytes, because a state dict that is to be saved as safetensors holds nothing but tensors.
        destination[prefix + "pattern.meta"] = torch.tensor(list(json.dumps(meta).encode()), dtype=torch.uint8)

    def _load_from_state_dict(
        self,
        state_dict: Mapping[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        own = {key[len(prefix) :]: value for key, value in state_dict.items() if key.startswith(prefix)}
        used: set[str] = set()
        try:
            if "pattern.meta" in own:
                used |= self._load_own(own)
            elif "weight" in own or "weight_orig" in own:
                used |= self._load_dense(own)
            else:
                missing_keys.append(prefix + "values")
        except (FileFormatError, StructureError) as error:
            error_msgs.append(f"{prefix[:-1] or type(self).__name__}: {error}")
            used |= set(own)
        if self.bias is not None:
            if "bias" not in own:
                missing_keys.append(prefix + "bias")
            elif tuple(own["bias"].shape) != tuple(self.bias.shape):
                error_msgs.append(f"{prefix}bias: shape {tuple(own['bias'].shape)}, {tuple(self.bias.shape)} expected")
            else:
                with torch.no_grad():
                    self.bias.copy_(own["bias"])
            used.add("bias")
        if strict:
            unexpected_keys.extend(prefix + name for name in own if name not in used)

    def _load_own(self, own: dict[str, torch.Tensor]) -> set[str]:
        try:
            meta = json.loads(bytes(own["pattern.meta"].tolist()).decode())
        except ValueError as error:
            raise FileFormatError(f"pattern.meta is not JSON: {error}") from None
        tensors = {
            name: tensor for name, tensor in own.items() if name.startswith("pattern.") and name != "pattern.meta"
        }
        if "values" not in own or not isinstance(meta, dict):
            raise FileFormatError("values or pattern.meta are missing or damaged")
        packed = PackedWeight.from_state({"values": own["values"].detach(), **tensors}, meta)
        if packed.shape != self._template.shape:
            raise FileFormatError(f"weight of shape {packed.shape} in the state dict, {self._template.shape} expected")
        self._take(packed)
        return {"values", "pattern.meta", *tensors}

    def _load_dense(self, own: dict[str, torch.Tensor]) -> set[str]:
        name = "weight" if "weight" in own else "weight_orig"
        weight, mask = own[name].detach(), own.get("weight_mask")
        if tuple(weight.shape) != self._template.shape:
            raise FileFormatError(f"{name} of shape {tuple(weight.shape)}, {self._template.shape} expected")
        mask = None if mask is None else mask.detach().cpu() != 0
        kept = (weight != 0).cpu() if mask is None else mask
        if mask is None and not self._full and not bool((kept & ~self._template.mask()).any()):
            # The layer's own pattern holds every non-zero: it stays, zeros that were trained to zero included.
            self._replace_values(self._template.gather(weight.cpu()).to(self.values))
        else:
            self._take(PackedWeight.from_dense(weight, kept))
        return {name} | ({"weight_mask"} if mask is not None else set())

    def _take(self, packed: PackedWeight) -> None:
        self._replace_values(packed.values.to(self.values))
        self._adopt(packed.with_values(self.values.detach()))
        self._full = False


class SparseLinear(SparseLayer):
    """`nn.Linear` with a sparse weight.

    Example:
        >>> dense = nn.Linear(256, 128)
        >>> layer = SparseLinear.from_dense(dense, torch.rand(128, 256) < 0.1)
        >>> layer(torch.randn(32, 256)).shape
        torch.Size([32, 128])
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        mask: torch.Tensor | None = None,
        structure: Structure | str | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        """Make a layer with freshly initialised values.

        Args:
            in_features, out_features, bias, device, dtype: as in `nn.Linear`.
            mask: (out_features, in_features), True = kept. Without one everything is kept until a state dict with a
                `weight` or `set_pattern_` says otherwise.
            structure: of the mask; detected when not given.
        """
        super().__init__()
        dense = nn.Linear(in_features, out_features, bias, device=device, dtype=dtype)
        _initialise(self, dense, mask, structure)

    @classmethod
    def from_dense(
        cls, module: nn.Linear, mask: torch.Tensor | None = None, structure: Structure | str | None = None
    ) -> Self:
        """Make a sparse layer from a dense one.

        Args:
            module: its values are copied, its bias Parameter is shared.
            mask: what to keep; without one the mask that `se.prune`, `torch.nn.utils.prune` or `torch.ao.pruning` left
                on the module, or else everything but exact zeros.
            structure: of the mask; detected when not given.

        Raises:
            StructureError: when mask, structure and weight do not fit together.
        """
        layer = cls.__new__(cls)
        nn.Module.__init__(layer)
        _initialise(layer, module, mask, structure, share_bias=True)
        return layer

    def to_dense(self) -> nn.Linear:
        """Return the `nn.Linear` with the same weight, zeros where nothing is kept; the bias Parameter is shared."""
        return _to_dense(self, nn.Linear(self.in_features, self.out_features, False, device="meta"))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map (..., in_features) to (..., out_features)."""
        if not torch.compiler.is_compiling():
            parameters = self._parameters
            values, bias = parameters.get("values"), parameters.get("bias")
            if native.is_plain(x, values, bias) and x.numel() and x.shape[-1] == self.in_features:
                product = self._native or self._build()
                if product is not None:
                    if native.wants_gradient(x, values, bias):
                        return EagerLinear.apply(x, values, bias, self._pattern, product)
                    y = torch.empty((*x.shape[:-1], self.out_features), dtype=float32)
                    linear_into(y, product, x, values, bias)
                    return y
        return sparse_linear(x, self.values, self._pattern, self.bias)

    def _build(self) -> native.NativeProduct | None:
        pattern = self._pattern
        if native.why_not_extension("Linear") or pattern.num_values == 0:
            return None
        self._native = linear_product(pattern.row_ptr, pattern.cols, pattern.rows, pattern.columns, pattern.block)
        return self._native

    def extra_repr(self) -> str:
        """Describe the layer as `nn.Linear` does, with structure and sparsity."""
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, "
            f"structure={self.structure}, sparsity={self.sparsity:.4f}"
        )


class SparseConv2d(SparseLayer):
    """`nn.Conv2d` with a sparse weight; every kernel size, stride, padding, dilation, grouping and padding mode.

    Example:
        >>> dense = nn.Conv2d(16, 32, 3, padding="same")
        >>> layer = SparseConv2d.from_dense(dense, torch.rand(32, 16, 3, 3) < 0.1)
        >>> layer(torch.randn(2, 16, 8, 8)).shape
        torch.Size([2, 32, 8, 8])
    """

    _lists: ChannelLists | None  # made with `_native`

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, int],
        stride: int | tuple[int, int] = 1,
        padding: int | tuple[int, int] | str = 0,
        dilation: int | tuple[int, int] = 1,
        groups: int = 1,
        bias: bool = True,
        padding_mode: str = "zeros",
        *,
        mask: torch.Tensor | None = None,
        structure: Structure | str | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        """Make a layer with fresh values; arguments as in `nn.Conv2d`, `mask` and `structure` as in `SparseLinear`."""
        super().__init__()
        dense = nn.Conv2d(
            in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias, padding_mode, device, dtype
        )
        _initialise(self, dense, mask, structure)

    @classmethod
    def from_dense(
        cls, module: nn.Conv2d, mask: torch.Tensor | None = None, structure: Structure | str | None = None
    ) -> Self:
        """Make a sparse layer from a dense one; arguments as in `SparseLinear.from_dense`."""
        layer = cls.__new__(cls)
        nn.Module.__init__(layer)
        _initialise(layer, module, mask, structure, share_bias=True)
        return layer

    def to_dense(self) -> nn.Conv2d:
        """Return the `nn.Conv2d` with the same weight, zeros where nothing is kept; the bias Parameter is shared."""
        dense = nn.Conv2d(
            self.in_channels,
            self.out_channels,
            self.kernel_size,
            self.stride,
            self.padding,
            self.dilation,
            self.groups,
            False,
            self.padding_mode,
            device="meta",
        )
        return _to_dense(self, dense)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map (N, C, H, W) to (N, M, H', W'), or the same without N."""
        padding: int | tuple[int, ...] | str = self.padding
        if self.padding_mode != "zeros":
            x = functional.pad(x, self._reversed_padding, mode=self.padding_mode)
            padding = 0
        if not torch.compiler.is_compiling():
            parameters = self._parameters
            values, bias = parameters.get("values"), parameters.get("bias")
            if native.is_plain(x, values, bias) and x.dim() == 4 and x.shape[1] == self.in_channels and x.numel():
                product = self._native or self._build()
                size = output_size(x.shape[2], x.shape[3], self.kernel_size, self.stride, self._edges, self.dilation)
                if product is not None and size[0] > 0 and size[1] > 0:
                    if native.wants_gradient(x, values, bias):
                        if self._lists is not None and x.is_contiguous():
                            return ListedConv2d.apply(x, values, bias, self._pattern, self._lists, self._geometry)
                        return EagerConv2d.apply(x, values, bias, self._pattern, product, size, self._geometry)
                    order = conv2d_memory_format(x, product)
                    y = torch.empty((x.shape[0], self.out_channels, *size), dtype=float32, memory_format=order)
                    conv2d_into(y, product, x, values, bias)
                    return y
        return sparse_conv2d(
            x,
            self.values,
            self._pattern,
            self.bias,
            stride=self.stride,
            padding=padding,
            dilation=self.dilation,
            groups=self.groups,
        )

    @property
    def _geometry(self) -> tuple[Any, ...]:
        """The geometry as the op takes it, with the padding that is left to it."""
        pattern = self._pattern
        strides, dilations = list(self.stride), list(self.dilation)
        return list(pattern.shape), strides, self._edges, dilations, self.groups, list(pattern.block)

    def _build(self) -> native.NativeProduct | None:
        pattern = self._pattern
        if native.why_not_extension("Conv2d") or pattern.num_values == 0:
            return None
        self._native = conv2d_product(pattern.row_ptr, pattern.cols, *self._geometry)
        self._lists = channel_lists(self._template, self._geometry)
        return self._native

    def extra_repr(self) -> str:
        """Describe the layer as `nn.Conv2d` does, with structure and sparsity."""
        return (
            f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}, stride={self.stride}, "
            f"padding={self.padding}, "
            f"dilation={self.dilation}, groups={self.groups}, bias={self.bias is not None}, "
            f"padding_mode={self.padding_mode}, structure={self.structure}, sparsity={self.sparsity:.4f}"
        )


_MASKS = "_sparse_engine_masks"  # where prune/masks.py keeps the masks of a module's weights
_LINEAR_ATTRIBUTES = ("in_features", "out_features")
_CONV_ATTRIBUTES = (
    "in_channels",
    "out_channels",
    "kernel_size",
    "stride",
    "padding",
    "dilation",
    "groups",
    "padding_mode",
)


def pruned_weight(module: nn.Module) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Return the weight of a dense layer and the mask that pruning put on it, or None.

    Understands the masks of `se.prune` and `se.prune.set_masks`, `torch.nn.utils.prune` (`weight_orig` and
    `weight_mask`) and `torch.ao.pruning` (a parametrization with a `mask`). A mask says more than the zeros: a kept
    weight may be exactly zero, by its initialisation or for a moment of its training.
    """
    buffers, parameters = module._buffers, module._parameters
    if "weight_orig" in parameters and "weight_mask" in buffers:
        return parameters["weight_orig"], buffers["weight_mask"] != 0
    if parametrize.is_parametrized(module, "weight"):
        steps = module.parametrizations.weight
        masks = [step.mask for step in steps if isinstance(getattr(step, "mask", None), torch.Tensor)]
        if len(steps) == 1 and len(masks) == 1:
            return steps.original, (masks[0] != 0).expand(steps.original.shape)
        return module.weight, None
    own = module.__dict__.get(_MASKS, {}).get("weight")
    return module.weight, None if own is None else own.to(module.weight.device)


def _initialise(
    layer: SparseLayer,
    dense: nn.Module,
    mask: torch.Tensor | None,
    structure: Structure | str | None,
    share_bias: bool = False,
) -> None:
    names = _LINEAR_ATTRIBUTES if isinstance(dense, nn.Linear) else _CONV_ATTRIBUTES
    fresh = not share_bias
    for name in names:
        setattr(layer, name, getattr(dense, name))
    if isinstance(layer, SparseConv2d):
        layer._edges = resolve_padding(
            dense.padding if dense.padding_mode == "zeros" else 0, dense.kernel_size, dense.stride, dense.dilation
        )
        layer._reversed_padding = tuple(dense._reversed_padding_repeated_twice)
    weight, found = pruned_weight(dense)
    kept = found if mask is None else mask
    layer._full = fresh and mask is None
    if kept is None:
        # A fresh layer keeps everything, also a weight that happened to be initialised to zero.
        kept = torch.ones(weight.shape, dtype=torch.bool) if fresh else weight.detach() != 0
        structure = structure or (Unstructured() if fresh else None)
    packed = PackedWeight.from_dense(weight.detach(), kept, structure)
    layer.values = nn.Parameter(packed.values, requires_grad=weight.requires_grad)
    layer._adopt(packed)
    bias = dense.bias
    layer.register_parameter(
        "bias", bias if isinstance(bias, nn.Parameter) or bias is None else nn.Parameter(bias.detach())
    )
    layer.train(dense.training)


def _to_dense(layer: SparseLayer, dense: nn.Module) -> Any:
    weight = layer.weight.detach()
    dense.weight = nn.Parameter(weight, requires_grad=layer.values.requires_grad)
    dense.bias = layer.bias
    return dense.train(layer.training)
