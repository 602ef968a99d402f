"""Help for very sparse networks during training: soft activations and soft skip connections that anneal away.

After :meth:`PostPruning.remove_` the network is the plain one, with the outputs the annealed one had (arXiv
2312.01653).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sparse_engine.errors import SparseEngineError
from sparse_engine.prune.masks import is_sparse_layer


class SoftReLU(nn.Module):
    """``x · σ(β x)``, which is x/2 at β = 0 and ReLU as β → ∞ (β = inf is ReLU exactly).

    Example::

        SoftReLU(beta=1.0)(torch.tensor([-1.0, 1.0]))
    """

    def __init__(self, beta: float = 1.0) -> None:
        super().__init__()
        self.beta = beta

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(x) if self.beta == float("inf") else x * torch.sigmoid(self.beta * x)


class SoftSkip:
    """A shortcut around a layer: its output becomes ``layer(x) + weight · shortcut(x)``; at weight 0 the layer's own.

    The shortcut has no parameters: missing channels are zeros, surplus ones are left out, pixels are averaged where the
    layer strides. It is a hook, so that the layer keeps its name and its place.
    """

    def __init__(self, layer: nn.Module, weight: float = 1.0) -> None:
        self.weight = weight
        self.handle = layer.register_forward_hook(self._add)

    def _add(self, _: nn.Module, inputs: tuple[Tensor, ...], out: Tensor) -> Tensor:
        return out if self.weight == 0 else out + self.weight * _shortcut(inputs[0], out)


class PostPruning:
    """Soft activations and skip connections over a training run.

    Example::

        helpers = PostPruning(model, activations=True, skips=True)
        helpers.set_progress(0.3)            # the share of training done
        helpers.remove_()                    # the plain network again

    ReLU modules become :class:`SoftReLU` with β growing geometrically from ``beta`` to ``final_beta``, then ReLU; the
    linear and convolution layers between the first and the last get a :class:`SoftSkip` with a weight falling linearly
    from 1 to 0. Both are done at progress ``until``. Masks, parameters and their identity are not touched.

    Args:
        model: changed in place until :meth:`remove_`.
        activations, skips: which help.
        until: share of training at which the plain network is reached.
        beta, final_beta: of the soft activations.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        activations: bool = True,
        skips: bool = True,
        until: float = 0.75,
        beta: float = 1.0,
        final_beta: float = 100.0,
    ) -> None:
        if not 0 <= until <= 1:
            raise SparseEngineError(f"until is {until}; it is a share of training, 0..1")
        self.model = model
        self.until = until
        self.beta = beta
        self.final_beta = final_beta
        self.activations: list[tuple[nn.Module, str, nn.Module, SoftReLU]] = []
        self.skips: list[SoftSkip] = []
        if activations:
            for parent, attribute, module in _children(model, nn.ReLU):
                soft = SoftReLU(beta)
                self.activations.append((parent, attribute, module, soft))
                setattr(parent, attribute, soft)
        if skips:
            layers = [m for m in model.modules() if isinstance(m, nn.Linear | nn.Conv2d) or is_sparse_layer(m)]
            attention = {id(c) for m in model.modules() if isinstance(m, nn.MultiheadAttention) for c in m.children()}
            self.skips = [SoftSkip(layer) for layer in layers[1:-1] if id(layer) not in attention]

    def set_progress(self, share: float) -> None:
        """Move β and the skip weight to where they belong at this share of training."""
        done = 1.0 if self.until == 0 else min(1.0, share / self.until)
        for *_, soft in self.activations:
            soft.beta = float("inf") if done >= 1 else self.beta * (self.final_beta / self.beta) ** done
        for skip in self.skips:
            skip.weight = max(0.0, 1.0 - done)

    def remove_(self) -> nn.Module:
        """Put the plain modules back. The outputs change only if the annealing was cut short."""
        for parent, attribute, module, _ in self.activations:
            setattr(parent, attribute, module)
        for skip in self.skips:
            skip.handle.remove()
        self.activations, self.skips = [], []
        return self.model


def _children(model: nn.Module, kinds: type | tuple[type, ...]) -> list[tuple[nn.Module, str, nn.Module]]:
    found, seen = [], set()
    for parent in list(model.modules()):
        for attribute, module in parent.named_children():
            if isinstance(module, kinds) and id(module) not in seen:
                seen.add(id(module))
                found.append((parent, attribute, module))
    return found


def _shortcut(x: Tensor, y: Tensor) -> Tensor:
    if x.dim() == 4 and x.shape[2:] != y.shape[2:]:
        x = F.adaptive_avg_pool2d(x, y.shape[2:])
    channel = 1 if x.dim() in (3, 4) and y.dim() == 4 else x.dim() - 1
    missing = y.shape[channel] - x.shape[channel]
    if missing < 0:
        return x.narrow(channel, 0, y.shape[channel])
    if missing > 0:
        shape = list(x.shape)
        shape[channel] = missing
        return torch.cat([x, x.new_zeros(shape)], channel)
    return x
