"""ZerO: a deterministic initialisation of zeros and ones (arXiv 2110.12661)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .masks import PRUNABLE


def hadamard(size: int) -> Tensor:
    """The Sylvester-Hadamard matrix, ``size`` a power of two: entries ±1, rows orthogonal."""
    matrix = torch.ones(1, 1)
    while matrix.shape[0] < size:
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)])
    return matrix


def zero_matrix(outputs: int, inputs: int) -> Tensor:
    """ZerO's matrix [m, n]: a partial identity where m ≤ n, else ``I_{m×p} · (H_p / √p) · I_{p×n}``, p the next power
    of two of m.

    Example::

        zero_matrix(2, 3)       # [[1, 0, 0], [0, 1, 0]]
    """
    if outputs <= inputs:
        return torch.eye(outputs, inputs)
    size = 1 << (outputs - 1).bit_length()
    return (hadamard(size) / size**0.5)[:outputs, :inputs].clone()


@torch.no_grad()
def zero_init_(model: nn.Module) -> nn.Module:
    """Initialise every linear and convolution layer with ZerO: matrices of :func:`zero_matrix`, at the kernel's centre
    for convolutions, biases 0. Norms are left at their usual ones and zeros.

    Example::

        zero_init_(model)

    Grouped convolutions get the matrix of one group's shape in every group.

    Returns:
        The same model.
    """
    for module in model.modules():
        if not isinstance(module, tuple(kind for kind, _ in PRUNABLE)) or isinstance(module, nn.MultiheadAttention):
            continue
        weight = module.weight
        weight.zero_()
        if weight.dim() == 2:
            weight.copy_(zero_matrix(*weight.shape))
        else:
            groups = module.groups
            outputs, inputs = weight.shape[0] // groups, weight.shape[1]
            centre = tuple((size - 1) // 2 for size in weight.shape[2:])
            block = zero_matrix(outputs, inputs)
            weight[(slice(None), slice(None), *centre)] = block.repeat(groups, 1).to(weight)
        if module.bias is not None:
            module.bias.zero_()
    return model
