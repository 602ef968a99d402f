"""The numeric contract of low-precision kernels: never much worse than PyTorch in the same precision, both against
fp64."""

from __future__ import annotations

from collections.abc import Callable

import torch

from tests.helpers import assert_close_to_fp64

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
UNIT = {torch.float32: 2.0**-24, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}


def assert_accurate(
    actual: torch.Tensor,
    function: Callable[..., torch.Tensor],
    *operands: torch.Tensor | None,
    factor: float = 2.0,
    name: str = "output",
) -> None:
    """fp32: within 1e-5 of the fp64 result's scale. 16-bit types: at most `factor` times the error of `function` in
    that type, plus its rounding unit.

    Args:
        actual: what the kernel returned.
        function: the readable reference; run on the operands as they are and on fp64 copies.
        operands: tensors or None, integers are left alone.
    """
    wide = [o.cpu().double() if isinstance(o, torch.Tensor) and o.is_floating_point() else _cpu(o) for o in operands]
    reference = function(*wide)
    if actual.dtype == torch.float32 and not any(
        isinstance(o, torch.Tensor) and o.dtype in (torch.float16, torch.bfloat16) for o in operands
    ):
        assert_close_to_fp64(actual, reference, 1e-5, name)
        return
    assert actual.shape == reference.shape, f"{name} has shape {tuple(actual.shape)}, not {tuple(reference.shape)}"
    if not reference.numel():
        return
    plain = function(*(_cpu(o) for o in operands)).double()
    scale = float(reference.abs().max())
    low = next(o.dtype for o in operands if isinstance(o, torch.Tensor) and o.is_floating_point())
    allowed = factor * float((plain - reference).abs().max()) + UNIT[low] * scale
    worst = float((actual.cpu().double() - reference).abs().max())
    assert worst <= allowed, f"{name}: error {worst:.3g}, allowed {allowed:.3g} (scale {scale:.3g}, {low})"


def _cpu(operand):
    return operand.cpu() if isinstance(operand, torch.Tensor) else operand
